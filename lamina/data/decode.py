"""Encoded images, decoded once: every stream reads pixels from the cache, never JPEG twice.

What the cache holds of a set of images is one flat array of bytes: the pixels (3, height, width) of one image
after another, then eight bytes per image, the hash of the file it came from, all zero for an image that could
not be read. So the fingerprint of a set depends on what its files contain and not on where they lie.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lamina.data.cache import cached_array
from lamina.data.pictures import hashed
from lamina.errors import DataError

#: part of every key: raise it when the same file would give other pixels
_VERSION = "1"

#: files in memory at once while decoding; photos can take 10 MB each
_AT_ONCE = 64

#: EXIF's tag for how the camera was held; from 5 on, width and height change places
_ORIENTATION = 0x0112

_DIGEST = 8

T = TypeVar("T")


class Encoded:
    """Images that are encoded in files; a subclass says where.

    Attributes:
        name: begins the names of the cache files.
        labels: (n,), int64. The source's label of each image, from 0.
        max_side: an image whose short side is longer than this is kept shrunk to it, in proportion, so that a
            folder of photos does not fill the disk with pixels that no backbone looks at.
    """

    name: str
    labels: np.ndarray
    max_side: int = 256

    def opened(self, wanted: np.ndarray, skip_broken: bool) -> DecodedImages:
        """Return the images with the indices `wanted` (m,) decoded; see `lamina.data.pictures.Pictures`."""
        return DecodedImages(self, wanted, skip_broken)

    def address(self, index: int) -> str:
        """Return where one image lies, in words for an error message."""
        raise NotImplementedError

    def stamp(self, wanted: np.ndarray) -> str:
        """Return a hash that changes when the files of the images `wanted` do: of names, sizes and times."""
        raise NotImplementedError

    def streams(self, wanted: np.ndarray) -> Iterator[BinaryIO]:
        """Yield the contents of the images `wanted`, in that order; none in those that cannot be opened."""
        raise NotImplementedError


class ImageFiles(Encoded):
    """Images that each have a file of their own."""

    def __init__(self, name: str, paths: Sequence[Path], labels: np.ndarray, max_side: int = 256) -> None:
        self.name, self.paths, self.max_side = name, paths, max_side
        self.labels = np.asarray(labels, np.int64)

    def address(self, index: int) -> str:
        """Return the path."""
        return str(self.paths[index])

    def stamp(self, wanted: np.ndarray) -> str:
        """Hash paths, sizes and times of change."""
        return hashed(*(file_stamp(self.paths[index]) for index in wanted))

    def streams(self, wanted: np.ndarray) -> Iterator[BinaryIO]:
        """Open one file after the other."""
        for index in wanted:
            stream: BinaryIO = BytesIO()
            with suppress(OSError):
                stream = self.paths[index].open("rb")
            yield stream


def file_stamp(path: Path) -> str:
    """Return path, size and time of change of a file, as one line."""
    try:
        status = path.stat()
    except OSError:
        return f"{path}:gone"
    return f"{path.absolute()}:{status.st_size}:{status.st_mtime_ns}"


class DecodedImages:
    """An ImageSet over decoded pixels, memory-mapped where the cache is on disk.

    Attributes:
        labels: (n,), int64. Of every image of the source, decoded or not.
        broken: (k,), int64. Indices of the images that were wanted and could not be read.
        fingerprint: a hash of the files behind the wanted images, and of the sizes they are kept in.

    Raises:
        DataError: when a wanted image cannot be read and `skip_broken` is false.
    """

    def __init__(self, source: Encoded, wanted: np.ndarray, skip_broken: bool) -> None:
        key = f"{source.name}-{hashed(_VERSION, str(source.max_side), source.stamp(wanted), wanted)}"
        shape = (len(wanted), 2)
        sizes = cached_array(f"{key}-sizes", shape, np.int32, lambda out: _measure(source, wanted, out))
        ends = np.cumsum(3 * sizes.astype(np.int64).prod(axis=1))
        total = int(ends[-1]) if len(ends) else 0
        store = cached_array(
            key,
            (total + _DIGEST * len(wanted),),
            np.uint8,
            lambda out: _decode(source, wanted, sizes, ends, out),
        )
        digests = store[total:].reshape(len(wanted), _DIGEST)
        read = digests.any(axis=1)
        self.labels = source.labels
        self.broken = wanted[~read]
        self.fingerprint = hashed(np.array(sizes), np.array(digests))
        if len(self.broken) and not skip_broken:
            raise DataError(_broken_sentence(source, self.broken))
        self._name = source.name
        self._sizes, self._ends, self._pixels = sizes, ends, store[:total]
        self._place = np.full(len(source.labels), -1, np.int64)
        self._place[wanted[read]] = np.flatnonzero(read)
        self._equal = self._as_one_array()

    def _as_one_array(self) -> np.ndarray | None:
        """Return the pixels as (m, 3, height, width), when all images have one size."""
        if not len(self._sizes) or (self._sizes != self._sizes[0]).any() or not self._sizes[0].all():
            return None
        return self._pixels.reshape(len(self._sizes), 3, *map(int, self._sizes[0]))

    def __len__(self) -> int:
        return len(self.labels)

    def _places(self, indices: np.ndarray) -> np.ndarray:
        places = self._place[indices]
        if (places < 0).any():
            index = np.atleast_1d(indices)[np.flatnonzero(np.atleast_1d(places) < 0)[0]]
            raise IndexError(f"image {index} of {self._name} was not decoded: not wanted, or broken")
        return places

    def image(self, index: int) -> Tensor:
        """Return one image (3, height, width), uint8."""
        place = int(self._places(np.asarray(index)))
        height, width = map(int, self._sizes[place])
        end = int(self._ends[place])
        pixels = np.array(self._pixels[end - 3 * height * width : end])
        return torch.from_numpy(pixels.reshape(3, height, width))

    def batch(self, indices: np.ndarray) -> Tensor | None:
        """Return images (b, 3, height, width), uint8; None when the set has images of several sizes."""
        if self._equal is None:
            return None
        return torch.from_numpy(np.asarray(self._equal[self._places(indices)]))


def kept_size(width: int, height: int, max_side: int) -> tuple[int, int]:
    """Return the (width, height) in which an image is kept.

    >>> kept_size(1000, 500, 256), kept_size(80, 60, 256)
    ((512, 256), (80, 60))
    """
    short = min(width, height)
    if short <= max_side:
        return width, height
    return round(width * max_side / short), round(height * max_side / short)


def rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB: transparent parts on white, 16-bit grey scaled to 8, palettes resolved."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.clip(np.rint(grey / 257), 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    # a damaged tag says nothing about the pixels
    with suppress(Exception):
        return int(image.getexif().get(_ORIENTATION, 1))
    return 1


def decode_image(contents: bytes, max_side: int = 256) -> np.ndarray:
    """Decode one image to (3, height, width), uint8, turned upright by its EXIF tag and shrunk to `max_side`.

    Raises whatever the decoder raises for contents that are not a whole image.
    """
    with Image.open(BytesIO(contents)) as image:
        width, height = kept_size(*image.size, max_side)
        # a JPEG can be decoded at a half, a quarter or an eighth for a fraction of the time
        image.draft(None, (width, height))
        # conversion drops the tag from some formats, so its value is read first
        turned = _orientation(image)
        plain = rgb(image)
        if plain.size != (width, height):
            plain = plain.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        plain.getexif()[_ORIENTATION] = turned
        return np.asarray(ImageOps.exif_transpose(plain)).transpose(2, 0, 1)


def _measure(source: Encoded, wanted: np.ndarray, out: np.ndarray) -> None:
    """Write the kept (height, width) of each image, from its header; (0, 0) where there is none."""

    def size(stream: BinaryIO) -> tuple[int, int]:
        # the decoders raise almost anything for a file that is not an image
        with stream, suppress(Exception), Image.open(stream) as image:
            width, height = kept_size(*image.size, source.max_side)
            return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)
        return (0, 0)

    for place, found in _each(source.streams(wanted), size):
        out[place] = found


def _decode(source: Encoded, wanted: np.ndarray, sizes: np.ndarray, ends: np.ndarray, out: np.ndarray) -> None:
    """Write pixels and digests; a broken image leaves zeros."""

    def pixels(stream: BinaryIO) -> tuple[bytes, np.ndarray | None]:
        with stream, suppress(Exception):
            contents = stream.read()
            digest = hashlib.blake2b(contents, digest_size=_DIGEST).digest()
            return digest, decode_image(contents, source.max_side)
        return bytes(_DIGEST), None

    digests = out[int(ends[-1]) :].reshape(len(wanted), _DIGEST) if len(wanted) else out
    for place, (digest, image) in _each(source.streams(wanted), pixels):
        if image is not None and image.shape == (3, *sizes[place]):
            end = int(ends[place])
            out[end - image.size : end] = image.reshape(-1)
            digests[place] = np.frombuffer(digest, np.uint8)


def _each(streams: Iterator[BinaryIO], work: Callable[[BinaryIO], T]) -> Iterator[tuple[int, T]]:
    """Yield (place, work(stream)) in order, with a few streams in work at once."""
    place = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while some := list(islice(streams, _AT_ONCE)):
            for result in pool.map(work, some):
                yield place, result
                place += 1


def _broken_sentence(source: Encoded, broken: np.ndarray) -> str:
    first = source.address(int(broken[0]))
    why = "its pixels do not have the size that its header says"
    with next(iter(source.streams(broken[:1]))) as stream:
        contents = stream.read()
    try:
        decode_image(contents, source.max_side)
    except Exception as error:
        why = "it is empty or cannot be opened" if not contents else str(error).split(" <_io")[0].rstrip(".")
    others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
    return f"{first} cannot be read: {why}{others}; mend it, or leave broken images out by --skip-broken"
