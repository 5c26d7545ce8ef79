"""Contexts that are a distribution: every prediction is the mean over some of them (Bayesian prompt learning).

References:
    Derakhshani et al., Bayesian Prompt Learning for Image-Language Model Generalization, ICCV 2023, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.clip import TextSide
from lamina.heads.base import Scores
from lamina.heads.text import TextHead
from lamina.heads.texts import ContextTexts, version_of
from lamina.prompts.contexts import encoded

Start = Literal["tokens", "paper"]
Predict = Literal["samples", "mean"]
Bound = Literal["mixture", "elbo"]

#: the standard deviation of embeddings of words
TOKENS = 0.02


class Residual(nn.Module):
    """What is added to every word of a context is normal in each channel: its mean and its log-variance.

    Args:
        start: "tokens" starts as wide as words are spread; "paper" draws the log-variances from 0 to 1, as the
            released code does.
    """

    def __init__(self, width: int, start: Start = "tokens") -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(width))
        wide = torch.rand(width) if start == "paper" else torch.full((width,), 2 * math.log(TOKENS))
        self.log_variance = nn.Parameter(wide)

    def forward(self, images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, (W,) each."""
        return self.mean, self.log_variance


class ImageResidual(nn.Module):
    """The same as a function of the image, by two small networks.

    Args:
        features: F, of the images.
        start: "tokens" starts as wide as words are spread and at zero, whatever the image; "paper" starts as PyTorch
            starts linear layers.
    """

    def __init__(self, features: int, width: int, start: Start = "tokens") -> None:
        super().__init__()
        self.mean, self.log_variance = (_network(features, width) for _ in range(2))
        if start == "tokens":
            for network, value in ((self.mean, 0.0), (self.log_variance, 2 * math.log(TOKENS))):
                last = network[-1]
                assert isinstance(last, nn.Linear)
                nn.init.zeros_(last.weight)
                nn.init.constant_(last.bias, value)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance for images (B, F), (B, W) each."""
        return self.mean(images), self.log_variance(images)


def _network(features: int, width: int) -> nn.Sequential:
    inside = features // 2
    return nn.Sequential(
        nn.Linear(features, inside), nn.ELU(), nn.Linear(inside, inside), nn.ELU(), nn.Linear(inside, width)
    )


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of N(mean, exp(log_variance)) from N(0, 1), averaged over all entries.

    >>> float(divergence(torch.tensor([0.0, 2.0]), torch.zeros(2)))
    1.0
    """
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).mean()


def mixture(logits: Tensor) -> Tensor:
    """Return logits (B, C) whose softmax is the mean of those of S samples, (S, B, C).

    What a softmax does not show, the logarithm of its denominator, is the mean of theirs.

    >>> mixture(torch.tensor([[[0.0, 0.0]], [[0.0, 1000.0]]])).softmax(-1)
    tensor([[0.2500, 0.7500]])
    """
    total = logits.logsumexp(-1, keepdim=True)
    return (logits - total).logsumexp(0) - math.log(len(logits)) + total.mean(0)


class SampledTexts(ContextTexts):
    """A context plus S draws of what is added to it.

    In training draws are new in every step. Else they are the ones drawn when the texts were made, so that a
    prediction depends on nothing but its image and what was learned, and texts are computed once.

    Args:
        samples: S.
        predict: "samples" scores with all draws when nothing is learned, "mean" with the mean context alone.
        conditional: the distribution depends on the image; features are then (B, S * C, F), one draw after the other.
        start: of the distribution, see `Residual`.
        divergence: weight of the divergence of the distribution from N(0, 1) in the loss.
    """

    noise: Tensor

    def __init__(
        self,
        side: TextSide,
        length: int = 4,
        *,
        words: str = "a photo of a",
        samples: int = 10,
        predict: Predict = "samples",
        conditional: bool = False,
        start: Start = "tokens",
        divergence: float = 0.001,
        names: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(side, length, words=words, names=names)
        width, features = side.tower.width, side.tower.features
        self.per_image, self.samples, self.weight = conditional, samples, divergence
        self.residual = ImageResidual(features, width, start) if conditional else Residual(width, start)
        self.register_buffer("noise", torch.randn(samples, width) if predict == "samples" else torch.zeros(1, width))

    def draw(self, images: Tensor | None = None) -> Tensor:
        """Return contexts (S, n, W), or (B, S, n, W) for images (B, F) where they depend on the image."""
        mean, log_variance = (part[..., None, :] for part in self.residual(images))
        shape = (*mean.shape[:-2], self.samples, mean.shape[-1])
        noise = torch.randn(shape, device=mean.device) if self.training else self.noise
        added = mean + (0.5 * log_variance).exp() * noise
        return self.contexts[0] + added[..., None, :]

    def version(self, column: int) -> Hashable:
        return version_of(*self.contexts, *self.residual.parameters(), self.noise)

    def encode(self, columns: Sequence[int]) -> Tensor:
        """Return features (C, S, F): classes first, as they are kept."""
        return self._encoded(columns, self.draw()).transpose(0, 1)

    def forward(self, columns: Sequence[int] | None = None) -> Tensor:
        """Return features (S, C, F) of some classes or of all."""
        columns = range(len(self.classes)) if columns is None else columns
        return (self.encode(columns) if self.training else super().forward(columns)).transpose(0, 1)

    def of_images(self, images: Tensor, columns: Sequence[int] | None = None) -> Tensor:
        columns = range(len(self.classes)) if columns is None else columns
        contexts = self.draw(images)
        return self._encoded(columns, contexts.flatten(0, 1)).unflatten(0, contexts.shape[:2]).flatten(1, 2)

    def _encoded(self, columns: Sequence[int], contexts: Tensor) -> Tensor:
        assert self._wording is not None
        return F.normalize(encoded(self.tower, self._wording.of(columns), contexts), dim=-1)

    def terms(self, images: Tensor) -> dict[str, Tensor]:
        return {"divergence": self.weight * divergence(*self.residual(images))}


class SampledTextHead(TextHead):
    """Scores of images whose softmax is the mean over draws of a context.

    Args:
        texts: whose contexts are drawn.
        bound: of the likelihood, in training: "mixture" is the logarithm of its mean over draws; "elbo" is the mean of
            its logarithms, for which logits are (S, B, C) then.
        negatives: as for `TextHead`.
    """

    sampling = True

    def __init__(
        self, texts: SampledTexts, *, bound: Bound = "mixture", negatives: Literal["task", "seen"] = "seen"
    ) -> None:
        super().__init__(texts, negatives=negatives)
        self.bound = bound

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scores:
        columns = self.competing
        logits = self.scale * self.cosines(features, columns)
        if not self.training or self.bound == "mixture":
            logits = mixture(logits)
        return Scores(self.spread(logits, columns), self.texts.terms(features) if self.training else {})

    def samples_of(self, features: Tensor) -> Tensor:
        return self.scale * self.cosines(features, None)

    def cosines(self, features: Tensor, columns: Sequence[int] | None) -> Tensor:
        """Return the cosines (S, B, n) of images (B, F) and the names of some classes or of all, draw by draw."""
        found = super().cosines(features, columns)
        each = len(self.texts.classes if columns is None else columns)
        return found.unflatten(1, (-1, each)).transpose(0, 1) if self.texts.per_image else found
