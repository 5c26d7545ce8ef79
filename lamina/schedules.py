"""Learning-rate factors as functions of progress in [0, 1): no state, so nothing to save or resume."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


class Moment(float):
    """The share of training that is over before a step, which also knows how many steps there are.

    >>> moment = Moment(3, 12)
    >>> moment == 0.25, moment.steps
    (True, 12)
    """

    steps: int

    def __new__(cls, step: int, steps: int) -> Moment:
        self = super().__new__(cls, step / steps)
        self.steps = steps
        return self


def constant(progress: float) -> float:
    """Keep the learning rate.

    >>> constant(0.7)
    1.0
    """
    return 1.0


def steps_down(at: tuple[float, ...], by: float) -> Schedule:
    """Multiply the learning rate by `by` at each milestone.

    >>> [round(steps_down((0.5, 0.8), 0.1)(p), 3) for p in (0.0, 0.49, 0.5, 0.9)]
    [1.0, 1.0, 0.1, 0.01]
    """
    return lambda progress: by ** sum(progress >= milestone for milestone in at)


def cosine(floor: float = 0.0) -> Schedule:
    """Let the learning rate fall from 1 to `floor` along half a cosine.

    >>> [round(cosine()(p), 3) for p in (0.0, 0.5, 1.0)]
    [1.0, 0.5, 0.0]
    """
    return lambda progress: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def by_epoch(schedule: Schedule, epochs: int) -> Schedule:
    """Let a schedule act once an epoch: all steps of an epoch have what its first one has.

    >>> [round(by_epoch(cosine(), 2)(p), 3) for p in (0.0, 0.49, 0.5, 0.99)]
    [1.0, 1.0, 0.5, 0.5]
    """
    return lambda progress: schedule(_epoch(progress, epochs) / epochs)


def _epoch(progress: float, epochs: int) -> int:
    return math.floor(progress * epochs + 1e-9)  # a step that begins an epoch may be a rounding error before it


def cosine_by_epoch(epochs: int) -> Schedule:
    """Let the learning rate fall along a cosine, once an epoch, from 1 to cos(99 pi / 200) in the last one.

    One epoch alone keeps the learning rate.

    >>> [round(cosine_by_epoch(3)(p), 4) for p in (0.0, 0.3, 0.34, 0.67, 0.99)]
    [1.0, 1.0, 0.7126, 0.0157, 0.0157]
    >>> cosine_by_epoch(1)(0.9)
    1.0
    """

    def factor(progress: float) -> float:
        return math.cos(99 / 200 * math.pi * _epoch(progress, epochs) / max(epochs - 1, 1))

    return factor


def warmed(part: float, factor: float, schedule: Schedule) -> Schedule:
    """Begin with a factor of the learning rate for a part of training, and go through a schedule in the rest of it.

    >>> [round(warmed(0.2, 0.01, cosine())(p), 3) for p in (0.0, 0.19, 0.2, 0.6, 1.0)]
    [0.01, 0.01, 1.0, 0.5, 0.0]
    """
    return lambda progress: factor if progress < part else schedule((progress - part) / (1 - part))


def rising(part: float, schedule: Schedule, *, start: float | None = 0.0) -> Schedule:
    """Rise from a share of the learning rate to it in a part of training, and go through a schedule in the rest.

    Args:
        start: that share; None is one over the steps of the rise and one, so that the first step does something, too,
            where a `Moment` says how many steps there are.

    >>> [round(rising(0.2, cosine())(p), 3) for p in (0.0, 0.05, 0.2, 0.6, 1.0)]
    [0.0, 0.25, 1.0, 0.5, 0.0]
    >>> [round(rising(0.2, cosine(), start=0.1)(p), 3) for p in (0.0, 0.1, 0.2)]
    [0.1, 0.55, 1.0]
    >>> [round(rising(0.3, cosine(), start=None)(Moment(step, 10)), 3) for step in range(4)]
    [0.25, 0.5, 0.75, 1.0]
    """

    def factor(progress: float) -> float:
        if progress < part:
            first = start or 0.0
            if start is None and isinstance(progress, Moment):
                first = 1 / (1 + round(part * progress.steps))
            return first + (1 - first) * (progress / part)
        return schedule((progress - part) / (1 - part))

    return factor
