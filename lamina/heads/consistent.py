"""A linear classifier that learns from prompts of any task, and keeps old columns modest on new images (CPrompt)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.data.stream import places
from lamina.heads.base import Scores
from lamina.heads.linear import LinearHead


class ConsistentHead(LinearHead):
    """A linear layer per task, and in training one more that goes when its task is over.

    In training the features are of two copies of the images, first with the prompts of their task, then with
    prompts that they might get by mistake; of one copy, it stands for both. The logits are of the last copy,
    so columns learn from prompts that are right or wrong. From the first copy come two losses, for its prompts
    alone to learn by:
        "auxiliary": cross-entropy of a layer of the current task, which takes no part in predictions. It stays in the
            state until the next task brings its own.
        "smoothing": from the second task on, what `smoothing` says of every old layer, averaged over these.

    Weights start uniform within sqrt(3 / F), biases at zero.

    Args:
        weight: of the smoothing.
        flatness: the temperature of answers that are to be flatter.
        margin: by so much the new task's highest logit must exceed an old layer's, for its answer to stay.

    References:
        Gao et al., Consistent Prompting for Rehearsal-Free Continual Learning, CVPR 2024.
    """

    replaceable = False
    auxiliary: nn.Linear

    def __init__(self, features: int, *, weight: float = 1.0, flatness: float = 1.2, margin: float = 0.0) -> None:
        super().__init__(features)
        self.weight, self.flatness, self.margin = weight, flatness, margin
        self.columns: list[int] = []  # of the current task

    @torch.no_grad()
    def begin_task(self, index: int, classes: Sequence[str], columns: Sequence[int]) -> None:
        met = len(self._rows)
        super().begin_task(index, classes, columns)
        self.columns, self.auxiliary = list(columns), nn.Linear(self.features, len(columns))
        bound = (3 / self.features) ** 0.5
        nn.init.zeros_(self.auxiliary.bias)
        self.auxiliary.weight.uniform_(-bound, bound)
        for place, column in enumerate(columns):
            if column >= met:  # a class met before goes on from the row it has
                self.blocks[-1].weight[place].uniform_(-bound, bound)  # type: ignore[index]

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scores:
        if labels is None:
            return super().forward(features)
        own, last = features[: len(labels)], features[-len(labels) :]
        terms = {"auxiliary": F.cross_entropy(self.auxiliary(own), places(labels, self.columns))}
        if len(self.blocks) > 1:
            terms["smoothing"] = self.weight * self._smoothing(own)
        return Scores(super().forward(last).logits, terms)

    def _smoothing(self, features: Tensor) -> Tensor:
        """Return what `smoothing` says of each old layer on features (B, F), averaged over layers."""
        *olds, new = self.blocks
        with torch.no_grad():
            best = new(features).amax(-1) - self.margin
        answers = [old(features) for old in olds]
        return torch.stack([smoothing(z, best > z.detach().amax(-1), self.flatness) for z in answers]).mean()


def smoothing(logits: Tensor, content: Tensor, flatness: float) -> Tensor:
    """Return the cross-entropy of answers with themselves at a higher temperature, which is not differentiated.

    The gradient of a row of logits z is (softmax(z) - softmax(z / flatness)) / B.

    Args:
        logits: (B, C), of one layer.
        content: (B,), true for rows that may stay as they are: their gradient is zero.
        flatness: the temperature.
    """
    temperature = torch.where(content, 1.0, flatness)[:, None]
    aim = (logits.detach() / temperature).softmax(-1)
    return -(aim * logits.log_softmax(-1)).sum(-1).mean()
