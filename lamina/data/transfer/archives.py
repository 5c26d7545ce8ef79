"""Public archives of VTAB's data sets, unpacked: which examples there are in each split, with keys, labels and images.

Four of the nineteen cannot be split from their archives as published: Caltech101 (the draw depends on how a file system
lists folders), SUN397 and Retinopathy (partitions and pixels of their own) and DMLab (records of TensorFlow). These are
read from lists alone.

References:
    The builders of TensorFlow Datasets, at the versions that VTAB-1K names: splits, keys and labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lamina.data.pictures import Source
from lamina.data.transfer.arrays import (
    NORB_STEMS,
    Rows,
    StoredPictures,
    camelyon_rows,
    cifar_rows,
    norb_rows,
    sprite_rows,
    svhn_rows,
)
from lamina.data.transfer.order import (
    CLEVR_DISTANCES,
    KITTI_DISTANCES,
    NO_VEHICLE,
    SLICES,
    Slice,
    binned,
    taken,
)
from lamina.data.transfer.sets import Entry, TransferSet, listed, placed, whole
from lamina.errors import DataError
from lamina.text import printable

_HOW = "the archive, in the order of TensorFlow Datasets as recomputed from its keys"


@dataclass(frozen=True)
class Archive:
    """How an archive is read.

    Attributes:
        folders: names of its folder.
        marks: what tells that a folder is one; `*` stands for anything.
        read: from the folder and the name of the data set to its splits.
        layout: for people.
        files: what must lie in it beside, so that what a copy lacks can be named.
    """

    folders: Sequence[str]
    marks: Sequence[str]
    read: Callable[[Path, str], tuple[dict[str, Rows] | dict[str, list[tuple[str, Path, int]]], list[str]]]
    layout: str
    files: Sequence[str] = ()


def read_archive(dataset: TransferSet, root: Path, max_side: int | None) -> Source | None:
    """Return a data set from its public archive, split as published; None where there is none or none is read.

    Args:
        max_side: as of `lamina.data.decode.Encoded`.

    Raises:
        DataError: when a file of it is missing or broken.
    """
    name = dataset.name.removeprefix("vtab-")
    archive = ARCHIVES.get(name)
    if archive is None:
        return None
    place, _ = placed(root, archive.folders, lambda at: all(any(at.glob(mark)) for mark in archive.marks))
    if place is None:
        return None
    if gone := [file for file in archive.files if not (place / file).is_file()]:
        raise DataError(
            f"{printable(str(place))} lacks {', '.join(gone)}; {dataset.title} is {archive.layout}, so get what is "
            "missing"
        )
    try:
        splits, classes = archive.read(place, name)
    except DataError:
        raise
    except Exception as error:  # readers of MATLAB files, pickles and zip archives raise almost anything
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(
            f"{printable(str(place))} is not a whole copy of {dataset.title} ({what}); get it anew"
        ) from None
    return _cut(dataset, name, splits, classes, max_side)


def _cut(
    dataset: TransferSet,
    name: str,
    splits: dict[str, Rows] | dict[str, list[tuple[str, Path, int]]],
    classes: list[str],
    max_side: int | None,
) -> Source:
    published = SLICES[name]
    parts = (published.train, published.validation, published.test)
    first = next(iter(splits.values()))
    if isinstance(first, list):

        def entries(part: Slice) -> list[Entry]:
            examples: list[tuple[str, Path, int]] = splits[part.split]  # type: ignore[assignment]  # all are lists
            return [examples[place][1:] for place in taken(part, [key for key, _, _ in examples])]

        train, validation, test = map(entries, parts)
        return listed(dataset, train, validation, test, max_side, _HOW, classes)
    rows: list[tuple[Rows, np.ndarray]] = []
    for part in parts:
        own: Rows = splits[part.split]  # type: ignore[assignment]  # all are rows
        rows.append((own, taken(part, own.keys)))
    learned = StoredPictures(f"{dataset.name}-train", rows[:2])
    aside = np.arange(len(rows[0][1]), len(learned.labels))
    return whole(dataset, classes, learned, aside, StoredPictures(f"{dataset.name}-test", rows[2:]), _HOW)


def _dtd(place: Path, name: str) -> tuple[dict[str, list[tuple[str, Path, int]]], list[str]]:
    said = {
        split: (place / "labels" / f"{file}1.txt").read_text().split()
        for split, file in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    classes = sorted({key.partition("/")[0] for keys in said.values() for key in keys})
    label = {each: number for number, each in enumerate(classes)}
    return {
        split: [(key, place / "images" / key, label[key.partition("/")[0]]) for key in keys]
        for split, keys in said.items()
    }, classes


def _flowers(place: Path, name: str) -> tuple[dict[str, list[tuple[str, Path, int]]], list[str]]:
    from scipy.io import loadmat

    labels = loadmat(place / "imagelabels.mat")["labels"][0].astype(np.int64)
    ids = loadmat(place / "setid.mat")
    splits: dict[str, list[tuple[str, Path, int]]] = {}
    for split, field in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
        keys = [(int(each), f"image_{int(each):05d}.jpg") for each in ids[field][0]]
        splits[split] = [(key, place / "jpg" / key, int(labels[each - 1]) - 1) for each, key in keys]
    return splits, []


def _pets(place: Path, name: str) -> tuple[dict[str, list[tuple[str, Path, int]]], list[str]]:
    splits: dict[str, list[tuple[str, Path, int]]] = {}
    names: dict[int, str] = {}
    for split, file in (("train", "trainval"), ("test", "test")):
        splits[split] = []
        for line in (place / "annotations" / f"{file}.txt").read_text().splitlines():
            image, label, *_ = line.split()
            splits[split].append((f"{image}.jpg", place / "images" / f"{image}.jpg", int(label) - 1))
            names[int(label) - 1] = image.rpartition("_")[0].replace("_", " ")
    known = sorted(names) == list(range(len(names)))
    return splits, [names[label] for label in sorted(names)] if known else []


def _folders(place: Path, name: str) -> tuple[dict[str, list[tuple[str, Path, int]]], list[str]]:
    """Read CLASS/* whose keys are the class and the file's name, all in one split."""
    classes = sorted(each.name for each in place.iterdir() if each.is_dir() and not each.name.startswith("."))
    found = [
        (f"{each}_{path.name}", path, label)
        for label, each in enumerate(classes)
        for path in sorted((place / each).glob("*.jpg"))
    ]
    return {"train": found}, classes


def _clevr(place: Path, name: str) -> tuple[dict[str, list[tuple[str, Path, int]]], list[str]]:
    splits: dict[str, list[tuple[str, Path, int]]] = {}
    for split, folder in (("train", "train"), ("validation", "val")):
        scenes = json.loads((place / "scenes" / f"CLEVR_{folder}_scenes.json").read_text())["scenes"]
        objects = [scene["objects"] for scene in scenes]
        if name == "clevr-count":
            labels = np.array([len(own) - 3 for own in objects])
        else:
            labels = binned(
                np.array([min(each["pixel_coords"][2] for each in own) for own in objects]), CLEVR_DISTANCES
            )
        files = [scene["image_filename"] for scene in scenes]
        splits[split] = [
            (file, place / "images" / folder / file, int(label)) for file, label in zip(files, labels, strict=True)
        ]
    return splits, [f"{count} objects" for count in range(3, 11)] if name == "clevr-count" else []


def nearest_vehicle(text: str) -> float:
    """Return the least z of cars, vans and trucks in a label file of KITTI, in metres; or else NO_VEHICLE."""
    rows = [line.split() for line in text.splitlines() if line.strip()]
    return min((float(row[13]) for row in rows if row[0] in ("Car", "Van", "Truck")), default=NO_VEHICLE)


def _kitti(place: Path, name: str) -> tuple[dict[str, list[tuple[str, Path, int]]], list[str]]:
    """Read the labelled half of KITTI's objects; videos are dealt to splits as the builder of version 3 deals them."""
    lines = (place / "mapping" / "train_mapping.txt").read_text().splitlines()
    places = [int(word) - 1 for word in (place / "mapping" / "train_rand.txt").read_text().split(",")]
    video_of = [lines[each].split(" ")[1] for each in places]
    videos = sorted(set(video_of))
    draw = np.random.RandomState(123)
    count = max(1, len(videos) // 10)
    tested = set(draw.choice(videos, count, replace=False).tolist())
    aside = set(draw.choice(sorted(set(videos) - tested), count, replace=False).tolist())
    splits: dict[str, list[tuple[str, Path, int]]] = {"train": [], "validation": [], "test": []}
    for image, video in enumerate(video_of):
        near = nearest_vehicle((place / "training" / "label_2" / f"{image:06d}.txt").read_text())
        split = "test" if video in tested else "validation" if video in aside else "train"
        file = f"{image:06d}.png"
        splits[split].append(
            (file, place / "training" / "image_2" / file, int(binned(np.array(near), KITTI_DISTANCES)))
        )
    return splits, ["within 8 m", "within 20 m", "farther", "none"]


_CLEVR = Archive(
    ("CLEVR_v1.0", "clevr", "clevr/CLEVR_v1.0"),
    ("scenes", "images"),
    _clevr,
    "CLEVR_v1.0 with its folders images and scenes",
)
_SPRITES = Archive(
    ("dsprites",),
    ("dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz",),
    sprite_rows,
    "dsprites/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz",
)
_NORB = Archive(
    ("smallnorb",),
    ("smallnorb-5x*.mat",),
    norb_rows,
    "smallnorb with the six files smallnorb-*.mat, unpacked",
    # categories are in files of their own, which nobody asks for
    [f"{stem}-{what}.mat" for stem in NORB_STEMS.values() for what in ("dat", "info")],
)

#: name of the data set -> how its archive is read
ARCHIVES: dict[str, Archive] = {
    "cifar100": Archive(
        ("cifar-100-python", "cifar100/cifar-100-python"), ("train", "test"), cifar_rows, "cifar-100-python"
    ),
    "dtd": Archive(("dtd", "dtd/dtd"), ("labels/train1.txt",), _dtd, "dtd with its folders images and labels"),
    "flowers102": Archive(
        ("flowers-102", "oxford_flowers102", "flowers102"),
        ("setid.mat", "imagelabels.mat"),
        _flowers,
        "flowers-102 with jpg, setid.mat and imagelabels.mat",
    ),
    "pets": Archive(
        ("oxford-iiit-pet", "oxford_iiit_pet"),
        ("annotations/trainval.txt",),
        _pets,
        "oxford-iiit-pet with its folders images and annotations",
    ),
    "svhn": Archive(
        ("svhn",),
        ("t*_32x32.mat",),
        svhn_rows,
        "svhn with train_32x32.mat and test_32x32.mat",
        ("train_32x32.mat", "test_32x32.mat"),
    ),
    "camelyon": Archive(
        ("pcam", "patch_camelyon"),
        ("camelyonpatch_level_2_split_*.h5",),
        camelyon_rows,
        "pcam with the six files camelyonpatch_level_2_split_*.h5, unpacked",
        [f"camelyonpatch_level_2_split_{split}_{half}.h5" for split in ("train", "valid", "test") for half in "xy"],
    ),
    "eurosat": Archive(
        ("2750", "eurosat/2750", "EuroSAT/2750"), ("AnnualCrop",), _folders, "the folder 2750 of EuroSAT"
    ),
    "resisc45": Archive(("NWPU-RESISC45",), ("airplane",), _folders, "NWPU-RESISC45"),
    "clevr-count": _CLEVR,
    "clevr-distance": _CLEVR,
    "kitti-distance": Archive(
        ("kitti",),
        ("training/label_2", "mapping/train_rand.txt"),
        _kitti,
        "kitti with training/image_2, training/label_2 and the folder mapping of devkit_object",
    ),
    "dsprites-location": _SPRITES,
    "dsprites-orientation": _SPRITES,
    "smallnorb-azimuth": _NORB,
    "smallnorb-elevation": _NORB,
}  # fmt: skip
