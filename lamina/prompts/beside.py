"""Prompts that travel, and beside them prompts that only the frozen sequence sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lamina.backbones.splice import PromptPass, Splice
from lamina.prompts.base import PromptModule
from lamina.prompts.deep import DeepPrompts


class PromptsBeside(DeepPrompts):
    """Deep prompts after the norm, beside other prompts that travel and never see them.

    What travels depends on images and on itself, not on the deep prompts but through the images. So while a step of the
    deep prompts leaves a block's frozen sequence where it is, for some images, what travels stays, too, and so does all
    that comes after. Those that would enter a block without a trace take a place in the sequence here, since a context
    is either before the norm or after it.

    The null spaces of deep prompts say nothing of what travels, which each block reads and changes. So what travels,
    with all that belongs to it, such as a carrier or gates and temperatures, learns in the first task alone.

    Args:
        carrier: the prompts that travel.
        layers: the blocks that get deep prompts.
        length: M of the deep prompts.
        width: D of the tower.
    """

    def __init__(self, carrier: PromptModule, layers: Sequence[int], length: int, width: int) -> None:
        super().__init__(layers, length, width, normed=True)
        self.carrier = carrier

    def begin_task(self, index: int, columns: Sequence[int] = ()) -> None:
        self.carrier.begin_task(index, columns)
        if index:
            self.carrier.requires_grad_(False)

    def start(self, query: Tensor | None = None, task: int | None = None) -> PromptPass:
        return _Beside(self, self.carrier.start(query, task))


class _Beside(PromptPass):
    def __init__(self, prompts: PromptsBeside, carrier: PromptPass) -> None:
        super().__init__()
        self.prompts, self.carrier = prompts, carrier

    def at(self, layer: int, tokens: Tensor, carried: Tensor | None) -> Splice:
        splice = self.carrier.at(layer, tokens, carried) or Splice()
        if splice.context is not None:
            splice = replace(splice, tokens=splice.context.expand(tokens.shape[0], -1, -1), context=None)
        if layer not in self.prompts.layers:
            return splice
        return replace(splice, context=self.prompts.value(layer), context_normed=True, frozen_only=True)
