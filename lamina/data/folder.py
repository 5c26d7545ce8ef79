"""A folder of images with one folder per class, as a data set."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from lamina.data.decode import ImageFiles
from lamina.data.pictures import Source
from lamina.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})

_LAYOUT = "a folder of images holds train/CLASS/* and test/CLASS/* or val/CLASS/*"


def folder_source(root: Path, max_side: int = 256) -> Source:
    """Return images of a folder: train/CLASS/* to learn from, test/CLASS/* or else val/CLASS/* to test on.

    Classes are the names of the folders, sorted. Hidden files, and files whose suffix is not that of an
    image, are passed over.

    Args:
        max_side: images with a longer short side are kept shrunk to it.

    Raises:
        DataError: when the folder does not have this layout.
    """
    root = root.expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; {_LAYOUT}")
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        missing = "train/" if not train.is_dir() else "test/ or val/"
        raise DataError(f"{root} has no {missing}; {_LAYOUT}")
    classes = sorted({*_folders(train), *_folders(test)})
    if not classes:
        raise DataError(f"{train} has no folders; {_LAYOUT}")
    return Source(
        classes=classes,
        train=_pictures(train, classes, max_side),
        test=_pictures(test, classes, max_side),
    )


def _pictures(root: Path, classes: list[str], max_side: int) -> ImageFiles:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _images(root / name)
        paths += found
        labels += [label] * len(found)
    return ImageFiles(f"folder-{root.name}", paths, np.array(labels, np.int64), max_side)


def _folders(root: Path) -> list[str]:
    return [entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    names = (
        entry.name
        for entry in os.scandir(folder)
        if not entry.name.startswith(".") and Path(entry.name).suffix.lower() in SUFFIXES and entry.is_file()
    )
    return [folder / name for name in sorted(names)]
