"""Tasks in order: what is learned, when, and which column of the classifier it gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lamina.errors import DataError


class ImageSet(Protocol):
    """Labelled images of one source, decoded on demand.

    Attributes:
        labels: (n,), int64. The source's own label of each image, from 0.
        fingerprint: a hash of what the images are; part of every cache key.
    """

    labels: np.ndarray
    fingerprint: str

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """Return one image (3, height, width), uint8, RGB."""
        ...


@dataclass(frozen=True)
class Split:
    """The images of one task in one role.

    Attributes:
        images: the source.
        indices: (n,), int64. Which images of the source, in a fixed order.
        columns: (n,), int64. The column of each image's class in the head.
    """

    images: ImageSet
    indices: np.ndarray
    columns: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def some(self, count: int) -> Split:
        """Return at most `count` of the images, spread evenly over the order."""
        few = np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64)) if len(self) > count else slice(None)
        return replace(self, indices=self.indices[few], columns=self.columns[few])


@dataclass(frozen=True)
class Task:
    """One stage of a stream.

    Attributes:
        index: from 0.
        classes: names of the task's classes, in the order of their columns.
        columns: the column of each of `classes` in the head; equal for a class met before.
        train, test: its images.
        home: the columns that its test images are of, where classes of other tasks come among its training images;
            empty where it is tested on all of `columns`.
    """

    index: int
    classes: Sequence[str]
    columns: Sequence[int]
    train: Split
    test: Split
    home: Sequence[int] = ()

    @property
    def tested(self) -> list[int]:
        """The columns that its test images are of: what is left to choose from when the task is given."""
        return list(self.home or self.columns)


@dataclass(frozen=True)
class Stream:
    """A named sequence of tasks.

    Attributes:
        name: as on the command line.
        tasks: in order of arrival.
        order_seed: of the order of classes; apart from the seed of training.
        fingerprint: a hash of classes, order, image addresses and sources; a checkpoint names it.
        skipped: images left out because they could not be read.
        kind: of what comes with a new task: other classes, other images of the same classes, or some of both.
        details: what else a reader of numbers must know of it, by name.
    """

    name: str
    tasks: Sequence[Task]
    order_seed: int
    fingerprint: str
    skipped: int = 0
    kind: str = "class-incremental"
    details: Mapping[str, str | int | float] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        """How many columns the head has in the end: classes, each counted once."""
        return 1 + max(column for task in self.tasks for column in task.columns)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def merged(self) -> Task:
        """Return all tasks as one, for the upper bound that sees everything at once."""
        first = self.tasks[0]
        for task in self.tasks:
            if task.train.images is not first.train.images:
                raise DataError(f"stream {self.name!r} has several sources; its tasks cannot be merged into one")
        classes: dict[int, str] = {}
        for task in self.tasks:
            classes |= dict(zip(task.columns, task.classes, strict=True))
        return Task(
            index=0,
            classes=[classes[column] for column in sorted(classes)],
            columns=sorted(classes),
            train=_concatenated([task.train for task in self.tasks]),
            test=_concatenated([task.test for task in self.tasks]),
        )


def _concatenated(splits: Sequence[Split]) -> Split:
    return replace(
        splits[0],
        indices=np.concatenate([split.indices for split in splits]),
        columns=np.concatenate([split.columns for split in splits]),
    )


def places(labels: Tensor, columns: Sequence[int]) -> Tensor:
    """Return where labels (B,) stand among the columns of a task; -1 for one that is not among them.

    >>> places(torch.tensor([7, 2, 7, 3]), [2, 5, 7])
    tensor([ 2,  0,  2, -1])
    """
    place = torch.full((max(columns) + 1,), -1, device=labels.device)
    place[list(columns)] = torch.arange(len(columns), device=labels.device)
    return place[labels]
