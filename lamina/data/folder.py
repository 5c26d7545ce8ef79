"""Folders of images with one folder per class, as data sets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from lamina.data.decode import SUFFIXES, ImageFiles
from lamina.data.pictures import Source
from lamina.errors import ConfigError, DataError
from lamina.text import printable

#: in characters; a model file keeps the names of its classes
_LONGEST_NAME = 255

#: folders that stand for roles and not for classes, where there is no other
_SPLITS = ({"train", "test"}, {"train", "val"}, {"train", "test", "val"})

_LAYOUT = "a folder of images holds train/CLASS/* and test/CLASS/* or val/CLASS/*"
_DOMAINS = "a folder of domains holds train/DOMAIN/CLASS/* and test/DOMAIN/CLASS/* or val/DOMAIN/CLASS/*"


def folder_source(root: Path, max_side: int = 256) -> Source:
    """Return images of a folder: train/CLASS/* to learn from, test/CLASS/* or else val/CLASS/* to test on.

    Classes are the names of the folders, sorted. Hidden files, and files whose suffix is not that of an
    image, are passed over.

    Args:
        max_side: images with a longer short side are kept shrunk to it.

    Raises:
        DataError: when the folder does not have this layout.
    """
    train, test = _roles(root, _LAYOUT)
    classes = sorted({*_folders(train), *_folders(test)})
    if not classes:
        raise DataError(f"{train} has no folders; {_LAYOUT}")
    return Source(
        classes=classes,
        train=_pictures(train, classes, max_side, f"folder-{train.name}"),
        test=_pictures(test, classes, max_side, f"folder-{test.name}"),
    )


def domain_folder_source(root: Path, max_side: int = 256) -> Source:
    """Return images of a folder of domains: train/DOMAIN/CLASS/* and test/DOMAIN/CLASS/* or else val/DOMAIN/CLASS/*.

    Domains and classes are the names of the folders, sorted. A domain need not have a folder for every class: who
    builds a stream says what is missing. Otherwise as `folder_source`.

    Raises:
        DataError: when the folder does not have this layout.
    """
    train, test = _roles(root, _DOMAINS)
    domains = sorted({*_folders(train), *_folders(test)})
    if not domains:
        raise DataError(f"{train} has no folders; {_DOMAINS}")
    below = [role / domain for role in (train, test) for domain in domains]
    classes = sorted({name for folder in below if folder.is_dir() for name in _folders(folder)})
    if not classes:
        raise DataError(f"{below[0]} has no folders; {_DOMAINS}")
    folders = [f"{domain}/{name}" for domain in domains for name in classes]
    return Source(
        classes=classes,
        train=_pictures(train, folders, max_side, f"domains-{train.name}"),
        test=_pictures(test, folders, max_side, f"domains-{test.name}"),
        domains=domains,
    )


def _roles(root: Path, layout: str) -> tuple[Path, Path]:
    """Return the folders to learn from and to test on."""
    root = root.expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; {layout}")
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        missing = "train/" if not train.is_dir() else "test/ or val/"
        raise DataError(f"{root} has no {missing}; {layout}")
    return train, test


def labelled_folder(root: Path, max_side: int = 256) -> tuple[list[str], ImageFiles]:
    """Return the classes and images of a folder that holds CLASS/*.

    Classes are the names of the folders, sorted; links to folders count. Hidden files, files whose suffix is
    not that of an image, and whatever lies deeper are passed over.

    Args:
        max_side: images with a longer short side are kept shrunk to it.

    Raises:
        DataError: when the folder does not have this layout, a class has no images, or its name cannot be kept.
    """
    root = root.expanduser()
    shown = printable(str(root))
    if not root.is_dir():
        raise DataError(f"{shown} is not a folder; name a folder that holds CLASS/*")
    try:
        classes = sorted(_folders(root))
        if not classes:
            raise DataError(_without_classes(root, shown))
        if set(classes) in _SPLITS and _folders(root / "train"):
            raise DataError(f"{shown} holds {' and '.join(classes)}, not classes; name {shown}/train instead")
        for name in classes:
            _refuse_name(name, shown)
        images = _pictures(root, classes, max_side, "folder")
    except OSError as error:
        place = printable(str(error.filename or root))
        raise DataError(f"{place} cannot be read: {error.strerror or error}") from None
    counts = np.bincount(images.labels, minlength=len(classes))
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        others = f" (nor do {len(empty) - 1} more)" if len(empty) > 1 else ""
        suffixes = ", ".join(sorted(SUFFIXES))
        raise DataError(f"class {empty[0]!r} in {shown} has no images ({suffixes}){others}; add some or remove it")
    return classes, images


def _pictures(root: Path, classes: list[str], max_side: int, name: str) -> ImageFiles:
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(classes):
        found = _images(root / folder)
        paths += found
        labels += [label] * len(found)
    return ImageFiles(name, paths, np.array(labels, np.int64), max_side)


def held_out(labels: np.ndarray, share: float, seed: int, names: Sequence[str]) -> np.ndarray:
    """Return which images are kept aside, (n,), bool: of each class `share`, rounded, and at least one.

    A class with one image keeps none aside, and no class keeps all; a share of 0 keeps none. An image is chosen
    by a hash of the seed and its name, so that others hardly change places when files are added, and no stretch
    of a camera's numbers is chosen as a whole.

    Args:
        labels: (n,), int64.
        names: of the images' files, different within a class.

    Raises:
        ConfigError: when the share is not from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"the share of images kept aside must be at least 0 and below 1; got {share}")
    aside = np.zeros(len(labels), bool)
    drawn = np.array([_drawn(seed, name) for name in names], np.uint64)
    for label in np.unique(labels) if share else ():
        places = np.flatnonzero(labels == label)
        count = min(max(round(share * len(places)), 1), len(places) - 1)
        aside[places[np.argsort(drawn[places], kind="stable")[:count]]] = True
    return aside


def _drawn(seed: int, name: str) -> int:
    text = f"{seed}/{name}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _without_classes(root: Path, shown: str) -> str:
    if images := _images(root):
        return f"{shown} holds {len(images)} images and no folders; put them into a folder named after their class"
    return f"{shown} holds no folders; name a folder that holds CLASS/*"


def _refuse_name(name: str, shown: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise DataError(f"the name of class folder {name!r} in {shown} is not UTF-8; rename it")
    if printable(name) != name:
        raise DataError(f"the name of class folder {name!r} in {shown} holds a control character; rename it")
    if len(name) > _LONGEST_NAME:
        got = f"{name[:20]!r}... in {shown} has {len(name)} characters"
        raise DataError(f"the name of class folder {got}, more than {_LONGEST_NAME}; rename it")


def _folders(root: Path) -> list[str]:
    return [entry.name for entry in os.scandir(root) if not entry.name.startswith(".") and _holds(entry.is_dir)]


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    names = (
        entry.name
        for entry in os.scandir(folder)
        if not entry.name.startswith(".") and Path(entry.name).suffix.lower() in SUFFIXES and _holds(entry.is_file)
    )
    return [folder / name for name in sorted(names)]


def _holds(test: Callable[[], bool]) -> bool:
    # a link that leads to itself is neither file nor folder, but asking it raises
    with suppress(OSError):
        return test()
    return False
