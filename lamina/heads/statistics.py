"""Heads in closed form from class statistics, without an optimizer: they do not forget.

What they keep is a sum over images, so it is the same for every order of tasks. It stays true as long
as the features of old images stay where they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.heads.base import Head, Scores
from lamina.heads.moments import ClassStatistics, shrunk
from lamina.lookback import Reduce

#: ridges that `ridge` tries, as shares of the largest eigenvalue
_RIDGES = torch.logspace(-12, 3, 31, dtype=torch.float64)


class _ClosedForm(Head):
    """A head that keeps class statistics, and is remade from them when they change.

    Args:
        features: F.
        width: features after a fixed random projection with a ReLU; 0 leaves them as they are.
        trained: the head that gives the scores in training, where prompts learn from a gradient.
    """

    looks_at = "features"
    needs_moment = True
    projection: Tensor | None

    def __init__(self, features: int, *, width: int = 0, trained: Head | None = None) -> None:
        super().__init__()
        self.trained = trained
        self.register_buffer("projection", torch.randn(features, width) if width else None)
        self.seen = ClassStatistics(width or features, moment=self.needs_moment)
        self._made: list[Tensor] | None = None

    @property
    def statistics(self) -> ClassStatistics | None:
        return self.seen if self.projection is None and self.needs_moment else None

    def begin_task(self, index: int, classes: Sequence[str], columns: Sequence[int]) -> None:
        self.seen.grow(max(columns) + 1)
        self._made = None
        if self.trained is not None:
            self.trained.begin_task(index, classes, columns)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scores:
        if labels is not None and self.trained is not None:
            return self.trained(features, labels)
        if self._made is None or self._made[0].device != features.device or self._made[0].dtype != features.dtype:
            with torch.inference_mode(False), torch.no_grad():  # kept for later, when a gradient may be asked for
                self._made = [part.to(features) for part in self.solve()]
        centre, weight, bias = self._made
        return Scores((self._lifted(features) - centre) @ weight + bias)

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what makes scores of features x, all float64: centre (F,), weight (F, C) and bias (C,).

        The score is `(x - centre) @ weight + bias`; the centre keeps numbers small where float32 rounds.
        """
        raise NotImplementedError

    def centre(self) -> Tensor:
        """Return the mean of all features (F,), float64, as float32 has it, so that `x - centre` is exact near it."""
        return (self.seen.sums.sum(0) / self.seen.counts.sum().clamp_min(1)).float().double()

    def begin_look(self) -> None:
        self.seen.begin_look()

    def collect(self, features: Tensor, columns: Tensor) -> None:
        self.seen.collect(self._lifted(features), columns)

    def end_look(self, reduce: Reduce) -> None:
        self.seen.end_look(reduce)
        self._made = None

    def _lifted(self, features: Tensor) -> Tensor:
        return features if self.projection is None else F.relu(features @ self.projection.to(features.dtype))

    def _load_from_state_dict(self, *arguments: object) -> None:
        super()._load_from_state_dict(*arguments)
        self._made = None


class NearestMean(_ClosedForm):
    """Scores a class by the cosine between an image's features and the mean of the class's features.

    Features are brought to unit length before they are averaged.

    References:
        Rebuffi et al., iCaRL, CVPR 2017, section 2.1 (the classifier, on all images).
    """

    needs_moment = False

    def collect(self, features: Tensor, columns: Tensor) -> None:
        super().collect(features.double(), columns)  # before they are normalised: float32 would round what is summed

    def _lifted(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1)

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        means = F.normalize(self.seen.sums, dim=-1)
        return means.new_zeros(means.shape[1]), means.mT, means.new_zeros(len(means))


class Discriminant(_ClosedForm):
    """Linear discriminant analysis: a Gaussian per class, one covariance for all, every class as likely.

    The covariance within classes is shrunk as far as few images demand (OAS). Scores are
    log-probabilities up to a common constant.

    References:
        Hastie, Tibshirani and Friedman, The Elements of Statistical Learning (linear discriminant analysis).
    """

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        centre = self.centre()
        away = self.seen.means() - centre
        weight = torch.linalg.solve(shrunk(*self.seen.covariance()), away.mT)
        return centre, weight, -0.5 * (away * weight.mT).sum(1)


class Ridge(_ClosedForm):
    """Ridge regression of one-hot labels on features, as RanPAC has it.

    Args:
        ridge: what is added to the diagonal of the second moment; None takes what generalised
            cross-validation finds best, from the same sums, so that no image is held out for it.

    References:
        McDonnell et al., RanPAC: Random Projections and Pre-trained Models for Continual Learning,
        NeurIPS 2023.
        Golub, Heath and Wahba, Generalized Cross-Validation as a Method for Choosing a Good Ridge
        Parameter, Technometrics 1979.
    """

    def __init__(
        self, features: int, *, width: int = 0, trained: Head | None = None, ridge: float | None = None
    ) -> None:
        super().__init__(features, width=width, trained=trained)
        self.ridge = ridge

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        moment, targets, centre = self.seen.moment, self.seen.sums.mT, self.centre()
        if self.ridge is None:
            weight = _cross_validated(moment, targets, float(self.seen.counts.sum()))
        else:
            identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
            root = torch.linalg.cholesky(moment + self.ridge * identity)
            weight = torch.cholesky_solve(targets, root)
        return centre, weight, centre @ weight


def _cross_validated(moment: Tensor, targets: Tensor, images: float) -> Tensor:
    """Return the ridge solution (F, C) whose generalised cross-validation error is least."""
    values, basis = torch.linalg.eigh(moment)
    values = values.clamp_min(0)
    turned = basis.mT @ targets
    explained = turned.square().sum(1)
    best, chosen = float("inf"), values[-1].clamp_min(1e-12)
    for ridge in values[-1].clamp_min(1e-12) * _RIDGES.to(values.device):
        shrink = 1 / (values + ridge)
        freedom = images - (values * shrink).sum()
        if freedom < 1e-3 * images:
            continue  # so little ridge that the images are interpolated: both errors are rounding
        # |Y - X W|² with XᵀX W = targets shrunk; |Y|² is the number of images, since labels are one-hot
        residual = images - (explained * shrink * (2 - values * shrink)).sum()
        error = float(residual / freedom.square())
        if error < best:
            best, chosen = error, ridge
    return basis @ (turned / (values + chosen)[:, None])
