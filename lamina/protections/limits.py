"""Hold parameters within limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lamina.protections.base import Protection


class Limits(Protection):
    """Brings a parameter back between two limits right after every step.

    Where the limit is put matters. A clamp inside the forward pass gives no gradient to what lies outside, which then
    never comes back; one that changes the parameter there makes looking at a model change it. After the step, a number
    at its limit keeps its gradient, and every checkpoint holds what was evaluated.

    Args:
        parameter: to hold.
        low, high: the limits.
    """

    def __init__(self, parameter: nn.Parameter, low: float, high: float) -> None:
        self.parameter, self.low, self.high = parameter, low, high

    def guard(self, optimizer: Optimizer) -> AbstractContextManager[Any]:
        return self._held(optimizer)

    @contextmanager
    def _held(self, optimizer: Optimizer) -> Iterator[None]:
        @torch.no_grad()
        def after(*_: object) -> None:
            self.parameter.clamp_(self.low, self.high)

        handle = optimizer.register_step_post_hook(after)
        try:
            yield
        finally:
            handle.remove()
