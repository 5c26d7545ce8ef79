"""What the model sees: named ways from an image of any size to a square one, and its normalisation.

A random transform draws from torch's global generator alone and is called after that generator was seeded by
the address of the draw (`loader.py`), so an image at one address gets the same pixels in any batch, worker or
process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from lamina.errors import ConfigError, ShapeError, unknown

Steps = Callable[[Tensor], Tensor]
Builder = Callable[["InputSpec", tuple[float, float]], Steps]

#: name -> mean and deviation per channel, of pixels in [0, 1]
_NORMALIZATIONS: Mapping[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

_INTERPOLATIONS = {"nearest", "bilinear", "bicubic"}


@dataclass(frozen=True)
class InputSpec:
    """What a backbone expects.

    Attributes:
        size: height and width, in pixels.
        mean, std: per channel, of pixels in [0, 1].
        interpolation: "nearest", "bilinear" or "bicubic".
        crop_pct: share of the resized short side that the centre crop keeps, in (0, 1].

    Raises:
        ConfigError: when one of them is out of range.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"InputSpec.size must be at least 1; got {self.size}")
        if not 0 < self.crop_pct <= 1:
            raise ConfigError(f"InputSpec.crop_pct must be above 0 and at most 1; got {self.crop_pct}")
        if self.interpolation not in _INTERPOLATIONS:
            raise ConfigError(unknown("interpolation", self.interpolation, _INTERPOLATIONS))
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            got = f"{self.mean} and {self.std}"
            raise ConfigError(f"InputSpec.mean and std have three numbers, std above 0; got {got}")

    @property
    def max_side(self) -> int:
        """The short side, in pixels, beyond which photos are kept shrunk: what the backbone looks at, at least 256."""
        return max(256, math.ceil(self.size / self.crop_pct))

    @property
    def mode(self) -> InterpolationMode:
        """The interpolation, as torchvision calls it."""
        return InterpolationMode(self.interpolation)

    def fed(self, normalization: str) -> InputSpec:
        """Return the same with the mean and deviation that go by a name; "backbone" leaves them as they are.

        >>> InputSpec(8, (0.5,) * 3, (0.2,) * 3).fed("unit")
        InputSpec(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation='bicubic', crop_pct=1.0)

        Raises:
            ConfigError: when nobody knows the name.
        """
        if normalization == "backbone":
            return self
        if normalization not in _NORMALIZATIONS:
            raise ConfigError(unknown("normalization", normalization, ["backbone", *_NORMALIZATIONS]))
        mean, std = _NORMALIZATIONS[normalization]
        return replace(self, mean=mean, std=std)


@dataclass(frozen=True)
class Transform:
    """A named way from an image to what the model sees.

    Attributes:
        name: as in `names()`.
        spec: what the backbone expects.
        random: whether it draws random numbers.
        steps: from uint8 (..., 3, height, width) to uint8 (..., 3, size, size).
        channels: 3, or 4 where a label map comes along as the last one (`lamina.data.labelled`).
    """

    name: str
    spec: InputSpec
    random: bool
    steps: Steps
    channels: int = 3

    def __call__(self, image: Tensor) -> Tensor:
        """Turn an image (3, height, width), uint8, into (3, size, size), uint8.

        A transform that is not random also takes a batch (b, 3, height, width).

        Raises:
            ShapeError: when the image has another shape or type, or is a batch and the transform is random.
        """
        ranks = (3,) if self.random else (3, 4)
        if image.dtype != torch.uint8 or image.ndim not in ranks or image.shape[-3] != self.channels:
            raise ShapeError(
                f"transform {self.name!r} takes uint8 ({self.channels}, height, width); got {image.dtype} "
                f"{tuple(image.shape)}"
            )
        return self.steps(image)

    def normalised(self, batch: Tensor) -> Tensor:
        """Turn pixels (b, 3, size, size), uint8, into float32 with the mean and deviation of `spec`."""
        scaled = batch.float().div_(255)
        return functional.normalize(scaled, list(self.spec.mean), list(self.spec.std), inplace=True)


def names() -> list[str]:
    """Return the name of every transform.

    >>> names()
    ['autoaugment-cifar10', 'autoaugment-imagenet', 'crop-flip', 'flip', 'pad-crop-flip', 'plain', 'resize-crop', \
'resize-crop-flip', 'stretch']
    """
    return sorted(_BUILDERS)


