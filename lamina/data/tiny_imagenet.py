"""Tiny-ImageNet in the forms in which it is passed around: parquet files, or the public zip, unpacked or not.

All give the same labels (classes sorted by WordNet id) and the same order of images (by file name, numbers
as numbers), so that "the first 50 images of a class" are the same images in each form.

References:
    Le and Yang (2015), Tiny ImageNet Visual Recognition Challenge, CS 231N, Stanford.
"""

from __future__ import annotations

import csv
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lamina.data.decode import Encoded, ImageFiles, file_stamp
from lamina.data.pictures import Source, hashed
from lamina.errors import DataError

_PLACES = ("tiny-imagenet", "tiny-imagenet-200", "tiny-imagenet/tiny-imagenet-200")
_ZIPS = ("tiny-imagenet-200.zip", "tiny-imagenet/tiny-imagenet-200.zip")


def tiny_imagenet_path(root: Path) -> Path | None:
    """Return where Tiny-ImageNet lies below `root`, or None."""
    for place in _PLACES:
        if any((root / place).glob("train-*.parquet")) or (root / place / "wnids.txt").is_file():
            return root / place
    return next((root / place for place in _ZIPS if (root / place).is_file()), None)


def tiny_imagenet_source(path: Path) -> Source:
    """Return Tiny-ImageNet from what `tiny_imagenet_path` found.

    Raises:
        DataError: when files are missing or are not what they should be.
    """
    try:
        if any(path.glob("train-*.parquet")):
            return _from_parquet(path)
        return _from_zip(path) if path.suffix == ".zip" else _from_folder(path)
    except (OSError, KeyError, ValueError, IndexError, zipfile.BadZipFile, pa.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{path} is not a whole copy of Tiny-ImageNet ({what}); get it anew") from None


def first_synonyms(names: Sequence[str], wnids: Sequence[str]) -> list[str]:
    """Return the first of the comma-separated synonyms of each class; a shared one is told apart by its id.

    >>> first_synonyms(["crane, a bird", "crane", "bee"], ["n1", "n2", "n3"])
    ['crane (n1)', 'crane (n2)', 'bee']
    """
    first = [name.split(",")[0].strip() for name in names]
    count = Counter(first)
    return [name if count[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(first, wnids, strict=True)]


def natural(name: str) -> tuple[str | int, ...]:
    """Return a key that sorts numbers inside names as numbers.

    >>> sorted(["n2_10", "n2_9"], key=natural)
    ['n2_9', 'n2_10']
    """
    # a split by a captured group puts the numbers at the odd places
    return tuple(int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name)))


class ParquetImages(Encoded):
    """Images in the rows of parquet files, in the natural order of their file names."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self.name, self.paths = name, paths
        table = pa.concat_tables(pq.ParquetFile(path).read(columns=["image.path", "label"]) for path in paths)
        labels = table["label"].to_numpy().astype(np.int64)
        self.names = [row["path"] or "" for row in table["image"].to_pylist()]
        # stable: rows without names keep the order of the files
        self.rows = np.array(sorted(range(len(labels)), key=lambda row: natural(self.names[row])), np.int64)
        self.labels = labels[self.rows]

    def address(self, index: int) -> str:
        """Return file name and row."""
        row = int(self.rows[index])
        return f"{self.names[row] or 'an image'} (row {row} of {self.paths[0].parent}/{self.name})"

    def stamp(self, wanted: np.ndarray) -> str:
        """Hash the parquet files' paths, sizes and times of change."""
        return hashed(*map(file_stamp, self.paths))

    def streams(self, wanted: np.ndarray) -> Iterator[BinaryIO]:
        """Collect the encoded images, a few kB each, then hand them out in order."""
        rows = self.rows[wanted]
        contents: dict[int, bytes] = {}
        start = 0
        for path in self.paths:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    stop = start + file.metadata.row_group(group).num_rows
                    inside = rows[(rows >= start) & (rows < stop)]
                    if len(inside):
                        column = file.read_row_group(group, columns=["image.bytes"])["image"]
                        for row, cell in zip(inside.tolist(), column.take(pa.array(inside - start)), strict=True):
                            contents[row] = cell["bytes"].as_py() or b""
                    start = stop
        for row in rows.tolist():
            yield BytesIO(contents.pop(row))


