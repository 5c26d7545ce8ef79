"""What a confusion matrix of pixels says. Entry [c][k] counts pixels of class c that were taken for class k.

References:
    Long et al., Fully Convolutional Networks for Semantic Segmentation, CVPR 2015, section 5: the four measures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Counts = Sequence[Sequence[float]] | np.ndarray


def class_ious(confusion: Counts) -> list[float | None]:
    """Return for each class the pixels rightly called so, of all that are or were called so.

    None for a class that no pixel has and none was taken for.

    >>> class_ious([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    [0.75, 0.6666666666666666, None]
    """
    counts = np.asarray(confusion, dtype=float)
    right, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    return [float(r / u) if u else None for r, u in zip(right, union, strict=True)]


def mean_iou(confusion: Counts) -> float:
    """Return the mean of `class_ious` over classes that have one; 0 where none has.

    >>> mean_iou([[1, 1], [0, 2]])
    0.5833333333333333
    """
    known = [value for value in class_ious(confusion) if value is not None]
    return float(np.mean(known)) if known else 0.0


def pixel_accuracy(confusion: Counts) -> float:
    """Return the share of pixels that are rightly called.

    >>> pixel_accuracy([[3, 1], [0, 4]])
    0.875
    """
    counts = np.asarray(confusion, dtype=float)
    return float(counts.trace() / max(counts.sum(), 1.0))
