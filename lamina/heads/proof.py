"""Projections of image and text features that grow by a pair per task, and their fusion by attention (PROOF).

References:
    Zhou et al., Learning without Forgetting for Vision-Language Models, 2023, sections 4.1 to 4.3; the authors'
    repository zhoudw-zdw/PROOF at 58c097a.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.clip import TextSide
from lamina.data.stream import places
from lamina.heads.base import Scores
from lamina.heads.moments import ClassStatistics
from lamina.heads.text import TextHead
from lamina.heads.texts import EachText
from lamina.lookback import Reduce

Reduced = Literal["image", "batch_mean"]


class SummedLinear(nn.Module):
    """A sum of linear layers, one more for each task; without any, the identity.

    As long as all are linear, the sum is one layer, whose weights are summed before it meets a feature.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList()

    def grow(self, *, freeze: bool) -> None:
        """Add a layer; `freeze` takes those before out of training."""
        if freeze:
            self.layers.requires_grad_(False)
        self.layers.append(nn.Linear(self.width, self.width))

    def forward(self, features: Tensor) -> Tensor:
        if not len(self.layers):
            return features
        weights, biases = zip(*((layer.weight, layer.bias) for layer in self.layers), strict=True)
        return F.linear(features, torch.stack(weights).sum(0), torch.stack(biases).sum(0))


