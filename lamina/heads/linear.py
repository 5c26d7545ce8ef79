"""A linear classifier that grows by one block of columns per task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamina.heads.base import Head, Scores


class LinearHead(Head):
    """One linear layer per task, side by side.

    Blocks of earlier tasks leave the optimizer. In one big matrix they would have zero gradient and
    still move, by weight decay and by Adam's momentum. A class met again goes on in the new task's block
    from a copy of its row; the old row is no longer read.

    Args:
        start: of a new layer. "small" draws weights of deviation 0.02 and takes zero biases for every task.
            "released" does so for the first task alone: the second goes on from the first one's trained layer if
            it has as many classes, all others start as `nn.Linear` does. That is how the code of VPT-NSP² behaves.
            "kaiming" draws weights of deviation (2 / classes)^0.5 and takes biases of -ln 99, as the code of VPT does.
    """

    replaceable = True

    def __init__(self, features: int, *, start: Literal["small", "released", "kaiming"] = "small") -> None:
        super().__init__()
        self.features, self.start = features, start
        self.blocks = nn.ModuleList()
        self._rows: list[int] = []  # of each column, in the blocks side by side

    @torch.no_grad()
    def begin_task(self, index: int, classes: Sequence[str], columns: Sequence[int]) -> None:
        self.blocks.requires_grad_(False)
        block = nn.Linear(self.features, len(classes))
        olds: list[Any] = list(self.blocks)
        if self.start == "kaiming":
            nn.init.kaiming_normal_(block.weight, mode="fan_out")
            nn.init.constant_(block.bias, -math.log(99))
        elif self.start == "small" or not olds:
            nn.init.trunc_normal_(block.weight, std=0.02)
            nn.init.zeros_(block.bias)
        elif len(olds) == 1 and olds[0].out_features == len(classes):
            block.load_state_dict(olds[0].state_dict())
        first = sum(old.out_features for old in olds)
        met = [place for place, column in enumerate(columns) if column < len(self._rows)]
        if met:
            rows = [self._rows[columns[place]] for place in met]
            block.weight[met] = torch.cat([old.weight for old in olds])[rows]
            block.bias[met] = torch.cat([old.bias for old in olds])[rows]
        self._rows += [0] * (max(columns) + 1 - len(self._rows))
        for place, column in enumerate(columns):
            self._rows[column] = first + place
        self.blocks.append(block)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scores:
        return Scores(self.in_columns(torch.cat([block(features) for block in self.blocks], dim=-1)))

    def in_columns(self, logits: Tensor) -> Tensor:
        """Return the logits of the blocks side by side (B, rows) in the order of columns (B, C)."""
        return logits if len(self._rows) == logits.shape[-1] else logits[..., self._rows]
