"""Tasks in order: what is learned, when, and which column of the classifier it gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


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


class JoinedImages:
    """The images of several sources, one source after the other; labels go on counting from source to source.

    Args:
        sources: two or more.
    """

    def __init__(self, sources: Sequence[ImageSet]) -> None:
        self.sources = list(sources)
        self.starts = np.cumsum([0, *(len(source) for source in self.sources)])
        labels, above = [], 0
        for source in self.sources:
            labels.append(source.labels + above)
            above = int(labels[-1].max(initial=above - 1)) + 1
        self.labels = np.concatenate(labels)
        self.fingerprint = "+".join(source.fingerprint for source in self.sources)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def image(self, index: int) -> Tensor:
        """Return one image (3, height, width), uint8."""
        place = int(self._places(np.asarray(index)))
        return self.sources[place].image(index - int(self.starts[place]))

    def batch(self, indices: np.ndarray) -> Tensor | None:
        """Return images (b, 3, height, width), uint8; None when they have several sizes or a source gives none so."""
        places = self._places(indices)
        found: dict[int, Tensor] = {}
        for place in np.unique(places).tolist():
            batch = getattr(self.sources[place], "batch", None)
            together = batch(indices[places == place] - self.starts[place]) if batch is not None else None
            if together is None:
                return None
            found[place] = together
        if len({part.shape[1:] for part in found.values()}) != 1:
            return None
        out = torch.empty(len(indices), *next(iter(found.values())).shape[1:], dtype=torch.uint8)
        for place, part in found.items():
            out[torch.from_numpy(places == place)] = part
        return out

    def _places(self, indices: np.ndarray) -> np.ndarray:
        """Return which source each image is of."""
        return np.searchsorted(self.starts, indices, side="right") - 1


class Origin(NamedTuple):
    """Where images of a split come from: another split, and their positions (k,) in it, int64."""

    split: Split
    positions: np.ndarray


@dataclass(frozen=True)
class Split:
    """The images of one task in one role, or of several tasks where old ones are learned from again.

    Attributes:
        images: the source.
        indices: (n,), int64. Which images of the source, in a fixed order.
        columns: (n,), int64. The column of each image's class in the head.
        origins: the splits that the images were taken from, one after the other; whoever has computed something for
            those needs not do so again. Empty where the split stands for itself; `dataclasses.replace` forgets them.
    """

    images: ImageSet
    indices: np.ndarray
    columns: np.ndarray
    origins: tuple[Origin, ...] = field(default=(), init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def first_indices(self) -> np.ndarray:
        """Where each image stands in the source that it was first taken from, (n,), int64.

        The images of several sources have other `indices` together than each source has alone.
        """
        if not self.origins:
            return self.indices
        return np.concatenate([origin.split.first_indices[origin.positions] for origin in self.origins])

    @property
    def dense(self) -> bool:
        """Whether images have label maps, a column for each pixel; see `lamina.data.labelled`."""
        return hasattr(self.images, "mask")

    def take(self, positions: np.ndarray) -> Split:
        """Return the images at some positions (k,), in that order; where they come from is remembered."""
        few = replace(self, indices=self.indices[positions], columns=self.columns[positions])
        return few._from((Origin(self, positions),))

    def _from(self, origins: tuple[Origin, ...]) -> Split:
        object.__setattr__(self, "origins", origins)
        return self

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
        tested_on: which images are tested on, in words.
    """

    name: str
    tasks: Sequence[Task]
    order_seed: int
    fingerprint: str
    skipped: int = 0
    kind: str = "class-incremental"
    details: Mapping[str, str | int | float] = field(default_factory=dict)
    tested_on: str = "test images"

    @property
    def columns(self) -> int:
        """How many columns the head has in the end: classes, each counted once."""
        return 1 + max(column for task in self.tasks for column in task.columns)

    @property
    def dense(self) -> bool:
        """Whether pixels are told apart in place of images."""
        return any(task.train.dense for task in self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def merged(self) -> Task:
        """Return all tasks as one, for the upper bound that sees everything at once."""
        classes: dict[int, str] = {}
        for task in self.tasks:
            classes |= dict(zip(task.columns, task.classes, strict=True))
        return Task(
            index=0,
            classes=[classes[column] for column in sorted(classes)],
            columns=sorted(classes),
            train=mixed([task.train for task in self.tasks]),
            test=mixed([task.test for task in self.tasks]),
        )


def mixed(splits: Sequence[Split]) -> Split:
    """Return the images of one split or more as one, in their order.

    Images of one source keep their indices. Several sources become one, in the order in which they first come.
    """
    filled = [split for split in splits if len(split)]
    if len(filled) < 2:
        return (filled or splits)[0]
    sources = list({id(split.images): split.images for split in filled}.values())
    images: ImageSet = sources[0] if len(sources) == 1 else JoinedImages(sources)
    starts = np.cumsum([0, *(len(source) for source in sources)]).tolist()
    start_of = {id(source): start for source, start in zip(sources, starts, strict=False)}
    whole = Split(
        images,
        np.concatenate([split.indices + start_of[id(split.images)] for split in filled]),
        np.concatenate([split.columns for split in filled]),
    )
    return whole._from(tuple(o for split in filled for o in split.origins or (Origin(split, np.arange(len(split))),)))


def places(labels: Tensor, columns: Sequence[int]) -> Tensor:
    """Return where labels (B,) stand among the columns of a task; -1 for one that is not among them.

    >>> places(torch.tensor([7, 2, 7, 3]), [2, 5, 7])
    tensor([ 2,  0,  2, -1])
    """
    place = torch.full((max(columns) + 1,), -1, device=labels.device)
    place[list(columns)] = torch.arange(len(columns), device=labels.device)
    return place[labels]
