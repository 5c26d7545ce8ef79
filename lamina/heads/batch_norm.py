"""Batch normalisation over the images of all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn


class SharedBatchNorm(nn.BatchNorm2d):
    """Normalises channels by what all processes see of a global batch, so that their number does not matter.

    `torch.nn.SyncBatchNorm` does so on GPUs alone. In one process, and where nothing is trained, this is
    `nn.BatchNorm2d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        pixels = input.numel() // input.shape[1]
        sums = _Sum.apply(torch.cat([input.sum((0, 2, 3)), input.new_tensor([pixels])]))
        count, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        centred = input - mean[:, None, None]
        # a second pass, since squares of what is far from 0 leave float32 no digits for a small variance
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        factor = self.weight * (variance + self.eps).rsqrt()
        return centred * factor[:, None, None] + self.bias[:, None, None]


class _Sum(torch.autograd.Function):
    """The sum over processes. Each process's loss depends on what all put in, so gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)
