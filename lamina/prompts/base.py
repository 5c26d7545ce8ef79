"""What every prompt module is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from lamina.backbones.splice import PromptPass, Splice
from lamina.data.stream import Task


class PromptModule(nn.Module):
    """Learned prompts of one tower.

    A subclass holds parameters, and makes a `PromptPass` for every forward pass. It may grow at the
    start of a task; it never keeps anything that belongs to one batch.

    Attributes:
        query: "frozen" when `start` needs the features (B, F) of the same images without prompts; "early" when it
            needs those that the tower's pooling makes of the sequence on entry to block `entry`, so that one pass
            is enough.
        entry: the first block that prompts enter.
        readout: "prompts" when the head reads the mean of the final prompt tokens, not the features.
        transductive: what is spliced in for one image depends on the other images of its batch, and so does the
            prediction.
    """

    query: Literal["none", "frozen", "early"] = "none"
    entry: int = 0
    readout: Literal["backbone", "prompts"] = "backbone"
    transductive: bool = False

    @property
    def pool_size(self) -> int:
        """How many prompts there are to choose from: `PromptPass.chosen` numbers them from 0; 0 without a pool."""
        return 0

    @property
    def tasks_left(self) -> int | None:
        """How many more tasks there is room for; None where nothing limits them."""
        return None

    def check(self, tasks: Sequence[Task]) -> None:
        """Make sure that there is room for all tasks of a run; called before the first is learned.

        Raises:
            ConfigError: when there is not.
        """

    def begin_task(self, index: int, columns: Sequence[int] = ()) -> None:
        """Grow or freeze what task `index` (from 0) of classes `columns` needs, before the optimizer is made."""

    def start(self, query: Tensor | None = None, task: int | None = None) -> PromptPass:
        """Begin one forward pass.

        Args:
            query: (B, F). Features as `self.query` says; None where that is "none".
            task: the true task, in training; None in evaluation, where it is not known.
        """
        raise NotImplementedError


class EarlyPass(PromptPass):
    """A pass that begins on entry to a block, with what the tower says of the images up to there.

    Args:
        prompts: which are to enter there.
        read: the tower's pooling, of a sequence (B, N, D).
        task: the true task, in training.

    Attributes:
        query: (B, F), without a gradient; None before the tower came to the block.
    """

    def __init__(self, prompts: PromptModule, read: Callable[[Tensor], Tensor], task: int | None) -> None:
        super().__init__()
        self.prompts, self.read, self.task = prompts, read, task
        self.query: Tensor | None = None
        self._begun: PromptPass | None = None

    def at(self, layer: int, tokens: Tensor, carried: Tensor | None) -> Splice | None:
        if layer < self.prompts.entry:
            return None
        if self._begun is None:
            self.query = self.read(tokens).detach().float()
            self._begun = self.prompts.start(self.query, self.task)
            self.terms, self.chosen = self._begun.terms, self._begun.chosen
        return self._begun.at(layer, tokens, carried)

    def losses(self, labels: Tensor | None) -> dict[str, Tensor]:
        return self._begun.losses(labels) if self._begun is not None else self.terms


class Scripted(PromptPass):
    """A pass whose splice at each block is given by one function of (layer, tokens, carried)."""

    def __init__(self, script: Callable[[int, Tensor, Tensor | None], Splice | None]) -> None:
        super().__init__()
        self.script = script

    def at(self, layer: int, tokens: Tensor, carried: Tensor | None) -> Splice | None:
        return self.script(layer, tokens, carried)
