"""Images and labels as a Python program has them: paths, pictures, arrays, tensors, data sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from sklearn.utils.validation import column_or_1d
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from lamina.data.decode import ImageFiles, kept_size, reason, upright
from lamina.data.incoming import incoming
from lamina.data.pictures import hashed
from lamina.data.stream import ImageSet
from lamina.data.transforms import Transform
from lamina.errors import DataError
from lamina.text import printable

#: in characters; a model file keeps labels as text
_LONGEST_LABEL = 255

#: whole numbers above it do not all have a float
_LARGEST_FLOAT = 2**53

_TAKEN = (
    "take an array (n, h, w, 3) or (n, h, w), a tensor (n, 3, h, w) or (n, 1, h, w), a Dataset, or a list of paths or "
    "images"
)


# ── images ─────────────────────────────────────────────────────────────────────────────────────────


class Given(Protocol):
    """Images before any is read."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> list[Any]:
        """Labels that came with the images; known when those have been read. DataError where there are none."""
        ...

    def ready(self, transform: Transform, max_side: int) -> Iterator[Tensor]:
        """Read the images one after the other, (3, size, size), uint8; DataError where one cannot be read."""
        ...

    def kept(self, max_side: int) -> ImageSet:
        """Return images that can be read again and again; all of its labels are 0.

        Paths are decoded into the cache. Whatever is not an array of small images is held in memory, shrunk.

        Raises:
            DataError: when one of them cannot be read.
        """
        ...


def given(X: Any) -> Given:
    """Take images of any kind that `lamina.estimator.ContinualClassifier` takes.

    Raises:
        DataError: when X is something else, or a single image.
    """
    if isinstance(X, str | os.PathLike):
        raise DataError(f"X must be many images; got one path, {printable(os.fspath(X))!r}: put it into a list")
    if isinstance(X, Image.Image):
        raise DataError("X must be many images; got one: put it into a list")
    if isinstance(X, Dataset):
        return _of_dataset(X)
    if isinstance(X, list | tuple):
        paths = sum(isinstance(item, str | os.PathLike) for item in X)
        if 0 < paths < len(X):
            raise DataError(f"X must be all paths or all images; got {paths} paths among {len(X)}")
        return _Paths([Path(item) for item in X]) if paths else _Pictures(len(X), X.__getitem__)
    if not isinstance(X, Tensor):
        if not hasattr(X, "__array__"):
            raise DataError(f"X must be images, and a {type(X).__name__} is none; {_TAKEN}")
        X = np.asarray(X)
        if X.ndim == 1 and X.dtype.kind in "OU":
            return given(list(X))
    return _of_array(X)


def _of_array(X: np.ndarray | Tensor) -> Given:
    shape, tensor = tuple(X.shape), isinstance(X, Tensor)
    if len(shape) == 3 and (tensor or shape[2] == 3):
        also = ", or one channel each, X[:, None]" if tensor else ""
        raise DataError(f"X must be many images; got one of shape {shape}: give it an axis of images, X[None]{also}")
    channels = shape[1 if tensor else 3] if len(shape) == 4 else 1 if len(shape) == 3 else 0
    if channels not in (1, 3):
        raise DataError(f"X must be images; got {'a tensor' if tensor else 'an array'} of shape {shape}; {_TAKEN}")
    sides = shape[2:] if tensor else shape[1:3]
    return _Pictures(len(X), X.__getitem__, short=min(sides))


def _of_dataset(dataset: Any) -> Given:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise DataError(f"X must be a Dataset with a length; got {type(dataset).__name__}")
    labels: list[Any] = []

    def item(index: int) -> Any:
        got = dataset[index]
        if not isinstance(got, tuple | list):
            return got
        labels.extend(got[1:2])
        return got[0] if got else None

    return _Pictures(len(dataset), item, labels=labels)


