"""How sure a prediction is, and whether an image looks like nothing that was learned.

Both need no old image. Class statistics (sums, counts, one second moment of features) are gathered in
the look back of every task. A temperature, fitted on the images held out of a task, turns logits into
probabilities; the tasks' temperatures are averaged. (Features drawn from the class statistics, to stand
for old classes in that fit, were tried: they are too easy, and made predictions overconfident.) Two scores
say how new an image looks; each is read on a scale on which 0 is a typical held-out image and 1 is what
95 % of the held-out images stay below.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from lamina.config import Settings
from lamina.heads.moments import ClassStatistics, shrunk

#: names of the scores, the one that is shown first
SCORES = ("mahalanobis", "energy")

#: share of known images that a threshold leaves alone
KNOWN = 0.95

#: with fewer held-out images, thresholds and temperatures are rough
FEW = 20

#: held-out scores of a task are kept as so many quantiles
_QUANTILES = 101


def gaussians(statistics: ClassStatistics) -> Gaussians:
    """Return a Gaussian per class, with one covariance for all, shrunk where images are few."""
    covariance, freedom = statistics.covariance()
    covariance = shrunk(covariance, freedom)
    covariance.diagonal().add_(1e-12 * statistics.moment.trace() / freedom)  # rounding of sums, where images are alike
    return Gaussians(statistics.means().float(), torch.linalg.cholesky(covariance))


class Gaussians:
    """A Gaussian per class over features; all share one covariance.

    Args:
        means: (C, F).
        root: (F, F), float64, the lower Cholesky factor of the covariance.

    References:
        Lee et al., A Simple Unified Framework for Detecting Out-of-Distribution Samples, NeurIPS 2018,
        section 2.1.
    """

    def __init__(self, means: Tensor, root: Tensor) -> None:
        self.means, self.root = means, root
        # x -> L^-1 x makes the covariance the identity, so distances become Euclidean
        identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
        self.whiten = torch.linalg.solve_triangular(root, identity, upper=False).mT.float()
        self._centres = self.means @ self.whiten

    def distances(self, features: Tensor) -> Tensor:
        """Return the Mahalanobis distance (B,) of features (B, F) to the nearest class mean."""
        white = features.float() @ self.whiten.to(features.device)
        centres = self._centres.to(features.device)
        # Expanded squares: the difference (B, C, F) would be large. Tiny negatives are rounding.
        squared = white.square().sum(1, keepdim=True) - 2 * white @ centres.mT + centres.square().sum(1)
        return squared.min(dim=1).values.clamp_min(0).sqrt()


class Known(Settings):
    """What the held-out images of one task said, in plain numbers.

    Attributes:
        images: how many there were.
        temperature: that made the logits most likely to give their labels; None where one class left no choice.
        quantiles: of how new they look, by score.
    """

    images: int = Field(ge=0)
    temperature: float | None = Field(None, gt=0)
    quantiles: dict[str, list[float]] = Field(default_factory=dict)


class Confidence(Settings):
    """What turns logits and features into probabilities and novelty."""

    tasks: list[Known] = Field(default_factory=list)

    @property
    def temperature(self) -> float:
        """The geometric mean of the tasks' temperatures, weighted by their held-out images; 1 without any."""
        fitted = [(known.images, known.temperature) for known in self.tasks if known.temperature is not None]
        images = sum(count for count, _ in fitted)
        return math.exp(sum(count * math.log(temperature) for count, temperature in fitted) / max(images, 1))

    @property
    def unit(self) -> float:
        """The temperature of the first task: what energies are measured at, so that they can be compared later."""
        return next((known.temperature for known in self.tasks if known.temperature is not None), 1.0)

    def scale(self, score: str) -> tuple[float, float] | None:
        """Return the median and the threshold of a score over held-out images of all tasks; None without any.

        As long as there are fewer than 20, of which 5 % are less than one, the two are kept at least a unit of the
        score apart: of distance, or of energy one temperature.
        """
        kept = [known for known in self.tasks if score in known.quantiles]
        if not kept:
            return None
        values = np.concatenate([known.quantiles[score] for known in kept])
        weights = np.concatenate([np.full(len(known.quantiles[score]), known.images) for known in kept])
        order = np.argsort(values, kind="stable")
        share = (np.cumsum(weights[order]) - weights[order] / 2) / weights.sum()
        middle, limit = np.interp([0.5, KNOWN], share, values[order])
        few = sum(known.images for known in kept) < FEW
        least = (1.0 if score == "mahalanobis" else self.unit) if few else 1e-9 * max(1.0, abs(middle))
        return float(middle), float(max(limit, middle + least))


