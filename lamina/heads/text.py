"""Heads that compare features of images with those of class names."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.heads.base import Head, Scores
from lamina.heads.texts import ClassTexts
from lamina.prompts.contexts import TOGETHER

#: what a learned scale may grow to, as in CLIP's own training
LARGEST = 100.0


class TextHead(Head):
    """Cosines between images and class names, times a scale.

    Args:
        texts: of the classes.
        scale: of cosines; learned from there on if `learn_scale`.
        negatives: in training, which classes compete: "task" reads the names of the current task alone; all others then
            score minus infinity.

    References:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, section 2.3.
    """

    def __init__(
        self,
        texts: ClassTexts,
        *,
        scale: float | None = None,
        learn_scale: bool = False,
        negatives: Literal["task", "seen"] = "seen",
    ) -> None:
        super().__init__()
        self.texts, self.negatives = texts, negatives
        log_scale = torch.tensor(math.log(scale or texts.side.logit_scale))
        self.log_scale: Tensor
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        self._own: Sequence[int] = []

    def begin_task(self, index: int, classes: Sequence[str], columns: Sequence[int]) -> None:
        self.texts.begin_task(index, classes, columns)
        self._own = list(columns)

    @property
    def pool_size(self) -> int:
        return self.texts.pool_size

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by, ()."""
        return self.log_scale.exp().clamp(max=self._most)

    @property
    def _most(self) -> float:
        return max(LARGEST, self.texts.side.logit_scale)

    @torch.no_grad()
    def hold_scale(self) -> None:
        """Bring a learned scale that is beyond its limit back below: it would get no gradient any more."""
        if self.training and self.log_scale.requires_grad:
            self.log_scale.clamp_(max=math.log(self._most) - 1e-6)

    @property
    def competing(self) -> Sequence[int] | None:
        """The columns whose texts are read now; None for all."""
        return self._own if self.training and self.negatives == "task" else None

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scores:
        columns = self.competing
        self.hold_scale()
        logits = self.spread(self.scale * self.cosines(features, columns), columns)
        return Scores(logits, self.texts.terms(features) if self.training else {}, self.texts.choose(features))

    def cosines(self, features: Tensor, columns: Sequence[int] | None) -> Tensor:
        """Return the cosines (B, n) of images (B, F) and the names of some classes or of all.

        Where texts depend on the image and nothing is learned, images come a few at a time, so that memory is bounded.
        """
        images = F.normalize(features, dim=-1)
        if not self.texts.per_image:
            return images @ self.texts(columns).mT
        each = len(self.texts.classes if columns is None else columns)
        few = len(features) if torch.is_grad_enabled() else max(1, TOGETHER // each)
        parts = [
            torch.einsum("bf,bcf->bc", some, self.texts.of_images(seen, columns))
            for some, seen in zip(images.split(few), features.split(few), strict=True)
        ]
        return torch.cat(parts)

    def spread(self, logits: Tensor, columns: Sequence[int] | None) -> Tensor:
        """Return logits (..., n) of some columns as those of all (..., C), minus infinity elsewhere."""
        if columns is None:
            return logits
        out = logits.new_full((*logits.shape[:-1], len(self.texts.classes)), float("-inf"))
        return out.index_copy(-1, torch.as_tensor(columns, device=logits.device), logits)

    def says(self, column: int) -> str:
        return self.texts.says(column)

    def preview(self, classes: Sequence[str]) -> TextHead:
        out = copy.copy(self)
        out._modules = {**self._modules, "texts": self.texts.preview(classes)}
        return out