class _Paths:
    """Images in files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def labels(self) -> list[Any]:
        raise DataError("paths bring no labels; give them as y")

    def ready(self, transform: Transform, max_side: int) -> Iterator[Tensor]:
        with closing(incoming(self.paths, transform, max_side)) as images:  # type: ignore[type-var]  # a generator
            for index, image in enumerate(images):
                if image.pixels is None:
                    raise self._unreadable(index, image.error)
                yield image.pixels

    def kept(self, max_side: int) -> ImageSet:
        files = ImageFiles("given", self.paths, np.zeros(len(self), np.int64), max_side)
        images = files.opened(np.arange(len(self)), skip_broken=True)
        for index in images.broken[:1].tolist():
            with closing(incoming([self.paths[index]], _unchanged, max_side)) as again:  # type: ignore[type-var,arg-type]
                raise self._unreadable(index, next(again).error)
        return images

    def _unreadable(self, index: int, why: str | None) -> DataError:
        path = printable(str(self.paths[index]))
        return DataError(f"X[{index}], {path}, cannot be read: {why or 'it changes'}; mend it or leave it out")


def _unchanged(image: Tensor) -> Tensor:
    return image


class _Pictures:
    """Images in memory, or from a Dataset.

    Args:
        item: gives an image of any kind; asked for each once, in order, unless `short` is given.
        labels: filled by `item`.
        short: of the sides, in pixels, of images that are all alike and can be asked for again; None elsewhere.
    """

    def __init__(
        self, count: int, item: Callable[[int], Any], *, labels: list[Any] | None = None, short: int | None = None
    ) -> None:
        self.count, self.item, self.short = count, item, short
        self._labels = labels if labels is not None else []

    def __len__(self) -> int:
        return self.count

    @property
    def labels(self) -> list[Any]:
        if len(self._labels) != self.count:
            raise DataError(f"only {len(self._labels)} of {self.count} images brought a label; give labels as y")
        return self._labels

    def ready(self, transform: Transform, max_side: int) -> Iterator[Tensor]:
        for index in range(self.count):
            yield transform(self._read(index, max_side)).contiguous()

    def kept(self, max_side: int) -> ImageSet:
        if self.short is not None and self.short <= max_side:
            return _Kept(self.count, lambda index: self._read(index, max_side))
        images = [self._read(index, max_side) for index in range(self.count)]
        return _Kept(self.count, images.__getitem__)

    def _read(self, index: int, max_side: int) -> Tensor:
        """Return an image (3, height, width), uint8, its short side at most `max_side`."""
        image, name = self.item(index), f"X[{index}]"
        if isinstance(image, Image.Image):
            try:
                pixels = upright(image, kept_size(*image.size, max_side))
            # decoders raise almost anything for a file that is not a whole image
            except Exception as error:
                raise DataError(f"{name} cannot be read: {reason(error)}; mend it or leave it out") from None
        else:
            pixels = _bytes(image, name)
            if min(pixels.shape[:2]) > max_side:
                whole = Image.fromarray(pixels)
                pixels = upright(whole, kept_size(*whole.size, max_side))
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=2)
        # other strides could be resized by another kernel, which rounds in another way
        return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


class _Kept:
    """An ImageSet over whatever reads an image."""

    def __init__(self, count: int, read: Callable[[int], Tensor]) -> None:
        self.labels, self.image = np.zeros(count, np.int64), read
        images = map(read, range(count))
        self.fingerprint = hashed(*[hashed(str(tuple(image.shape)), image.numpy()) for image in images])

    def __len__(self) -> int:
        return len(self.labels)


def _bytes(image: Any, name: str) -> np.ndarray:
    """Return an array or tensor as (height, width, 3) or (height, width), uint8."""
    if not isinstance(image, np.ndarray | Tensor):
        raise DataError(f"{name} must be an image; got {type(image).__name__}; {_TAKEN}")
    shape = tuple(image.shape)
    if isinstance(image, Tensor):
        wanted = "(3, height, width) or (1, height, width)"
        fits = len(shape) == 3 and shape[0] in (1, 3)
        image = image.detach().cpu()
        # numpy has no bfloat16
        array = (image.float() if image.is_floating_point() else image).numpy()
        array = array.transpose(1, 2, 0) if fits else array
    else:
        wanted = "(height, width, 3) or (height, width)"
        array, fits = image, len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))
    if not fits or not array.size:
        raise DataError(f"{name} must have shape {wanted} and pixels; got {shape}")
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.dtype == np.uint8:
        return array
    kind = array.dtype.kind
    if kind not in "iuf":
        raise DataError(f"{name} must have whole numbers or floats; got {array.dtype}")
    if kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{name} must have floats from 0 to 1; got NaN or inf")
    low, high, most = array.min(), array.max(), 1 if kind == "f" else 255
    if low < 0 or high > most:
        rule = "floats from 0 to 1" if kind == "f" else "whole numbers from 0 to 255"
        got = f"{low:.4g} to {high:.4g}"
        raise DataError(f"{name} must have {rule}; got {got}: scale them, and leave normalisation to the model")
    return (np.rint(array.astype(np.float64) * 255) if kind == "f" else array).astype(np.uint8)


# ── labels ─────────────────────────────────────────────────────────────────────────────────────────


def _truth(text: str) -> bool:
    return {"False": False, "True": True}[text]


#: types of labels, and how to read one from its name
_READ: Mapping[str, Callable[[str], Any]] = {"text": str, "int": int, "bool": _truth, "float": float}

_TYPES = {str: "text", int: "int", bool: "bool", float: "float"}


class Labels:
    """Labels of images, and the name of each, from which it can be told again.

    Args:
        y: all text, all whole numbers, all booleans, or all floats without a fraction.

    Attributes:
        type: "text", "int", "bool" or "float".
        values: (n,), as given.
        names: of the labels that occur, sorted by value.
        columns: (n,), int64. The place of each image's label in `names`.

    Raises:
        DataError: when they are something else, or not in one row.
    """

    def __init__(self, y: Any) -> None:
        try:
            values = column_or_1d(_as_array(y), warn=True)
        except (TypeError, ValueError) as error:
            raise DataError(str(error).strip().splitlines()[0]) from None
        plain = values.tolist()
        if any(value is None or (isinstance(value, float) and value != value) for value in plain):
            raise DataError("y must have a label for each image; got NaN or None")
        types = sorted({_TYPES.get(type(value), type(value).__name__) for value in plain}) or ["int"]
        if len(types) > 1 or types[0] not in _READ:
            rule = "labels must be all whole numbers, all text, all booleans or all floats without a fraction"
            raise DataError(f"{rule}; got {' and '.join(types)}")
        self.type, self.values = types[0], values if types == ["text"] else np.array(plain)
        places = {value: place for place, value in enumerate(sorted(set(plain)))}
        self.names = [self._name(value) for value in places]
        self.columns = np.array([places[value] for value in plain], np.int64)

    def _name(self, value: Any) -> str:
        if self.type == "text" and (not 0 < len(value) <= _LONGEST_LABEL or printable(value) != value):
            shown = printable(repr(value[:20]))
            rule = f"labels must have 1 to {_LONGEST_LABEL} characters that can be printed"
            raise DataError(f"{rule}; got {len(value)}, beginning {shown}")
        if self.type == "float" and not (value.is_integer() and abs(value) <= _LARGEST_FLOAT):
            rule = "Unknown label type: continuous. Floats must be classes, without a fraction and at most 2**53"
            raise DataError(f"{rule}; got {value}")
        return str(value + 0.0) if self.type == "float" else str(value)  # -0.0 is called 0.0


def label_type(said: Any, names: Sequence[str]) -> str:
    """Return the type of labels with these names: as a model file says, if that can be; else text.

    >>> label_type("int", ["7", "12"]), label_type("int", ["7", "cat"]), label_type("int", ["007"])
    ('int', 'text', 'text')
    """
    try:
        if said in _READ and all(str(_READ[said](name)) == name for name in names):
            return said
    except (KeyError, TypeError, ValueError):
        pass
    return "text"


def labels_of(kind: str, names: Sequence[str]) -> np.ndarray:
    """Return the labels (C,) with these names."""
    return np.array([_READ[kind](name) for name in names])


def _as_array(y: Any) -> np.ndarray:
    if isinstance(y, Tensor):
        return y.detach().cpu().numpy()
    if not isinstance(y, list | tuple):
        return np.asarray(y)
    # numpy would make text of numbers that stand beside text
    return np.array([value.item() if isinstance(value, Tensor | np.generic) else value for value in y], dtype=object)
