"""Pools of prefixes with keys, one for each of a few blocks; each image takes those nearest its query (L2P++)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.splice import PromptPass, Splice
from lamina.prompts.base import PromptModule, Scripted
from lamina.prompts.pool import check_choice, highest


class PrefixPool(PromptModule):
    """At each block `size` prefixes of M rows for keys and M for values; chosen ones join the block's own.

    A block has keys of its own, so an image may take other places of the pool at each. Prefixes and keys are shared by
    all tasks and start uniform in [0, 1). The choice has no gradient, so the classification loss reaches
    chosen prefixes and no key; in training a loss term of its own, "pull", draws keys to the queries.

    Args:
        layers: blocks that get prefixes; nothing is shared between them.
        size: prefixes in the pool of one block.
        top: k, how many of them an image takes; 0 leaves the tower as it is.
        length: M, rows for keys, and as many for values; 0 leaves the tower as it is.
        width: D of the tower.
        features: F of the query.
        pull: weight of the loss that pulls keys. Minus the cosines between a query and the keys that its image chose,
            summed over these and over blocks, mean over images.
        pull_all: pull every key to the queries of all images of a batch, once for each image that chose it, and sum
            over images. For comparison with what others did; each process has a batch of its own.

    Raises:
        ConfigError: when more is to be chosen than there is.

    References:
        Wang et al., Learning to Prompt for Continual Learning, CVPR 2022: pool, choice and pull.
        Smith et al., CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual
        Learning, CVPR 2023: prefixes in place of tokens.
    """

    query = "frozen"

    def __init__(
        self,
        layers: Sequence[int],
        size: int,
        top: int,
        length: int,
        width: int,
        features: int,
        *,
        pull: float = 1.0,
        pull_all: bool = False,
    ) -> None:
        super().__init__()
        check_choice(size, top, length, readout="backbone")
        self.layers, self.size, self.top = list(layers), size, top
        self.pull, self.pull_all = pull, pull_all
        self.values = nn.Parameter(torch.rand(len(self.layers), size, 2, length, width))
        self.keys = nn.Parameter(torch.rand(len(self.layers), size, features))

    @property
    def pool_size(self) -> int:
        """Prefixes of all blocks together, numbered block by block."""
        return len(self.layers) * self.size

    def start(self, query: Tensor | None = None, task: int | None = None) -> PromptPass:
        if query is None:
            raise ValueError("prefixes are chosen by queries; give `start` the features of the same images")
        query = F.normalize(query.to(self.keys.dtype), dim=-1)
        cosines = query @ F.normalize(self.keys, dim=-1).mT  # (blocks, B, size)
        chosen = highest(cosines.detach(), self.top)  # (blocks, B, k)

        def at(layer: int, tokens: Tensor, carried: Tensor | None) -> Splice | None:
            if layer not in self.layers:
                return None
            place = self.layers.index(layer)
            rows = self.values[place][chosen[place]].movedim(1, 2).flatten(2, 3)  # (B, 2, k * M, D)
            keys, values = rows.unbind(1)
            return Splice(prefix=(keys, values))

        started = Scripted(at)
        before = self.size * torch.arange(len(self.layers), device=chosen.device)
        started.chosen = (chosen + before[:, None, None]).movedim(0, 1).flatten(1)  # (B, blocks * k)
        if task is not None:
            started.terms["pull"] = -self.pull * self._pulled(cosines, chosen)
        return started

    def _pulled(self, cosines: Tensor, chosen: Tensor) -> Tensor:
        """Return what the pull makes larger, from cosines (blocks, B, size) and the keys chosen (blocks, B, k)."""
        if not self.pull_all:
            return cosines.gather(-1, chosen).sum((0, 2)).mean()
        times = F.one_hot(chosen, self.size).sum((1, 2))  # (blocks, size), by how many images
        return (cosines.sum(1) * times).sum()
