"""Encoded images, decoded once: every stream reads pixels from the cache, never JPEG twice.

What the cache holds of a set of images is one flat array of bytes: the pixels (3, height, width) of one image
after another, then eight bytes per image, the hash of the file it came from, all zero for an image that could
not be read. So the fingerprint of a set depends on what its files contain and not on where they lie.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from lamina.data.cache import cached_array
from lamina.data.pictures import hashed
from lamina.errors import DataError
from lamina.text import printable

#: part of every key: raise it when the same file would give other pixels
_VERSION = "1"

#: files in memory at once while decoding; photos can take 10 MB each
_AT_ONCE = 64

#: EXIF's tag for how the camera was held; from 5 on, width and height change places
_ORIENTATION = 0x0112

_DIGEST = 8

#: endings of the files that are taken for images, in lower case
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})

#: bytes of the largest file that is read
MOST_BYTES = 200_000_000

# A file of a few kB can unfold to many GB, so its header is believed before anything is decoded. A resize by
# the short side would blow up a strip of 30000 x 1 just as well.
_MOST_PIXELS = 100_000_000
_LONGEST_SIDE = 30_000
_LONGEST_TO_SHORTEST = 100

#: images that stay above this many pixels are decoded one at a time: at five bytes and more for each, several
#: at once can fill a memory
_LARGE = 25_000_000
_ONE_LARGE = threading.Lock()

#: what people call .jpg that is none: where in a file, which bytes, what it is
_OTHERS = (
    (0, b"GIF8", "a GIF image"),
    (0, b"II*\0", "a TIFF image"),
    (0, b"MM\0*", "a TIFF image"),
    (4, b"ftypavi", "an AVIF image"),
    (4, b"ftyp", "a HEIC image or a video"),
    (0, b"%PDF", "a PDF document"),
    (0, b"version https://git-lfs", "the stand-in of a file that Git LFS has not fetched"),
)

T = TypeVar("T")


class Encoded:
    """Images that are encoded in files; a subclass says where.

    Attributes:
        name: begins the names of the cache files.
        labels: (n,), int64. The source's label of each image, from 0.
        max_side: an image whose short side is longer than this is kept shrunk to it, in proportion, so that a
            folder of photos does not fill the disk with pixels that no backbone looks at. None keeps every image as
            its file has it: neither shrunk nor turned by its EXIF tag.
    """

    name: str
    labels: np.ndarray
    max_side: int | None = 256

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

    def __init__(self, name: str, paths: Sequence[Path], labels: np.ndarray, max_side: int | None = 256) -> None:
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


def kept_size(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    """Return the (width, height) in which an image is kept; see `Encoded.max_side`.

    >>> kept_size(1000, 500, 256), kept_size(80, 60, 256), kept_size(1000, 500, None)
    ((512, 256), (80, 60), (1000, 500))
    """
    short = min(width, height)
    if max_side is None or short <= max_side:
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


def decode_image(contents: bytes, max_side: int | None = 256) -> np.ndarray:
    """Decode one image to (3, height, width), uint8, turned upright by its EXIF tag and shrunk to `max_side`.

    Where that is None, it stays as it is stored.

    Raises whatever the decoder raises for contents that are not a whole image, and ValueError for an image too
    large to be decoded; `reason` puts either into words.
    """
    if len(contents) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES // 10**6} MB; larger files are not read")
    with _opened(BytesIO(contents)) as image:
        if max_side is None:
            return np.asarray(_resized(image, image.size)).transpose(2, 0, 1)
        width, height = kept_size(*image.size, max_side)
        # a JPEG can be decoded at a half, a quarter or an eighth for a fraction of the time
        image.draft(None, (width, height))
        return upright(image, (width, height)).transpose(2, 0, 1)


def upright(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Return an image as (height, width, 3), uint8, brought to a size (width, height), then turned by its EXIF tag."""
    # conversion drops the tag from some formats, so its value is read first
    turned = _orientation(image)
    plain = _resized(image, size)
    # what else stood beside the tag may be damaged, and is not read again
    plain.info.clear()
    plain.getexif()[_ORIENTATION] = turned
    return np.asarray(ImageOps.exif_transpose(plain))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    with _ONE_LARGE if math.prod(image.size) > _LARGE else nullcontext():
        plain = rgb(image)
        return plain if plain.size == size else plain.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def _opened(stream: BinaryIO) -> ImageFile.ImageFile:
    """Open a JPEG, PNG, WEBP or BMP by its first bytes, and refuse it by its header; nothing is decoded.

    The formats' classes are called without `Image.open`, which warns of large images through a filter that all
    threads share, and draws its line elsewhere.
    """
    # as much as tells the format, and the size of a WEBP
    head = stream.read(30)
    stream.seek(0)
    kind: type[ImageFile.ImageFile]
    if head.startswith(b"\xff\xd8\xff"):
        kind = JpegImageFile
    elif head.startswith(b"\x89PNG\r\n\x1a\n"):
        kind = PngImageFile
    elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        kind = WebPImageFile
        # its class makes room for all pixels when it opens
        _refuse_size(*_webp_size(head))
    elif head.startswith(b"BM"):
        kind = BmpImageFile
    else:
        other = next((what for start, begins, what in _OTHERS if head[start:].startswith(begins)), None)
        raise ValueError(f"it is {other}; JPEG, PNG, WEBP and BMP are read" if other else "cannot identify image file")
    try:
        image = kind(stream)
    except SyntaxError:
        raise ValueError("its header is damaged, or says that it has no pixels") from None
    _refuse_size(*image.size)
    return image


