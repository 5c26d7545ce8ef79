"""Archives whose images are rows of arrays: what is wanted of them goes to the cache as bytes, a few rows at a time."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from lamina.data.cache import cached_array
from lamina.data.decode import file_stamp, reason
from lamina.data.pictures import ArrayPictures, hashed
from lamina.errors import DataError
from lamina.text import printable

#: part of every key: raise it when the same rows would give other pixels
_VERSION = "1"

#: rows that are in memory at once
_AT_ONCE = 1024

#: split -> how the names of smallNORB's files begin
NORB_STEMS = {
    "train": "smallnorb-5x46789x9x18x6x2x96x96-training",
    "test": "smallnorb-5x01235x9x18x6x2x96x96-testing",
}


@dataclass(frozen=True)
class Rows:
    """A split of an archive.

    Attributes:
        keys: of each row, as TensorFlow Datasets has them.
        labels: (n,), int64.
        size: (height, width) of all images.
        file: where the pixels are.
        count: how many images it has.
        pixels: from sorted rows (m,) to the images (b, 1 or 3, height, width), uint8, of some of them at a time.

    Raises:
        DataError: when there are not as many images as labels.
    """

    keys: Sequence[str | int]
    labels: np.ndarray
    size: tuple[int, int]
    file: Path
    count: int
    pixels: Callable[[np.ndarray], Iterator[np.ndarray]]

    def __post_init__(self) -> None:
        if self.count != len(self.labels):
            raise DataError(
                f"{printable(str(self.file))} has {self.count} images, and there are {len(self.labels)} labels for "
                "them; each image must have one, so get images and labels anew"
            )


class StoredPictures:
    """Chosen rows of one split or several, one after the other; see `lamina.data.pictures.Pictures`.

    Args:
        name: begins the name of the cache file.
        parts: splits, and which rows of each.
    """

    def __init__(self, name: str, parts: Sequence[tuple[Rows, np.ndarray]]) -> None:
        self.name, self.parts = name, list(parts)
        self.labels = np.concatenate([split.labels[rows] for split, rows in self.parts])

    def opened(self, wanted: np.ndarray, skip_broken: bool) -> ArrayPictures:
        """Return all images, as bytes in a file that is mapped into memory."""
        stamps = [part for split, rows in self.parts for part in (file_stamp(split.file), rows)]
        key = f"{self.name}-{hashed(_VERSION, *stamps)}"
        return ArrayPictures(
            cached_array(
                key,
                (len(self.labels), 3, *self.parts[0][0].size),
                np.uint8,
                lambda out: self._read(np.arange(len(self.labels)), out),
            ),
            self.labels,
        )

    def tried(self, wanted: np.ndarray) -> np.ndarray:
        """Return the images `wanted` (m,), sorted, as (m, 3, height, width), uint8, past the cache.

        Raises:
            DataError: when they cannot be read.
        """
        out = np.zeros((len(wanted), 3, *self.parts[0][0].size), np.uint8)
        self._read(wanted, out)
        return out

    def _read(self, wanted: np.ndarray, out: np.ndarray) -> None:
        """Write the images `wanted` (m,), sorted, to `out` (m, 3, height, width)."""
        start = 0
        for split, rows in self.parts:
            first, last = np.searchsorted(wanted, (start, start + len(rows)))
            own = rows[wanted[first:last] - start]
            order = np.argsort(own, kind="stable")
            done = 0
            try:
                for images in split.pixels(own[order]) if len(own) else ():
                    # one channel of grey becomes three equal ones
                    out[first + order[done : done + len(images)]] = images
                    done += len(images)
            except Exception as error:  # readers of HDF5 and zip files raise almost anything
                raise DataError(
                    f"the images in {printable(str(split.file))} cannot be read: {reason(error)}; get it anew"
                ) from None
            if done < len(own):
                raise DataError(f"{printable(str(split.file))} ends before all of its images came; get it anew")
            start += len(rows)


def _of_array(array: np.ndarray) -> Callable[[np.ndarray], Iterator[np.ndarray]]:
    def pixels(rows: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(rows), _AT_ONCE):
            yield np.asarray(array[rows[start : start + _AT_ONCE]])

    return pixels


def cifar_rows(place: Path, name: str) -> tuple[dict[str, Rows], list[str]]:
    """Return CIFAR-100's batches of pickled arrays; a key is the number of a row."""
    splits = {}
    for split in ("train", "test"):
        with (place / split).open("rb") as file:
            values = _Plain(file, encoding="latin1").load()
        labels = np.array(values["fine_labels"], np.int64)
        array = np.asarray(values["data"], np.uint8).reshape(-1, 3, 32, 32)
        splits[split] = Rows(range(len(labels)), labels, (32, 32), place / split, len(array), _of_array(array))
    classes: list[str] = []
    if (place / "meta").is_file():
        with (place / "meta").open("rb") as file:
            classes = [each.replace("_", " ") for each in _Plain(file, encoding="latin1").load()["fine_label_names"]]
    return splits, classes or [f"class {label}" for label in range(100)]


class _Plain(pickle.Unpickler):
    """Reads arrays, numbers and texts, and runs nothing else that a pickle may name."""

    def find_class(self, module: str, name: str) -> object:
        """Return what makes arrays."""
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        raise DataError(f"a file of CIFAR-100 wants to run {module}.{name}; get it anew from its public page")


