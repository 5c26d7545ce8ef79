"""Tasks from chosen images: which column each class gets, whether one lacks images, what all of it is known by."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from lamina.data.pictures import PixelSet, Source, hashed
from lamina.data.stream import Split, Task
from lamina.errors import DataError


def in_columns(
    source: Source,
    homes: Sequence[np.ndarray],
    train: PixelSet,
    arriving: Sequence[np.ndarray],
    test: PixelSet,
    tested: Sequence[np.ndarray],
) -> list[Task]:
    """Return the tasks, with a column for each class on first arrival, in the order of its home.

    Args:
        homes: for each task, the labels that are at home in it, in the order of their columns.
        arriving, tested: for each task, the indices of its training images and of its test images.
    """
    count = len(source.classes)
    order = dict.fromkeys((np.concatenate(homes) % count).tolist())
    columns: dict[int, int] = {}
    column_of = np.full(count, -1, np.int64)
    tasks = []
    for index, (learned, asked) in enumerate(zip(arriving, tested, strict=True)):
        met = set(((homes[index] if source.closed else train.labels[learned]) % count).tolist())
        for label in order:
            if label in met:
                column_of[label] = columns.setdefault(label, len(columns))
        own = sorted(met, key=columns.__getitem__)
        at_home = sorted({int(column_of[label % count]) for label in homes[index]})
        tasks.append(
            Task(
                index=index,
                classes=[source.classes[label] for label in own],
                columns=[columns[label] for label in own],
                train=Split(train, learned, column_of[train.labels[learned] % count]),
                test=Split(test, asked, column_of[test.labels[asked] % count]),
                home=at_home if len(at_home) < len(own) else (),
            )
        )
    return tasks


def refuse_empty(stream: str, role: str, source: Source, labels: np.ndarray, found: np.ndarray) -> None:
    """Make sure that there is an image of each of `labels` among `found`; DataError names the first one without."""
    empty = np.setdiff1d(labels, found)
    if not len(empty):
        return
    domain, label = divmod(int(empty[0]), len(source.classes))
    name, more = source.classes[label], len(empty) - 1
    if source.domains:
        others = f" (and {more} more such gap{'s' if more > 1 else ''})" if more else ""
        raise DataError(
            f"stream {stream!r}: domain {source.domains[domain]!r} has no {role} image of class {name!r}{others}; each "
            "domain needs images of every class to learn from and to test on: add some, or choose other domains with "
            "stream.domains"
        )
    others = f" (nor do {more} more)" if more else ""
    raise DataError(
        f"stream {stream!r}: class {name!r} has no {role} image{others}; every class needs images to learn from and "
        "images to test on"
    )


def fingerprint_of(tasks: Sequence[Task], train: PixelSet, test: PixelSet) -> str:
    """Return a hash of the images, and of which of them come in which task and column."""
    parts: list[str | np.ndarray] = [train.fingerprint, test.fingerprint]
    for task in tasks:
        parts.append(json.dumps([list(task.classes), list(task.columns)]))
        parts += [task.train.indices, task.train.columns, task.test.indices, task.test.columns]
    return hashed(*parts)