class ZippedImages(Encoded):
    """Images inside a zip file."""

    def __init__(self, name: str, path: Path, members: Sequence[str], labels: np.ndarray) -> None:
        self.name, self.path, self.members = name, path, members
        self.labels = np.asarray(labels, np.int64)

    def address(self, index: int) -> str:
        """Return the member and the zip file."""
        return f"{self.members[index]} in {self.path}"

    def stamp(self, wanted: np.ndarray) -> str:
        """Hash the zip file's path, size and time of change."""
        return hashed(file_stamp(self.path))

    def streams(self, wanted: np.ndarray) -> Iterator[BinaryIO]:
        """Read one member after the other."""
        with zipfile.ZipFile(self.path) as file:
            for index in wanted:
                try:
                    yield BytesIO(file.read(self.members[index]))
                except (zipfile.BadZipFile, OSError):
                    yield BytesIO()


def _from_parquet(path: Path) -> Source:
    with (path / "classes.tsv").open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file, delimiter="\t"), key=lambda row: int(row["label"]))
    if [int(row["label"]) for row in rows] != list(range(len(rows))):
        raise ValueError("the labels in classes.tsv are not 0, 1, 2, ...")
    source = Source(
        classes=first_synonyms([row["names"] for row in rows], [row["wnid"] for row in rows]),
        train=ParquetImages("tiny-imagenet-train", sorted(path.glob("train-*.parquet"))),
        test=ParquetImages("tiny-imagenet-val", sorted(path.glob("val-*.parquet"))),
    )
    for images in (source.train, source.test):
        if len(images.labels) and not 0 <= images.labels.min() <= images.labels.max() < len(rows):
            raise ValueError("there are labels that classes.tsv does not name")
    return source


def _from_folder(path: Path) -> Source:
    words = (path / "words.txt").read_text(encoding="utf-8")
    wnids, names = _classes((path / "wnids.txt").read_text(), words)
    val = _val_labels((path / "val" / "val_annotations.txt").read_text(), wnids)
    folders = [path / "train" / wnid / "images" for wnid in wnids]
    train = [sorted(folder.iterdir(), key=lambda image: natural(image.name)) for folder in folders]
    return Source(
        classes=first_synonyms(names, wnids),
        train=ImageFiles(
            "tiny-imagenet-train",
            [image for images in train for image in images],
            np.repeat(np.arange(len(wnids)), [len(images) for images in train]),
        ),
        test=ImageFiles(
            "tiny-imagenet-val",
            [path / "val" / "images" / name for name in val],
            np.array(list(val.values()), np.int64),
        ),
    )


def _from_zip(path: Path) -> Source:
    with zipfile.ZipFile(path) as file:
        members = file.namelist()
        top = next(name for name in members if name.endswith("wnids.txt")).removesuffix("wnids.txt")
        wnids, names = _classes(file.read(f"{top}wnids.txt").decode(), file.read(f"{top}words.txt").decode())
        val = _val_labels(file.read(f"{top}val/val_annotations.txt").decode(), wnids)
    label = {f"{top}train/{wnid}/images": place for place, wnid in enumerate(wnids)}
    parts = [(*_split(member), member) for member in members]
    found = sorted((label[folder], natural(name), member) for folder, name, member in parts if folder in label and name)
    return Source(
        classes=first_synonyms(names, wnids),
        train=ZippedImages(
            "tiny-imagenet-train",
            path,
            [member for _, _, member in found],
            np.array([place for place, _, _ in found], np.int64),
        ),
        test=ZippedImages(
            "tiny-imagenet-val",
            path,
            [f"{top}val/images/{name}" for name in val],
            np.array(list(val.values()), np.int64),
        ),
    )


def _split(member: str) -> tuple[str, str]:
    folder, _, name = member.rpartition("/")
    return folder, name


def _classes(wnids_text: str, words_text: str) -> tuple[list[str], list[str]]:
    """Return the WordNet ids, sorted, and the names of each."""
    wnids = sorted(wnids_text.split())
    words = dict(line.split("\t", 1) for line in words_text.splitlines() if "\t" in line)
    return wnids, [words.get(wnid, wnid) for wnid in wnids]


def _val_labels(annotations: str, wnids: Sequence[str]) -> dict[str, int]:
    """Return the label of each validation image, in the natural order of their names."""
    label = {wnid: place for place, wnid in enumerate(wnids)}
    rows = (line.split("\t") for line in annotations.splitlines() if line.strip())
    return dict(sorted(((row[0], label[row[1]]) for row in rows), key=lambda pair: natural(pair[0])))
