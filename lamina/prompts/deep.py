"""Fresh prompt tokens at every block (VPT-deep)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.splice import PromptPass, Splice
from lamina.backbones.tower import Tower
from lamina.errors import UnsupportedBackbone
from lamina.prompts.base import PromptModule, Scripted

#: whether each image of a batch, or only each batch, gets a mask of its own
DropoutMode = Literal["per_sample", "shared"]


class LearnedTokens(PromptModule):
    """Sets of prompt tokens, one for each chosen block, and how they look to a batch.

    Args:
        layers: the blocks that have a set.
        length: M, tokens in one set.
        width: of what is learned; D of the tower, unless something widens it.
        bound: prompts start uniform in [-bound, bound].
        dropout: share of numbers that are 0 in training, drawn anew for each set, and only while it is learned.
        dropout_mode: "per_sample" draws for each image of a batch, so that prompts are no longer those of the whole
            batch; "shared" draws once for all.
    """

    def __init__(
        self,
        layers: Sequence[int],
        length: int,
        width: int,
        *,
        bound: float = 1.0,
        dropout: float = 0.0,
        dropout_mode: DropoutMode = "per_sample",
    ) -> None:
        super().__init__()
        self.layers, self.dropout, self.dropout_mode = layers, dropout, dropout_mode
        self.values = nn.ParameterDict(
            {str(i): nn.Parameter(torch.empty(length, width).uniform_(-bound, bound)) for i in layers}
        )

    def value(self, layer: int) -> nn.Parameter:
        """Return the prompts (M, D) of block `layer`."""
        return self.values[str(layer)]

    def shown(self, layer: int, images: int) -> Tensor:
        """Return the prompts of block `layer` as a batch of images gets them: (M, D), or (B, M, D) with masks."""
        return self._dropped(self.value(layer), self.value(layer), images)

    def _dropped(self, tokens: Tensor, source: nn.Parameter, images: int) -> Tensor:
        if not self.dropout or not self.training or not source.requires_grad:
            return tokens
        return F.dropout(tokens.expand(images, -1, -1) if self.dropout_mode == "per_sample" else tokens, self.dropout)


class DeepPrompts(LearnedTokens):
    """One set of prompt tokens for each chosen block; what the block makes of them is thrown away.

    So they need no place in the sequence: they are a context of the whole batch, and their keys and
    values are computed once per forward pass.

    Args:
        layers: the blocks that get prompts.
        length: M, tokens in one set; 0 leaves the tower as it is.
        width: D of the tower.
        bound: prompts start uniform in [-bound, bound].
        normed: prompts enter after the block's first norm, so keys and values are affine in them.
        onward: L of the tower, where the last set is to travel on through the blocks behind its own; None throws it
            away, too.
        projection: width in which prompts are stored, if one linear layer is to widen them all; 0 stores them as
            they are.
        dropout, dropout_mode: as of `LearnedTokens`.

    References:
        Jia et al., Visual Prompt Tuning, ECCV 2022, section 3.2.
    """

    def __init__(
        self,
        layers: Sequence[int],
        length: int,
        width: int,
        *,
        bound: float = 1.0,
        normed: bool = False,
        onward: int | None = None,
        projection: int = 0,
        dropout: float = 0.0,
        dropout_mode: DropoutMode = "per_sample",
    ) -> None:
        super().__init__(layers, length, projection or width, bound=bound, dropout=dropout, dropout_mode=dropout_mode)
        self.normed, self.onward = normed, onward
        self.widen: nn.Linear | None = nn.Linear(projection, width) if projection else None
        if self.widen is not None:
            nn.init.kaiming_normal_(self.widen.weight, mode="fan_out")

    def shown(self, layer: int, images: int) -> Tensor:
        if self.widen is None:
            return super().shown(layer, images)
        return self._dropped(self.widen(self.value(layer)), self.value(layer), images)

    def start(self, query: Tensor | None = None, task: int | None = None) -> PromptPass:
        last = max(self.layers, default=-1)
        end = last if self.onward is None else self.onward - 1

        def at(layer: int, tokens: Tensor, carried: Tensor | None) -> Splice | None:
            if layer in self.layers:
                entering = self.shown(layer, tokens.shape[0])
                if last != layer or last == end:
                    return Splice(context=entering, context_normed=self.normed)
                return Splice(tokens=entering.expand(tokens.shape[0], -1, -1))
            return ending(carried) if carried is not None and layer == end else None

        return Scripted(at)


def ending(tokens: Tensor) -> Splice:
    """Return what shows prompt tokens (B, M, D) to the last block, which nobody reads them behind, without a trace."""
    return Splice(tokens=tokens[:, :0], context=tokens)


def patch_bound(tower: Tower, width: int) -> float:
    """Return where VPT's uniform start of prompts ends: (6 / (numbers in a patch + width))^0.5.

    Raises:
        UnsupportedBackbone: when the tower has no patches.
    """
    if tower.patch_size is None:
        raise UnsupportedBackbone(
            f"prompts start by the size of a patch, and a {type(tower).__name__} has no patches; take an image tower"
        )
    return (6 / (tower.patch_size + width)) ** 0.5
