"""Prompt tokens that enter before the first block and travel through all of them (VPT-shallow)."""

from __future__ import annotations

from lamina.prompts.deep import DeepPrompts, DropoutMode


class ShallowPrompts(DeepPrompts):
    """Deep prompts of the first block alone, of which every block goes on with what the one before made of them.

    The last block only looks at them.

    Args:
        depth: L of the tower.
        length: M.
        width: D of the tower.
        bound, dropout, dropout_mode: as of `LearnedTokens`.

    References:
        Jia et al., Visual Prompt Tuning, ECCV 2022, section 3.2.
    """

    def __init__(
        self,
        depth: int,
        length: int,
        width: int,
        *,
        bound: float = 1.0,
        dropout: float = 0.0,
        dropout_mode: DropoutMode = "per_sample",
    ) -> None:
        super().__init__(range(1), length, width, bound=bound, onward=depth, dropout=dropout, dropout_mode=dropout_mode)
