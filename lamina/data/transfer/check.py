"""What is missing or wrong with a data set on disk, in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from lamina.data.cache import cache_root
from lamina.data.checked import Checked, few, sample
from lamina.data.decode import ImageFiles, decode_image, reason
from lamina.data.dense_check import DENSE
from lamina.data.named import NamedStream, named_stream
from lamina.data.pictures import Pictures, Source
from lamina.data.sources import find_sets
from lamina.data.transfer.arrays import StoredPictures
from lamina.data.transfer.download import DOWNLOADS, download
from lamina.data.transfer.named import TRANSFER
from lamina.data.transfer.sets import ROLES, TransferSet, differences_of, roles_of
from lamina.errors import DataError
from lamina.text import printable

#: bytes in the cache from which on people are told of them
_MUCH = 5_000_000_000

#: the longest side of decoded photographs, as streams have it unless told otherwise
_SIDE = 256


def check(name: str, root: Path) -> Checked:
    """Look at the data set of a stream on disk: lists, files, classes of each role, and a sample of its images.

    Args:
        root: the folder that data sets lie in, or the data set's own.

    Raises:
        ConfigError: when nobody knows the name.
    """
    if name in DENSE:
        return DENSE[name](root.expanduser())
    dataset = TRANSFER.get(name)
    row, path = named_stream(name)
    found = Checked(name, dataset.layout if dataset else row.description)
    try:
        if dataset:
            _look(dataset, root, found)
        else:
            _look_at_source(name, row, path, root.expanduser(), found)
    except DataError as error:
        found.wrong.append(str(error))
    return found


def got(name: str, root: Path, begun: Callable[[], None] = lambda: None) -> Checked:
    """Look at a data set, after a download where no copy that can be used is there and torchvision knows a way.

    Args:
        begun: called before a download.

    Raises:
        ConfigError: when nobody knows the name.
        DataError: when it could not be downloaded.
    """
    found = check(name, root)
    if name not in DOWNLOADS and found.wrong and not any("does not download" in each for each in found.wrong):
        found.remarks.append(f"lamina does not download {name}")
    if not found.wrong or name not in DOWNLOADS:
        return found
    begun()
    download(name, root)
    found = check(name, root)
    if found.wrong:
        found.remarks.append("a folder that was unpacked once is left as it is: remove it, and it is downloaded anew")
    return found


def _look_at_source(name: str, row: NamedStream, path: str, root: Path, found: Checked) -> None:
    """Look at a data set that is not of a benchmark of transfer; what the stream takes of it is a remark."""
    for own, place, said in find_sets(root):
        if own == name and place is None:  # asking for it would download it
            raise DataError(said)
    source = row.source(path, root, _SIDE)
    found.roles = {role: len(labels) for role, labels in roles_of(source).items() if len(labels)}
    found.classes, found.split = len(source.classes), "the data set itself"
    found.remarks.append(f"the stream is {row.description}")
    _look_at_images(source, found)


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
            found.remarks.append(f"{few(names)} of {len(source.classes)} classes have no {role} image")
    _look_at_images(source, found)


def _look_at_images(source: Source, found: Checked) -> None:
    """Read a sample of the images of both halves, and reckon what all of them will take."""
    kept = 0.0
    for half, pictures in (("training or validation", source.train), ("test", source.test)):
        wrong, size = _of_files(half, pictures) if isinstance(pictures, ImageFiles) else _of_others(half, pictures)
        found.wrong += wrong
        kept += size * len(pictures.labels)
    if kept > _MUCH:
        place = printable(str(cache_root()))
        found.remarks.append(f"decoded, its images will take about {kept / 1e9:.0f} GB in {place} (LAMINA_CACHE)")


def _of_files(half: str, pictures: ImageFiles) -> tuple[list[str], float]:
    """Return what is wrong with images that have files of their own, and the bytes of one of them, decoded."""
    gone = [place for place, path in enumerate(pictures.paths) if not path.is_file()]
    wrong = []
    if gone:
        first = printable(str(pictures.paths[gone[0]]))
        wrong.append(f"{len(gone)} of {len(pictures.paths)} {half} images are missing, the first: {first}")
    there = np.setdiff1d(np.arange(len(pictures.paths)), gone)
    tried = there[sample(len(there))].tolist()
    sizes, broken = [], []
    for place in tried:
        try:
            sizes.append(decode_image(pictures.paths[place].read_bytes(), pictures.max_side).size)
        except Exception as error:  # decoders raise almost anything
            broken.append((place, reason(error)))
    if broken:
        place, why = broken[0]
        wrong.append(
            f"{len(broken)} of {len(tried)} {half} images that were tried cannot be read, the first: "
            f"{printable(str(pictures.paths[place]))}: {why}"
        )
    return wrong, float(np.mean(sizes)) if sizes else 0.0


def _of_others(half: str, pictures: Pictures) -> tuple[list[str], float]:
    """Return what is wrong with images of which many share a file, and the bytes of one of them."""
    tried = sample(len(pictures.labels))
    try:
        if isinstance(pictures, StoredPictures):
            return [], pictures.tried(tried)[0].size
        return [], pictures.opened(tried, skip_broken=False).image(int(tried[0])).numel()
    except DataError as error:
        return [f"{half} images that were tried cannot be read: {error}"], 0.0
