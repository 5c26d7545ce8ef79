"""Adapters: a small network at every block, whose say joins that of the block's MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.splice import PromptPass, Splice
from lamina.errors import ConfigError
from lamina.prompts.base import PromptModule, Scripted

#: added to a deviation that numbers are divided by
_EPSILON = 1e-5


class Adapters(PromptModule):
    """One adapter for each block. It acts on every row alone, so prompts of any kind may be there, too.

    Args:
        parts: first to last; each answers (x, y), both (B, n, D), as `Splice.branch` does.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def start(self, query: Tensor | None = None, task: int | None = None) -> PromptPass:
        return Scripted(lambda layer, tokens, carried: Splice(branch=self.parts[layer]))


class SerialAdapter(nn.Module):
    """Reads what the MLP says, y, and says y + Up(GELU(Down(y))).

    Up starts at zero, so the block starts as it was, and Down as any layer does: if it were zero, too, hidden
    numbers would be zero for ever and nothing but the bias of Up would ever learn.

    Args:
        width: D.
        hidden: numbers between Down and Up.

    References:
        Pfeiffer et al., AdapterFusion, EACL 2021, for the place; Jia et al., ECCV 2022, for its use in ViTs.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        learned = self.up(F.gelu(self.down(y.to(self.down.weight.dtype))))
        return (y + learned).to(y.dtype)


class ParallelAdapter(nn.Module):
    """Reads what the MLP reads before its norm, x, and says y + scale * Up(dropout(ReLU(Down(x)))), without biases.

    Args:
        width: D.
        hidden: numbers between Down and Up.
        bits: of each weight as it is used, see `quantised`; 0 takes weights as they are.

    References:
        Chen et al., AdaptFormer, NeurIPS 2022, section 3.2; Jie, Wang and Deng, Revisiting the Parameter Efficiency
        of Adapters from the Perspective of Precision Redundancy, ICCV 2023, section 4.
    """

    codes: Tensor
    cuts: Tensor

    def __init__(self, width: int, hidden: int, *, bits: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout, self.bits = scale, dropout, bits
        self.down, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        nn.init.trunc_normal_(self.up.weight, std=0.001)
        for name, values in zip(("codes", "cuts"), codebook(bits), strict=True):
            self.register_buffer(name, values, persistent=False)

    def weight(self, layer: nn.Linear) -> Tensor:
        """Return the weight of Down or Up as it is used."""
        return quantised(layer.weight, self.codes, self.cuts) if self.bits else layer.weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = F.relu(F.linear(x.to(self.down.weight.dtype), self.weight(self.down)))
        hidden = F.dropout(hidden, self.dropout, self.training)
        return (y + self.scale * F.linear(hidden, self.weight(self.up))).to(y.dtype)


def codebook(bits: int) -> tuple[Tensor, Tensor]:
    """Return 2^bits numbers that stand for those of a normal distribution, and where one takes over from another.

    All stand for equally many, and each is the median of what it stands for.

    >>> [[round(value, 4) for value in values.tolist()] for values in codebook(1)]
    [[-0.6745, 0.6745], [0.0]]
    """
    parts = 2**bits
    whole = torch.arange(parts, dtype=torch.float64)
    return torch.special.ndtri((whole + 0.5) / parts), torch.special.ndtri(whole[1:] / parts)


def quantised(weight: Tensor, codes: Tensor, cuts: Tensor) -> Tensor:
    """Return a weight of any shape in which there are no more values than codes.

    Its numbers are brought to mean 0 and deviation 1, replaced by codes, and brought back. A gradient goes to the
    weight as if nothing had been replaced.
    """
    deviation, mean = torch.std_mean(weight.detach())
    scores = (weight.detach() - mean) / (deviation + _EPSILON)
    chosen = codes.to(scores)[(scores[..., None] > cuts.to(scores)).sum(-1)]
    straight = weight - weight.detach()  # zero, with a gradient of 1
    return chosen * (deviation + _EPSILON) + mean + straight


def hidden_width(width: int, reduction: int) -> int:
    """Return how many hidden numbers an adapter has where it reduces D = `width` so many times.

    >>> hidden_width(768, 8)
    96

    Raises:
        ConfigError: when none are left.
    """
    if reduction > width:
        raise ConfigError(f"reduction must be at most the backbone's width, {width}; got {reduction}")
    return width // reduction
