"""Streams by name: which classes of which data set arrive in which order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from lamina.config import Settings
from lamina.data import sources
from lamina.data.folder import folder_source
from lamina.data.pictures import PixelSet, Source, hashed
from lamina.data.stream import Split, Stream, Task
from lamina.errors import ConfigError, DataError, unknown


class StreamSettings(Settings):
    """What a stream is made of. None means: as the named stream has it, see STREAMS."""

    name: str = Field(description="a name in `lamina list streams`, or folder:PATH")
    tasks: int | list[int] | None = Field(
        default=None,
        description="how many tasks, as equal as can be, larger ones first; or the number of classes of each",
    )
    order_seed: int = Field(default=1993, ge=0, lt=2**32, description="of the order in which classes arrive")
    order: Literal["legacy", "pcg64"] | None = Field(
        default=None, description="generator that shuffles the classes; None is legacy, pcg64 that of VPT-NSP²'s code"
    )
    classes: Literal["all", "odd", "even"] | None = Field(
        default=None, description="keep all labels, or only odd or even label numbers of the data set"
    )
    per_class: int | None = Field(default=None, ge=1, description="keep so many training images per class")
    test_per_class: int | None = Field(default=None, ge=1, description="keep so many test images per class")
    holdout: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="for tuning: test on this share of the training images, the last of each class",
    )
    skip_broken: bool = Field(default=False, description="leave out images that cannot be read")

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks_are_counts(cls, value: object) -> object:
        counts = value if isinstance(value, list) else [value]
        if value is None or (counts and all(type(count) is int and count >= 1 for count in counts)):
            return value
        raise ValueError(f"must be a whole number from 1 up, or a list of them; got {value!r}")


@dataclass(frozen=True)
class NamedStream:
    """A row of the table of streams.

    Attributes:
        description: one line for people.
        source: from (what follows the colon in the name, root of the data sets, max_side) to the data set.
        values: settings that hold unless others are given.
    """

    description: str
    source: Callable[[str, Path, int], Source]
    values: Mapping[str, Any] = field(default_factory=dict)


def _tiny(parity: str, per_class: int | None) -> NamedStream:
    images = f"the first {per_class}" if per_class else "all 500"
    purpose = "" if parity == "odd" else ", for tuning only"
    return NamedStream(
        f"Tiny-ImageNet, {parity} labels: ten tasks of ten classes, {images} images of each{purpose}",
        lambda path, root, max_side: sources.tiny_imagenet(root),
        {"tasks": 10, "classes": parity} | ({"per_class": per_class} if per_class else {}),
    )


#: name -> how to build it; `folder:PATH` stands for every name that begins with `folder:`
STREAMS: dict[str, NamedStream] = {
    "digits": NamedStream(
        "scikit-learn's handwritten digits, 8 x 8 pixels: five tasks of two classes; needs no files",
        lambda path, root, max_side: sources.digits(),
        {"tasks": 5},
    ),
    "folder:PATH": NamedStream(
        "a folder of images, train/CLASS/* and test/CLASS/* or val/CLASS/*: one task unless told otherwise",
        lambda path, root, max_side: folder_source(Path(path), max_side),
        {"tasks": 1},
    ),
    "cifar10": NamedStream(
        "CIFAR-10, 32 x 32 pixels: five tasks of two classes; downloaded if it is not there",
        lambda path, root, max_side: sources.cifar("cifar10", root),
        {"tasks": 5},
    ),
    "cifar100": NamedStream(
        "CIFAR-100, 32 x 32 pixels: ten tasks of ten classes; downloaded if it is not there",
        lambda path, root, max_side: sources.cifar("cifar100", root),
        {"tasks": 10},
    ),
    "tiny-imagenet": NamedStream(
        "Tiny-ImageNet, 64 x 64 pixels: ten tasks of twenty classes",
        lambda path, root, max_side: sources.tiny_imagenet(root),
        {"tasks": 10},
    ),
    "tiny-odd-10": _tiny("odd", 50),
    "tiny-odd-10-full": _tiny("odd", None),
    "tiny-even-10": _tiny("even", 50),
    "tiny-even-10-full": _tiny("even", None),
}


def named_stream(name: str) -> tuple[NamedStream, str]:
    """Return the row for a stream's name, and the path in the name if it has one.

    Raises:
        ConfigError: when nobody knows the name, or the path is missing.
    """
    kind, _, path = name.partition(":")
    if kind == "folder" or name == "folder:PATH":
        if not path or name == "folder:PATH":
            raise ConfigError(f"stream {name!r} needs the path of a folder, as in folder:photos/birds")
        return STREAMS["folder:PATH"], path
    if name not in STREAMS:
        raise ConfigError(unknown("stream", name, STREAMS))
    return STREAMS[name], ""


def resolved(settings: StreamSettings) -> StreamSettings:
    """Return the settings with what the named stream says in place of every None it has a value for.

    Raises:
        ConfigError: when nobody knows the name.
    """
    values = {"classes": "all", **named_stream(settings.name)[0].values}
    given = {name: value for name, value in settings.model_dump().items() if value is not None}
    return StreamSettings(**(values | given))


def build_stream(settings: StreamSettings, data: Path | None = None, *, max_side: int = 256) -> Stream:
    """Build a stream: choose classes and images, put the classes in order, decode what is needed.

    Classes arrive in the order `numpy.random.RandomState(order_seed).permutation(number of classes)`, or, with
    order "pcg64", as `numpy.random.Generator(PCG64(order_seed)).shuffle` leaves them; the k-th of them has
    column k. A split lists its images in the order of the source.

    Args:
        data: the folder that data sets lie in; None means LAMINA_DATA, or lamina's cache folder.
        max_side: photos of a `folder:` whose short side is longer are kept shrunk to it.

    Raises:
        ConfigError: when the name is unknown, or the tasks do not fit the number of classes.
        DataError: when the data set is missing or broken, or a class lacks images.
        StorageError: when decoded images fill the disk.
    """
    row, path = named_stream(settings.name)
    settings = resolved(settings)
    source = row.source(path, sources.data_root(data), max_side)
    labels = _kept_labels(len(source.classes), settings.classes)
    sizes = _task_sizes(settings, len(labels))
    order = _shuffled(labels, settings)
    classes = {int(label): source.classes[label] for label in labels}
    _refuse_empty(settings.name, "training", classes, source.train.labels)
    _refuse_empty(settings.name, "test", classes, source.test.labels)
    skip = settings.skip_broken
    train_wanted = _first_of_each(source.train.labels, labels, settings.per_class)
    test_wanted = _first_of_each(source.test.labels, labels, settings.test_per_class)
    tested = source.test
    if settings.holdout is not None:
        tested = source.train
        train_wanted, test_wanted = _parted(tested.labels, train_wanted, settings.holdout)
    train, test = source.train.opened(train_wanted, skip), tested.opened(test_wanted, skip)
    train_good, test_good = np.setdiff1d(train_wanted, train.broken), np.setdiff1d(test_wanted, test.broken)
    _refuse_empty(settings.name, "readable training", classes, train.labels[train_good])
    _refuse_empty(settings.name, "readable test", classes, test.labels[test_good])
    tasks = []
    for index, members in enumerate(np.split(order, np.cumsum(sizes)[:-1])):
        columns = np.arange(len(members)) + sum(sizes[:index])
        tasks.append(
            Task(
                index=index,
                classes=[classes[label] for label in members.tolist()],
                columns=columns.tolist(),
                train=_split(train, train_good, members, columns),
                test=_split(test, test_good, members, columns),
            )
        )
    return Stream(
        name=settings.name,
        tasks=tasks,
        order_seed=settings.order_seed,
        fingerprint=_fingerprint(tasks, train, test),
        skipped=len(train.broken) + len(test.broken),
    )


def _kept_labels(count: int, classes: str | None) -> np.ndarray:
    start, step = {"all": (0, 1), "even": (0, 2), "odd": (1, 2)}[classes or "all"]
    return np.arange(start, count, step)


def _shuffled(labels: np.ndarray, settings: StreamSettings) -> np.ndarray:
    if settings.order != "pcg64":
        return labels[np.random.RandomState(settings.order_seed).permutation(len(labels))]
    order = labels.copy()
    np.random.Generator(np.random.PCG64(settings.order_seed)).shuffle(order)
    return order


def _task_sizes(settings: StreamSettings, count: int) -> list[int]:
    """Return how many classes each task has."""
    tasks = settings.tasks
    kept = f"{settings.name} with classes={settings.classes!r} has {count}"
    if isinstance(tasks, list):
        if sum(tasks) != count:
            got = f"{tasks}, in all {sum(tasks)}"
            raise ConfigError(f"stream.tasks must add up to the number of classes; {kept}, got {got}")
        return list(tasks)
    tasks = tasks or 1
    if tasks > count:
        raise ConfigError(f"stream.tasks must be at most the number of classes; {kept}, got {tasks}")
    return [len(part) for part in np.array_split(np.arange(count), tasks)]


def _refuse_empty(stream: str, role: str, classes: Mapping[int, str], found: np.ndarray) -> None:
    present = set(np.unique(found).tolist())
    empty = [name for label, name in classes.items() if label not in present]
    if empty:
        others = f" (nor do {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise DataError(
            f"stream {stream!r}: class {empty[0]!r} has no {role} image{others}; every class needs images to "
            "learn from and images to test on"
        )


def _first_of_each(found: np.ndarray, labels: np.ndarray, count: int | None) -> np.ndarray:
    """Return the sorted indices of the first `count` images of each label in `labels`."""
    return np.sort(np.concatenate([np.flatnonzero(found == label)[:count] for label in labels]))


def _parted(found: np.ndarray, wanted: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Part indices in two: a share of each label's, the last of them and at least one, forms the second part."""
    kept, held = [], []
    for label in np.unique(found[wanted]):
        own = wanted[found[wanted] == label]
        cut = len(own) - max(1, round(share * len(own)))
        kept.append(own[:cut])
        held.append(own[cut:])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held))


def _split(images: PixelSet, good: np.ndarray, members: np.ndarray, columns: np.ndarray) -> Split:
    column = np.full(int(images.labels.max()) + 1, -1, np.int64)
    column[members] = columns
    chosen = good[column[images.labels[good]] >= 0]
    return Split(images=images, indices=chosen.astype(np.int64), columns=column[images.labels[chosen]])


def _fingerprint(tasks: Sequence[Task], train: PixelSet, test: PixelSet) -> str:
    parts: list[str | np.ndarray] = [train.fingerprint, test.fingerprint]
    for task in tasks:
        parts.append(json.dumps([list(task.classes), list(task.columns)]))
        parts += [task.train.indices, task.train.columns, task.test.indices, task.test.columns]
    return hashed(*parts)
