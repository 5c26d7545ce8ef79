"""Heads made of class statistics, without an optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.heads.base import Head, Scores
from lamina.lookback import Reduce


class NearestMean(Head):
    """Scores a class by the cosine between an image's features and the mean of the class's features.

    Features are brought to unit length before they are averaged. Sums and counts are kept, in
    float64, so the result does not depend on the order of tasks or on the split into batches.

    References:
        Rebuffi et al., iCaRL, CVPR 2017, section 2.1 (the classifier, on all images).
    """

    looks_at = "features"
    sums: Tensor
    counts: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(0, features, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.float64))
        self.begin_look()

    def begin_task(self, index: int, classes: Sequence[str], columns: Sequence[int]) -> None:
        new = max(0, max(columns) + 1 - len(self.counts))
        self.sums, self.counts = F.pad(self.sums, (0, 0, 0, new)), F.pad(self.counts, (0, new))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scores:
        means = F.normalize(self.sums / self.counts.clamp_min(1)[:, None], dim=-1).to(features.dtype)
        return Scores(F.normalize(features, dim=-1) @ means.T)

    def begin_look(self) -> None:
        self._draft = torch.zeros_like(self.sums), torch.zeros_like(self.counts)

    def collect(self, features: Tensor, columns: Tensor) -> None:
        sums, counts = self._draft
        unit = F.normalize(features.double(), dim=-1)
        sums.index_add_(0, columns, unit)
        counts.index_add_(0, columns, torch.ones_like(columns, dtype=counts.dtype))

    def end_look(self, reduce: Reduce) -> None:
        sums, counts = self._draft
        self.sums, self.counts = self.sums + reduce(sums), self.counts + reduce(counts)
        self.begin_look()
