"""What is missing or wrong with a data set of transfer learning on disk, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lamina.data.decode import ImageFiles, decode_image, reason
from lamina.data.pictures import Pictures
from lamina.data.transfer.named import TRANSFER
from lamina.data.transfer.sets import ROLES, TransferSet, differences_of, roles_of
from lamina.errors import ConfigError, DataError, unknown
from lamina.text import printable

#: images of each half that are decoded to see whether they can be
_SAMPLE = 64


@dataclass
class Checked:
    """What was found.

    Attributes:
        name: of the stream.
        layout: what must lie where.
        roles: images of each role; empty where the data set cannot be read at all.
        classes: how many there are; 0 where it cannot be read.
        split: how it was split, in words.
        wrong: what must be mended before it can be used.
        remarks: what is not as expected, or worth knowing; it can be used all the same.
    """

    name: str
    layout: str
    roles: dict[str, int] = field(default_factory=dict)
    classes: int = 0
    split: str = ""
    wrong: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def check(name: str, root: Path) -> Checked:
    """Look at a data set on disk: lists, files, classes of each role, and a sample of its images.

    Args:
        root: the folder that data sets lie in, or the data set's own.

    Raises:
        ConfigError: when nobody knows the name.
    """
    if name not in TRANSFER:
        raise ConfigError(unknown("data set of transfer learning", name, TRANSFER))
    dataset = TRANSFER[name]
    found = Checked(name, dataset.layout)
    try:
        _look(dataset, root, found)
    except DataError as error:
        found.wrong.append(str(error))
    return found


def _look(dataset: TransferSet, root: Path, found: Checked) -> None:
    source = dataset.source(root)
    labels = roles_of(source)
    found.roles = {role: len(own) for role, own in labels.items()}
    found.classes = len(source.classes)
    found.split = str(source.details["split"])
    found.remarks += [f"differs from what we expected: {each}" for each in differences_of(dataset, source)]
    if not found.roles["validation"]:
        found.remarks.append("no validation images: settings are chosen on a fifth of the training images")
    for role in ROLES:
        lacking = np.setdiff1d(np.arange(len(source.classes)), labels[role])
        if len(lacking) and found.roles[role]:
            names = [source.classes[label] for label in lacking]
            found.remarks.append(f"{_few(names)} of {len(source.classes)} classes have no {role} image")
    for half, pictures in (("training or validation", source.train), ("test", source.test)):
        found.wrong += _of_files(half, pictures)


def _of_files(half: str, pictures: Pictures) -> list[str]:
    """Return what is wrong with images that have files of their own."""
    if not isinstance(pictures, ImageFiles):
        return []
    gone = [place for place, path in enumerate(pictures.paths) if not path.is_file()]
    wrong = []
    if gone:
        first = printable(str(pictures.paths[gone[0]]))
        wrong.append(f"{len(gone)} of {len(pictures.paths)} {half} images are missing, the first: {first}")
    there = np.setdiff1d(np.arange(len(pictures.paths)), gone)
    sample = there[np.unique(np.linspace(0, len(there) - 1, _SAMPLE).astype(np.int64))] if len(there) else there
    broken = [(place, why) for place in sample.tolist() if (why := _unreadable(pictures.paths[place]))]
    if broken:
        place, why = broken[0]
        wrong.append(
            f"{len(broken)} of {len(sample)} {half} images that were tried cannot be read, the first: "
            f"{printable(str(pictures.paths[place]))}: {why}"
        )
    return wrong


def _unreadable(path: Path) -> str:
    """Return why an image cannot be read; nothing where it can."""
    try:
        decode_image(path.read_bytes())
    except Exception as error:  # decoders raise almost anything
        return reason(error)
    return ""


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{len(names)} ({shown}{', ...' if len(names) > 3 else ''})"
