"""Old images that are learned from again: which of them a phase takes, and what a memory chooses by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lamina.data.loader import Share
from lamina.data.memory import Memory, disagreement
from lamina.data.stream import Task, mixed
from lamina.errors import ConfigError
from lamina.learner import NO_DRAWS, Phase
from lamina.lookback import Reduce, Watcher
from lamina.model import Batch, PromptedModel
from lamina.seeds import seed_at
from lamina.training.evaluation import scores


def taking(phase: Phase, task: Task, memory: Memory | None, met: Sequence[Task]) -> Task:
    """Return a task with the training images that a phase takes: its own, old ones, or both.

    Args:
        met: all tasks so far in order, with their images; `task` is the last of them.

    Raises:
        ConfigError: when the phase asks for old images and there is no memory.
    """
    if phase.data == "task":
        return task
    if memory is None:
        raise ConfigError(
            f"a phase takes old images and its learner keeps none; got data={phase.data!r} with memory=None: give the "
            "learner a Memory"
        )
    if phase.data == "memory":
        return replace(task, train=memory.split_of(met))
    earlier = [memory.of(other) for other in met if other.index != task.index]
    return replace(task, train=mixed([task.train, *earlier]))


class Choosing(Watcher):
    """Lets a memory choose among the images of a finished task, by what one look back shows of them.

    Every process lays what it saw into a table of all images; the sum of such tables is exact, so all processes choose
    alike. Scores are those of the head as the look back leaves it, so this watcher's `end_look` comes after the head's.

    Args:
        classes: C, met so far.
        share: which images of the look back this process sees.
        seed: of the run; draws inside the head depend on it and on the task alone.
    """

    def __init__(
        self,
        memory: Memory,
        task: Task,
        model: PromptedModel,
        *,
        classes: int,
        share: Share,
        seed: int,
    ) -> None:
        self.memory, self.task, self.model = memory, task, model
        self.classes, self.seed = classes, seed
        self.looks_at: Literal["nothing", "features"] = "nothing" if memory.wants == "nothing" else "features"
        self._places = torch.from_numpy(np.arange(share.rank, len(task.train), share.world))
        self.begin_look()

    def begin_look(self) -> None:
        self._seen: list[Tensor] = []

    def collect(self, features: Tensor, columns: Tensor) -> None:
        self._seen.append(features)

    def end_look(self, reduce: Reduce) -> None:
        model, tables = self.model, {}
        if self.memory.wants == "features":
            prompts = model.prompts
            width = model.tower.width if prompts is not None and prompts.readout == "prompts" else model.width
            tables["features"] = reduce(self._table(self._seen, width))
        elif self.memory.wants == "scores":
            torch.manual_seed(seed_at(self.seed, "memory", self.task.index))
            said = [scores(model, Batch(None, features=seen)) for seen in self._seen]
            tables["scores"] = reduce(self._table(said, self.classes))
        elif self.memory.wants == "draws":
            tables["draws"] = reduce(self._table([self._differing(seen) for seen in self._seen], 1))
        self.memory.keep(self.task, self.seed, **tables)
        self.begin_look()

    def _differing(self, features: Tensor) -> Tensor:
        """Return how far draws differ on images (B, 1)."""
        said = self.model.eval().head.samples_of(features)
        if said is None:
            raise ConfigError(NO_DRAWS)
        return disagreement(said)[:, None]

    def _table(self, rows: Sequence[Tensor], width: int) -> Tensor:
        """Return all images' rows (n, width), float32: zero but for those of this process."""
        table = torch.zeros(len(self.task.train), width)
        if rows:
            table[self._places] = torch.cat(list(rows)).float().cpu()
        return table
