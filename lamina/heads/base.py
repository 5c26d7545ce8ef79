"""What every classifier head is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lamina.lookback import Watcher


@dataclass(frozen=True)
class Scores:
    """What a head says: logits (B, C), or (S, B, C) if it draws S samples; extra losses by name."""

    logits: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Head(nn.Module, Watcher):
    """Features (B, F) to scores over every class met so far, in order of arrival."""

    def begin_task(self, index: int, classes: Sequence[str]) -> None:
        """Add a column for each of `classes` and freeze what must not move any more."""
        raise NotImplementedError

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scores:
        """Score features (B, F); `labels` (B,) are given in training only."""
        raise NotImplementedError
