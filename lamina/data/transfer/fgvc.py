"""FGVC: five sets of fine-grained classes, split by JSON files that map the path of an image to the id of its class.

The split files are those passed around with the released code of VPT: train.json, val.json and test.json in the data
set's own folder. Without val.json a tenth of the training images is set aside, of every class; without train.json the
archive's own lists say what is trained on and tested, where they are text files.

References:
    Jia et al., Visual Prompt Tuning, ECCV 2022, and its released code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lamina.data.folder import held_out
from lamina.data.pictures import Source
from lamina.data.transfer.sets import Entry, TransferSet, listed, missing, placed
from lamina.errors import DataError
from lamina.text import printable

#: of training images, set aside where there is no list of validation images; and the seed of the draw
_SHARE, _SEED = 0.1, 0

_OWN_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt")

#: name -> title, classes, images to learn from, choose on and test (as far as we know), folders, folder of images
_FACTS: dict[str, tuple[str, int, tuple[int, int, int], tuple[str, ...], str]] = {
    "cub": ("CUB-200-2011", 200, (5_394, 600, 5_794), ("CUB_200_2011", "cub"), "images"),
    "nabirds": ("NABirds", 555, (21_536, 2_393, 24_633), ("nabirds", "NABirds"), "images"),
    "flowers": (
        "Oxford Flowers102",
        102,
        (1_020, 1_020, 6_149),
        ("OxfordFlower", "OxfordFlowers", "oxford_flowers102", "flowers-102"),
        ".",
    ),
    "dogs": (
        "Stanford Dogs",
        120,
        (10_800, 1_200, 8_580),
        ("Stanford-dogs", "StanfordDogs", "stanford_dogs"),
        "Images",
    ),
    "cars": ("Stanford Cars", 196, (7_329, 815, 8_041), ("Stanford-cars", "StanfordCars", "stanford_cars"), "."),
}


def read(dataset: TransferSet, root: Path, max_side: int) -> Source:
    """Return a data set by its split files, or by the lists of its archive.

    Raises:
        DataError: when it is not there, a file says something else, or a role has a class that training lacks.
    """
    folders = [place for folder in dataset.folders for place in (f"fgvc/{folder}", folder)]
    place, looked = placed(root, folders, lambda at: (at / "train.json").is_file() and (at / "test.json").is_file())
    own = None
    if place is None and len(dataset.options["lists"]):
        own, _ = placed(root, folders, lambda at: all((at / name).is_file() for name in _OWN_LISTS))
    if place is None and own is None:
        raise missing(dataset, root, looked)
    # photos are shown resized to 8/7 of what a backbone takes, so they are kept that large
    side = max_side if max_side <= 256 else -(-max_side * 8 // 7)
    if place is None:
        assert own is not None
        train, test = _own_lists(own)
        return _split(dataset, train, None, test, side, "the archive's train_test_split.txt")
    images = place / dataset.options["images"]
    roles = {role: _json(place / f"{role}.json", images) for role in ("train", "test")}
    validation = _json(place / "val.json", images) if (place / "val.json").is_file() else None
    return _split(dataset, roles["train"], validation, roles["test"], side, "train.json, test.json")


def _split(
    dataset: TransferSet,
    train: Mapping[Path, int],
    validation: Mapping[Path, int] | None,
    test: Mapping[Path, int],
    max_side: int,
    split: str,
) -> Source:
    """Return a source with the classes that training images have, in the order of their ids."""
    ids = sorted({*train.values()})
    label_of = {each: label for label, each in enumerate(ids)}
    for role, entries in (("validation", validation or {}), ("test", test)):
        # a map of its own for each role would shift all labels after a class that it lacks
        if other := sorted({*entries.values()} - {*ids}):
            more = f" and {len(other) - 3} more" if len(other) > 3 else ""
            raise DataError(
                f"{dataset.name}: {role} images have class ids that no training image has: "
                f"{', '.join(map(str, other[:3]))}{more}"
            )

    def labelled(entries: Mapping[Path, int]) -> list[Entry]:
        return [(path, label_of[each]) for path, each in entries.items()]

    learned, chosen_on = labelled(train), labelled(validation or {})
    if validation is None:
        labels = np.array([label for _, label in learned], np.int64)
        aside = held_out(labels, _SHARE, _SEED, [path.as_posix() for path in _below(train)])
        chosen_on = [entry for entry, out in zip(learned, aside, strict=True) if out]
        learned = [entry for entry, out in zip(learned, aside, strict=True) if not out]
        split += "; validation images are our own draw, a tenth of each class"
    else:
        split += ", val.json"
    return listed(dataset, learned, chosen_on, labelled(test), max_side, split, _names(train, ids))


def _below(paths: Mapping[Path, int]) -> list[Path]:
    """Return paths from the first folder in which they part, so that a draw does not depend on where they lie."""
    parts = [path.parts for path in paths]
    same = 0
    while all(len(each) > same + 1 for each in parts) and len({each[same] for each in parts}) == 1:
        same += 1
    return [Path(*each[same:]) for each in parts]


def _json(path: Path, images: Path) -> dict[Path, int]:
    shown = printable(str(path))
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{shown} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict) or not all(_is_id(value) for value in values.values()):
        raise DataError(f"{shown} must map the path of an image to the id of its class, a whole number")
    return {images / name: int(value) for name, value in values.items()}


def _is_id(value: Any) -> bool:
    return type(value) is int or (isinstance(value, str) and value.isascii() and value.isdigit())


def _own_lists(place: Path) -> tuple[dict[Path, int], dict[Path, int]]:
    """Return training and test images by the lists that CUB and NABirds have: lines of an image's id and a value."""
    names, labels, roles = (_lines(place / name) for name in _OWN_LISTS)
    if not names.keys() == labels.keys() == roles.keys():
        raise DataError(f"{printable(str(place))}: {', '.join(_OWN_LISTS)} must have the same images")
    found: tuple[dict[Path, int], dict[Path, int]] = ({}, {})
    for image, name in names.items():
        if not labels[image].isdigit() or roles[image] not in ("0", "1"):
            raise DataError(
                f"{printable(str(place))}: image {image} must have a class id, and 1 for training or 0 for test; got "
                f"{labels[image]!r} and {roles[image]!r}"
            )
        found[roles[image] == "0"][place / "images" / name] = int(labels[image])
    return found


