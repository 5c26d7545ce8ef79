"""Images in which every pixel has a label: how they are checked, resized, cropped and augmented.

An image and its label map travel as one, (4, height, width), uint8: whatever moves a pixel moves its label.

References:
    Zheng et al., Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with Transformers, CVPR 2021,
    section 4.1, and the configuration of its authors for ADE20K: sizes, crops, colours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from lamina.data.stream import ImageSet
from lamina.data.transforms import InputSpec, Steps, Transform
from lamina.errors import ConfigError, DataError, unknown

#: the label of pixels that nobody asks about: they are neither learned from nor counted
IGNORE = 255

#: the longest side that an image is resized to, in short sides of the crop
_LONGEST = 4

#: how much smaller and larger training images come
_RATIOS = (0.5, 2.0)

#: the largest share of a training crop that one class may have, and how often a crop is drawn to find such a one
_MOST, _TRIES = 0.75, 10


class LabelledImages(ImageSet, Protocol):
    """Images with label maps.

    Attributes:
        labels: (n,), int64. Of whole images: all 0, since they have none.
        palette: the names of labels 0, 1, ...; at most 255.
    """

    palette: Sequence[str]

    def mask(self, index: int) -> Tensor:
        """Return the label of each pixel of one image (height, width), uint8, `IGNORE` where there is none."""
        ...

    def address(self, index: int) -> str:
        """Return where one image lies, in words for an error message."""
        ...


def labelled(images: LabelledImages | ImageSet, index: int) -> Tensor:
    """Return one image and its label map (4, height, width), uint8.

    Raises:
        DataError: when they have different sizes, or the map has a label that is not in the palette.
    """
    source: LabelledImages = images  # type: ignore[assignment]  # whoever asks has seen that it has maps
    image, mask = source.image(index), source.mask(index)
    if image.shape[1:] != mask.shape:
        sizes = [" x ".join(map(str, part)) for part in (image.shape[1:], mask.shape)]
        raise DataError(
            f"{source.address(index)} is {sizes[0]} pixels and its label map {sizes[1]}; each image needs a map of its "
            "own size"
        )
    outside = mask[(mask >= len(source.palette)) & (mask != IGNORE)]
    if len(outside):
        raise DataError(
            f"the label map of {source.address(index)} has label {int(outside.max())}; labels go from 0 to "
            f"{len(source.palette) - 1}, and {IGNORE} stands for none"
        )
    return torch.cat([image, mask[None]])


def fitted(height: int, width: int, crop: int, ratio: float = 1.0) -> tuple[int, int]:
    """Return the size at which an image is looked at: its short side is `ratio` crops, its long side at most four.

    >>> fitted(300, 400, 512), fitted(100, 1000, 64), fitted(300, 400, 512, 0.5)
    ((512, 683), (26, 256), (256, 341))
    """
    factor = ratio * min(crop / min(height, width), _LONGEST * crop / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def resized(pair: Tensor, size: tuple[int, int]) -> Tensor:
    """Return an image with its label map in another size; labels are taken, never mixed."""
    if tuple(pair.shape[-2:]) == size:
        return pair
    image = functional.resize(pair[:3], list(size), antialias=True)
    return torch.cat(
        [image, functional.resize(pair[3:], list(size), interpolation=functional.InterpolationMode.NEAREST)]
    )


def dense_transform(name: str, spec: InputSpec, *, padding: bool = True) -> Transform:
    """Return the transform of images with label maps called `name`.

    "plain" is the middle of an image resized by its short side. "crop-flip" resizes by 0.5 to 2, takes a square
    anywhere and mirrors it half of the time; "crop-flip-color" also changes brightness, contrast, saturation and hue.

    Args:
        padding: fill up an image that is smaller than the crop, with the mean colour and the label `IGNORE`.

    Raises:
        ConfigError: when nobody knows the name.
    """
    if name not in _BUILDERS:
        raise ConfigError(unknown("transform of images with label maps", name, _BUILDERS))
    return Transform(name, spec, random=name != "plain", steps=_BUILDERS[name](spec, padding), channels=4)


def _plain(spec: InputSpec, padding: bool) -> Steps:
    def steps(pair: Tensor) -> Tensor:
        height, width = pair.shape[-2:]
        factor = spec.size / min(height, width)
        pair = resized(pair, (max(spec.size, round(height * factor)), max(spec.size, round(width * factor))))
        top, left = ((side - spec.size) // 2 for side in pair.shape[-2:])
        return pair[..., top : top + spec.size, left : left + spec.size]

    return steps


def _crop_flip(spec: InputSpec, padding: bool, *, colours: bool = False) -> Steps:
    fill = torch.tensor([*(round(255 * mean) for mean in spec.mean), IGNORE], dtype=torch.uint8)[:, None, None]

    def steps(pair: Tensor) -> Tensor:
        least, most = _RATIOS
        ratio = least + (most - least) * _drawn()
        height, width = pair.shape[-2:]
        pair = resized(pair, fitted(height, width, spec.size, ratio))
        pair = _cropped(pair, spec.size)
        if _drawn() < 0.5:
            pair = pair.flip(-1)
        if colours:
            pair = torch.cat([recoloured(pair[:3]), pair[3:]])
        return _filled(pair, spec.size, fill if padding else None)

    return steps


def _cropped(pair: Tensor, size: int) -> Tensor:
    """Return a square of an image anywhere, or as much as there is; no class has more than 75 % of it, if that goes."""
    height, width = pair.shape[-2:]
    crop = pair
    for _ in range(_TRIES):
        top, left = (int(_drawn() * (max(side - size, 0) + 1)) for side in (height, width))
        crop = pair[..., top : top + size, left : left + size]
        labels, counts = crop[3].unique(return_counts=True)
        counts = counts[labels != IGNORE]
        if len(counts) > 1 and counts.max() < _MOST * counts.sum():
            break
    return crop


def _filled(pair: Tensor, size: int, fill: Tensor | None) -> Tensor:
    """Fill an image up to a square, on the right and below."""
    height, width = pair.shape[-2:]
    if (height, width) == (size, size):
        return pair
    if fill is None:
        raise DataError(
            f"a crop of {size} x {size} pixels is larger than the image, which is {height} x {width} where it is "
            "cropped; with dense.padding=true it is filled up"
        )
    out = fill.repeat(1, size, size)
    out[:, :height, :width] = pair
    return out


def recoloured(image: Tensor) -> Tensor:
    """Return an image (3, height, width), uint8, with other colours; each change comes half of the time.

    Brightness moves by up to 32, contrast is multiplied by 0.5 to 1.5, before or after saturation (0.5 to 1.5) and hue
    (a tenth of a turn).
    """
    if _drawn() < 0.5:
        image = _clipped(image.float() + 64 * _drawn() - 32)
    early = _drawn() < 0.5
    if early:
        image = _contrasted(image)
    if _drawn() < 0.5:
        image = functional.adjust_saturation(image, 0.5 + _drawn())
    if _drawn() < 0.5:
        image = functional.adjust_hue(image, 0.2 * _drawn() - 0.1)
    return image if early else _contrasted(image)


def _contrasted(image: Tensor) -> Tensor:
    return _clipped(image.float() * (0.5 + _drawn())) if _drawn() < 0.5 else image


def _clipped(image: Tensor) -> Tensor:
    return image.round().clamp(0, 255).to(torch.uint8)


def _drawn() -> float:
    return float(torch.rand(()))


_BUILDERS: Mapping[str, Callable[[InputSpec, bool], Steps]] = {
    "plain": _plain,
    "crop-flip": _crop_flip,
    "crop-flip-color": partial(_crop_flip, colours=True),
}
