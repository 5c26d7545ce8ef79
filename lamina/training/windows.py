"""Images of any size through a model that takes one size: windows that slide, several scales.

References:
    Zheng et al., Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with Transformers, CVPR 2021,
    section 4.1, and the configuration of its authors for ADE20K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from lamina.data.labelled import fitted
from lamina.errors import ConfigError
from lamina.heads.setr import upsampled

#: windows (b, 3, crop, crop), float32, to logits (b, C, crop, crop)
Score = Callable[[Tensor], Tensor]

#: how large images are looked at, in place of once, where several scales are asked for
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def starts(length: int, crop: int, stride: int) -> list[int]:
    """Return where windows begin along a side; the last one is moved inward, so that it ends with the image.

    >>> starts(10, 4, 3), starts(9, 4, 3), starts(4, 4, 3)
    ([0, 3, 6], [0, 3, 5], [0])

    Raises:
        ConfigError: when the side is shorter than a window.
    """
    if length < crop:
        raise ConfigError(f"a window of {crop} pixels is larger than a side of {length}; make the image larger first")
    count = -(-(length - crop) // stride) + 1
    return [min(place * stride, length - crop) for place in range(count)]


def slid(score: Score, images: Tensor, crop: int, *, stride: int | None = None, most: int = 16) -> Tensor:
    """Return the logits (B, C, height, width) of images (B, 3, height, width), a mean where windows overlap.

    Args:
        stride: from window to window; None is two thirds of a window.
        most: windows that are scored at once.
    """
    height, width = images.shape[-2:]
    step = stride or max(1, 2 * crop // 3)
    places = list(product(starts(height, crop, step), starts(width, crop, step)))
    windows = torch.cat([images[..., top : top + crop, left : left + crop] for top, left in places])
    logits = torch.cat([score(part) for part in windows.split(most)])
    if len(places) == 1:
        return logits
    total = logits.new_zeros(len(images), logits.shape[1], height, width)
    times = logits.new_zeros(height, width)
    for (top, left), part in zip(places, logits.split(len(images)), strict=True):
        total[..., top : top + crop, left : left + crop] += part
        times[top : top + crop, left : left + crop] += 1
    return total / times


def looked_at(height: int, width: int, crop: int, ratio: float = 1.0) -> tuple[int, int]:
    """Return the size at which an image is looked at: as in training, but no side is shorter than a window.

    >>> looked_at(300, 400, 512), looked_at(300, 400, 512, 0.5), looked_at(100, 1000, 64)
    ((512, 683), (512, 683), (64, 640))
    """
    size = fitted(height, width, crop, ratio)
    return size if min(size) >= crop else _of_short_side(height, width, crop)


def _of_short_side(height: int, width: int, short: int) -> tuple[int, int]:
    factor = short / min(height, width)
    return max(short, round(height * factor)), max(short, round(width * factor))


def whole(
    score: Score,
    images: Tensor,
    crop: int,
    normalised: Callable[[Tensor], Tensor],
    *,
    ratio: float = 1.0,
    mirrored: bool = False,
    most: int = 16,
) -> Tensor:
    """Return the logits (B, C, height, width) of images (B, 3, height, width), uint8, looked at in another size.

    Args:
        normalised: from uint8 to what the model takes.
        mirrored: show the mirror image, and turn back what is said of it.
    """
    height, width = images.shape[-2:]
    size = looked_at(height, width, crop, ratio)
    if size != (height, width):
        images = functional.resize(images, list(size), antialias=True)
    images = images.flip(-1) if mirrored else images
    logits = upsampled(slid(score, normalised(images), crop, most=most), (height, width))
    return logits.flip(-1) if mirrored else logits


def over_scales(
    score: Score,
    images: Tensor,
    crop: int,
    normalised: Callable[[Tensor], Tensor],
    *,
    ratios: Sequence[float] = RATIOS,
    most: int = 16,
) -> Tensor:
    """Return probabilities (B, C, height, width), averaged over sizes, each as it is and mirrored."""
    passes = list(product(ratios, (False, True)))
    total = torch.zeros(())
    for ratio, mirrored in passes:
        logits = whole(score, images, crop, normalised, ratio=ratio, mirrored=mirrored, most=most)
        total = total.to(logits.device) + logits.softmax(1)
    return total / len(passes)
