"""What a data set of transfer learning is: what is expected of it, how it is read, what of it is not as expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lamina.data.decode import ImageFiles
from lamina.data.pictures import Pictures, Source
from lamina.data.transfer.download import DOWNLOADS
from lamina.errors import DataError
from lamina.text import printable

#: an image's place and its label
Entry = tuple[Path, int]

Reader = Callable[["TransferSet", Path, int], Source]


@dataclass(frozen=True)
class TransferSet:
    """One data set.

    Attributes:
        name: of the stream, as in `vtab-cifar100`.
        title: for people.
        classes: how many we expect; what is on disk decides.
        sizes: how many images we expect to learn from, to choose settings on and to test; None where nobody says.
        read: from itself, the folder of data sets and the longest short side to the images.
        layout: what must lie where, in words.
        group: of a benchmark whose average goes by groups.
        folders: names under which its own folder is looked for.
        options: what its reader must know beside.
    """

    name: str
    title: str
    classes: int
    sizes: tuple[int | None, int | None, int | None]
    read: Reader
    layout: str
    group: str = ""
    folders: Sequence[str] = ()
    options: Mapping[str, str] = field(default_factory=dict)

    def source(self, root: Path, max_side: int = 256) -> Source:
        """Return its images from below `root`.

        Raises:
            DataError: when they are not there or not what they should be.
        """
        return self.read(self, root.expanduser(), max_side)

    def expected(self) -> dict[str, int]:
        """Return how many classes and images of each role we expect, by name, where anybody says."""
        roles = dict(zip(ROLES, self.sizes, strict=True))
        return {"classes": self.classes, **{f"{role} images": n for role, n in roles.items() if n is not None}}


ROLES = ("training", "validation", "test")


def roles_of(source: Source) -> dict[str, np.ndarray]:
    """Return the labels of the images of each role; validation images are not among those of training."""
    aside = np.zeros(len(source.train.labels), bool)
    aside[source.validation] = True
    labels = source.train.labels
    return dict(zip(ROLES, (labels[~aside], labels[aside], source.test.labels), strict=True))


def differences_of(dataset: TransferSet, source: Source) -> list[str]:
    """Return what is not as we expected, a phrase each; what is on disk decides all the same.

    Numbers of images and classes are from memory and public descriptions, so a difference is no error.
    """
    labels = roles_of(source)
    found = {"classes": len(source.classes), **{f"{role} images": len(own) for role, own in labels.items()}}
    return [
        f"{found[name]} {name} where we expected {number}"
        for name, number in dataset.expected().items()
        if found[name] != number
    ]


def missing(dataset: TransferSet, root: Path, looked: Sequence[Path]) -> DataError:
    """Return the error for a data set that is not there: what, where it was looked for, the next move."""
    places = ", ".join(printable(str(place)) for place in looked)
    known = dataset.name in DOWNLOADS
    how = (
        f"`lamina data get {dataset.name} {printable(str(root))}` downloads it"
        if known
        else "lamina does not download it"
    )
    return DataError(
        f"{dataset.name} was not found; looked for {places}; {how}. What belongs there: "
        f"{dataset.layout}; or name another folder: --data DIR (`lamina data` takes DIR alone) or LAMINA_DATA"
    )


def whole(
    dataset: TransferSet,
    classes: Sequence[str],
    train: Pictures,
    validation: np.ndarray,
    test: Pictures,
    split: str,
    **details: str,
) -> Source:
    """Return the images of a data set as a source that says how it was split and what was not as expected."""
    for role, count in (("training", len(train.labels)), ("test", len(test.labels))):
        if not count:
            raise DataError(f"{dataset.name} has no {role} image")
    said = {"group": dataset.group} if dataset.group else {}
    source = Source(
        classes, train, test, validation=validation, closed=True, details={**said, "split": split, **details}
    )
    if not (other := differences_of(dataset, source)):
        return source
    return Source(
        classes,
        train,
        test,
        validation=validation,
        closed=True,
        details={**source.details, "differs": "; ".join(other)},
    )


def listed(
    dataset: TransferSet,
    train: Sequence[Entry],
    validation: Sequence[Entry],
    test: Sequence[Entry],
    max_side: int | None,
    split: str,
    classes: Sequence[str] = (),
) -> Source:
    """Return images that have files of their own, by lists.

    Args:
        max_side: as of `lamina.data.decode.Encoded`.
        classes: their names; where there are none, they are numbered, as many as labels and expectation ask for.

    Raises:
        DataError: when an image is in two roles: what was learned would be tested.
    """
    roles = {"training": train, "validation": validation, "test": test}
    seen: dict[Path, str] = {}
    for role, entries in roles.items():
        for path, _ in entries:
            if seen.setdefault(path, role) != role:
                raise DataError(
                    f"{dataset.name}: {printable(str(path))} is a {seen[path]} image and a {role} image; each image "
                    "must have one role"
                )
    labels = [np.array([label for _, label in entries], np.int64) for entries in roles.values()]
    highest = max((int(own.max(initial=-1)) for own in labels), default=-1)
    if classes and highest >= len(classes):
        raise DataError(f"{dataset.name} has label {highest} and names for {len(classes)} classes, from 0")
    names = list(classes) or [f"class {label}" for label in range(max(dataset.classes, highest + 1))]

    def files(role: str, *entries: Sequence[Entry]) -> ImageFiles:
        every = [entry for some in entries for entry in some]
        return ImageFiles(
            f"{dataset.name}-{role}",
            [path for path, _ in every],
            np.array([label for _, label in every], np.int64),
            max_side,
        )

    aside = np.arange(len(train), len(train) + len(validation))
    return whole(dataset, names, files("train", train, validation), aside, files("test", test), split)


def placed(root: Path, folders: Sequence[str], mark: Callable[[Path], bool]) -> tuple[Path | None, list[Path]]:
    """Return the first of some folders below `root` that has a mark, or None, and all where it was looked for.

    `root` itself counts, so that a data set's own folder can be named as well as one that holds it.
    """
    looked = [root / folder for folder in folders]
    return next((place for place in [*looked, root] if mark(place)), None), looked
