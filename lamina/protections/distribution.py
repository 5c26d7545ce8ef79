"""Keep the distribution of each prompt token over its channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.lookback import Reduce
from lamina.model import PromptedModel
from lamina.protections.base import Protection, TokenPrompts, rows_of


class TokenMoments(Protection):
    """Pulls each token's mean and deviation over channels to what they were after the last task.

    Layer normalisation subtracts the one and divides by the other; while they stay put, the normalised
    prompt is an affine function of the prompt, which is what `NullSpace` takes for granted. The loss is
    the absolute gap, averaged over tokens and summed over blocks.

    Args:
        prompts: the prompts to hold; of a pool, all tokens, whichever images took.
        weight: of the loss term `moments`.

    References:
        Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024, section 4.2.
    """

    def __init__(self, prompts: TokenPrompts, *, weight: float = 1.0) -> None:
        self.prompts, self.weight = prompts, weight
        self.last: dict[int, Tensor] = {}

    def terms(self, model: PromptedModel) -> dict[str, Tensor]:
        if not self.last or not self.weight:
            return {}
        gaps = [
            F.l1_loss(_moments(rows_of(self.prompts, i)), last, reduction="sum") / last.shape[1]
            for i, last in self.last.items()
        ]
        return {"moments": self.weight * torch.stack(gaps).sum()}

    @torch.no_grad()
    def end_look(self, reduce: Reduce) -> None:
        self.last = {i: _moments(rows_of(self.prompts, i)).clone() for i in self.prompts.layers}

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last = {i: last.to(self.prompts.value(i).device) for i, last in state["last"].items()}


def _moments(prompt: Tensor) -> Tensor:
    """Mean and deviation over channels of each token (R, D): (2, R)."""
    return torch.stack([prompt.mean(-1), prompt.std(-1, unbiased=False)])
