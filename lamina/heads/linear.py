"""A linear classifier that grows by one block of columns per task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lamina.heads.base import Head, Scores


class LinearHead(Head):
    """One linear layer per task, side by side; each starts small and with zero bias.

    Blocks of earlier tasks leave the optimizer. In one big matrix they would have zero gradient and
    still move, by weight decay and by Adam's momentum. A class met again goes on in the new task's block
    from a copy of its row; the old row is no longer read.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.blocks = nn.ModuleList()
        self._rows: list[int] = []  # of each column, in the blocks side by side

    @torch.no_grad()
    def begin_task(self, index: int, classes: Sequence[str], columns: Sequence[int]) -> None:
        self.blocks.requires_grad_(False)
        block = nn.Linear(self.features, len(classes))
        nn.init.trunc_normal_(block.weight, std=0.02)
        nn.init.zeros_(block.bias)
        olds: list[Any] = list(self.blocks)
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
        logits = torch.cat([block(features) for block in self.blocks], dim=-1)
        return Scores(logits if len(self._rows) == logits.shape[-1] else logits[..., self._rows])
