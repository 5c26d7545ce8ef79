"""Frozen linear layers by oneDNN on a CPU.

PyTorch sends products in float32 to its BLAS, which on some processors reaches half of what oneDNN
does at the same accuracy; products in bfloat16 go to oneDNN anyway, which brings the weight into a
layout of its own at every call. A frozen weight can be brought there once. The operators are not public
API, so everything falls back to `F.linear` where they are missing or do not fit.
`benchmarks/speed.py` measures what this is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: rows that packed layouts are chosen for; other numbers of rows give the same values
_ROWS = 2048


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `F.linear` of x (..., in) and a frozen weight (out, in), which never gets a gradient."""
    if weight.dtype == torch.float32 and _fits(x, weight):
        return _Product.apply(x, weight, weight.t, bias)
    return F.linear(x, weight, bias)


class FrozenLinear(nn.Module):
    """Takes the place of a frozen `nn.Linear`.

    In bfloat16 on a CPU the weight is replaced, at the first call, by a copy in oneDNN's layout, and
    at the first gradient joined by a second one of its transpose; meanwhile `state_dict` does not hold
    it. Moving, casting or copying the layer brings the plain weight back.

    Args:
        layer: its weight and bias are taken over, not copied.
        keep: keep the plain weight too, for a layer of which single rows are used.
    """

    def __init__(self, layer: nn.Linear, *, keep: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.keep = layer.in_features, layer.out_features, keep
        self.weight: Any = layer.weight  # None while a packed copy stands in for it
        self.bias = layer.bias
        self._ahead: Any = None
        self._back: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self._ahead is None:
            if self.weight.dtype != torch.bfloat16 or not _fits(x, self.weight):
                return linear(x, self.weight, self.bias)
            self._ahead = _pack(self.weight)
            if not self.keep:
                self.weight = None
        return _Product.apply(x, self._ahead, self._transposed, self.bias)

    def plain(self) -> nn.Linear:
        """Return a plain layer of the same weight and bias, taken over, not copied: one that can learn."""
        self._unpack()
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer

    def _transposed(self) -> Tensor:
        if self._back is None:
            self._back = _pack(self._ahead.to_dense().t())
        return self._back

    def _unpack(self) -> None:
        if self.weight is None:
            self.weight = nn.Parameter(self._ahead.to_dense(), requires_grad=False)
        self._ahead = self._back = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        self._unpack()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        self._unpack()
        return self.__dict__


def use_plain_layers(module: nn.Module) -> None:
    """Replace every frozen layer inside a module by a plain one."""
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, FrozenLinear):
                setattr(part, name, child.plain())


class _Product(torch.autograd.Function):
    """A product with a weight, plain or packed, whose transpose is only made when a gradient asks for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.transposed = transposed
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = torch.ops.mkldnn._linear_pointwise(grad.contiguous(), ctx.transposed(), None, "none", [], "")
        return grad, None, None, None


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)


def _fits(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype and x.device.type == weight.device.type == "cpu" and _available(x.dtype)


def _available(dtype: torch.dtype) -> bool:
    """Say whether this build and this processor have the operators for `dtype`."""
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or operators._is_mkldnn_bf16_supported()
