"""Prompts for the first blocks, one set after the other; the last one stays in the sequence (MaPLe's image side)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lamina.backbones.splice import PromptPass, Splice
from lamina.backbones.tower import Tower
from lamina.prompts.base import PromptModule, Scripted


class StackedPrompts(PromptModule):
    """A set of prompt tokens on entry to each of the first J blocks, of which the last travels on.

    Each takes the place of what the block before made of its own. So a set that will be replaced is looked at and
    leaves no trace, which costs less than to let it travel and changes nothing; so does one that enters the last block.
    What enters before the first block passes the tower's pre-norm, where it has one.

    Args:
        tower: that the prompts are for.

    References:
        Khattak et al., MaPLe: Multi-modal Prompt Learning, CVPR 2023, section 3.2.
    """

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.depth, self._pre_norm = tower.depth, tower.pre_norm

    def rows(self) -> Sequence[Tensor]:
        """Return the sets (M, D), one for each of the first J blocks."""
        raise NotImplementedError

    def start(self, query: Tensor | None = None, task: int | None = None) -> PromptPass:
        rows = self.rows()
        last = len(rows) - 1

        def at(layer: int, tokens: Tensor, carried: Tensor | None) -> Splice | None:
            if layer > last:
                return None
            entering = rows[layer] if layer else self._pre_norm(rows[0])
            if layer < last or layer == self.depth - 1:
                return Splice(context=entering)
            return Splice(tokens=entering.expand(tokens.shape[0], -1, -1))

        return Scripted(at)


class FreePrompts(StackedPrompts):
    """Sets that are learned as they are.

    Args:
        depth: J.
        length: M.
        bound: they start uniform in [-bound, bound]; None draws them from a Gaussian of deviation 0.02.
    """

    def __init__(self, tower: Tower, depth: int, length: int, *, bound: float | None = None) -> None:
        super().__init__(tower)
        rows = [torch.empty(length, tower.width) for _ in range(depth)]
        starts = [row.normal_(std=0.02) if bound is None else row.uniform_(-bound, bound) for row in rows]
        self.values = nn.ParameterList([nn.Parameter(start) for start in starts])

    def rows(self) -> Sequence[Tensor]:
        return list(self.values)


class CoupledPrompts(StackedPrompts):
    """Sets that are linear images of other ones, which belong to somebody else and learn by them, too.

    All maps but the first start alike.

    Args:
        depth: J.
        width: of what the maps are given, W.
        source: returns J sets (M, W).
    """

    def __init__(self, tower: Tower, depth: int, width: int, source: Callable[[], Sequence[Tensor]]) -> None:
        super().__init__(tower)
        self.source = source
        first, deep = nn.Linear(width, tower.width), nn.Linear(width, tower.width)
        self.maps = nn.ModuleList([first, *(copy.deepcopy(deep) for _ in range(depth - 1))])

    def rows(self) -> Sequence[Tensor]:
        return [made(rows) for made, rows in zip(self.maps, self.source(), strict=True)]
