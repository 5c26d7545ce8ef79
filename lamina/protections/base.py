"""What every protection against forgetting is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lamina.lookback import Watcher
from lamina.model import PromptedModel


class Protection(Watcher):
    """Keeps old knowledge in place while a new task is learned.

    For every task the loop asks it for loss terms, lets it guard the optimizer, and shows it the
    finished task once more (see `Watcher`). Each does nothing unless overridden. What a protection
    remembers goes in and out by `state_dict`: tensors, numbers and strings only.
    """

    def terms(self, model: PromptedModel) -> dict[str, Tensor]:
        """Return weighted loss terms for this step, by name."""
        return {}

    def guard(self, optimizer: Optimizer) -> AbstractContextManager[Any]:
        """Constrain every step that `optimizer` takes inside this context."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Return what must be remembered."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
