"""Class statistics and class names, mixed as far as each is to be trusted."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.heads.base import Scores
from lamina.heads.moments import shrinkage, shrunk
from lamina.heads.statistics import Discriminant
from lamina.heads.texts import ClassTexts
from lamina.lookback import Reduce

#: weights that are tried: of log-probabilities by class statistics, and of cosines with names
OF_STATISTICS = torch.logspace(-2, 0.5, 51, dtype=torch.float64)
OF_NAMES = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-1, 2, 41, dtype=torch.float64)])


class NamedDiscriminant(Discriminant):
    """Scores a class by a Gaussian around its images and by the cosine of an image and its name.

    The score is a weighted sum of the two. When a task is over, its images say how well they would have been told by
    each pair of weights, among all classes met by then, had each of them not been there itself: class statistics leave
    an image out in closed form. These losses are summed over tasks, and the best pair is taken. So the weights are also
    a temperature, and softmax of the scores is a calibrated probability as far as images to come are like these.

    Args:
        features: F, of all layers that are read, side by side; those that live beside texts come last.
        texts: of the classes.

    Attributes:
        losses: (51, 42), sums over images of the negative log-likelihood under each pair of weights.
        typical: (2,), the sum of images' scores for their own class without them, by class statistics; how many.

    References:
        Ours. Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, sections 4.3 and 7.10 (linear
        discriminants, leaving one out); Zhang et al., Tip-Adapter, ECCV 2022 (images and names in one score).
    """

    losses: Tensor
    typical: Tensor

    def __init__(self, features: int, texts: ClassTexts) -> None:
        super().__init__(features)
        self.texts = texts
        self.register_buffer("losses", torch.zeros(len(OF_STATISTICS), len(OF_NAMES), dtype=torch.float64))
        self.register_buffer("typical", torch.zeros(2, dtype=torch.float64))
        self._shown: list[tuple[Tensor, Tensor]] = []

    def begin_task(self, index: int, classes: Sequence[str], columns: Sequence[int]) -> None:
        super().begin_task(index, classes, columns)
        self.texts.begin_task(index, classes, columns)

    @property
    def weights(self) -> tuple[float, float]:
        """Of log-probabilities by class statistics, and of cosines; before anything was learned, names alone."""
        if not self.losses.any():
            return 0.0, self.texts.side.logit_scale
        # Names that say nothing leave losses alike up to rounding; then the least weights are as good as any.
        best = int((self.losses <= self.losses.min() * (1 + 1e-9)).flatten().nonzero()[0])
        return float(OF_STATISTICS[best // len(OF_NAMES)]), float(OF_NAMES[best % len(OF_NAMES)])

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scores:
        of_statistics, of_names = self.weights
        told = of_names * self.cosines(features)
        if not of_statistics:
            return Scores(told)
        known = super().forward(features).logits
        new = told.shape[-1] - known.shape[-1]
        if new:
            # A class without images is scored as if an image were as near to it as known ones are to theirs on average;
            # so what is the same for all known classes, which their scores leave out, matters here.
            away, counted = features.double() - self.centre(), self.typical[1].clamp_min(1)
            common = -0.5 * (away @ torch.linalg.inv(shrunk(*self.seen.covariance())) * away).sum(1, keepdim=True)
            usual = (self.typical[0] / counted).to(known).expand(len(known), new)
            known = torch.cat([known + common.to(known), usual], dim=1)
        return Scores(of_statistics * known + told)

    def cosines(self, features: Tensor) -> Tensor:
        """Return the cosines (B, C) of images (B, F) and names."""
        images = F.normalize(features[:, -self.texts.tower.features :], dim=-1)
        return images @ self.texts().to(images.dtype).mT

    # ── leaving one out ────────────────────────────────────────────────────────────────────────────

    def begin_look(self) -> None:
        super().begin_look()
        self._shown = []

    def collect(self, features: Tensor, columns: Tensor) -> None:
        super().collect(features, columns)
        self._shown.append((features, columns))

    def end_look(self, reduce: Reduce) -> None:
        super().end_look(reduce)
        losses, typical = torch.zeros_like(self.losses), torch.zeros_like(self.typical)
        for features, columns in self._shown:
            known, told = self.left_out(features.double(), columns), self.cosines(features).double()
            more = self.seen.counts[columns] > 1  # else nothing is left of the class without the image
            known, told, columns = known[more], told[more], columns[more]
            typical += torch.stack([known.gather(1, columns[:, None]).sum(), more.sum()])
            for row, weight in enumerate(OF_STATISTICS.tolist()):
                scores = weight * known[:, None] + OF_NAMES.to(told)[:, None] * told[:, None]  # (B, pairs, C)
                own = scores.gather(2, columns[:, None, None].expand(-1, scores.shape[1], 1)).squeeze(2)
                losses[row] += (scores.logsumexp(2) - own).sum(0)
        self.losses, self.typical = self.losses + reduce(losses), self.typical + reduce(typical)
        self._shown = []

    def left_out(self, features: Tensor, columns: Tensor) -> Tensor:
        """Return the scores (B, C) of images (B, F), float64, as if each were not part of the statistics.

        The class of an image loses it from its mean, and the covariance within classes its part, while the shrinkage
        stays; both in closed form (Sherman and Morrison). What is said of the class of a single image is of no use.
        """
        covariance, freedom = self.seen.covariance()
        kept = 1 - shrinkage(covariance, freedom)
        inverse, means, counts = torch.linalg.inv(shrunk(covariance, freedom)), self.seen.means(), self.seen.counts
        turned = features @ inverse
        squares = (turned * features).sum(1, keepdim=True) - 2 * turned @ means.mT + (means @ inverse * means).sum(1)
        own = (features - means[columns]) @ inverse
        across = (own * features).sum(1, keepdim=True) - own @ means.mT  # with the distance to each mean
        leverage = across.gather(1, columns[:, None])
        rest = (counts / (counts - 1).clamp_min(1))[columns][:, None]
        part = kept * rest / freedom
        left = (1 - part * leverage).clamp_min(1e-9)
        without = squares + part * across.square() / left
        return -0.5 * without.scatter(1, columns[:, None], rest.square() * leverage / left)

    def preview(self, classes: Sequence[str]) -> NamedDiscriminant:
        out = copy.copy(self)
        out._modules = {**self._modules, "texts": self.texts.preview(classes)}
        return out

    def says(self, column: int) -> str:
        return self.texts.says(column)
