"""The published slices of VTAB-1K, recomputed from public archives: the order of TensorFlow Datasets is a hash of keys.

A builder gives every example a key, and what is written is sorted by the MD5 of the split's name and the key. So the
first 800 examples can be told from the keys alone. For CIFAR-10 this gives train_16399, train_01680, train_47917, as
its documentation shows; the keys of other data sets are read from their builders and not checked against their files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Slice(NamedTuple):
    """Some examples of a split in its order.

    Attributes:
        split: its name.
        percent: where it starts, of the whole split.
        length: how many; None takes all to the end.
    """

    split: str
    percent: int = 0
    length: int | None = None


@dataclass(frozen=True)
class Published:
    """Which slices to learn from, to choose settings on and to test."""

    train: Slice
    validation: Slice
    test: Slice


def _of_train(percent: int, test: str = "test") -> Published:
    """Return the slices where validation images come from behind a share of the training split."""
    return Published(Slice("train", 0, 800), Slice("train", percent, 200), Slice(test))


_OF_VALIDATION = Published(Slice("train", 0, 800), Slice("validation", 0, 200), Slice("test"))
_FROM_ONE = Published(Slice("train", 0, 800), Slice("train", 60, 200), Slice("train", 80))
_SPRITES = Published(Slice("train", 0, 800), Slice("train", 80, 200), Slice("train", 90))
_NORB = Published(Slice("train", 0, 800), Slice("test", 0, 200), Slice("test", 50))

#: name of the data set -> its slices
SLICES: dict[str, Published] = {
    "cifar100": _of_train(90),
    "dtd": _OF_VALIDATION,
    "flowers102": _OF_VALIDATION,
    "pets": _of_train(80),
    "svhn": _of_train(90),
    "camelyon": _OF_VALIDATION,
    "eurosat": _FROM_ONE,
    "resisc45": _FROM_ONE,
    "clevr-count": _of_train(90, "validation"),
    "clevr-distance": _of_train(90, "validation"),
    "kitti-distance": _OF_VALIDATION,
    "dsprites-location": _SPRITES,
    "dsprites-orientation": _SPRITES,
    "smallnorb-azimuth": _NORB,
    "smallnorb-elevation": _NORB,
}

#: pixel coordinates z of CLEVR's nearest object, metres to KITTI's nearest vehicle; a value at one is still below it
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
#: stands for the distance to a vehicle where there is none
NO_VEHICLE = 1000.0


def in_order(split: str, keys: Sequence[str | int]) -> np.ndarray:
    """Return the positions of examples in the order in which TensorFlow Datasets keeps them, int64.

    >>> in_order("train", range(50_000))[:4].tolist()
    [16399, 1680, 47917, 17307]
    """
    salt = hashlib.md5(split.encode())

    def drawn(position: int) -> bytes:
        digest = salt.copy()
        digest.update(str(keys[position]).encode())
        return digest.digest()

    return np.array(sorted(range(len(keys)), key=drawn), np.int64)


def taken(part: Slice, keys: Sequence[str | int]) -> np.ndarray:
    """Return the positions of the examples of a slice, in order.

    Args:
        keys: of every example of the slice's split.
    """
    start = len(keys) * part.percent // 100
    stop = None if part.length is None else start + part.length
    return in_order(part.split, keys)[start:stop]


def binned(values: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """Return the label of each value: the last of the thresholds, from 0, that is below it.

    >>> binned(np.array([8.0, 8.01, 20.0, 999.5]), KITTI_DISTANCES).tolist()
    [0, 1, 1, 3]
    """
    return np.searchsorted(np.asarray(thresholds), np.asarray(values, np.float32), side="left").astype(np.int64) - 1
