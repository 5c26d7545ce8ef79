"""Where data sets lie, and the ones that lamina knows by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lamina.data.cache import user_cache
from lamina.data.pictures import ArrayPictures, Source
from lamina.data.tiny_imagenet import tiny_imagenet_path, tiny_imagenet_source
from lamina.errors import DataError

#: of the split of the digits into training and test; never a setting, so that all runs share it
_DIGITS_SEED = 0

_CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def data_root(data: Path | None = None) -> Path:
    """Return the folder of data sets: `data`, else LAMINA_DATA, else `data` in lamina's cache folder."""
    if data is not None:
        return Path(data).expanduser()
    if own := os.environ.get("LAMINA_DATA"):
        return Path(own).expanduser()
    return user_cache() / "data"


def find_sets(data: Path | None = None) -> list[tuple[str, Path | None, str]]:
    """Return (name, where it lies or None, a sentence for people) for every data set that lies on disk."""
    root = data_root(data)
    found = [("tiny-imagenet", tiny_imagenet_path(root))]
    found += [(name, cifar_path(name, root)) for name in _CIFAR_FOLDERS]
    return [(name, path, f"found in {path}" if path else _missing(name, root)) for name, path in found]


def tiny_imagenet(root: Path) -> Source:
    """Return Tiny-ImageNet: 200 classes, 64 x 64 pixels, 500 training and 50 validation images of each.

    Raises:
        DataError: when it does not lie below `root`.
    """
    path = tiny_imagenet_path(root)
    if path is None:
        raise DataError(_missing("tiny-imagenet", root))
    return tiny_imagenet_source(path)


def digits() -> Source:
    """Return scikit-learn's handwritten digits: ten classes, 8 x 8 pixels, 1437 training and 360 test images.

    They come with scikit-learn, so nothing needs to be found or downloaded.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    grey, labels = load_digits(return_X_y=True)
    # 0..16 becomes 0..255, and grey becomes three equal channels
    bytes_ = np.rint(grey.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    pixels = np.ascontiguousarray(np.broadcast_to(bytes_, (len(bytes_), 3, 8, 8)))
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=_DIGITS_SEED, stratify=labels)
    return Source(
        classes=["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
        train=ArrayPictures(pixels[np.sort(train)], labels[np.sort(train)]),
        test=ArrayPictures(pixels[np.sort(test)], labels[np.sort(test)]),
    )


def cifar(name: str, root: Path) -> Source:
    """Return CIFAR-10 or CIFAR-100 (32 x 32 pixels) from below `root`; downloaded to there when it is not.

    Raises:
        DataError: when there is no copy and none can be downloaded.
    """
    import torchvision.datasets

    make = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    path = cifar_path(name, root)
    if path is None:
        path = root / name / _CIFAR_FOLDERS[name]
        _download(name, root, lambda: make(str(path.parent), train=True, download=True))
    try:
        halves = [make(str(path.parent), train=train) for train in (True, False)]
    except (RuntimeError, OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{path} is not a whole copy of {name} ({error}); remove it, get it anew") from None
    train, test = (
        ArrayPictures(np.ascontiguousarray(half.data.transpose(0, 3, 1, 2)), np.array(half.targets, np.int64))
        for half in halves
    )
    return Source(classes=[text.replace("_", " ") for text in halves[0].classes], train=train, test=test)


def cifar_path(name: str, root: Path) -> Path | None:
    """Return the folder of CIFAR's unpacked files below `root`, or None."""
    folder = _CIFAR_FOLDERS[name]
    return next((place / folder for place in (root, root / name) if (place / folder).is_dir()), None)


def _download(name: str, root: Path, download: Callable[[], object]) -> None:
    try:
        (root / name).mkdir(parents=True, exist_ok=True)
        download()
    # torchvision raises URLError, OSError and RuntimeError, and http.client's own errors
    except Exception as error:
        raise DataError(f"{_missing(name, root)}. Downloading it failed: {why_not(error)}") from None


def why_not(error: Exception) -> str:
    """Return in words why a download failed."""
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)


def _missing(name: str, root: Path) -> str:
    """Return the sentence for a data set that is not there: what, where it was looked for, the next move."""
    if name == "tiny-imagenet":
        looked = [root / "tiny-imagenet", root / "tiny-imagenet-200", root / "tiny-imagenet-200.zip"]
        what = "its parquet files and classes.tsv, or the public tiny-imagenet-200.zip, unpacked or not,"
    else:
        folder = _CIFAR_FOLDERS[name]
        looked = [root / folder, root / name / folder]
        what = f"the folder {folder} of the public archive"
    places = ", ".join(map(str, looked))
    return (
        f"{name} was not found; looked for {places}; put {what} there, or name another folder: --data DIR "
        "(`lamina data` takes DIR alone) or LAMINA_DATA"
    )
