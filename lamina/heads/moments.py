"""Sums over images that say where classes lie in feature space: all that is kept of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.errors import ShapeError
from lamina.lookback import Reduce, Watcher


class ClassStatistics(nn.Module, Watcher):  # in this order: what is remembered is the module's own state_dict
    """Sums, counts and one second moment of the features of all classes met so far.

    Everything is a sum over images in float64, so neither the split into batches nor the order of tasks
    matters.

    Args:
        features: F.
        moment: whether to keep the second moment.

    Attributes:
        sums: (C, F). counts: (C,). moment: (F, F), of features of all classes together; (0, 0) if not kept.
    """

    looks_at = "features"
    sums: Tensor
    counts: Tensor
    moment: Tensor

    def __init__(self, features: int, *, moment: bool = True) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(0, features, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.float64))
        size = features if moment else 0
        self.register_buffer("moment", torch.zeros(size, size, dtype=torch.float64))
        self.begin_look()

    def grow(self, classes: int) -> None:
        """Make room for `classes` classes in all; called before the look back that brings the new ones."""
        new = max(0, classes - len(self.counts))
        self.sums, self.counts = F.pad(self.sums, (0, 0, 0, new)), F.pad(self.counts, (0, new))
        self.begin_look()

    def begin_look(self) -> None:
        self._draft = [torch.zeros_like(self.sums), torch.zeros_like(self.counts), torch.zeros_like(self.moment)]

    def collect(self, features: Tensor, columns: Tensor) -> None:
        sums, counts, moment = self._draft
        rows, columns = features.double().to(sums.device), columns.to(sums.device)
        sums.index_add_(0, columns, rows)
        counts.index_add_(0, columns, torch.ones_like(columns, dtype=counts.dtype))
        if len(moment):
            moment.addmm_(rows.mT, rows)

    def end_look(self, reduce: Reduce) -> None:
        sums, counts, moment = (reduce(part) for part in self._draft)
        self.sums, self.counts = self.sums + sums, self.counts + counts
        self.moment = self.moment + (moment + moment.mT) / 2  # exactly symmetric, so that half of it can be stored
        self.begin_look()

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take back what `state_dict` returned, for however many classes it was.

        Raises:
            ShapeError: when a tensor in it does not fit.
        """
        classes = len(state["counts"])
        shapes = {"sums": (classes, self.sums.shape[1]), "counts": (classes,), "moment": tuple(self.moment.shape)}
        for name, shape in shapes.items():
            if state[name].shape != shape:
                raise ShapeError(f"{name} of the classes must have shape {shape}; got {tuple(state[name].shape)}")
        self.grow(classes)
        return super().load_state_dict(state, strict, assign)

    def means(self) -> Tensor:
        """Return the mean features (C, F) of each class; zeros for a class without images."""
        return self.sums / self.counts.clamp_min(1)[:, None]

    def covariance(self) -> tuple[Tensor, float]:
        """Return the covariance (F, F) within classes, and how many independent images it rests on."""
        freedom = max(float(self.counts.sum() - (self.counts > 0).sum()), 1.0)
        return (self.moment - self.sums.mT @ self.means()) / freedom, freedom

    def spread(self) -> float:
        """Return the root of the mean squared distance of features from their mean."""
        count = self.counts.sum().clamp_min(1)
        centre = self.sums.sum(0) / count
        return float((self.moment.trace() / count - centre @ centre).clamp_min(0).sqrt())


def shrinkage(covariance: Tensor, count: float) -> float:
    """Return how far few images demand that a covariance be pulled towards a multiple of the identity, in (0, 1].

    Args:
        covariance: (F, F), float64, measured.
        count: n, how many independent images it rests on.

    References:
        Chen et al., Shrinkage Algorithms for MMSE Covariance Estimation, IEEE TSP 2010, equation 23 (OAS).
    """
    size = len(covariance)
    squares, square = covariance.square().sum(), covariance.trace().square()
    above = (1 - 2 / size) * squares + square
    below = (count + 1 - 2 / size) * (squares - square / size)
    return max(1.0 if below <= 0 else min(1.0, float(above / below)), 1e-6)


def shrunk(covariance: Tensor, count: float) -> Tensor:
    """Return a covariance (F, F), pulled towards a multiple of the identity as `shrinkage` says."""
    size, share = len(covariance), shrinkage(covariance, count)
    level = (covariance.trace() / size).clamp_min(1e-12)  # images that are all alike have no spread at all
    return (1 - share) * covariance + share * level * torch.eye(size, dtype=covariance.dtype, device=covariance.device)
