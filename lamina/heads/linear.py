"""A linear classifier that grows by one block of columns per task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lamina.heads.base import Head, Scores


class LinearHead(Head):
    """One linear layer per task, side by side; each starts small and with zero bias.

    Blocks of earlier tasks leave the optimizer. In one big matrix they would have zero gradient and
    still move, by weight decay and by Adam's momentum.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.blocks = nn.ModuleList()

    def begin_task(self, index: int, classes: Sequence[str]) -> None:
        self.blocks.requires_grad_(False)
        block = nn.Linear(self.features, len(classes))
        nn.init.trunc_normal_(block.weight, std=0.02)
        nn.init.zeros_(block.bias)
        self.blocks.append(block)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scores:
        return Scores(torch.cat([block(features) for block in self.blocks], dim=-1))
