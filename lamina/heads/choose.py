"""Heads by name, for methods that leave the choice to their users."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lamina.heads.base import Head
from lamina.heads.cosine import CosineHead
from lamina.heads.linear import LinearHead
from lamina.heads.refined import RefinedHead
from lamina.heads.statistics import Discriminant

HeadName = Literal["linear", "cosine", "statistics", "refined"]


def head_of(name: HeadName, features: int, linear: Callable[[int], LinearHead] = LinearHead) -> Head:
    """Return a new head.

    Args:
        name: "linear": a linear layer per task; "cosine": the same with cosines; "statistics": linear layers
            to learn by, class statistics to predict by; "refined": linear layers that are balanced after
            every task, for a plan with `lamina.learner.refinement`.
        features: F.
        linear: makes the linear layers of "linear" and "statistics".
    """
    if name == "statistics":
        return Discriminant(features, trained=linear(features))
    return {"linear": linear, "cosine": CosineHead, "refined": RefinedHead}[name](features)
