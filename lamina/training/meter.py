"""How far a run moves the features of old tasks, measured on test images that are kept for it.

Accuracies say what was forgotten, not where: an old task may lose points because its features moved, or
because new classes came close to features that stayed. The meter looks at the features alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina.backbones.splice import Probe
from lamina.data.loader import Share
from lamina.data.stream import Split, Stream
from lamina.errors import DataError, ResumeError
from lamina.lookback import Reduce
from lamina.model import Batch, PromptedModel
from lamina.seeds import seed_at

#: images kept of each task, where it has so many
IMAGES = 50


class DriftMeter:
    """Keeps some test images of each task, and what each block made of them just after their task.

    Drift is the root mean squared distance between an image's rows now and then, in units of their spread
    then: the root mean squared distance of the rows from their mean over the images. The rows are those
    that the features are read from (their mean, where there are several) on entry to blocks 1 to L - 1,
    and the features themselves for the last block.

    Args:
        stream: whose test images are kept.
        images: how many of each task at most, spread evenly over its classes.

    Attributes:
        splits: the images that are kept, by task.
        drift: entry [t][i][l] is the drift, after task t, of the images of task i <= t as block l leaves them.

    Raises:
        DataError: when a task has a single test image, which has no spread.
    """

    def __init__(self, stream: Stream, images: int = IMAGES) -> None:
        for task in stream:
            if len(task.test) < 2:
                raise DataError(
                    f"stream {stream.name!r}: drift is told in units of the spread of test images, so each task needs "
                    f"at least 2; task {task.index + 1} has {len(task.test)}; give it more, or measure no drift"
                )
        self.splits = [_spread_out(task.test, images) for task in stream]
        self.drift: list[list[list[float]]] = []
        self._references: list[list[Tensor]] = []  # by task and block, (n, D) or (n, F), float32

    def images(self, model: PromptedModel, task: int) -> int:
        """Return how many images `measure` looks at after a task: none where nothing can move them."""
        return 0 if not model.moves else sum(len(split) for split in self.splits[: task + 1])

    @torch.inference_mode()
    def measure(
        self,
        model: PromptedModel,
        task: int,
        batches: Callable[[Split], Iterable[Batch]],
        share: Share,
        reduce: Reduce,
        seed: int,
        advance: Callable[[int], None] = lambda images: None,
    ) -> None:
        """Append a row to `drift`; called once after each task, in order.

        Each process looks at its share of the images. Its rows are laid into a table of all of them, and the
        sum of such tables is exact, however uneven the shares.

        Args:
            task: index of the task that was just learned.
            batches: this process's share of a split, in order.
            share: which images of a split these are.
            seed: of draws inside the prompts; each look at a task draws alike.
        """
        row = []
        for index, split in enumerate(self.splits[: task + 1]):
            if not model.moves:
                row.append([0.0] * model.tower.depth)  # what is frozen does not move
                continue
            torch.manual_seed(seed_at(seed, "drift", index))
            places = torch.arange(share.rank, len(split), share.world)
            now = [reduce(table) for table in _rows(model, batches(split), places, len(split), advance)]
            if index == task:
                self._references.append(now)
            row.append([_moved(new, old) for new, old in zip(now, self._references[index], strict=True)])
        self.drift.append(row)

    def state_dict(self) -> dict[str, Any]:
        """Return what must be remembered from task to task."""
        return {"drift": self.drift, "references": self._references}

    def resume(self, state: dict[str, Any] | None, tasks: int) -> None:
        """Take back what `state_dict` returned in a run that has learned so many tasks.

        Raises:
            ResumeError: when these tasks were learned without a meter.
        """
        drift = state["drift"] if state is not None else []
        if len(drift) != tasks:
            raise ResumeError(
                f"drift must be measured from the first task on: of the {tasks} learned so far, {len(drift)} were "
                "measured; resume without measuring, or start the run anew"
            )
        self.drift, self._references = drift, state["references"] if state is not None else []


def _spread_out(split: Split, count: int) -> Split:
    """Return at most `count` images of a split, of each class in proportion to its images."""
    by_class = np.argsort(split.columns, kind="stable")
    chosen = np.sort(by_class[np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(np.int64)])
    return replace(split, indices=split.indices[chosen], columns=split.columns[chosen])


def _rows(
    model: PromptedModel, batches: Iterable[Batch], places: Tensor, count: int, advance: Callable[[int], None]
) -> list[Tensor]:
    """Return for each block a table (count, D), the last (count, F), float32: zero but at `places` (n,)."""
    tower, prompts = model.tower, model.prompts
    width = tower.width if prompts is not None and prompts.readout == "prompts" else model.width
    tables = [torch.zeros(count, tower.width) for _ in range(tower.depth - 1)] + [torch.zeros(count, width)]
    model.eval()
    done = 0
    for batch in batches:
        here = places[done : done + len(batch.targets)]

        def tap(probe: Probe, here: Tensor = here) -> None:
            if probe.layer:
                read = probe.inputs if tower.readout is None else probe.inputs[:, tower.readout]
                tables[probe.layer - 1][here] = read.float().mean(1).cpu()

        tables[-1][here] = model.features(batch, tap=tap)[0].float().cpu()
        done += len(here)
        advance(len(here))
    return tables


def _moved(now: Tensor, then: Tensor) -> float:
    """Return the distance between two tables (n, D) of the same images, in units of the spread of the second."""
    now, then = now.double(), then.double()
    spread = (then - then.mean(0)).square().sum(1).mean().sqrt()
    return float((now - then).square().sum(1).mean().sqrt() / spread.clamp_min(1e-12))
