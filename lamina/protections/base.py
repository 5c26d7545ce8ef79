"""What every protection against forgetting is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from lamina.data.stream import Task
from lamina.lookback import Reduce, Watcher
from lamina.model import Batch, PromptedModel
from lamina.prompts.base import PromptModule


class TokenPrompts(Protocol):
    """Prompts made of learned tokens that enter blocks; all that a protection of those tokens asks of them.

    Those that enter after a block's first norm also say `normed`; those that get a place in the sequence, `position`.
    """

    @property
    def layers(self) -> Sequence[int]: ...
    @property
    def pool_size(self) -> int: ...
    def value(self, layer: int) -> nn.Parameter: ...


def rows_of(prompts: TokenPrompts, layer: int) -> Tensor:
    """Return all prompt tokens of a block as they enter it, (R, D); of a pool, every prompt's, one after another."""
    rows, position = prompts.value(layer).flatten(0, -2), getattr(prompts, "position", None)
    return rows if position is None else rows + position


class Room(NamedTuple):
    """How much freedom old tasks leave to a step at one block.

    Attributes:
        layer: index of the block, from 0.
        what: what the directions are of: "channels" or "tokens".
        used: directions that old tasks use, of `size` in all.
        kept: share in [0, 1] of the second moment that lies in the used ones; the rest is given away.
    """

    layer: int
    what: str
    used: int
    size: int
    kept: float


class Felt(NamedTuple):
    """How much some images feel a move of the prompts at one block, to first order.

    Attributes:
        layer: index of the block, from 0.
        step: length of the move.
        moved: proportional to the squared change of what the block hands on, averaged over the images.
        worst: the same for the worst move of that length.
    """

    layer: int
    step: float
    moved: float
    worst: float


class Protection(Watcher):
    """Keeps old knowledge in place while a new task is learned.

    For every task the loop asks it for loss terms, lets it guard the optimizer, and shows it the
    finished task once more (see `Watcher`). Each does nothing unless overridden.

    Attributes:
        measures: how many images `measure` wants; 0 where it does not want to be called.
        of_images: what it remembers has numbers for single images, so it stays out of model files.
    """

    measures: int = 0
    of_images: bool = False

    def check(self, tasks: Sequence[Task], processes: int = 1) -> None:
        """Make sure that it can take tasks which are to come, with their images; called before one is learned.

        Args:
            tasks: all tasks of a run, or the one that a lesson brings.
            processes: that learn together.

        Raises:
            ConfigError: when it cannot.
        """

    def terms(self, model: PromptedModel) -> dict[str, Tensor]:
        """Return weighted loss terms for this step, by name."""
        return {}

    def guard(self, optimizer: Optimizer) -> AbstractContextManager[Any]:
        """Constrain every step that `optimizer` takes inside this context."""
        return nullcontext()

    def measure(self, model: PromptedModel, batches: Sequence[Batch], reduce: Reduce) -> None:
        """Try things out on a few images of the finished task; called after the look back.

        Args:
            batches: this process's share of `measures` images, spread over the task, in their order and without
                augmentation; of all images where the task has fewer.
        """

    def room(self) -> list[Room]:
        """Return how much freedom is left for new tasks; empty where nothing is constrained."""
        return []

    def felt(self, before: PromptModule, images: Mapping[str, Any]) -> list[Felt]:
        """Return how much images feel the move of the prompts from `before` to now; empty if it cannot say.

        Args:
            images: what this protection remembers of them, as from `state_dict`.
        """
        return []

    def since(self, memory: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what is remembered of the images that came after `memory`, in the form of `state_dict`."""
        return {}