def transform(name: str, spec: InputSpec, scale: tuple[float, float] | None = None) -> Transform:
    """Return the transform called `name`.

    Args:
        scale: smallest and largest share of the image's area that a random crop keeps; None means (0.4, 1) in
            `crop-flip` and (0.08, 1) in the autoaugment transforms. The others do not crop by area.

    Raises:
        ConfigError: when nobody knows the name, or `scale` is out of range or has no meaning for it.
    """
    if name not in _BUILDERS:
        raise ConfigError(unknown("transform", name, _BUILDERS))
    if scale is not None and name not in _SCALES:
        raise ConfigError(f"transform {name!r} does not crop by area, so it takes no scale; got {scale}")
    if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
        raise ConfigError(f"scale of transform {name!r} must be 0 < smallest <= largest <= 1; got {scale}")
    steps = _BUILDERS[name](spec, scale or _SCALES.get(name, (1.0, 1.0)))
    return Transform(name, spec, random=name not in STILL, steps=steps)


def still_of(name: str) -> str:
    """Return the transform of images that are not trained on, where those that are have transform `name`.

    >>> still_of("crop-flip"), still_of("resize-crop-flip"), still_of("stretch")
    ('plain', 'resize-crop', 'stretch')
    """
    return name if name in STILL else _STILL_OF.get(name, "plain")


def _plain(spec: InputSpec, scale: tuple[float, float]) -> Steps:
    # rounded down, as timm does, so that timm's own evaluation sees the same pixels
    short = math.floor(spec.size / spec.crop_pct)

    def steps(image: Tensor) -> Tensor:
        if image.shape[-2:] == (spec.size, spec.size):
            return image
        if min(image.shape[-2:]) != short:
            image = functional.resize(image, [short], interpolation=spec.mode, antialias=True)
        return functional.center_crop(image, [spec.size, spec.size])

    return steps


def _area_crop(spec: InputSpec, scale: tuple[float, float]) -> v2.Transform:
    return v2.RandomResizedCrop(spec.size, scale=scale, interpolation=spec.mode, antialias=True)


def _crop_flip(spec: InputSpec, scale: tuple[float, float]) -> Steps:
    return v2.Compose([_area_crop(spec, scale), v2.RandomHorizontalFlip()])


def _stretch(spec: InputSpec, scale: tuple[float, float]) -> Steps:
    # bilinear without a filter before it, as TensorFlow resizes for VTAB
    def steps(image: Tensor) -> Tensor:
        size = [spec.size, spec.size]
        return functional.resize(image, size, interpolation=InterpolationMode.BILINEAR, antialias=False)

    return steps


def _resize(spec: InputSpec) -> Steps:
    # 256 for 224, 438 for 384, 512 for 448
    short = spec.size * 8 // 7

    def steps(image: Tensor) -> Tensor:
        return functional.resize(image, [short], interpolation=InterpolationMode.BILINEAR, antialias=True)

    return steps


def _resize_crop(spec: InputSpec, scale: tuple[float, float]) -> Steps:
    return v2.Compose([_resize(spec), v2.CenterCrop(spec.size)])


def _resize_crop_flip(spec: InputSpec, scale: tuple[float, float]) -> Steps:
    return v2.Compose([_resize(spec), v2.RandomCrop(spec.size), v2.RandomHorizontalFlip()])


def _flip(spec: InputSpec, scale: tuple[float, float]) -> Steps:
    return v2.Compose([_plain(spec, scale), v2.RandomHorizontalFlip()])


def _pad_crop_flip(spec: InputSpec, scale: tuple[float, float]) -> Steps:
    # an eighth on each side: four pixels of 32, as is usual on CIFAR
    crop = v2.RandomCrop(spec.size, padding=max(1, spec.size // 8))
    return v2.Compose([_plain(spec, scale), crop, v2.RandomHorizontalFlip()])


def _auto(policy: v2.AutoAugmentPolicy) -> Builder:
    # the order, the bilinear policy and the missing flip are those of VPT-NSP2's authors
    return lambda spec, scale: v2.Compose(
        [v2.AutoAugment(policy, interpolation=InterpolationMode.BILINEAR), _area_crop(spec, scale)]
    )


_BUILDERS: Mapping[str, Builder] = {
    "plain": _plain,
    "crop-flip": _crop_flip,
    "flip": _flip,
    "pad-crop-flip": _pad_crop_flip,
    "resize-crop": _resize_crop,
    "resize-crop-flip": _resize_crop_flip,
    "stretch": _stretch,
    "autoaugment-cifar10": _auto(v2.AutoAugmentPolicy.CIFAR10),
    "autoaugment-imagenet": _auto(v2.AutoAugmentPolicy.IMAGENET),
}

#: draws no random numbers
STILL = ("plain", "resize-crop", "stretch")

#: of what training images look like, how images look that are not trained on; of all others, plain
_STILL_OF: Mapping[str, str] = {"resize-crop-flip": "resize-crop"}

_SCALES: Mapping[str, tuple[float, float]] = {
    "crop-flip": (0.4, 1.0),
    "autoaugment-cifar10": (0.08, 1.0),
    "autoaugment-imagenet": (0.08, 1.0),
}