def _refuse_size(width: int, height: int) -> None:
    size = f"its header says {width} x {height} pixels"
    if min(width, height) < 1:
        raise ValueError(f"{size}: there is nothing to see")
    if max(width, height) > _LONGEST_SIDE or width * height > _MOST_PIXELS:
        most = f"{_LONGEST_SIDE} on a side and {_MOST_PIXELS // 10**6} million in all"
        raise ValueError(f"{size}; at most {most} are read")
    if max(width, height) > _LONGEST_TO_SHORTEST * min(width, height):
        raise ValueError(f"{size}; one side may be at most {_LONGEST_TO_SHORTEST} times as long as the other")


def _webp_size(head: bytes) -> tuple[int, int]:
    """Return (width, height) from the first bytes of a WEBP file (RFC 9649, sections 2.5 to 2.7)."""

    def number(start: int, stop: int) -> int:
        return int.from_bytes(head[start:stop], "little")

    if head[12:16] == b"VP8X":
        return number(24, 27) + 1, number(27, 30) + 1
    if head[12:16] == b"VP8L":
        return (number(21, 25) & 0x3FFF) + 1, (number(21, 25) >> 14 & 0x3FFF) + 1
    return number(26, 28) & 0x3FFF, number(28, 30) & 0x3FFF


def reason(error: Exception) -> str:
    """Put what a decoder raised into words: one short line that is safe to print."""
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0][:200].split(" <_io")[0].rstrip("."))


def _measure(source: Encoded, wanted: np.ndarray, out: np.ndarray) -> None:
    """Write the kept (height, width) of each image, from its header; (0, 0) where there is none."""

    def size(stream: BinaryIO) -> tuple[int, int]:
        # the decoders raise almost anything for a file that is not an image
        with stream, suppress(Exception), _opened(stream) as image:
            width, height = kept_size(*image.size, source.max_side)
            turned = source.max_side is not None and _orientation(image) in (5, 6, 7, 8)
            return (width, height) if turned else (height, width)
        return (0, 0)

    for place, found in _each(source.streams(wanted), size):
        out[place] = found


def _decode(source: Encoded, wanted: np.ndarray, sizes: np.ndarray, ends: np.ndarray, out: np.ndarray) -> None:
    """Write pixels and digests; a broken image leaves zeros."""

    def pixels(stream: BinaryIO) -> tuple[bytes, np.ndarray | None]:
        with stream, suppress(Exception):
            contents = stream.read(MOST_BYTES + 1)
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
    first = printable(source.address(int(broken[0])))
    why = "its pixels do not have the size that its header says"
    with next(iter(source.streams(broken[:1]))) as stream:
        contents = stream.read(MOST_BYTES + 1)
    try:
        decode_image(contents, source.max_side)
    except Exception as error:
        why = "it is empty or cannot be opened" if not contents else reason(error)
    others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
    return f"{first} cannot be read: {why}{others}; mend it, or leave broken images out by --skip-broken"
