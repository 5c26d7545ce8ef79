"""SETR-PUP: patch tokens to a class for every pixel, by convolutions between steps of up-sampling.

The main decoder reads the tokens after the last block and doubles their map four times. In training three smaller ones
read the tokens after a quarter, half and three quarters of the blocks, so that these are told what pixels are, too.

References:
    Zheng et al., Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with Transformers, CVPR 2021,
    sections 3.3 and 4.1. Its code classifies before the last up-sampling, and so does this: the two commute. Auxiliary
    decoders have two steps, as those of MMSegmentation have.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from lamina.data.labelled import IGNORE
from lamina.errors import ConfigError, ShapeError
from lamina.heads.base import Head, Scores
from lamina.heads.batch_norm import SharedBatchNorm

#: of the decoders, in the paper
CHANNELS = 256


class Decoder(nn.Module):
    """Tokens of patches (B, h * w, D) to logits (B, C, height, width).

    Each stage is a convolution, a norm and a ReLU; then the map grows by a factor, the last time to the size of the
    image, whatever the size of a patch.

    Args:
        width: D.
        channels: of the maps between stages.
        grid: h and w.
        size: height and width of the image, in pixels.
        stages: how many.
        factor: by which the map grows after each but the last.
    """

    classifier: nn.Conv2d

    def __init__(
        self, width: int, channels: int, grid: tuple[int, int], size: tuple[int, int], *, stages: int, factor: int
    ) -> None:
        super().__init__()
        self.channels, self.grid = channels, grid
        self.norm = nn.LayerNorm(width, eps=1e-6)
        convolutions = [
            nn.Conv2d(width if stage == 0 else channels, channels, 3, padding=1, bias=False) for stage in range(stages)
        ]
        for convolution in convolutions:
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        self.stages = nn.ModuleList(nn.Sequential(each, SharedBatchNorm(channels), nn.ReLU()) for each in convolutions)
        growths = [factor**stage for stage in range(1, stages)]
        self.sizes = [*((min(grid[0] * by, size[0]), min(grid[1] * by, size[1])) for by in growths), size]

    def classes(self, count: int) -> None:
        """Make the classifier of C classes."""
        self.classifier = nn.Conv2d(self.channels, count, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, tokens: Tensor) -> Tensor:
        *between, last = self.sizes
        first, *others = self.stages
        x = first(self.norm(tokens).transpose(1, 2).unflatten(2, self.grid))
        for stage, size in zip(others, between, strict=True):
            x = stage(upsampled(x, size))
        # on the smaller map: a 1 x 1 convolution and a bilinear up-sampling may change places
        return upsampled(self.classifier(x), last)


class SetrHead(Head):
    """Scores every pixel. Its loss is `pixel_loss`; in training the auxiliary decoders' come as a term "auxiliary".

    Args:
        width: D of the tower.
        depth: L of the tower.
        grid: rows and columns of patches.
        size: height and width of the image, in pixels.
        channels: of the maps inside; the paper has 256.
        weight: of the auxiliary losses; 0 leaves those decoders away.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        grid: tuple[int, int],
        size: tuple[int, int],
        *,
        channels: int = CHANNELS,
        weight: float = 0.4,
    ) -> None:
        super().__init__()
        quarters = [max(1, depth * part // 4) - 1 for part in (1, 2, 3)] if weight else []
        self.after = tuple(sorted({*quarters, depth - 1}))
        self.quarters, self.weight = [self.after.index(block) for block in quarters], weight
        self.main = Decoder(width, channels, grid, size, stages=4, factor=2)
        self.auxiliary = nn.ModuleList(Decoder(width, channels, grid, size, stages=2, factor=4) for _ in self.quarters)

    def begin_task(self, index: int, classes: Sequence[str], columns: Sequence[int]) -> None:
        if index:
            raise ConfigError(f"a head for pixels learns one task; task {index + 1} has come, too")
        for decoder in (self.main, *self.auxiliary):
            decoder.classes(len(columns))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scores:
        """Score pixels by the patch tokens (K, B, h * w, D) after the blocks of `after`.

        Args:
            labels: (B, height, width), columns, `IGNORE` for pixels without one; given in training only.

        Returns:
            Logits (B, C, height, width).
        """
        if features.ndim != 4 or len(features) != len(self.after):
            got = tuple(features.shape)
            raise ShapeError(f"a head for pixels reads (K, B, h * w, D) with K {len(self.after)}; got {got}")
        logits = self.main(features[-1])
        if labels is None or not self.quarters:
            return Scores(logits)
        losses = [
            pixel_loss(decoder(features[place]), labels)
            for place, decoder in zip(self.quarters, self.auxiliary, strict=True)
        ]
        return Scores(logits, {"auxiliary": self.weight * sum(losses[1:], losses[0])})


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of pixels that have a label, summed and divided by the number of all pixels.

    As in MMSegmentation, unless it is told otherwise. A mean over those with a label would weigh images by what the
    others of their batch happen to show, so two processes would not learn what one learns; and a batch without any
    label would have no mean.

    Args:
        logits: (B, C, height, width).
        labels: (B, height, width), columns, or `IGNORE`.
    """
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum") / labels.numel()


def upsampled(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a map (B, c, h, w) at another size, bilinear between centres of pixels."""
    return x if tuple(x.shape[-2:]) == tuple(size) else F.interpolate(x, size, mode="bilinear", align_corners=False)
