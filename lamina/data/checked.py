"""What a look at a data set on disk finds, and which of its images such a look tries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

#: images of each half that are read to see whether they can be
SAMPLE = 64


@dataclass
class Checked:
    """What was found.

    Attributes:
        name: of the stream.
        layout: what must lie where.
        roles: images of each role; empty where the data set cannot be read at all.
        classes: how many there are; 0 where it cannot be read.
        split: how it was split, in words.
        wrong: what must be mended before it can be used.
        remarks: what is not as expected, or worth knowing; it can be used all the same.
    """

    name: str
    layout: str
    roles: dict[str, int] = field(default_factory=dict)
    classes: int = 0
    split: str = ""
    wrong: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def sample(count: int) -> np.ndarray:
    """Return the indices of at most SAMPLE of `count` images, from the first to the last, int64.

    >>> sample(3).tolist(), len(sample(1000)), sample(0).tolist()
    ([0, 1, 2], 64, [])
    """
    return np.unique(np.linspace(0, count - 1, SAMPLE).astype(np.int64)) if count else np.zeros(0, np.int64)


def few(names: Sequence[str]) -> str:
    """Return how many names there are, and the first three.

    >>> few(["bee", "ant"])
    "2 ('bee', 'ant')"
    """
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{len(names)} ({shown}{', ...' if len(names) > 3 else ''})"
