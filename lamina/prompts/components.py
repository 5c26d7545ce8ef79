"""Prefixes of keys and values that are sums of components, weighted for every image (CODA-Prompt)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lamina.backbones.splice import PromptPass, Splice
from lamina.data.stream import Task
from lamina.errors import ConfigError
from lamina.prompts.base import PromptModule, Scripted


class ComponentPrefixes(PromptModule):
    """Components with a key and an attention vector each; an image's prefix is their weighted sum.

    A weight is the cosine between the component's key and the query, after the attention vector has multiplied
    the query channel by channel: between -1 and 1, no softmax. Every task adds components and freezes those
    before; all there are take part, in training and in evaluation. New rows (a component is one row of
    2 x M x D numbers) have unit norm and are orthogonal to each other and to all rows before them.

    Args:
        layers: blocks that get prefixes; nothing is shared between them.
        components: how many a task adds.
        length: M, rows for keys, and as many for values.
        width: D of the tower.
        features: F of the query.
        orthogonality: weight of a loss that keeps rows orthonormal while they learn; see `far_from_orthonormal`.

    References:
        Smith et al., CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual
        Learning, CVPR 2023.
    """

    query = "frozen"

    def __init__(
        self,
        layers: Sequence[int],
        components: int,
        length: int,
        width: int,
        features: int,
        *,
        orthogonality: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers, self.components, self.orthogonality = list(layers), components, orthogonality
        self.shape, self.features = (2, length, width), features
        self.prefixes = nn.ParameterList()  # per task (blocks, components, 2, M, D)
        self.keys = nn.ParameterList()  # per task (blocks, components, F)
        self.attentions = nn.ParameterList()  # per task (blocks, components, F)

    @property
    def room(self) -> int:
        """How many components there can be in all: rows, of prefixes or of keys, that are orthogonal to each other."""
        return min(self.features, torch.Size(self.shape).numel())

    @property
    def tasks_left(self) -> int:
        """How many more tasks find room; the last of them may get fewer components."""
        return math.ceil((self.room - self._there) / self.components)

    @property
    def _there(self) -> int:
        return sum(part.shape[1] for part in self.keys)

    def check(self, tasks: Sequence[Task]) -> None:
        """Refuse more tasks than all of `components` have room for.

        Raises:
            ConfigError: when there are more.
        """
        most = self.room // len(tasks)
        if self.components > most:
            way_out = f"set components={most} or fewer" if most else f"take at most {self.room} tasks"
            raise ConfigError(
                f"components of all tasks must be orthogonal to each other, so there is room for {self.room}; got "
                f"{len(tasks)} tasks of {self.components}, {len(tasks) * self.components} in all: {way_out}"
            )

    def begin_task(self, index: int, columns: Sequence[int] = ()) -> None:
        """Freeze what there is and add components; where room for so many directions is not left, as many as there is.

        Raises:
            ConfigError: when there is none left.
        """
        there, room = self._there, self.room
        count = min(self.components, room - there)
        if count < 1:
            raise ConfigError(
                f"task {index + 1} finds no room for components: there are {there}, and no more than {room} rows of "
                f"{room} numbers can be orthogonal to each other; start anew with fewer components for each task"
            )
        self.requires_grad_(False)
        for parts, shape in (
            (self.prefixes, self.shape),
            (self.keys, (self.features,)),
            (self.attentions, (self.features,)),
        ):
            new = []
            for place in range(len(self.layers)):
                old = [part.detach()[place].flatten(1) for part in parts]
                new.append(orthogonal_rows(count, torch.Size(shape).numel(), old).unflatten(1, shape))
            parts.append(nn.Parameter(torch.stack(new)))

    def weights(self, query: Tensor, layer: int) -> Tensor:
        """Return the weights (B, components so far) of queries (B, F) at block `layer`."""
        place, query = self.layers.index(layer), query.to(self.keys[0].dtype)
        keys, attentions = (torch.cat([part[place] for part in parts]) for parts in (self.keys, self.attentions))
        tiny = torch.finfo(query.dtype).tiny  # a query of zeros gives weights of zero
        products = query @ (attentions * keys).T
        attended = (query.square() @ attentions.square().T).clamp_min(tiny).sqrt()  # (B, components)
        return products / attended / keys.square().sum(-1).clamp_min(tiny).sqrt()

    def start(self, query: Tensor | None = None, task: int | None = None) -> PromptPass:
        if query is None:
            raise ValueError("components are weighted by queries; give `start` the features of the same images")

        def at(layer: int, tokens: Tensor, carried: Tensor | None) -> Splice | None:
            if layer not in self.layers:
                return None
            place = self.layers.index(layer)
            prefixes = torch.cat([part[place] for part in self.prefixes])  # (components, 2, M, D)
            mixed = self.weights(query, layer) @ prefixes.flatten(1)
            keys, values = mixed.unflatten(1, self.shape).unbind(1)
            return Splice(prefix=(keys, values))

        started = Scripted(at)
        if task is not None and self.orthogonality:
            started.terms["orthogonality"] = self.orthogonality * self._far_from_orthonormal()
        return started

    def _far_from_orthonormal(self) -> Tensor:
        """Sum over blocks and over components, keys and attention vectors."""
        terms = []
        for parts in (self.prefixes, self.keys, self.attentions):
            terms += [far_from_orthonormal(rows.flatten(1)) for rows in torch.cat(list(parts), dim=1)]
        return torch.stack(terms).sum()


def orthogonal_rows(count: int, size: int, old: Sequence[Tensor] = ()) -> Tensor:
    """Draw rows (count, size), float32, of unit norm, orthogonal to each other and to all `old` rows (n, size).

    Old rows need be neither orthogonal nor independent: what counts is what they span.

    >>> rows = orthogonal_rows(2, 5, [torch.ones(1, 5), torch.eye(5)[:1]])
    >>> rows.sum(1).abs().max() < 1e-6, rows[:, 0].abs().max() < 1e-6
    (tensor(True), tensor(True))
    """
    new = torch.randn(count, size)
    columns = torch.cat([*(part.to(new.device) for part in old), new]).double().T
    basis, triangle = torch.linalg.qr(columns)
    signs = triangle.diagonal()[-count:].sign()  # so that rows are like the draws, whatever the solver's signs
    return (basis[:, -count:] * signs).T.to(new.dtype).contiguous()


def far_from_orthonormal(rows: Tensor) -> Tensor:
    """Return the mean squared difference between the products of rows (n, size) and those of orthonormal ones.

    >>> far_from_orthonormal(torch.eye(4)[:3]), far_from_orthonormal(torch.zeros(4, 7))
    (tensor(0.), tensor(0.2500))
    """
    return (rows @ rows.T - torch.eye(len(rows)).to(rows)).square().mean()