def svhn_rows(place: Path, name: str) -> tuple[dict[str, Rows], list[str]]:
    """Return SVHN's cropped digits from MATLAB files; the digit 0 is written as 10."""
    from scipy.io import loadmat

    splits = {}
    for split in ("train", "test"):
        file = place / f"{split}_32x32.mat"
        values = loadmat(file)
        labels = values["y"].reshape(-1).astype(np.int64) % 10
        array = values["X"].transpose(3, 2, 0, 1)
        splits[split] = Rows(range(len(labels)), labels, (32, 32), file, len(array), _of_array(array))
    return splits, [f"digit {digit}" for digit in range(10)]


def camelyon_rows(place: Path, name: str) -> tuple[dict[str, Rows], list[str]]:
    """Return Patch Camelyon's HDF5 files; keys are train_0, valid_0, test_0 and so on."""
    try:
        import h5py
    except ModuleNotFoundError:
        raise DataError(
            f"{printable(str(place))} holds HDF5 files, which need h5py: pip install h5py; or take lists of images"
        ) from None

    splits = {}
    for split, own in (("train", "train"), ("validation", "valid"), ("test", "test")):
        images, marks = (place / f"camelyonpatch_level_2_split_{own}_{half}.h5" for half in "xy")
        with h5py.File(marks, "r") as found:
            labels = np.asarray(found["y"]).reshape(-1).astype(np.int64)
        with h5py.File(images, "r") as found:
            count = len(found["x"])

        def pixels(rows: np.ndarray, images: Path = images) -> Iterator[np.ndarray]:
            with h5py.File(images, "r") as found:
                for start in range(0, len(rows), _AT_ONCE):
                    yield np.asarray(found["x"][rows[start : start + _AT_ONCE]]).transpose(0, 3, 1, 2)

        keys = [f"{own}_{row}" for row in range(len(labels))]
        splits[split] = Rows(keys, labels, (96, 96), images, count, pixels)
    return splits, ["no tumour tissue", "tumour tissue"]


def sprite_rows(place: Path, name: str) -> tuple[dict[str, Rows], list[str]]:
    """Return dSprites, all in one split; 32 places and 40 turns become 16 classes each."""
    file = place / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    with np.load(file) as found:
        latents = found["latents_classes"]
    labels = sprite_labels(latents, name)
    with zipfile.ZipFile(file) as whole, whole.open("imgs.npy") as stream:
        images, _ = _header(stream)

    def pixels(rows: np.ndarray) -> Iterator[np.ndarray]:
        # unpacked they are 3 GB, so they are read from front to back
        with zipfile.ZipFile(file) as whole, whole.open("imgs.npy") as stream:
            total, dtype = _header(stream)
            for start in range(0, total, _AT_ONCE):
                count = min(_AT_ONCE, total - start)
                block = np.frombuffer(stream.read(count * 64 * 64 * dtype.itemsize), dtype).reshape(count, 1, 64, 64)
                own = rows[(rows >= start) & (rows < start + count)]
                if len(own):
                    yield block[own - start].astype(np.uint8) * 255

    split = Rows(range(len(labels)), labels, (64, 64), file, images, pixels)
    kind = "place" if name == "dsprites-location" else "turn"
    return {"train": split}, [f"{kind} {label}" for label in range(16)]


def _header(stream: IO[bytes]) -> tuple[int, np.dtype]:
    """Read how many rows an .npy file has, and of what; the stream is then at the first."""
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return shape[0], dtype


def sprite_labels(latents: np.ndarray, name: str) -> np.ndarray:
    """Return the class of each sprite (n,), int64, from its latent classes (n, 6).

    Args:
        latents: colour, shape, scale, orientation, x, y.
    """
    if name == "dsprites-location":
        return latents[:, 4].astype(np.int64) // 2
    return np.floor(latents[:, 3] / 2.5).astype(np.int64)


def norb_rows(place: Path, name: str) -> tuple[dict[str, Rows], list[str]]:
    """Return smallNORB, the images of its first camera; azimuths are written as 0, 2, ..., 34, elevations as 0 to 8."""
    splits = {}
    for split, stem in NORB_STEMS.items():
        file = place / f"{stem}-dat.mat"
        array, info = _norb_matrix(file), _norb_matrix(place / f"{stem}-info.mat")
        labels = (info[:, 2] // 2 if name == "smallnorb-azimuth" else info[:, 1]).astype(np.int64)
        splits[split] = Rows(range(len(labels)), labels, (96, 96), file, len(array), _of_array(array[:, :1]))
    if name == "smallnorb-azimuth":
        return splits, [f"{20 * label} degrees around" for label in range(18)]
    return splits, [f"{30 + 5 * label} degrees up" for label in range(9)]


def _norb_matrix(path: Path) -> np.ndarray:
    """Map a matrix in the format that smallNORB calls .mat, which is not MATLAB's."""
    head = np.fromfile(path, "<i4", 2)
    dtypes: dict[int, np.dtype] = {507333717: np.dtype("u1"), 507333716: np.dtype("<i4")}
    if len(head) < 2 or int(head[0]) not in dtypes or not 1 <= int(head[1]) <= 8:
        raise DataError(f"{printable(str(path))} is no matrix of smallNORB; unpack the .gz file anew")
    shape = tuple(np.fromfile(path, "<i4", int(head[1]), offset=8).tolist())
    # at least three sizes are written
    return np.memmap(path, dtypes[int(head[0])], "r", 8 + 4 * max(3, int(head[1])), shape)
