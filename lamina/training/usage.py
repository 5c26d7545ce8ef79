"""How often test images choose each prompt of a pool, exact over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lamina.data.stream import Task
from lamina.lookback import Reduce
from lamina.model import Batch, Output


class Usage:
    """Counts choices by task, class and prompt while `lamina.training.evaluation.accuracies` goes through images.

    Each process counts the choices of its share of the images; `counts` adds them up.

    Args:
        tasks: whose test images are seen, in order.
        prompts: how many there are to choose from; 0 counts nothing.
    """

    def __init__(self, tasks: Sequence[Task], prompts: int) -> None:
        self.tasks, self.prompts = tasks, prompts
        columns = 1 + max(column for task in tasks for column in task.columns)
        self._table = torch.zeros(len(tasks), columns, prompts, dtype=torch.int64)

    def see(self, place: int, batch: Batch, output: Output) -> None:
        """Count what images of the task at `place` chose."""
        if self.prompts and output.chosen is not None:
            table = self._table[place]
            cells = batch.targets.cpu()[:, None] * self.prompts + output.chosen.cpu()  # (B, k)
            table += torch.bincount(cells.flatten(), minlength=table.numel()).view_as(table)

    def counts(self, reduce: Reduce) -> list[list[list[int]]]:
        """Return, for each class of each task, how often each prompt was chosen; empty where none ever was."""
        if not self.prompts:
            return []
        table = reduce(self._table)
        if not table.any():
            return []
        return [table[place, list(task.columns)].tolist() for place, task in enumerate(self.tasks)]
