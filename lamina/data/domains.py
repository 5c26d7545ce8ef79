"""Domains: the same classes again and again, each time in images of another kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy.ndimage import convolve1d

from lamina.data.pictures import ArrayPictures, Pictures, Source
from lamina.data.sources import digits
from lamina.seeds import seed_at

#: from images (n, 3, height, width), uint8, and the name of their role to as many changed ones
Change = Callable[[np.ndarray, str], np.ndarray]

#: standard deviation of the noise, in steps of grey
_NOISE = 64.0


def digit_domains() -> Source:
    """Return the handwritten digits in every domain of DIGIT_DOMAINS: 1437 training and 360 test images in each.

    All domains share one split, so no test image was trained on in any of them. An image is the same in every
    run, process and order of domains.
    """
    plain = digits()
    train, test = (_in_all_domains(*half) for half in ((plain.train, "train"), (plain.test, "test")))
    return Source(classes=plain.classes, train=train, test=test, domains=list(DIGIT_DOMAINS))


def _in_all_domains(pictures: Pictures, role: str) -> ArrayPictures:
    every = np.arange(len(pictures.labels))
    images = pictures.opened(every, skip_broken=False)
    pixels = np.stack([images.image(index).numpy() for index in every.tolist()])
    classes = int(pictures.labels.max()) + 1
    changed = [change(pixels, role) for change in DIGIT_DOMAINS.values()]
    labels = [place * classes + pictures.labels for place in range(len(changed))]
    return ArrayPictures(np.ascontiguousarray(np.concatenate(changed)), np.concatenate(labels))


def _plain(pixels: np.ndarray, role: str) -> np.ndarray:
    return pixels


def _inverted(pixels: np.ndarray, role: str) -> np.ndarray:
    return 255 - pixels


def _rotated(pixels: np.ndarray, role: str) -> np.ndarray:
    # a quarter turn loses nothing; another angle would blur eight pixels beyond recognition
    return np.rot90(pixels, axes=(2, 3))


def _blurred(pixels: np.ndarray, role: str) -> np.ndarray:
    """Weigh each pixel and its neighbours by 1, 2, 1 in both directions; the border goes on outwards."""
    sums = pixels.astype(np.uint16)
    for axis in (2, 3):
        sums = convolve1d(sums, [1, 2, 1], axis=axis, mode="nearest")
    return ((sums + 8) // 16).astype(np.uint8)


def _noisy(pixels: np.ndarray, role: str) -> np.ndarray:
    """Add noise to each image, the same to its three channels, seeded by the image's address."""
    noise = [
        np.random.RandomState(seed_at("noisy digits", role, index) % 2**32).normal(0, _NOISE, (1, *pixels.shape[2:]))
        for index in range(len(pixels))
    ]
    return np.rint(pixels + np.stack(noise)).clip(0, 255).astype(np.uint8)


def _coarse(pixels: np.ndarray, role: str) -> np.ndarray:
    """Put the mean of two by two pixels in the place of each."""
    count, channels, height, width = pixels.shape
    blocks = pixels.reshape(count, channels, height // 2, 2, width // 2, 2).astype(np.uint16)
    means = ((blocks.sum(axis=(3, 5)) + 2) // 4).astype(np.uint8)
    return means.repeat(2, axis=2).repeat(2, axis=3)


#: name -> what is done to the digits, in the order in which the domains arrive
DIGIT_DOMAINS: Mapping[str, Change] = {
    "plain": _plain,
    "inverted": _inverted,
    "rotated": _rotated,
    "blurred": _blurred,
    "noisy": _noisy,
    "coarse": _coarse,
}
