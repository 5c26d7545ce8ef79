"""What one lesson is made of, and what is left of the lessons before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lamina.data.pictures import hashed
from lamina.data.stream import ImageSet, Split


@dataclass(frozen=True)
class Material:
    """Labelled images for one lesson.

    Attributes:
        images: the source; its labels (n,) count through `names`.
        names: of the classes.
        train, held: (k,), (h,), int64. Indices of the images to learn from, and of those kept aside.
        skipped: images left out because they could not be read.
    """

    images: ImageSet
    names: Sequence[str]
    train: np.ndarray
    held: np.ndarray
    skipped: int = 0

    @property
    def fingerprint(self) -> str:
        """A hash of the images, their classes and which of them are kept aside."""
        return hashed(self.images.fingerprint, *self.names, self.images.labels, self.train, self.held)

    def split(self, indices: np.ndarray, columns: Sequence[int]) -> Split:
        """Return some of the images; `columns` are those of `names`."""
        return Split(self.images, indices, np.asarray(columns, np.int64)[self.images.labels[indices]])


class _Gone:
    """Images that are not there any more."""

    labels, fingerprint = np.zeros(0, np.int64), "gone"

    def __len__(self) -> int:
        return 0

    def image(self, index: int) -> Tensor:
        raise IndexError(index)


#: the images of a task of long ago
GONE = Split(_Gone(), np.zeros(0, np.int64), np.zeros(0, np.int64))
