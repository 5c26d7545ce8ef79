"""What a source gives: names of classes and labelled images that are made ready when they are wanted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lamina.data.stream import ImageSet


class Pictures(Protocol):
    """The images of one source in one role, before anything is decoded.

    Attributes:
        labels: (n,), int64. The source's label of each image, from 0.
    """

    labels: np.ndarray

    def opened(self, wanted: np.ndarray, skip_broken: bool) -> PixelSet:
        """Return the images with the indices `wanted` (m,) ready for use; indices stay what they were.

        Raises:
            DataError: when one of them cannot be read and `skip_broken` is false.
        """
        ...


class PixelSet(ImageSet, Protocol):
    """An ImageSet that can also give many images of one size at once.

    Attributes:
        broken: (k,), int64. Indices of the wanted images that could not be read.
    """

    broken: np.ndarray

    def batch(self, indices: np.ndarray) -> Tensor | None:
        """Return images (b, 3, height, width), uint8; None when the set has images of several sizes."""
        ...


@dataclass(frozen=True)
class Source:
    """A data set with names.

    Attributes:
        classes: the name of label 0, 1, ...; each is unique.
        train, test: its images.
        domains: names of the kinds of images in which every class comes again; label d * len(classes) + c is then
            that of class c in domain d. Empty where there is one kind.
        validation: (v,), int64. The training images that the data set itself sets aside for choosing settings.
        closed: whether the data set says which classes there are, so that each has a column even where a small draw of
            training images has none of it.
        details: what a reader of numbers must know of how it was read, by name.
    """

    classes: Sequence[str]
    train: Pictures
    test: Pictures
    domains: Sequence[str] = ()
    validation: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    closed: bool = False
    details: Mapping[str, str | int | float] = field(default_factory=dict)


class ArrayPictures:
    """Images that are an array in memory.

    Args:
        pixels: (n, 3, height, width), uint8.
        labels: (n,), int64.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels = pixels
        self.labels = np.asarray(labels, np.int64)
        self.broken = np.zeros(0, np.int64)
        self.fingerprint = hashed(str(pixels.shape), np.ascontiguousarray(pixels), self.labels)

    def opened(self, wanted: np.ndarray, skip_broken: bool) -> ArrayPictures:
        """Return itself: an array has nothing to decode and nothing broken."""
        return self

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        """Return one image (3, height, width), uint8."""
        return torch.from_numpy(np.array(self.pixels[index]))

    def batch(self, indices: np.ndarray) -> Tensor:
        """Return images (b, 3, height, width), uint8."""
        return torch.from_numpy(self.pixels[indices])


def hashed(*parts: str | np.ndarray) -> str:
    """Hash texts and arrays, in order, to 32 hexadecimal digits.

    >>> hashed("ab", "c") == hashed("a", "bc")
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, str):
            part = np.frombuffer(part.encode(errors="surrogateescape"), np.uint8)
        # the length goes first, so that no two lists of parts run together to the same bytes
        digest.update(part.nbytes.to_bytes(8, "big"))
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()
