"""A cosine classifier that grows by one block of columns per task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.heads.base import Scores
from lamina.heads.linear import LinearHead


class CosineHead(LinearHead):
    """Scores a class by the cosine between features and its weight; lengths and biases play no part.

    So no task's columns can outgrow another's. Otherwise as `LinearHead`.

    Args:
        scale: what cosines are multiplied by.

    References:
        Hou et al., Learning a Unified Classifier Incrementally via Rebalancing, CVPR 2019.
    """

    def __init__(self, features: int, *, scale: float = 100.0) -> None:
        super().__init__(features)
        self.scale = scale

    def begin_task(self, index: int, classes: Sequence[str], columns: Sequence[int]) -> None:
        super().begin_task(index, classes, columns)
        for name, part in self.blocks.named_parameters():
            if name.endswith("bias"):
                part.requires_grad_(False)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scores:
        weight = F.normalize(
            torch.cat([part for name, part in self.blocks.named_parameters() if name.endswith("weight")]), dim=-1
        )
        return Scores(self.in_columns(self.scale * F.normalize(features, dim=-1) @ weight.mT))
