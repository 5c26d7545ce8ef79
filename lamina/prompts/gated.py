"""Prompts of which a gate says how much each block may change them (gated prompt tuning)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamina.backbones.splice import PromptPass, Splice
from lamina.prompts.deep import DropoutMode, LearnedTokens, ending


class GatedPrompts(LearnedTokens):
    """One set of prompt tokens for all blocks, a gate behind each but the last, and a temperature for each.

    A block gets `g * what the block before made of the prompts + (1 - g) * what entered that block`, g being the
    sigmoid of a learned number. A closed gate still lets the prompts be looked at: it keeps them as they were. The
    temperature divides the logits of a block's attention, of all its queries to all its keys.

    Args:
        depth: L of the tower.
        length: M.
        width: D of the tower.
        gate_init: gates start at the sigmoid of minus this.
        bound, dropout, dropout_mode: as of `LearnedTokens`; the mask is drawn once, where prompts enter.

    Attributes:
        gates: (L - 1,), before the sigmoid.
        temperatures: (L,), from 1.

    References:
        Yoo et al., Improving Visual Prompt Tuning for Self-supervised Vision Transformers, ICML 2023; the authors'
        repository ryongithub/GatedPromptTuning.
    """

    def __init__(
        self,
        depth: int,
        length: int,
        width: int,
        *,
        gate_init: float = 10.0,
        bound: float = 1.0,
        dropout: float = 0.0,
        dropout_mode: DropoutMode = "per_sample",
    ) -> None:
        super().__init__(range(1), length, width, bound=bound, dropout=dropout, dropout_mode=dropout_mode)
        self.gates = nn.Parameter(torch.full((depth - 1,), -gate_init))
        self.temperatures = nn.Parameter(torch.ones(depth))

    def start(self, query: Tensor | None = None, task: int | None = None) -> PromptPass:
        return _GatedPass(self)


class _GatedPass(PromptPass):
    """Remembers what entered the last block (B, M, D)."""

    def __init__(self, prompts: GatedPrompts) -> None:
        super().__init__()
        self.prompts = prompts
        self.entered: Tensor | None = None

    def at(self, layer: int, tokens: Tensor, carried: Tensor | None) -> Splice:
        if self.entered is None or carried is None:
            entering = self.prompts.shown(0, tokens.shape[0]).expand(tokens.shape[0], -1, -1)
        else:
            gate = self.prompts.gates[layer - 1].sigmoid()
            entering = gate * carried + (1 - gate) * self.entered
        self.entered = entering
        temperature = self.prompts.temperatures[layer]
        if layer < len(self.prompts.temperatures) - 1:
            return Splice(tokens=entering, temperature=temperature)
        last = ending(entering)
        return Splice(tokens=last.tokens, context=last.context, temperature=temperature)
