"""A small residual step between frozen features and the names of classes (CLIP-Adapter)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lamina.heads.text import TextHead
from lamina.heads.texts import ClassTexts


class Adapter(nn.Module):
    """Features (..., F) through a bottleneck without biases, mixed with what they were.

    Args:
        features: F.
        ratio: how much of the mixture comes from the bottleneck, from 0 to 1.
        reduction: the bottleneck has F / reduction channels, one at least.
        final_relu: the bottleneck answers with nothing below zero.

    References:
        Gao et al., CLIP-Adapter: Better Vision-Language Models with Feature Adapters, 2021, section 3.2; the second
        ReLU is in its code alone.
    """

    def __init__(self, features: int, ratio: float, *, reduction: int = 4, final_relu: bool = False) -> None:
        super().__init__()
        self.ratio, self.final_relu = ratio, final_relu
        hidden = max(1, features // reduction)
        self.narrow = nn.Linear(features, hidden, bias=False)
        self.widen = nn.Linear(hidden, features, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        found = self.widen(F.relu(self.narrow(features)))
        return self.ratio * (F.relu(found) if self.final_relu else found) + (1 - self.ratio) * features

    def reset(self) -> None:
        """Start afresh."""
        self.narrow.reset_parameters()
        self.widen.reset_parameters()


class AdapterHead(TextHead):
    """Cosines of adapted images and adapted names.

    Args:
        images: of features as they come from the tower; without biases their length makes no difference. None leaves
            them.
        names: of features of texts, which have length 1; None leaves them.
        reset: let adapters start afresh with every task.
        arguments: those of `TextHead`.
    """

    def __init__(
        self,
        texts: ClassTexts,
        *,
        images: Adapter | None = None,
        names: Adapter | None = None,
        reset: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(texts, **arguments)
        self.images, self.names, self.reset = images, names, reset

    def begin_task(self, index: int, classes: Sequence[str], columns: Sequence[int]) -> None:
        super().begin_task(index, classes, columns)
        for adapter in filter(None, (self.images, self.names)):
            if self.reset and index:
                adapter.reset()

    def cosines(self, features: Tensor, columns: Sequence[int] | None) -> Tensor:
        images, names = features, self.texts(columns)
        if self.images is not None:
            images = self.images(images)
        if self.names is not None:
            names = self.names(names)
        return F.normalize(images, dim=-1) @ F.normalize(names, dim=-1).mT