class Fusion(nn.Module):
    """One attention over each image and rows that all images share, with one head, a residual and a layer norm.

    What rows do with one another is the same for every image, so keys, values and products of shared rows are computed
    once, and the output layer is applied to values before they are mixed: the result is that of one sequence per image.

    Args:
        width: F.
        dropout: of attention, and of what it adds to a row.
    """

    def __init__(self, width: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        for layer in (self.query, self.key, self.value):
            nn.init.normal_(layer.weight, std=width**-0.5)
        self.out, self.norm, self.dropout = nn.Linear(width, width), nn.LayerNorm(width), nn.Dropout(dropout)
        nn.init.xavier_normal_(self.out.weight)

    def forward(self, images: Tensor, shared: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Return what becomes of images (B, F) and, beside each, of the first shared rows: (B, rows, F).

        Args:
            shared: (n, F); those behind the first `rows` are looked at only.
        """
        together = torch.cat([images, shared])
        keys = self.key(together) * together.shape[-1] ** -0.5
        values = F.linear(self.value(together), self.out.weight)
        queries = self.query(torch.cat([images, shared[:rows]]))
        count = len(images)
        (own, others), (value, all_values) = keys.tensor_split([count]), values.tensor_split([count])
        looks = queries @ others.mT  # (B + rows, n)
        of_image = torch.cat([(queries[:count] * own).sum(-1, keepdim=True), looks[:count]], -1)  # (B, 1 + n)
        to_image = own @ queries[count:].mT  # (B, rows)
        of_rows = torch.cat([to_image[..., None], looks[count:].expand(count, -1, -1)], -1)  # (B, rows, 1 + n)
        scores = torch.cat([of_image[:, None], of_rows], 1)
        weights = self.dropout(scores.softmax(-1))
        mixed = weights[..., :1] * value[:, None] + weights[..., 1:] @ all_values
        before = torch.cat([images[:, None], shared[:rows].expand(count, -1, -1)], 1)
        fused = self.norm(before + self.dropout(mixed + self.out.bias))
        return fused[:, 0], fused[:, 1:]


class ProofHead(TextHead):
    """Images, class names and mean images, projected, fused, and compared with one another in three ways.

    Images and names go through sums of linear layers, of which each task adds one; means of images go through those of
    images. A sequence of an image, all names, all means and a few learned contexts, three per task, is fused by one
    attention. The score of a class is the sum of three products: of image and name as projected, of fused image and
    fused name, of fused image and fused mean. Means are those of the frozen features (of length 1) of a task's images,
    seen before it is trained on. A class without images has its name for a mean.

    Training, with labels, reads the first template alone; its loss is that of the second product, with that of the
    third one and a contrast between projected images and the names of their classes as terms of their own.

    Args:
        side: of a CLIP model, whose features are of width F.
        templates: what is said of a class.
        names: what to read instead of a class's own name.
        contexts: how many a task adds.
        reduce: "image" compares a fused image with the names and means fused beside it; "batch_mean" with their
            averages over a batch, so that predictions depend on the other images.
        freeze_texts: old layers for names stay as they are, as those for images do.
        plain: images are scored as they are projected, not brought to length 1; in training they always are.
        negatives: as of `TextHead`; with "task", other classes are not part of the sequence in training, either.

    References:
        Zhou et al., Learning without Forgetting for Vision-Language Models, 2023.
    """

    looks_at = "features"
    looks_ahead = True

    def __init__(
        self,
        side: TextSide,
        templates: Sequence[str],
        names: Mapping[str, str] | None = None,
        *,
        contexts: int = 3,
        reduce: Reduced = "image",
        freeze_texts: bool = True,
        plain: bool = False,
        negatives: Literal["task", "seen"] = "seen",
    ) -> None:
        super().__init__(EachText(side, templates, names), learn_scale=True, negatives=negatives)
        self.width, self.each, self.reduce = side.tower.features, contexts, reduce
        self.transductive, self.decides = reduce == "batch_mean", ("fusion_reduce", "batch_mean")
        self.freeze_texts, self.plain = freeze_texts, plain
        self.of_images, self.of_texts = SummedLinear(self.width), SummedLinear(self.width)
        self.contexts = nn.ParameterList()
        self.fusion = Fusion(self.width)
        self.seen = ClassStatistics(self.width, moment=False)

    def begin_task(self, index: int, classes: Sequence[str], columns: Sequence[int]) -> None:
        super().begin_task(index, classes, columns)
        self.seen.grow(len(self.texts.classes))
        if len(columns if self.negatives == "task" else self.texts.classes) < 2:
            return  # nothing can be learned, and what has not learned would disturb the sums
        self.of_images.grow(freeze=True)
        self.of_texts.grow(freeze=self.freeze_texts)
        self.contexts.requires_grad_(False)
        self.contexts.append(nn.Parameter(torch.randn(self.each, self.width)))

    def begin_look(self) -> None:
        self.seen.begin_look()

    def collect(self, features: Tensor, columns: Tensor) -> None:
        self.seen.collect(F.normalize(features, dim=-1), columns)

    def end_look(self, reduce: Reduce) -> None:
        self.seen.end_look(reduce)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scores:
        columns, learning = self.competing, self.training and labels is not None
        self.hold_scale()
        said = self.texts(columns)  # (n, templates, F)
        images = self.of_images(features if self.plain else F.normalize(features, dim=-1))
        if learning or not self.plain:
            images = F.normalize(images, dim=-1)
        names = self.named(said[:, :1] if learning else said)
        means = F.normalize(self.of_images(self.means(said, columns)), dim=-1)
        image, fused = self.fusion(images, torch.cat([names, means, *self.contexts]), 2 * len(names))
        if self.reduce == "batch_mean":
            fused = fused.mean(0, keepdim=True)
        by_name, by_mean = (image[:, None] @ fused.mT)[:, 0].chunk(2, dim=-1)  # (B, n) each
        if labels is None or not learning:
            return Scores(self.spread(images @ names.mT + by_name + by_mean, columns))
        own = labels if columns is None else places(labels, columns)
        terms = {"means": F.cross_entropy(by_mean, own), "contrast": contrast(self.scale * images @ names[own].mT)}
        return Scores(self.spread(by_name, columns), terms)

    def named(self, said: Tensor) -> Tensor:
        """Return class names as they are projected, (n, F), of length 1; of texts (n, templates, F)."""
        return F.normalize(F.normalize(self.of_texts(said), dim=-1).mean(1), dim=-1)

    def means(self, said: Tensor, columns: Sequence[int] | None) -> Tensor:
        """Return mean images (n, F), not projected; where there are none, names of length 1."""
        count = len(self.texts.classes)
        new = count - len(self.seen.counts)  # there are some in a preview
        means, counts = F.pad(self.seen.means(), (0, 0, 0, new)), F.pad(self.seen.counts, (0, new))
        rows = list(range(count) if columns is None else columns)
        names = F.normalize(said.mean(1), dim=-1)
        return torch.where(counts[rows, None] > 0, means[rows].to(names), names)


def contrast(logits: Tensor) -> Tensor:
    """Return the loss (), by which each image finds its text among those of a batch, and each text its image.

    Args:
        logits: (B, B), of images and texts; those of one pair on the diagonal.

    >>> contrast(torch.zeros(4, 4)).exp()
    tensor(4.)
    """
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.mT, pairs)) / 2