def _lines(path: Path) -> dict[str, str]:
    try:
        lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{printable(str(path))} cannot be read: {error}") from None
    if wrong := next((line for line in lines if len(line) != 2), None):
        raise DataError(f"{printable(str(path))}: a line must have an image's id and a value; got {wrong[0]!r}")
    return {image: value.strip() for image, value in lines}


def _names(train: Mapping[Path, int], ids: Sequence[int]) -> list[str]:
    """Return the names of classes: of their folders, where each class has one of its own; else their ids."""
    folders: dict[int, set[str]] = {each: set() for each in ids}
    for path, each in train.items():
        folders[each].add(path.parent.name)
    single = [next(iter(own)) if len(own) == 1 else "" for own in folders.values()]
    if not all(single) or len({*single}) < len(single):
        return [f"class {each}" for each in ids]
    # 001.Black_footed_Albatross, n02085620-Chihuahua, 0817
    plain = [re.sub(r"^(n?[0-9]+[.-])", "", name).replace("_", " ") for name in single]
    return plain if len({*plain}) == len(plain) else single


#: name -> data set
FGVC: dict[str, TransferSet] = {
    f"fgvc-{name}": TransferSet(
        name=f"fgvc-{name}",
        title=title,
        classes=classes,
        sizes=sizes,
        read=read,
        layout=f"{folders[0]} with train.json, val.json and test.json, which map paths to class ids, and the images in "
        + str(Path(folders[0], images)),
        folders=folders,
        options={"images": images, "lists": "own" if name in ("cub", "nabirds") else ""},
    )
    for name, (title, classes, sizes, folders, images) in _FACTS.items()
}
