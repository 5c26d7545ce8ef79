"""What carries prompts from one block to the next: an LSTM, a GRU or a transformer layer over depth.

Each has the new prompts of a block for its input and what the block before made of prompts for its state: all that
depends on the image comes in by the state. So `prepared` does what inputs alone decide, once for a batch and for all
blocks, and a step does the rest. Time is the block, and each prompt token is carried by itself, but for the
transformer's.

References:
    Mo et al., LSPT: Long-term Spatial Prompt Tuning for Visual Representation Learning, 2024, section 3.3 and the
    ablation of what carries. That both layers of two get the same state, and the transformer's form, are ours.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lamina.backbones.attention import attend

Carry = Literal["lstm", "gru", "transformer", "none"]


class Chain:
    """Products with the same weights, each of which what the one before gave flows into, as in steps over depth.

    Their gradients to the weights are summed by one product over all steps, not by one for each and a sum: weights are
    much larger than what they are multiplied with. The first step is the last that a backward pass comes to, so there.

    Args:
        dtype: of what is multiplied, where it is less than float32; what is learned stays in its own.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._low = dtype if dtype.itemsize < 4 else None
        self._known: dict[Tensor, tuple[Tensor, list[Any]]] = {}

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x weight^T: (..., D) by (E, D) to (..., E), in the dtype of x."""
        if weight not in self._known:
            self._known[weight] = (weight.detach().to(self._low or weight.dtype), [])
        factor, steps = self._known[weight]
        steps.append(None)
        return _Product.apply(x, weight, factor, steps, len(steps) - 1)


class _Product(torch.autograd.Function):
    """A product of a chain: it leaves what makes its gradient to the weights in `steps`, and the first one uses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, factor: Tensor, steps: list[Any], place: int) -> Tensor:
        given = x.to(factor.dtype)
        ctx.save_for_backward(given, factor)
        ctx.steps, ctx.place = steps, place
        return F.linear(given, factor).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        given, factor = ctx.saved_tensors
        low = gradient.to(factor.dtype)
        to_weight = None
        if ctx.needs_input_grad[1]:
            ctx.steps[ctx.place] = (given.flatten(0, -2), low.flatten(0, -2))
            if not ctx.place:
                all_given, gradients = zip(*filter(None, ctx.steps), strict=True)
                to_weight = (torch.cat(gradients).mT @ torch.cat(all_given)).to(gradient.dtype)
                ctx.steps[:] = [None] * len(ctx.steps)  # another pass back through the same graph begins anew
        return (low @ factor).to(gradient.dtype), to_weight, None, None, None


class Carrier(nn.Module):
    """One step over depth.

    Attributes:
        cells: how many cell states (B, M, D) it hands on.
    """

    cells: int = 0

    def prepared(self, prompts: Tensor, chain: Chain) -> Tensor:
        """Return what prompts (..., M, D) decide by themselves; `chain` is that of the steps to come."""
        return prompts

    def forward(
        self, prepared: Tensor, hidden: Tensor, cells: tuple[Tensor, ...], chain: Chain
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the prompts (B, M, D) that enter the next block, and the cell states.

        Args:
            prepared: of the new prompts.
            hidden: (B, M, D). What the block before made of the prompts, and what is told of its patches.
            cells: of the step before.
            chain: of the steps of one pass.
        """
        raise NotImplementedError


class LSTM(Carrier):
    """An LSTM of one layer or of several, of which each has its own cell state and all the same hidden one.

    Args:
        width: D.
        layers: what the first makes of the prompts is the next one's input.
        forget_bias: the forget gates' bias at the start; None leaves it where PyTorch draws it.
    """

    def __init__(self, width: int, layers: int = 1, forget_bias: float | None = None) -> None:
        super().__init__()
        self.cells = layers
        cells = [nn.LSTMCell(width, width) for _ in range(layers)]
        if forget_bias is not None:
            for cell in cells:
                nn.init.constant_(cell.bias_ih[width : 2 * width], forget_bias)
                nn.init.zeros_(cell.bias_hh[width : 2 * width])
        self.steps = nn.ModuleList(cells)

    def prepared(self, prompts: Tensor, chain: Chain) -> Tensor:
        return _inputs(cast(nn.LSTMCell, self.steps[0]), prompts, chain)

    def forward(
        self, prepared: Tensor, hidden: Tensor, cells: tuple[Tensor, ...], chain: Chain
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, after, steps = hidden, [], cast(list[nn.LSTMCell], list(self.steps))
        for number, (step, cell) in enumerate(zip(steps, cells, strict=True)):
            given = _inputs(step, out, chain) if number else prepared
            enter, forget, new, leave = (given + chain.product(hidden, step.weight_hh)).chunk(4, dim=-1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            out = leave.sigmoid() * cell.tanh()
            after.append(cell)
        return out, tuple(after)


def _inputs(step: nn.LSTMCell, x: Tensor, chain: Chain) -> Tensor:
    """Return what an input (..., D) and both biases give the gates of an LSTM: (..., 4 D)."""
    return chain.product(x, step.weight_ih) + (step.bias_ih + step.bias_hh)


class GRU(Carrier):
    """A gated recurrent unit.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.step = nn.GRUCell(width, width)

    def prepared(self, prompts: Tensor, chain: Chain) -> Tensor:
        return chain.product(prompts, self.step.weight_ih) + self.step.bias_ih

    def forward(
        self, prepared: Tensor, hidden: Tensor, cells: tuple[Tensor, ...], chain: Chain
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        reset, keep, new = prepared.chunk(3, dim=-1)
        resets, keeps, news = (chain.product(hidden, self.step.weight_hh) + self.step.bias_hh).chunk(3, dim=-1)
        keep = (keep + keeps).sigmoid()
        new = (new + (reset + resets).sigmoid() * news).tanh()
        return (1 - keep) * new + keep * hidden, cells


class TransformerLayer(Carrier):
    """A block like the tower's that sees the state and, behind it, the new prompts, and hands on the latter.

    Args:
        width: D.
        heads: H.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self, prepared: Tensor, hidden: Tensor, cells: tuple[Tensor, ...], chain: Chain
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        prompts = prepared.expand(hidden.shape)
        both = self.qkv(self.norm1(torch.cat([hidden, prompts], dim=1)))
        q, k, v = both.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, 2 M, d)
        mixed = attend(q[:, :, hidden.shape[1] :], k, v).transpose(1, 2).flatten(2)
        out = prompts + self.proj(mixed)
        return out + self.mlp(self.norm2(out)), cells


def carrier_of(name: Carry, width: int, heads: int, *, layers: int = 1, forget_bias: float | None = None) -> Carrier:
    """Return a new carrier by name; "none" has none."""
    if name == "lstm":
        return LSTM(width, layers, forget_bias)
    return GRU(width) if name == "gru" else TransformerLayer(width, heads)
