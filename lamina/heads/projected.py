"""A head of class names that brings images to the space of texts itself, by a copy of the backbone's projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lamina.heads.base import Scores
from lamina.heads.gaussians import GaussianHead
from lamina.heads.text import TextHead
from lamina.heads.texts import ClassTexts


class ProjectedTextHead(GaussianHead, TextHead):
    """A `TextHead` for features that are not yet projected; its projection stays as it is but where it is balanced.

    Args:
        texts: of the classes.
        features: D, of a tower that is `unprojected`.
        projection: (D, F), to start from; None starts from the identity.
        options: as of `TextHead`.

    References:
        Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024, the head
        refinement of the CLIP variant.
    """

    def __init__(self, texts: ClassTexts, features: int, projection: Tensor | None, **options: Any) -> None:
        super().__init__(texts, **options)
        start = torch.eye(features) if projection is None else projection.detach()
        self.projection = nn.Linear(*start.shape)
        with torch.no_grad():
            self.projection.weight.copy_(start.mT)
            self.projection.bias.zero_()
        self.projection.requires_grad_(False)
        self.remember(features)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scores:
        return super().forward(self.projection(features), labels)
