"""Class names as Gaussians around what a text tower says of them: the probabilistic classifier of CLAP.

References:
    Jha et al., CLAP4CLIP: Continual Learning with Probabilistic Finetuning for Vision-Language Models, NeurIPS 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.errors import ConfigError
from lamina.heads.base import Scores
from lamina.heads.bayes import mixture
from lamina.heads.encoders import Encoders, Start, divergence
from lamina.heads.guidance import Guidance, apart
from lamina.heads.text import TextHead
from lamina.heads.texts import ClassTexts, EachText
from lamina.seeds import generator_at

MonteCarlo = Literal["sample", "mean"]
Average = Literal["logits", "probabilities"]
Anchored = Literal["learning", "past", "all"]

#: rows of an image and a class that go through the guidance together where nothing is learned
TOGETHER = 2**14


class ClapHead(TextHead):
    """Scores images by class features that are drawn: t + v + z.

    t is what the text tower says of a class; v what becomes of it when it looks at images (`Guidance`); z a draw from
    the Gaussian that the encoder of the class's task makes of t + v (`Encoders`). Draws are shared by all images of a
    batch. As in the paper, class features are not brought to length 1, so logits are no cosines: an untrained v alone
    has the length √F, and they lie √F times as far apart as those of the names. `cosine` brings them to length 1.

    Beside the loss on the scores of all draws there are, for tasks whose encoder learns, the divergence of their
    Gaussians from N(0, 1), and the language-aware loss: draws of a task's classes must tell apart what templates say
    of these classes.

    In training draws are new in every step. Else they depend on the class's place alone, so that a prediction depends
    on nothing but its image and what was learned.

    Args:
        texts: of the classes; the templates themselves where nothing else is said.
        templates: by which encoders start and are anchored.
        guidance: None leaves v out.
        encoders: of tasks; None leaves z out.
        samples: S, draws in a step, and for a prediction.
        mc: what predictions are made of: S draws, or the mean of the Gaussians, which is the limit of many draws.
        average: what is averaged over draws for a prediction.
        start: what encoders of a new task begin with.
        weights: of the divergence and of the language-aware loss.
        anchored: for which tasks the latter is: those whose encoder learns, those of the past, or all.
        cosine: bring what is drawn to length 1.
        future: a class of a task to come has the newest encoder; without, its draws are left out.
        scale: of products; what pre-training left if not given.

    Raises:
        ConfigError: when encoders are to start from a variance over templates and there is one template; when cosines
            are asked for the mean of their draws in closed form.
    """

    texts: ClassTexts
    decides = ("context", "batch")

    def __init__(
        self,
        texts: ClassTexts | None,
        templates: EachText,
        guidance: Guidance | None,
        encoders: Encoders | None,
        *,
        samples: int = 20,
        mc: MonteCarlo = "sample",
        average: Average = "logits",
        start: Start = "language",
        weights: tuple[float, float] = (0.001, 15.0),
        anchored: Anchored = "learning",
        cosine: bool = False,
        future: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__(texts or templates, scale=scale)
        if start == "language" and encoders is not None and encoders.learns_spread and len(templates.templates) < 2:
            raise ConfigError(
                "encoders start from the variance of what templates say of a class, which takes two templates; got "
                f"{templates.templates[0]!r} alone: give more, or another start"
            )
        self.bank, self.width = templates, templates.tower.features
        self.guidance, self.encoders = guidance, encoders
        self.samples, self.mc, self.average, self.start = samples, mc, average, start
        self.weights, self.anchored, self.cosine, self.future = weights, anchored, cosine, future
        self.transductive = guidance is not None and guidance.context == "batch"
        self.sampling = encoders is not None and encoders.learns_spread
        if cosine and mc == "mean" and self.sampling:
            raise ConfigError('cosines of draws have no mean in closed form; take mc="sample" or cosine=false')
        self._sizes: list[int] = []  # of the tasks that brought new classes, one after the other
        self._trained = 0  # classes that are not there by their names alone
        self._noise: list[Tensor] = []  # of each class, (S, F)

    def begin_task(self, index: int, classes: Sequence[str], columns: Sequence[int]) -> None:
        met = len(self.texts.classes)
        super().begin_task(index, classes, columns)
        if self.bank is not self.texts:
            self.bank.begin_task(index, classes, columns)
        new = len(self.texts.classes) - met
        if not new:
            return
        self._sizes, self._trained = [*self._sizes, new], met + new
        encoder = self.encoders.grow() if self.encoders is not None else None
        if encoder is None:
            return
        encoder.to(self.log_scale.device)
        if self.start == "language":
            encoder.start(self.bank())
        elif self.start == "zero":
            encoder.clear()

    # ── what a class is ────────────────────────────────────────────────────────────────────────────

    def named(self, images: Tensor) -> Tensor:
        """Return what the text tower says of all classes, (C, F), or (B, C, F) for images (B, F) it depends on."""
        if self.texts is self.bank:
            return F.normalize(self.bank().mean(1), dim=-1)
        return self.texts.of_images(images) if self.texts.per_image else self.texts()

    def gaussians(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return t + v, (B, C, F), and mean and standard deviation of z, (B, C, F) each; B is 1 if no image matters.

        Args:
            images: (B, F), as they come from the tower.
        """
        names = self.named(images)
        around = names if names.ndim == 3 else names[None]
        if self.guidance is not None:
            block = apart(self._sizes, names.device)
            around = around + self.guidance(names, F.normalize(images, dim=-1), block)
        if self.encoders is None:
            return around, torch.zeros_like(around), None
        last = len(self.encoders.tasks) - 1
        which = [min(number, last) for number in range(len(self._sizes))]
        mean, spread = self.encoders(around, self._sizes, which)
        if not self.future:
            new = torch.arange(mean.shape[1], device=mean.device) >= self._trained
            mean = mean.masked_fill(new[:, None], 0.0)
            spread = None if spread is None else spread.masked_fill(new[:, None], 0.0)
        return around, mean, spread

    def noise(self, device: torch.device) -> Tensor:
        """Return standard normal draws (S, C, F): new ones in training, else those of each class's place."""
        classes, width = len(self.texts.classes), self.width
        if self.training:
            return torch.randn(self.samples, classes, width, device=device)
        for column in range(len(self._noise), classes):
            generator = generator_at("draws", column)
            self._noise = [*self._noise, torch.randn(self.samples, width, generator=generator)]
        return torch.stack(self._noise[:classes], dim=1).to(device)

    # ── scores ─────────────────────────────────────────────────────────────────────────────────────

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scores:
        if self.training:
            around, mean, spread = self.gaussians(features)
            noise = None if spread is None else self.noise(features.device)
            terms = {**self.texts.terms(features), **self.regularised(mean, spread, noise)}
            return Scores(self.scored(features, around + mean, spread, noise), terms, self.texts.choose(features))
        logits = torch.cat([self.predicted(some) for some in self._few(features)])
        return Scores(logits, chosen=self.texts.choose(features))

    def _few(self, features: Tensor) -> Sequence[Tensor]:
        """Part images so that memory is bounded; not where they look at one another."""
        few = len(features) if self.transductive else max(1, TOGETHER // len(self.texts.classes))
        return features.split(few)

    def scored(self, features: Tensor, centre: Tensor, spread: Tensor | None, noise: Tensor | None) -> Tensor:
        """Return logits (S, B, C) of images for class features centre + spread * noise; (B, C) without a spread.

        Args:
            features: (B, F).
            centre, spread: (B, C, F), or (1, C, F) for all images alike.
            noise: (S, C, F).
        """
        images = F.normalize(features, dim=-1)
        if self.cosine and (spread is None or noise is None):
            centre = F.normalize(centre, dim=-1)
        logits = images @ centre[0].mT if centre.shape[0] == 1 else torch.einsum("bf,bcf->bc", images, centre)
        if spread is None or noise is None:
            return self.scale * logits
        # Images times deviations once, then one product per class: draws of features (S, B, C, F) are never made.
        logits = logits + moved(images[:, None] * spread, noise)
        if not self.cosine:
            return self.scale * logits
        # |c + d|² = |c|² + 2 c·d + |d|² for a centre c and a draw d from it: two more products per class
        lengths = centre.square().sum(-1) + 2 * moved(centre * spread, noise) + moved(spread.square(), noise.square())
        return self.scale * logits * lengths.clamp_min(torch.finfo(lengths.dtype).tiny).rsqrt()

    def predicted(self, features: Tensor) -> Tensor:
        """Return logits (B, C) of images (B, F)."""
        around, mean, spread = self.gaussians(features)
        if spread is None or self.mc == "mean":
            return self.scored(features, around + mean, None, None)
        noise = self.noise(features.device)
        if self.average == "probabilities":
            return mixture(self.scored(features, around + mean, spread, noise))
        if self.cosine:
            return self.scored(features, around + mean, spread, noise).mean(0)
        # logits are linear in the draws, so their mean is that of one mean draw
        return self.scored(features, around + mean, spread, noise.mean(0, keepdim=True))[0]

    def samples_of(self, features: Tensor) -> Tensor | None:
        if not self.sampling:
            return None
        parts = []
        for some in self._few(features):
            around, mean, spread = self.gaussians(some)
            parts.append(self.scored(some, around + mean, spread, self.noise(features.device)))
        return torch.cat(parts, dim=1)

    # ── losses ─────────────────────────────────────────────────────────────────────────────────────

    def regularised(self, mean: Tensor, spread: Tensor | None, noise: Tensor | None) -> dict[str, Tensor]:
        """Return the divergence and the language-aware loss, weighted and summed over tasks."""
        if self.encoders is None:
            return {}
        tasks = range(len(self._sizes))
        learning = tasks if self.encoders.shared else self.encoders.learning
        anchored: Sequence[int] = {"learning": learning, "past": tasks[:-1], "all": tasks}[self.anchored]
        firsts = [sum(self._sizes[:number]) for number in tasks]
        own = [slice(first, first + size) for first, size in zip(firsts, self._sizes, strict=True)]
        terms = {}
        if spread is not None and self.weights[0] and learning:
            parts = [divergence(mean[:, own[t]], spread[:, own[t]]).mean() for t in learning]
            terms["divergence"] = self.weights[0] * torch.stack(parts).sum()
        anchored = [t for t in anchored if self._sizes[t] > 1]
        if self.weights[1] and anchored:
            # the mean over draws and templates of products is the product of the means
            drawn = mean if spread is None or noise is None else mean + spread * noise.mean(0)
            said = self.bank().mean(1)
            parts = [anchor(said[own[t]], drawn[:, own[t]]) for t in anchored]
            terms["language"] = self.weights[1] * torch.stack(parts).sum()
        return terms

    def preview(self, classes: Sequence[str]) -> ClapHead:
        out = super().preview(classes)
        assert isinstance(out, ClapHead)
        same = self.bank is self.texts
        out._modules = {**out._modules, "bank": out.texts if same else self.bank.preview(classes)}
        new = len(out.texts.classes) - len(self.texts.classes)
        out._sizes = [*self._sizes, new] if new else self._sizes
        return out


def moved(by: Tensor, noise: Tensor) -> Tensor:
    """Return the products (S, B, C) of what multiplies the draws of a class (B, C, F) and these draws (S, C, F)."""
    return torch.bmm(by.transpose(0, 1), noise.permute(1, 2, 0)).permute(2, 1, 0)


def anchor(said: Tensor, drawn: Tensor) -> Tensor:
    """Return how badly draws (B, n, F) tell apart what templates say of n classes, (n, F): a mean cross-entropy."""
    products = torch.einsum("af,bcf->bac", said, drawn)
    labels = torch.arange(len(said), device=said.device).expand(len(products), -1)
    return F.cross_entropy(products.flatten(0, 1), labels.flatten())
