"""Learning-rate factors as functions of progress in [0, 1): no state, so nothing to save or resume."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


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
