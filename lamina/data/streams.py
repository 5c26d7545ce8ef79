"""From settings to a stream: which classes of which data set arrive in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from lamina.config import Settings
from lamina.data import sources
from lamina.data.choosing import dealt, first_of_each, set_aside, with_labels
from lamina.data.dense_streams import DenseSource, dense_stream
from lamina.data.named import STREAMS as STREAMS, NamedStream as NamedStream, named_stream as named_stream
from lamina.data.parts import joined, part_names, refuse_shared, shared_out
from lamina.data.pictures import Source
from lamina.data.stream import Stream
from lamina.data.tasks import fingerprint_of, in_columns, refuse_empty
from lamina.errors import ConfigError, DataError, unknown


class StreamSettings(Settings):
    """What a stream is made of. None means: as the named stream has it, see STREAMS."""

    name: str = Field(
        description="a name in `lamina list streams`, or folder:PATH, or folder-domains:PATH; or several, A+B"
    )
    tasks: int | list[int] | None = Field(
        default=None,
        description="how many tasks, as equal as can be, larger ones first, in each part of a stream A+B; or the "
        "number of classes of each",
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
    test_on: Literal["test", "validation"] | None = Field(
        default=None,
        description="None is test; validation, for tuning, tests on the data set's own validation images, or else on a "
        "fifth of the training images, and learns from the others alone",
    )
    blurry: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="the share of each class's training images that arrives with other tasks than its own",
    )
    domains: list[str] | None = Field(
        default=None, description="for a stream of domains: which of them, in this order; None is all, in theirs"
    )
    duplicates: Literal["refuse", "merge"] | None = Field(
        default=None,
        description="for a stream A+B: what to do with a class whose name two parts have; None is refuse, merge gives "
        "it one column",
    )
    skip_broken: bool = Field(default=False, description="leave out images that cannot be read")

    @field_validator("domains", mode="before")
    @classmethod
    def _domains_are_names(cls, value: object) -> object:
        names = value if isinstance(value, list) else [None]
        if value is None or (names and all(isinstance(name, str) for name in names) and len({*names}) == len(names)):
            return value
        raise ValueError(f'must be a list of different names, as in ["plain", "noisy"]; got {value!r}')

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks_are_counts(cls, value: object) -> object:
        counts = value if isinstance(value, list) else [value]
        if value is None or (counts and all(type(count) is int and count >= 1 for count in counts)):
            return value
        raise ValueError(f"must be a whole number from 1 up, or a list of them; got {value!r}")


def resolved(settings: StreamSettings) -> StreamSettings:
    """Return the settings, of one part, with what the named stream says in place of every None it has a value for.

    Raises:
        ConfigError: when nobody knows the name.
    """
    values = {"classes": "all", **named_stream(settings.name)[0].values}
    given = {name: value for name, value in settings.model_dump().items() if value is not None}
    return StreamSettings(**(values | given))


def usual_run(name: str) -> dict[str, Any]:
    """Return the settings of runs that a stream has unless others are given; of several parts, what all agree on.

    Raises:
        ConfigError: when nobody knows the name.
    """
    first, *others = (_row(part, name)[0].run for part in part_names(name))
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def build_stream(settings: StreamSettings, data: Path | None = None, *, max_side: int = 256) -> Stream:
    """Build a stream: choose classes and images, put the classes in order, decode what is needed.

    Classes arrive in the order `numpy.random.RandomState(order_seed).permutation(number of classes)`, or, with
    order "pcg64", as `numpy.random.Generator(PCG64(order_seed)).shuffle` leaves them. Columns are given on first
    arrival: to the classes of a task in that order, and a class that comes again keeps its column. A split lists
    its images in the order of the source.

    In a stream of domains every task has all classes. With `blurry`, a task has classes of other tasks among its
    training images, while its test images stay those of the classes that are at home in it.

    In a stream of several parts, A+B, the tasks of B come after those of A, and its columns after all of A's. Settings
    hold for each part as if it were alone.

    Args:
        data: the folder that data sets lie in; None means LAMINA_DATA, or lamina's cache folder.
        max_side: photos of a `folder:` whose short side is longer are kept shrunk to it.

    Raises:
        ConfigError: when the name is unknown, the tasks or domains do not fit what there is, or two parts have a class
            of the same name and `duplicates` is not "merge".
        DataError: when the data set is missing or broken, or a class lacks images, in any domain where it has several.
        StorageError: when decoded images fill the disk.
    """
    parts = _parts(settings, sources.data_root(data), max_side)
    if len(parts) == 1:
        if settings.duplicates is not None:
            raise ConfigError(f"stream.duplicates is for streams of several parts (A+B); {settings.name} is one")
        return _built(parts[0])
    for part in parts:
        if isinstance(part.source, DenseSource):
            raise ConfigError(f"{part.settings.name} has a label for each pixel, so it is no part of another stream")
    if settings.duplicates != "merge":
        refuse_shared(settings.name, {part.settings.name: part.classes for part in parts})
    return joined(settings.name, [_built(part) for part in parts])


@dataclass(frozen=True)
class _Part:
    """A data set and what is taken of it, before anything is decoded.

    Attributes:
        settings: resolved.
        homes: the labels that are at home in each task, in the order of their columns.
    """

    settings: StreamSettings
    source: Source
    homes: list[np.ndarray]

    @property
    def classes(self) -> list[str]:
        """The names of its classes, in the order of the source."""
        count = len(self.source.classes)
        return [self.source.classes[label] for label in np.unique(np.concatenate(self.homes) % count)]


def _parts(settings: StreamSettings, root: Path, max_side: int) -> list[_Part]:
    names = part_names(settings.name)
    rows = [_row(name, settings.name) for name in names]
    own = [resolved(settings.model_copy(update={"name": name})) for name in names]
    found = [_source(row, path, root, max_side) for row, path in rows]
    if len(names) > 1 and isinstance(settings.tasks, list) and not any(source.domains for source in found):
        counts = [len(_kept_labels(len(source.classes), each.classes)) for each, source in zip(own, found, strict=True)]
        sizes = shared_out(settings.tasks, dict(zip(names, counts, strict=True)))
        own = [each.model_copy(update={"tasks": tasks}) for each, tasks in zip(own, sizes, strict=True)]
    return [_Part(each, source, _homes(each, source)) for each, source in zip(own, found, strict=True)]


def _row(name: str, whole: str) -> tuple[NamedStream, str]:
    try:
        return named_stream(name)
    except ConfigError as error:
        # a plus of a path, taken for one between parts, leaves the end of the path
        rule = "; in a path, a plus is written twice, as in folder:a++b" if name != whole and ":" in whole else ""
        raise ConfigError(f"{error}{rule}") from None


def _source(row: NamedStream, path: str, root: Path, max_side: int) -> Source:
    try:
        return row.source(path, root, max_side)
    except DataError as error:
        rule = "; in the name of a stream, ++ stands for one plus of a path" if "+" in path else ""
        raise DataError(f"{error}{rule}") from None


def _built(part: _Part) -> Stream:
    """Return the stream of one part: choose its images, decode what is needed."""
    settings, source, homes = part.settings, part.source, part.homes
    if isinstance(source, DenseSource):
        return dense_stream(settings, source)
    labels = np.sort(np.concatenate(homes))
    if not source.closed:
        refuse_empty(settings.name, "training", source, labels, source.train.labels)
        refuse_empty(settings.name, "test", source, labels, source.test.labels)
    skip = settings.skip_broken
    train_wanted = first_of_each(source.train.labels, labels, settings.per_class)
    test_wanted = first_of_each(source.test.labels, labels, settings.test_per_class)
    tested, tested_on = source.test, "test images"
    if settings.holdout is not None or settings.test_on == "validation":
        tested = source.train
        train_wanted, test_wanted, tested_on = set_aside(
            tested.labels, train_wanted, source.validation, settings.holdout
        )
    train, test = source.train.opened(train_wanted, skip), tested.opened(test_wanted, skip)
    train_good, test_good = np.setdiff1d(train_wanted, train.broken), np.setdiff1d(test_wanted, test.broken)
    if not source.closed:
        refuse_empty(settings.name, "readable training", source, labels, train.labels[train_good])
        refuse_empty(settings.name, "readable test", source, labels, test.labels[test_good])
    if settings.blurry:
        arriving = dealt(train.labels, train_good, homes, settings.blurry, settings.order_seed)
    else:
        arriving = [with_labels(train.labels, train_good, home) for home in homes]
    tasks = in_columns(
        source, homes, train, arriving, test, [with_labels(test.labels, test_good, home) for home in homes]
    )
    kind, details = _kind(settings, source, homes)
    return Stream(
        name=settings.name,
        tasks=tasks,
        order_seed=settings.order_seed,
        fingerprint=fingerprint_of(tasks, train, test),
        skipped=len(train.broken) + len(test.broken),
        kind=kind,
        details={**details, **source.details},
        tested_on=tested_on,
    )


def _homes(settings: StreamSettings, source: Source) -> list[np.ndarray]:
    """Return the labels that are at home in each task, in the order of their columns."""
    kept = _kept_labels(len(source.classes), settings.classes)
    if source.domains:
        return _homes_of_domains(settings, source, kept)
    if settings.domains is not None:
        of_domains = ", ".join(name for name in STREAMS if "-domains" in name)
        raise ConfigError(f"stream.domains is for streams of domains ({of_domains}); {settings.name} is none")
    sizes = _task_sizes(settings, len(kept))
    if settings.blurry and len(sizes) < 2:
        raise ConfigError(
            f"stream.blurry shares classes out between tasks, so there must be two or more; {settings.name} with "
            f"tasks={settings.tasks} has one"
        )
    return np.split(_shuffled(kept, settings), np.cumsum(sizes)[:-1])


def _homes_of_domains(settings: StreamSettings, source: Source, kept: np.ndarray) -> list[np.ndarray]:
    for name, value in {"tasks": settings.tasks, "blurry": settings.blurry}.items():
        if value:
            raise ConfigError(
                f"stream.{name} does not go with a stream of domains, where each domain is a task with all classes; "
                f"{settings.name} has {len(source.domains)}, stream.domains chooses among them; got {name}={value}"
            )
    for name in settings.domains or []:
        if name not in source.domains:
            raise ConfigError(f"stream {settings.name!r}: " + unknown("domain", name, source.domains))
    count = len(source.classes)
    places = [source.domains.index(name) for name in settings.domains or source.domains]
    found = np.concatenate([source.train.labels, source.test.labels])
    chosen = np.isin(found // count, places)
    elsewhere = np.setdiff1d(found[~chosen] % count, found[chosen] % count)  # in domains that were left out alone
    order = _shuffled(np.setdiff1d(kept, elsewhere), settings)
    if not len(order):
        shown = ", ".join(source.domains[place] for place in places)
        raise DataError(f"stream {settings.name!r}: there is no class with images in its domains; got {shown}")
    return [place * count + order for place in places]


def _kind(
    settings: StreamSettings, source: Source, homes: Sequence[np.ndarray]
) -> tuple[str, dict[str, str | int | float]]:
    """Return what kind of stream it is, and what else must be said of it."""
    if source.closed:
        return "transfer", {}
    if source.domains:
        places = [int(home[0]) // len(source.classes) for home in homes]
        return "domain-incremental", {"domains": ", ".join(source.domains[place] for place in places)}
    if settings.blurry:
        return "blurry class-incremental", {"blurry": settings.blurry}
    return "class-incremental", {}


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
