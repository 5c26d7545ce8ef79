"""Prompts of their own for every task, found by a key per class (CPrompt)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.splice import Splice
from lamina.data.stream import places
from lamina.prompts.base import PromptModule, Scripted
from lamina.prompts.components import orthogonal_rows


class ConsistentPrompts(PromptModule):
    """Prompt tokens per task, which enter at a few blocks and travel on; each class of a task has a key.

    In training every image is shown with the prompts of the true task and, from the second task on, once more
    with those of a task drawn for it, any so far as likely: two copies of a batch, in this order. A head can
    so learn from prompts as wrong as those that test images may get. In evaluation an image takes the
    prompts of the task that has the class whose key is nearest its query.

    A task's prompts start as a copy of those before; the first start uniform within 1 / sqrt(D). What belongs to
    earlier tasks is frozen. Keys learn from a loss of their own, "keys": the cross-entropy of the cosines between
    a query and all keys so far, not divided by any temperature. A class met again has a key with every task
    that it comes with.

    Args:
        layers: blocks at which tokens enter, ascending.
        length: M, how many enter at each of them; after the last there are as many times M.
        width: D of the tower.
        features: F of the query.
        keys_in_advance: so many keys are drawn at the start, orthogonal to each other, for the first classes to come.
            Keys of further classes are drawn when their task begins, orthogonal to what the others have become;
            where all F directions are taken, anyhow.

    References:
        Gao et al., Consistent Prompting for Rehearsal-Free Continual Learning, CVPR 2024.
    """

    query = "frozen"
    reserve: Tensor

    def __init__(
        self, layers: Sequence[int], length: int, width: int, features: int, *, keys_in_advance: int = 0
    ) -> None:
        super().__init__()
        self.layers, self.shape, self.features = list(layers), (len(layers), length, width), features
        self.values = nn.ParameterList()  # per task (blocks, M, D)
        self.keys = nn.ParameterList()  # per task (classes of the task, F)
        self.columns: list[list[int]] = []  # per task
        self.register_buffer("reserve", new_keys(keys_in_advance, features))

    @property
    def pool_size(self) -> int:
        return len(self.values)

    def begin_task(self, index: int, columns: Sequence[int] = ()) -> None:
        self.requires_grad_(False)
        if len(self.values):
            value = self.values[-1].detach().clone()
        else:
            value = torch.empty(self.shape).uniform_(-1, 1) / self.shape[-1] ** 0.5
        first = sum(map(len, self.columns))
        waiting = self.reserve[first : first + len(columns)]
        taken = [*(rows.detach() for rows in self.keys), waiting]
        drawn = new_keys(len(columns) - len(waiting), self.features, taken)
        self.values.append(nn.Parameter(value))
        self.keys.append(nn.Parameter(torch.cat([waiting, drawn.to(waiting)])))
        self.columns.append(list(columns))

    def nearest(self, query: Tensor) -> Tensor:
        """Return the tasks (B,) that have the class whose key is nearest to a query (B, F); of equals the first."""
        sizes = torch.tensor([len(columns) for columns in self.columns], device=query.device)
        tasks = torch.arange(len(sizes), device=query.device).repeat_interleave(sizes)
        return tasks[self.cosines(query).argmax(-1)]

    def cosines(self, query: Tensor, tasks: int | None = None) -> Tensor:
        """Return the cosines (B, keys) of queries (B, F) and all keys, or those of the first `tasks` tasks."""
        keys = torch.cat(list(self.keys)[:tasks])
        return F.normalize(query.to(keys.dtype), dim=-1) @ F.normalize(keys, dim=-1).T

    def start(self, query: Tensor | None = None, task: int | None = None) -> _Started:
        if query is None:
            raise ValueError("prompts are found by queries; give `start` the features of the same images")
        if task is None:
            chosen = self.nearest(query)
        else:
            chosen = torch.full((len(query),), task, device=query.device)
            if task:  # the only task there is cannot be taken for another
                drawn = torch.randint(task + 1, (len(query),)).to(query.device)
                chosen = torch.cat([chosen, drawn])

        def at(layer: int, tokens: Tensor, carried: Tensor | None) -> Splice | None:
            if layer not in self.layers:
                return None
            place = self.layers.index(layer)
            entering = torch.stack([value[place] for value in self.values])[chosen]
            return Splice(tokens=entering if carried is None else torch.cat([carried, entering.to(carried)], dim=1))

        started = _Started(at)
        started.chosen = chosen[:, None]
        if task is not None:
            started.copies = 2 if task else 1
            started.cosines, started.columns = self.cosines(query, task + 1), self.columns[task]
        return started


class _Started(Scripted):
    """A pass whose keys learn when it is told which classes the images show.

    Attributes:
        cosines: (B, keys); None in evaluation. Keys of the true task come last.
        columns: of the true task.
    """

    def __init__(self, script: Callable[[int, Tensor, Tensor | None], Splice | None]) -> None:
        super().__init__(script)
        self.cosines: Tensor | None = None
        self.columns: Sequence[int] = ()

    def losses(self, labels: Tensor | None) -> dict[str, Tensor]:
        if self.cosines is None or labels is None:
            return self.terms
        first = self.cosines.shape[1] - len(self.columns)
        return {**self.terms, "keys": F.cross_entropy(self.cosines, first + places(labels, self.columns))}


def new_keys(count: int, size: int, old: Sequence[Tensor] = ()) -> Tensor:
    """Draw keys (count, size) of unit length, orthogonal to each other and to `old` ones (n, size) as far as room goes.

    >>> keys = new_keys(3, 5, [torch.eye(5)[:3]])
    >>> (keys[:2, :3].abs() < 1e-6).all(), keys.norm(dim=1).round(decimals=4)
    (tensor(True), tensor([1., 1., 1.]))
    """
    free = min(count, max(size - sum(map(len, old)), 0))
    orthogonal = orthogonal_rows(free, size, old) if free else torch.empty(0, size)
    return torch.cat([orthogonal, F.normalize(torch.randn(count - free, size), dim=-1)])
