"""A Gaussian per class of what a head reads: to draw features from when the images are gone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.heads.base import Head
from lamina.lookback import Reduce
from lamina.seeds import generator_at

#: added to the diagonal of every covariance, which few images leave singular
RIDGE = 1e-4


class GaussianHead(Head):
    """A part of heads that can be balanced after every task, on features drawn from a Gaussian per class.

    A Gaussian is the mean and covariance of a class's features when it was learned; what prompts do to
    them later it does not know. A head that is this and another head, too, calls `remember` when it is made.

    Attributes:
        features: F.
        counts: (C,). means: (C, F). scatters: (C, F (F + 1) / 2), the lower triangle of the sum of outer
            products of what is left of features when their mean is gone. All float64.

    References:
        Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024, the head
        refinement of the CLIP variant.
    """

    looks_at = "features"
    features: int
    counts: Tensor
    means: Tensor
    scatters: Tensor

    def remember(self, features: int) -> None:
        """Make room for Gaussians of F features."""
        self.features = features
        self._lower = torch.tril_indices(features, features, device="cpu").unbind()
        for name, size in {"counts": (), "means": (features,), "scatters": (len(self._lower[0]),)}.items():
            self.register_buffer(name, torch.zeros(0, *size, dtype=torch.float64))
        self.begin_look()

    def begin_task(self, index: int, classes: Sequence[str], columns: Sequence[int]) -> None:
        super().begin_task(index, classes, columns)
        new = max(0, max(columns) + 1 - len(self.counts))
        self.counts = F.pad(self.counts, (0, new))
        self.means, self.scatters = (F.pad(rows, (0, 0, 0, new)) for rows in (self.means, self.scatters))

    def begin_look(self) -> None:
        self._roots: dict[int, Tensor] = {}
        self._draft: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by column: count, sum, sum of outer products

    def collect(self, features: Tensor, columns: Tensor) -> None:
        for column in columns.unique().tolist():
            rows = features[columns == column].double()
            parts = (torch.tensor(float(len(rows)), dtype=torch.float64), rows.sum(0), rows.mT @ rows)
            before = self._draft.get(column)
            self._draft[column] = parts if before is None else tuple(map(torch.add, before, parts))  # type: ignore[assignment]

    def end_look(self, reduce: Reduce) -> None:
        size = self.features
        met = reduce(torch.tensor([float(column in self._draft) for column in range(len(self.counts))]))
        for column in met.nonzero().flatten().tolist():
            nothing = (torch.zeros(()).double(), torch.zeros(size).double(), torch.zeros(size, size).double())
            count, total, moment = (reduce(part.to(self.means)) for part in self._draft.get(column, nothing))
            was, mean = self.counts[column].clone(), self.means[column].clone()  # not views of what changes below
            moment += self._full(self.scatters[column]) + was * torch.outer(mean, mean)
            self.counts[column] += count
            self.means[column] = (total + was * mean) / self.counts[column]
            moment -= self.counts[column] * torch.outer(self.means[column], self.means[column])
            self.scatters[column] = moment[self._lower]
        self.begin_look()

    def _load_from_state_dict(self, *arguments: object) -> None:
        super()._load_from_state_dict(*arguments)
        self._roots = {}

    def covariance(self, column: int) -> Tensor:
        """Return a class's covariance (F, F), float64, with a small ridge."""
        covariance = self._full(self.scatters[column]) / (self.counts[column] - 1).clamp_min(1)
        covariance.diagonal().add_(RIDGE)
        return covariance

    def draws(self, per_class: int, *address: int | str) -> tuple[Tensor, Tensor]:
        generator, features = generator_at(*address), []
        for column in range(len(self.counts)):
            normal = torch.randn(per_class, self.features, generator=generator).to(self.means.device)
            features.append(self.means[column].float() + normal @ self._root(column).mT)
        return torch.cat(features), torch.arange(len(self.counts)).repeat_interleave(per_class).to(self.means.device)

    def _root(self, column: int) -> Tensor:
        """Return the Cholesky factor (F, F), float32, of a class's covariance; kept until the next look back."""
        if column not in self._roots:
            self._roots[column] = torch.linalg.cholesky(self.covariance(column)).float()
        return self._roots[column]

    def _full(self, lower: Tensor) -> Tensor:
        out = lower.new_zeros(self.features, self.features)
        out[self._lower] = lower
        return out + out.tril(-1).mT
