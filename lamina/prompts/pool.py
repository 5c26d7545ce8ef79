"""A pool of prompts with keys; each image takes those whose keys are nearest its query (L2P)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.splice import PromptPass, Splice
from lamina.backbones.tower import Tower
from lamina.errors import ConfigError
from lamina.prompts.base import PromptModule, Scripted

Selection = Literal["image", "batch"]
Readout = Literal["prompts", "backbone"]
Query = Literal["frozen", "early"]


class PromptPool(PromptModule):
    """`size` prompts of M tokens each; the chosen ones enter one block behind the sequence, and travel with it.

    The choice has no gradient, so the classification loss reaches the chosen prompts and no key; a loss
    term of its own, "pull", draws the chosen keys to the query and reaches nothing else.

    Args:
        size: prompts in the pool.
        top: k, how many of them an image takes; 0 leaves the tower as it is.
        length: M, tokens in one prompt; 0 leaves the tower as it is.
        width: D of the tower.
        features: F of the query.
        pull: weight of the sum of the cosines between a query and its chosen keys.
        selection: "image" takes for each image its own `top`. "batch" takes for all images of a batch the `top` that
            most of them would take, and of two that are taken as often the one that stands earlier in the pool.
        readout: what the head reads, the mean of what became of the prompts or the tower's features.
        position: (D,). Added to every prompt token where it enters; None adds nothing.
        entry: the block that they enter, from 0.
        query: what the frozen tower says of the image in the end, or "early", on entry to block `entry`.

    Attributes:
        transductive: predictions depend on the other images of the batch.

    Raises:
        ConfigError: when more is to be chosen than there is, or read than was put in.

    References:
        Wang et al., Learning to Prompt for Continual Learning, CVPR 2022.
    """

    position: Tensor | None

    def __init__(
        self,
        size: int,
        top: int,
        length: int,
        width: int,
        features: int,
        *,
        pull: float = 0.1,
        selection: Selection = "image",
        readout: Readout = "prompts",
        position: Tensor | None = None,
        entry: int = 0,
        query: Query = "frozen",
    ) -> None:
        super().__init__()
        check_choice(size, top, length, readout)
        self.size, self.top, self.pull = size, top, pull
        self.entry, self.query = entry, query
        self.selection, self.transductive, self.readout = selection, selection == "batch", readout
        self.values = nn.Parameter(torch.empty(size, length, width).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(size, features).uniform_(-1, 1))
        # A copy of what belongs to the tower: it is not learned, so it is not kept with what is.
        self.register_buffer("position", None if position is None else position.detach().float().clone(), False)

    @property
    def pool_size(self) -> int:
        return self.size

    @property
    def layers(self) -> list[int]:
        """The blocks that learned tokens enter: one."""
        return [self.entry]

    def value(self, layer: int) -> nn.Parameter:
        """Return the tokens (size, M, D) of the whole pool."""
        return self.values

    def start(self, query: Tensor | None = None, task: int | None = None) -> PromptPass:
        if query is None:
            raise ValueError("a pool of prompts chooses by the query; give the features of the frozen model")
        cosines = F.normalize(query.float(), dim=-1) @ F.normalize(self.keys, dim=-1).T  # (B, size)
        chosen = self.choose(cosines.detach())
        tokens = self.values[chosen].flatten(1, 2)  # (B, k * M, D)
        if self.position is not None:
            tokens = tokens + self.position
        begun = Scripted(lambda layer, _, carried: Splice(tokens=tokens) if layer == self.entry else None)
        begun.terms["pull"] = -self.pull * cosines.gather(1, chosen).sum(-1).mean()
        begun.chosen = chosen
        return begun

    def choose(self, cosines: Tensor) -> Tensor:
        """Return which prompts are taken (B, k), best first, from the cosines of queries and keys (B, size)."""
        own = highest(cosines, self.top)
        if self.selection == "image":
            return own
        votes = torch.bincount(own.flatten(), minlength=self.size)
        return highest(votes, self.top).expand(len(own), -1)


def check_choice(size: int, top: int, length: int, readout: Readout) -> None:
    """Refuse a pool that cannot give what is asked of it.

    Raises:
        ConfigError: see the message.
    """
    if top > size:
        raise ConfigError(f"top must be at most size, the prompts in the pool; got top={top}, size={size}: lower top")
    if readout == "prompts" and not top * length:
        raise ConfigError(
            f'readout="prompts" needs at least one prompt token to read; got top={top}, length={length}: raise them or '
            'take readout="backbone"'
        )


def check_query(query: Query, entry: int, depth: int | None = None) -> None:
    """Refuse to ask before the first block, or to enter a block that a backbone of `depth` has not.

    Raises:
        ConfigError: see the message.
    """
    if query == "early" and not entry:
        raise ConfigError(
            'entry must be at least 1 with query="early", or no block has seen the image yet; got 0: a third of the '
            "backbone's blocks is a fair choice"
        )
    if depth is not None and entry >= depth:
        raise ConfigError(f"entry must be a block of the backbone, from 0 to {depth - 1}; got {entry}")


def class_position(tower: Tower) -> Tensor:
    """Return the position (D,) that block 0 finds added to the class token.

    Raises:
        ConfigError: when there is no such thing.
    """
    position = tower.class_position()
    if position is None:
        raise ConfigError(
            'position="class" needs a backbone whose class token enters block 0 with a learned position added to '
            f'it; this {type(tower).__name__} has none: set position="none"'
        )
    return position


def highest(values: Tensor, count: int) -> Tensor:
    """Return the places of the `count` highest along the last axis, highest first; of equals, the earlier one.

    `torch.topk` leaves open which of equals it takes.

    >>> highest(torch.tensor([[0.1, 0.5, 0.5], [0.2, 0.0, 0.3]]), 2)
    tensor([[1, 2],
            [2, 0]])
    """
    return values.argsort(dim=-1, descending=True, stable=True)[..., :count]
