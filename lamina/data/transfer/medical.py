"""Nine medical data sets, each stratified by us into 800 images to learn from, 200 to choose settings on, and the rest.

The paper that reports on them (LSPT, appendix) says neither which images were trained on nor which classes or measure
were taken, so this is no reproduction of its numbers; it is the size of VTAB-1K on the same archives. Who is in which
role is drawn by a hash of the images' names, of each class in proportion, so it is the same on every machine.

References:
    Mo et al., LSPT: Long-term Spatial Prompt Tuning, 2024, appendix A.1: which data sets.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lamina.data.decode import SUFFIXES
from lamina.data.pictures import Source
from lamina.data.transfer.sets import Entry, TransferSet, listed, missing, placed
from lamina.errors import DataError
from lamina.text import printable

TRAIN, VALIDATION = 800, 200

#: name -> title, classes (as far as we know), folders, how labels are written, what belongs there
_FACTS: dict[str, tuple[str, int, tuple[str, ...], str, str]] = {
    "hyperkvasir": (
        "HyperKvasir", 23, ("labeled-images", "hyper-kvasir", "hyperkvasir"), "deepest",
        "labeled-images with a folder of images for each finding, at any depth",
    ),
    "mesad": (
        "MESAD-Prostatectomy", 21, ("mesad-prostatectomy", "MESAD"), "folders",
        "mesad-prostatectomy/CLASS/*; the archive is one of detection, so cut boxes of one action each first",
    ),
    "kvasir": (
        "Kvasir v2", 8, ("kvasir-dataset-v2", "kvasir-v2", "kvasir"), "folders",
        "kvasir-dataset-v2/CLASS/*",
    ),
    "amlc": (
        "AML cytomorphology", 15, ("AML-Cytomorphology", "AML-Cytomorphology_LMU", "amlc"), "folders",
        "AML-Cytomorphology/CLASS/*, its TIFF files turned into PNG",
    ),
    "malaria": (
        "LHNCBC malaria", 2, ("cell_images", "malaria"), "folders",
        "cell_images/Parasitized/* and cell_images/Uninfected/*",
    ),
    "bone-marrow": (
        "MLLBone, bone marrow cytomorphology", 21, ("BM_cytomorphology_data", "bone-marrow"), "folders",
        "BM_cytomorphology_data/CLASS/*, or its folders of a thousand below CLASS",
    ),
    "aptos": (
        "APTOS 2019", 5, ("aptos2019-blindness-detection", "aptos2019", "aptos"),
        "train.csv id_code diagnosis train_images",
        "aptos2019-blindness-detection with train.csv and train_images",
    ),
    "eyepacs": (
        "EyePACS", 5, ("diabetic-retinopathy-detection", "eyepacs"), "trainLabels.csv image level train",
        "diabetic-retinopathy-detection with trainLabels.csv and train",
    ),
    "isic": (
        "ISIC 2019", 8, ("isic2019", "ISIC_2019", "isic-2019"),
        "ISIC_2019_Training_GroundTruth.csv image * ISIC_2019_Training_Input",
        "isic2019 with ISIC_2019_Training_GroundTruth.csv and ISIC_2019_Training_Input",
    ),
}  # fmt: skip


def read(dataset: TransferSet, root: Path, max_side: int) -> Source:
    """Return a data set with our split of it.

    Raises:
        DataError: when it is not there, its labels cannot be read, or it has too few images.
    """
    how = dataset.options["labels"].split()
    folders = [place for folder in dataset.folders for place in (f"medical/{folder}", folder)]

    def mark(at: Path) -> bool:
        # a folder of folders has no mark but its name
        return (at / how[0]).is_file() if len(how) > 1 else at.is_dir() and (at != root or at.name in dataset.folders)

    place, looked = placed(root, folders, mark)
    if place is None:
        raise missing(dataset, root, looked)
    names, entries = _of_folders(place, how[0] == "deepest") if len(how) == 1 else _of_table(place, *how)
    if len(entries) <= TRAIN + VALIDATION:
        raise DataError(
            f"{dataset.name}: {printable(str(place))} has {len(entries)} images; the split is of {TRAIN} to learn "
            f"from, {VALIDATION} to choose on and the rest, so there must be more than {TRAIN + VALIDATION}"
        )
    labels = np.array([label for _, label in entries], np.int64)
    keys = [path.relative_to(place).as_posix() for path, _ in entries]
    train, validation, test = stratified(labels, keys, (TRAIN, VALIDATION))
    split = f"our own, stratified: {len(train)}, {len(validation)} and the rest"
    learned, chosen_on, tested = ([entries[index] for index in part] for part in (train, validation, test))
    return listed(dataset, learned, chosen_on, tested, max_side, split, names)


def stratified(labels: np.ndarray, keys: Sequence[str], sizes: Sequence[int]) -> list[np.ndarray]:
    """Part images into as many as `sizes` asks for, in turn, and the rest; of each class in proportion.

    Every class gets the whole part of its share, and what is left goes to the largest remainders. Within a class images
    come in the order of a hash of their names.

    Args:
        labels: (n,), int64.
        keys: a name for each image.

    Returns:
        Sorted indices, one array more than there are sizes.
    """
    drawn = np.array([hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest() for key in keys])
    left = {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}
    left = {label: own[np.argsort(drawn[own], kind="stable")] for label, own in left.items()}
    total = len(labels)
    parts = []
    for size in sizes:
        shares = {label: size * int((labels == label).sum()) / total for label in left}
        counts = {label: min(int(share), len(left[label])) for label, share in shares.items()}
        by_remainder = sorted(shares, key=lambda label: (counts[label] - shares[label], label))
        while sum(counts.values()) < min(size, sum(map(len, left.values()))):
            for label in by_remainder:
                if sum(counts.values()) < size and counts[label] < len(left[label]):
                    counts[label] += 1
        parts.append(np.sort(np.concatenate([own[: counts[label]] for label, own in left.items()])))
        left = {label: own[counts[label] :] for label, own in left.items()}
    return [*parts, np.sort(np.concatenate(list(left.values())))]


def _of_folders(place: Path, deepest: bool) -> tuple[list[str], list[Entry]]:
    """Return classes and images of folders: a class is the folder that images lie in, or the first one on the way."""
    found: dict[str, list[Path]] = {}
    for folder, below, files in os.walk(place):
        below[:] = sorted(name for name in below if not name.startswith("."))
        inside = Path(folder).relative_to(place)
        images = sorted(name for name in files if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."))
        if images and inside.parts:
            own = found.setdefault(inside.name if deepest else inside.parts[0], [])
            own += [Path(folder) / name for name in images]
    if len(found) < 2:
        raise DataError(
            f"{printable(str(place))} has images in {len(found)} folders of classes; there must be two or more"
        )
    names = sorted(found)
    return names, [(path, label) for label, name in enumerate(names) for path in found[name]]


def _of_table(place: Path, table: str, image: str, label: str, folder: str) -> tuple[list[str], list[Entry]]:
    """Return classes and images of a CSV file with a column of images and one of grades, or a column for each class."""
    path = place / table
    shown = printable(str(path))
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{shown} cannot be read: {error}") from None
    wanted = [image] if label == "*" else [image, label]
    if not rows or any(name not in rows[0] for name in wanted):
        raise DataError(f"{shown} must have the columns {', '.join(wanted)} and a row for each image")
    marks = [name for name in rows[0] if name != image] if label == "*" else []
    suffix_of = {each.stem: each.name for each in sorted((place / folder).glob("*")) if each.suffix.lower() in SUFFIXES}
    said: list[tuple[str, str]] = []
    for number, row in enumerate(rows, start=2):
        values = (
            [name for name in marks if (row[name] or "0").strip() not in ("0", "0.0")] if marks else [row[label] or ""]
        )
        if len(values) != 1 or not values[0].strip() or not (row[image] or "").strip():
            raise DataError(f"{shown}, line {number}: must name an image and one class; got {len(values)} classes")
        said.append((row[image].strip(), values[0].strip()))
    names = [name for name in marks if name in {name for _, name in said}] or sorted({name for _, name in said})
    label_of = {name: place for place, name in enumerate(names)}
    entries = [(place / folder / suffix_of.get(key, f"{key}.jpg"), label_of[name]) for key, name in said]
    return ([f"grade {name}" for name in names] if not marks else names), entries


#: name -> data set
MEDICAL: dict[str, TransferSet] = {
    f"medical-{name}": TransferSet(
        name=f"medical-{name}",
        title=title,
        classes=classes,
        sizes=(TRAIN, VALIDATION, None),
        read=read,
        layout=layout,
        folders=folders,
        options={"labels": labels},
    )
    for name, (title, classes, folders, labels, layout) in _FACTS.items()
}
