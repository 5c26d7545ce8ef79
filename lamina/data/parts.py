"""Streams of several parts: one data set's tasks after the other's, and a column for each class that arrives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lamina.data.pictures import hashed
from lamina.data.stream import Split, Stream, Task
from lamina.errors import ConfigError

#: names in a message; with more of them it would be no line any more
_SHOWN = 10


@dataclass(frozen=True)
class JoinedStream(Stream):
    """A stream whose tasks come from several data sets, one data set after the other.

    Attributes:
        parts: the name of each part, and which tasks are its own, from 0.
    """

    parts: Mapping[str, Sequence[int]] = field(default_factory=dict)


def part_names(name: str) -> list[str]:
    """Return the names of a stream's parts, one or more: a plus stands between two, and twice for one in a path.

    >>> part_names("digits+folder:c++"), part_names("folder:a+++digits"), part_names("folder:a++digits")
    (['digits', 'folder:c++'], ['folder:a++', 'digits'], ['folder:a++digits'])

    Raises:
        ConfigError: when there is no name on one side of a plus, or a name comes twice.
    """
    # pairs are taken from the left, and no path holds a NUL
    names = [part.replace("\0", "++") for part in name.replace("++", "\0").split("+")]
    if len(names) > 1 and not all(names):
        raise ConfigError(
            f"stream {name!r} has no name on one side of a plus; it stands between two streams, as in digits+cifar10, "
            "and is written twice in a path, as in folder:a++b"
        )
    for part in names:
        if names.count(part) > 1:
            raise ConfigError(f"stream {name!r} has {part} twice; give each part once")
    return names


def unescaped(path: str) -> str:
    """Return the path that a part's name means.

    >>> unescaped("c++/images")
    'c+/images'
    """
    return path.replace("++", "+")


def shared_out(sizes: Sequence[int], counts: Mapping[str, int]) -> list[list[int]]:
    """Return the number of classes of each task, part by part, from those of all tasks in order.

    >>> shared_out([2, 1, 4], {"a": 3, "b": 4})
    [[2, 1], [4]]

    Args:
        counts: the number of classes of each part, by name.

    Raises:
        ConfigError: when a task would have classes of two parts, or the sizes do not add up.
    """
    borders = np.cumsum(list(counts.values())).tolist()
    ends = np.cumsum(sizes).tolist()
    if not set(borders) <= set(ends) or ends[-1] != borders[-1]:
        said = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ConfigError(
            "stream.tasks must add up to the number of classes of one part after the other, or be a single number, of "
            f"tasks in each; {said}, got {list(sizes)}"
        )
    cuts = [ends.index(border) + 1 for border in borders]
    return [list(sizes[start:end]) for start, end in zip([0, *cuts], cuts, strict=False)]


def refuse_shared(name: str, classes: Mapping[str, Sequence[str]]) -> None:
    """Make sure that no two parts have a class of the same name.

    Args:
        name: of the stream.
        classes: names of the classes of each part.

    Raises:
        ConfigError: when two have; it names the classes.
    """
    met: set[str] = set()
    for part, own in classes.items():
        shared = [each for each in own if each in met]
        if shared:
            more = f" and {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else ""
            raise ConfigError(
                f"stream {name!r}: {part} has classes that a part before it has, too: "
                f"{', '.join(map(repr, shared[:_SHOWN]))}{more}; set stream.duplicates=merge for one column for both, "
                "or rename them"
            )
        met.update(own)


def joined(name: str, streams: Sequence[Stream]) -> JoinedStream:
    """Return the tasks of one stream after those of another, in columns of one classifier.

    Columns are given on first arrival, in the order that the streams have, so those of the second follow all of the
    first. A class whose name has come before, in whichever stream, keeps its column.
    """
    column_of: dict[str, int] = {}
    tasks: list[Task] = []
    parts: dict[str, list[int]] = {}
    shared: set[str] = set()
    for stream in streams:
        before = set(column_of)
        moved = np.full(stream.columns, -1, np.int64)
        for task in stream:
            for own, column in zip(task.classes, task.columns, strict=True):
                moved[column] = column_of.setdefault(own, len(column_of))
                shared |= {own} & before
            tasks.append(_moved(task, moved, len(tasks)))
        parts[stream.name] = list(range(len(tasks) - len(stream), len(tasks)))
    kinds = dict.fromkeys(stream.kind for stream in streams)
    return JoinedStream(
        name=name,
        tasks=tasks,
        order_seed=streams[0].order_seed,
        fingerprint=hashed(
            *(stream.fingerprint for stream in streams),
            *(json.dumps([list(task.classes), list(task.columns)]) for task in tasks),
        ),
        skipped=sum(stream.skipped for stream in streams),
        kind=" and ".join(kinds),
        tested_on=" and ".join(dict.fromkeys(stream.tested_on for stream in streams)),
        details={
            "parts": ", ".join(f"{part} in {_counted(own)}" for part, own in parts.items()),
            **({"shared_classes": len(shared)} if shared else {}),
            **_details(streams),
        },
        parts=parts,
    )


def _moved(task: Task, moved: np.ndarray, index: int) -> Task:
    """Return a task in other columns, `moved[column]` for each, and at another place in the order of tasks."""
    named = sorted((int(moved[column]), name) for name, column in zip(task.classes, task.columns, strict=True))

    def split(own: Split) -> Split:
        return replace(own, columns=moved[own.columns])

    return Task(
        index=index,
        classes=[name for _, name in named],
        columns=[column for column, _ in named],
        train=split(task.train),
        test=split(task.test),
        home=sorted(int(moved[column]) for column in task.home),
    )


def _counted(tasks: Sequence[int]) -> str:
    first, last = tasks[0] + 1, tasks[-1] + 1
    return f"task {first}" if first == last else f"tasks {first} to {last}"


def _details(streams: Sequence[Stream]) -> dict[str, str | int | float]:
    """Return what must be said of the parts: under its own name where it is so of all, else with the part's."""
    details: dict[str, str | int | float] = {}
    for stream in streams:
        for name, value in stream.details.items():
            common = all(other.details.get(name) == value for other in streams)
            details[name if common else f"{name} of {stream.name}"] = value
    return details
