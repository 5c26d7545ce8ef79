"""Fresh prompt tokens at every block (VPT-deep)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lamina.backbones.splice import PromptPass, Splice
from lamina.prompts.base import PromptModule, Scripted


class DeepPrompts(PromptModule):
    """One set of prompt tokens for each chosen block; what the block makes of them is thrown away.

    So they need no place in the sequence: they are a context of the whole batch, and their keys and
    values are computed once per forward pass.

    Args:
        layers: the blocks that get prompts.
        length: M, tokens in one set; 0 leaves the tower as it is.
        width: D of the tower.
        bound: prompts start uniform in [-bound, bound].
        normed: prompts enter after the block's first norm, so keys and values are affine in them.

    References:
        Jia et al., Visual Prompt Tuning, ECCV 2022, section 3.2.
    """

    def __init__(
        self, layers: Sequence[int], length: int, width: int, *, bound: float = 1.0, normed: bool = False
    ) -> None:
        super().__init__()
        self.layers, self.normed = layers, normed
        self.values = nn.ParameterDict(
            {str(i): nn.Parameter(torch.empty(length, width).uniform_(-bound, bound)) for i in layers}
        )

    def value(self, layer: int) -> nn.Parameter:
        """Return the prompts (M, D) of block `layer`."""
        return self.values[str(layer)]

    def start(self, query: Tensor | None = None, task: int | None = None) -> PromptPass:
        def at(layer: int, tokens: Tensor, carried: Tensor | None) -> Splice | None:
            if layer not in self.layers:
                return None
            return Splice(context=self.value(layer), context_normed=self.normed)

        return Scripted(at)
