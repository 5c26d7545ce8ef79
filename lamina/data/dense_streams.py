"""Streams whose images have label maps: one task, with a column for each class of the palette."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lamina.data.choosing import USUAL_SHARE
from lamina.data.pictures import Source, hashed
from lamina.data.stream import Split, Stream, Task
from lamina.errors import ConfigError, DataError

#: of `lamina.data.streams.StreamSettings`, those that choose among classes of images
_OF_CLASSES = ("per_class", "test_per_class", "blurry", "domains", "duplicates")


@dataclass(frozen=True)
class DenseSource(Source):
    """A data set whose images have label maps (`LabelledImages`); its classes are the palette."""


def dense_stream(settings: Any, source: DenseSource) -> Stream:
    """Return the stream of a data set whose images have label maps.

    Args:
        settings: a `StreamSettings`.

    Raises:
        ConfigError: when settings are given that choose among images by their class.
        DataError: when there is no image to learn from, or none to test on.
    """
    for name in _OF_CLASSES:
        if getattr(settings, name):
            raise ConfigError(f"stream.{name} chooses images by their class; those of {settings.name} have many each")
    if settings.tasks not in (None, 1, [len(source.classes)]) or settings.classes not in (None, "all"):
        raise ConfigError(
            f"{settings.name} is one task with all of its {len(source.classes)} classes, since an image shows many; "
            f"got tasks={settings.tasks} and classes={settings.classes}"
        )
    train, test = source.train, source.test
    learned, tested = (np.arange(len(part.labels)) for part in (train, test))
    tested_on = "test images"
    if settings.holdout is not None or settings.test_on == "validation":
        last = round((settings.holdout or USUAL_SHARE) * len(learned))
        test, tested_on = train, "held-out training images"
        learned, tested = learned[: len(learned) - last], learned[len(learned) - last :]
    for role, indices in {"training": learned, "test": tested}.items():
        if not len(indices):
            raise DataError(
                f"stream {settings.name!r} has no {role} images; it needs images to learn from and to test on"
            )
    splits = (
        _split(train.opened(learned, settings.skip_broken), learned),
        _split(test.opened(tested, settings.skip_broken), tested),
    )
    names = list(source.classes)
    task = Task(0, names, list(range(len(names))), *splits)
    return Stream(
        name=settings.name,
        tasks=[task],
        order_seed=settings.order_seed,
        fingerprint=_fingerprint(names, splits),
        skipped=len(learned) + len(tested) - sum(map(len, splits)),
        kind="segmentation",
        details={**source.details},
        tested_on=tested_on,
    )


def _split(images: Any, wanted: np.ndarray) -> Split:
    good = np.setdiff1d(wanted, getattr(images, "broken", []))
    return Split(images, good, np.zeros(len(good), np.int64))


def _fingerprint(names: Sequence[str], splits: Sequence[Split]) -> str:
    parts: list[str | np.ndarray] = [json.dumps(list(names))]
    for split in splits:
        parts += [split.images.fingerprint, split.indices]
    return hashed(*parts)
