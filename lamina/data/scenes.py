"""Scenes made of scikit-learn's digits, with a label for every pixel; they need no files."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.data.dense_streams import DenseSource
from lamina.data.pictures import hashed
from lamina.data.sources import digits

#: of the scenes; never a setting, so that all runs share them
_SEED = 0

_SIDE, _TRAIN, _TEST = 64, 1000, 200

#: the number of digits in a scene, and their sides in pixels, from and to
_COUNT, _DIGIT = (2, 4), (24, 36)

#: how dark an original pixel is at least, in [0, 1], to belong to its digit
_INK = 0.4


class LabelledArrays:
    """Images with label maps that are arrays in memory.

    Args:
        pixels: (n, 3, height, width), uint8.
        masks: (n, height, width), uint8.
        palette: names of the labels, from 0.
    """

    def __init__(self, pixels: np.ndarray, masks: np.ndarray, palette: list[str]) -> None:
        self.pixels, self.masks, self.palette = pixels, masks, palette
        self.labels, self.broken = np.zeros(len(pixels), np.int64), np.zeros(0, np.int64)
        self.fingerprint = hashed(str((pixels.shape, masks.shape)), pixels, masks)

    def opened(self, wanted: np.ndarray, skip_broken: bool) -> LabelledArrays:
        """Return itself: an array has nothing to decode and nothing broken."""
        return self

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> Tensor:
        """Return one image (3, height, width), uint8."""
        return torch.from_numpy(np.array(self.pixels[index]))

    def batch(self, indices: np.ndarray) -> Tensor:
        """Return images (b, 3, height, width), uint8."""
        return torch.from_numpy(self.pixels[indices])

    def mask(self, index: int) -> Tensor:
        """Return the label of each pixel of one image (height, width), uint8."""
        return torch.from_numpy(np.array(self.masks[index]))

    def address(self, index: int) -> str:
        """Return the number of an image."""
        return f"image {index}"


@lru_cache(maxsize=1)
def digit_scenes() -> DenseSource:
    """Return scenes of two to four digits on a texture, 64 x 64 pixels, 1000 to learn from and 200 to test on.

    Those to test on show digits that the others never do. Label 0 is the background, 1 to 10 are the digits.
    """
    source = digits()
    palette = ["background", *source.classes]
    train = _scenes(source.train, _TRAIN, np.random.RandomState([_SEED, 0]), palette)
    test = _scenes(source.test, _TEST, np.random.RandomState([_SEED, 1]), palette)
    return DenseSource(palette, train, test)


def _scenes(digit: Any, count: int, rng: np.random.RandomState, palette: list[str]) -> LabelledArrays:
    pixels = np.empty((count, 3, _SIDE, _SIDE), np.uint8)
    masks = np.empty((count, _SIDE, _SIDE), np.uint8)
    for place in range(count):
        pixels[place], masks[place] = _scene(digit, rng)
    return LabelledArrays(pixels, masks, palette)


def _scene(digit: Any, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene (3, side, side), uint8, and its labels (side, side), uint8."""
    ground = rng.uniform(40, 215, (3, 1, 1))
    image = ground + _texture(rng, 6, 25) + _texture(rng, _SIDE // 2, 12)
    mask = np.zeros((_SIDE, _SIDE), np.uint8)
    for _ in range(rng.randint(_COUNT[0], _COUNT[1] + 1)):
        index, side = rng.randint(len(digit.labels)), rng.randint(_DIGIT[0], _DIGIT[1] + 1)
        ink = _enlarged(digit.pixels[index, :1] / 255, side)[0]
        shape = ink > _INK
        # far from the ground in every channel, on the side where there is more room
        colour = np.where(
            ground > 127, ground - rng.uniform(60, 110, (3, 1, 1)), ground + rng.uniform(60, 110, (3, 1, 1))
        )
        for _ in range(20):
            top, left = rng.randint(0, _SIDE - side + 1, 2)
            rows, columns = slice(top, top + side), slice(left, left + side)
            if not mask[rows, columns][shape].any():
                share = np.clip(2 * ink, 0, 1)
                image[:, rows, columns] = (1 - share) * image[:, rows, columns] + share * colour
                mask[rows, columns][shape] = 1 + digit.labels[index]
                break
    image += rng.normal(0, 6, image.shape)
    return np.rint(image).clip(0, 255).astype(np.uint8), mask


def _texture(rng: np.random.RandomState, cells: int, strength: float) -> np.ndarray:
    """Draw smooth noise (3, side, side) that changes over so many cells from side to side."""
    return strength * _enlarged(rng.normal(0, 1, (3, cells, cells)), _SIDE)


def _enlarged(values: np.ndarray, side: int) -> np.ndarray:
    """Return values (c, h, w) as (c, side, side)."""
    return F.interpolate(torch.from_numpy(values)[None], (side, side), mode="bilinear")[0].numpy()