class Sureness(NamedTuple):
    """What is said of a batch of images.

    Attributes:
        probabilities: (B, C), float32.
        novelty: of each score (B,), float32: 0 is a typical known image, above 1 looks new; raw scores as
            long as no images were ever held out.
        uncertainty: in nats (B,): the entropy of the probabilities; where the head draws, also what `uncertainty` says
            of its draws.
    """

    probabilities: Tensor
    novelty: dict[str, Tensor]
    uncertainty: dict[str, Tensor] = {}


def sureness(
    logits: Tensor, features: Tensor, gaussians: Gaussians, confidence: Confidence, draws: Tensor | None = None
) -> Sureness:
    """Turn logits (B, C) and features (B, F) into probabilities, novelty and uncertainty.

    Args:
        draws: (S, B, C), of a head that draws.
    """
    logits = logits.float()
    novelty = {}
    for name, values in raw_scores(logits, features, gaussians, confidence.unit).items():
        scale = confidence.scale(name)
        novelty[name] = values if scale is None else (values - scale[0]) / (scale[1] - scale[0])
    scaled = logits / confidence.temperature
    probabilities = scaled.softmax(-1)
    of_draws = {} if draws is None else uncertainty(draws.float() / confidence.temperature)
    return Sureness(probabilities, novelty, {"entropy": entropy(probabilities), **of_draws})


def raw_scores(logits: Tensor, features: Tensor, gaussians: Gaussians, unit: float) -> dict[str, Tensor]:
    """Return how new images look, (B,) per score; higher is newer.

    Args:
        unit: temperature that energies are measured at.

    References:
        Lee et al., NeurIPS 2018 (mahalanobis); Liu et al., Energy-based Out-of-distribution Detection,
        NeurIPS 2020 (energy).
    """
    energy = -unit * torch.logsumexp(logits.float() / unit, dim=-1)
    return dict(zip(SCORES, (gaussians.distances(features), energy), strict=True))


def learn_confidence(
    before: Confidence, logits: Tensor, features: Tensor, labels: Tensor, gaussians: Gaussians
) -> Confidence:
    """Fit a temperature to a task's held-out images, over all classes met, and note how new they look.

    Args:
        logits, features, labels: (n, C), (n, F), (n,) of the held-out images; n may be 0.
    """
    if not len(labels):
        return Confidence(tasks=[*before.tasks, Known(images=0, temperature=None)])
    choice = logits.shape[-1] > 1  # one class alone says nothing about temperature or energy
    known = Known(images=len(labels), temperature=fitted_temperature(logits, labels) if choice else None)
    after = Confidence(tasks=[*before.tasks, known])
    levels = np.linspace(0, 1, _QUANTILES)
    scores = raw_scores(logits, features, gaussians, after.unit).items()
    told = [(name, values) for name, values in scores if choice or name != "energy"]
    quantiles = {name: np.quantile(values.double().numpy(), levels).tolist() for name, values in told}
    return Confidence(tasks=[*before.tasks, known.model_copy(update={"quantiles": quantiles})])


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature that makes logits (n, C) most likely to give labels (n,).

    Labels are smoothed by 1 / (n + 2): a few images that are all right would otherwise ask for certainty.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 4.2.
        Platt, Probabilistic Outputs for Support Vector Machines, 1999, section 2.2 (the smoothing).
    """
    smoothing = 1 / (len(labels) + 2)
    spread = max(float(logits.double().std()), 1e-6) if logits.numel() > 1 else 1.0

    def loss(log_ratio: float) -> float:
        scaled = logits.double() / (spread * math.exp(log_ratio))
        return float(F.cross_entropy(scaled, labels, label_smoothing=smoothing))

    found = minimize_scalar(loss, bounds=(math.log(0.01), math.log(100)), method="bounded", options={"xatol": 1e-6})
    return spread * math.exp(float(found.x))


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy (...), in nats, of probabilities (..., C)."""
    return torch.special.entr(probabilities).sum(-1)


def uncertainty(logits: Tensor) -> dict[str, Tensor]:
    """Return how uncertain draws are, and why, from logits (S, B, C) of single draws; (B,) each, in nats.

    The entropy of their mean prediction is the sum of two parts: the mean entropy of draws, which more images of the
    kind would not change, and the mutual information, what draws disagree on, which they would. A prediction that
    averages logits is surer than the mean of predictions.

    >>> two = torch.tensor([[[0.0, 100.0]], [[100.0, 0.0]]])
    >>> {name: round(float(value), 4) for name, value in uncertainty(two).items()}
    {'entropy_of_draws': 0.6931, 'expected_entropy': 0.0, 'mutual_information': 0.6931}
    """
    each = logits.double().log_softmax(-1)
    mean = each.logsumexp(0) - math.log(len(logits))
    whole = entropy(mean.exp())
    expected = entropy(each.exp()).mean(0)
    return {
        "entropy_of_draws": whole,
        "expected_entropy": expected,
        "mutual_information": (whole - expected).clamp_min(0),
    }
