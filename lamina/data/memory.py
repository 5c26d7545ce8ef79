"""Which old training images are kept to be learned from again: their addresses, never an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.data.stream import Split, Task, mixed
from lamina.errors import ConfigError, ShapeError
from lamina.seeds import generator_at

Choice = Literal["random", "first", "herding", "entropy", "energy", "variance"]

#: what a choice looks at: "draws" are the scores of each draw, from a head that draws
Wanted = Literal["nothing", "features", "scores", "draws"]

#: what each way to choose looks at
_WANTED: dict[str, Wanted] = {
    "random": "nothing",
    "first": "nothing",
    "herding": "features",
    "entropy": "scores",
    "energy": "scores",
    "variance": "draws",
}


class Memory:
    """Keeps the addresses of some training images of every class met so far: task, position in its split, column.

    When a task is over, the images of each of its classes are put in an order of preference, and the first of them are
    kept. Where all classes share a budget, room gets less with every new class, and what is least preferred goes. So
    what is kept of a class is always the beginning of its order. A class that comes in several tasks prefers the first
    of each task, then the second of each, and so on: its room is shared evenly by the tasks that have as many images.

    Args:
        per_class: how many images of a class are kept at most.
        total: how many in all, the same number for every class met so far; what is left over stays empty.
        choose: the order of preference. "random" draws it, by address; "first" is the order of the split; "herding"
            takes the image that brings the mean of those taken nearest to that of all, features being of unit length;
            "entropy" takes those first of which the model is least sure; "energy" those that look least known, whose
            scores have the smallest log-sum-exp; "variance" those on whose probabilities draws agree most. Equals are
            taken in the order of the split.

    Raises:
        ConfigError: when neither or both budgets are given, one is below 1, or nobody knows the choice.

    References:
        Rebuffi et al., iCaRL, CVPR 2017, algorithms 4 and 5: herding, and less room for each class.
    """

    def __init__(self, per_class: int | None = None, total: int | None = None, choose: Choice = "random") -> None:
        budgets = {"per_class": per_class, "total": total}
        if (per_class is None) == (total is None):
            raise ConfigError(f"a memory has one budget, per_class or total; got {_said(budgets)}: give one of them")
        for name, value in budgets.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1; got {value}; a learner that keeps nothing has no memory")
        if choose not in _WANTED:
            raise ConfigError(f"choose must be one of {', '.join(_WANTED)}; got {choose!r}")
        self.per_class, self.total, self.choose = per_class, total, choose
        self._kept: dict[int, dict[int, list[int]]] = {}  # positions by column and task, best first

    def __str__(self) -> str:
        """Return the budget and the choice in words, as in "10 per class, random"."""
        return f"{f'{self.total} in all' if self.per_class is None else f'{self.per_class} per class'}, {self.choose}"

    # not a length, with which a memory that has kept nothing yet would be false
    @property
    def images(self) -> int:
        """How many are kept."""
        return sum(len(positions) for tasks in self._kept.values() for positions in tasks.values())

    @property
    def wants(self) -> Wanted:
        """What `keep` looks at, of each training image of a task."""
        return _WANTED[self.choose]

    @property
    def room(self) -> int:
        """How many images of each class there is room for, as many classes as were met so far."""
        return self.per_class if self.per_class is not None else (self.total or 0) // max(1, len(self._kept))

    def check(self, tasks: Sequence[Task]) -> None:
        """Make sure that no class of all tasks of a run will be without an image.

        Raises:
            ConfigError: when there are more classes than the memory has images.
        """
        classes = len({column for task in tasks for column in task.columns})
        if self.total is not None and self.total < classes:
            raise ConfigError(
                f"a memory needs an image of each class; got {self.total} in all for {classes} classes: give it at "
                f"least {classes}, or a number per class"
            )

    def keep(
        self,
        task: Task,
        seed: int,
        *,
        features: Tensor | None = None,
        scores: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> None:
        """Choose among the training images of a task that is over, and let go of old ones that have no room left.

        Args:
            seed: of the run.
            features: (n, F), of the task's training images in their order; for "herding".
            scores: (n, C), the same, over all classes met; for "entropy" and "energy".
            draws: (n, 1), what `disagreement` says of their draws; for "variance".

        Raises:
            ShapeError: when what is looked at is missing, or has another number of rows.
        """
        seen = {"features": features, "scores": scores, "draws": draws}.get(self.wants)
        if self.wants != "nothing" and (seen is None or seen.ndim != 2 or len(seen) != len(task.train)):
            got = "none" if seen is None else f"shape {tuple(seen.shape)}"
            raise ShapeError(
                f"choose={self.choose!r} takes a row of {self.wants} for each of {len(task.train)} images; got {got}"
            )
        for column in task.columns:
            self._kept.setdefault(column, {})
        for column in task.columns:
            own = np.flatnonzero(task.train.columns == column)
            rows = seen[torch.from_numpy(own)].double().cpu() if seen is not None else None
            chosen = own[self._preferred(len(own), rows, (seed, "memory", task.index, column))]
            self._kept[column][task.index] = chosen.tolist()
        for tasks in self._kept.values():
            _shrink(tasks, self.room)

    def _preferred(self, count: int, rows: Tensor | None, address: tuple[int | str, ...]) -> np.ndarray:
        """Return the places (k,) of the best images of a class among all `count` of it, k at most `room`."""
        if rows is None:
            drawn = self.choose == "random"
            order = torch.randperm(count, generator=generator_at(*address)) if drawn else torch.arange(count)
        elif self.choose == "herding":
            order = herded(rows, self.room)
        elif self.choose == "entropy":
            order = entropies(rows).argsort(descending=True, stable=True)
        elif self.choose == "energy":
            order = rows.logsumexp(1).argsort(stable=True)
        else:
            order = rows[:, 0].argsort(stable=True)
        return order[: self.room].numpy()

    def of(self, task: Task) -> Split:
        """Return what is kept of a task that brings its images, in the order in which they came."""
        positions = [position for tasks in self._kept.values() for position in tasks.get(task.index, ())]
        return task.train.take(np.sort(np.asarray(positions, np.int64)))

    def split_of(self, tasks: Sequence[Task]) -> Split:
        """Return what is kept of one task or more that bring their images, in the order in which they came."""
        return mixed([self.of(task) for task in tasks])

    def state_dict(self) -> dict[str, Any]:
        """Return the columns met and the addresses (task, position, column), in order of preference; whole numbers."""
        kept = [
            [task, position, column]
            for column, tasks in self._kept.items()
            for task, positions in tasks.items()
            for position in positions
        ]
        return {"columns": list(self._kept), "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._kept = {column: {} for column in state["columns"]}
        for task, position, column in state["kept"]:
            self._kept[column].setdefault(task, []).append(position)


def herded(features: Tensor, count: int) -> Tensor:
    """Return which features to take, (k,), each bringing the mean of those taken nearest to that of all.

    Args:
        features: (n, F), float64; their lengths do not matter.
        count: how many to take; k is n where there are fewer.

    >>> herded(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), 2)
    tensor([1, 0])
    """
    units = F.normalize(features, dim=1)
    mean, taken = units.mean(0), torch.zeros(units.shape[1], dtype=units.dtype)
    left = torch.full((len(units),), True)
    order: list[int] = []
    for number in range(1, min(count, len(units)) + 1):
        # |mean - (taken + unit) / number|^2, as it is: a shorter form would round differently where two are equal
        distances = (mean - (taken + units) / number).square().sum(1)
        best = int(distances.masked_fill(~left, float("inf")).argmin())
        order.append(best)
        left[best] = False
        taken = taken + units[best]
    return torch.tensor(order, dtype=torch.int64)


def entropies(scores: Tensor) -> Tensor:
    """Return the entropy (n,) of the distribution over classes that each row of scores (n, C) stands for.

    >>> entropies(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])).tolist()
    [0.6931471824645996, 0.0]
    """
    return torch.special.entr(scores.softmax(1)).sum(1)


def disagreement(scores: Tensor) -> Tensor:
    """Return how far draws differ (n,): the variance of probabilities over draws, summed over classes.

    Args:
        scores: (S, n, C), of each draw.

    >>> disagreement(torch.tensor([[[0.0, 99.0], [0.0, 0.0]], [[99.0, 0.0], [0.0, 0.0]]])).tolist()
    [0.5, 0.0]
    """
    return scores.double().softmax(-1).var(0, correction=0).sum(-1)


def _shrink(tasks: dict[int, list[int]], room: int) -> None:
    """Leave of a class, of each task in turn the best that is left, as many as there is room for."""
    turns = sorted((place, task) for task, positions in tasks.items() for place in range(len(positions)))
    for task, positions in tasks.items():
        del positions[sum(other == task for _, other in turns[:room]) :]


def _said(values: dict[str, int | None]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
