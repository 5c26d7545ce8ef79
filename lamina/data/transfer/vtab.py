"""VTAB-1K: nineteen data sets in three groups, of each 800 images to learn from and 200 to choose settings on.

The published split is of slices in the order of TensorFlow Datasets, which archives do not show. It is passed around
as lists with the images, `vtab-1k/FOLDER/{images/*, train800.txt, val200.txt, train800val200.txt, test.txt}`, where a
line is a path and a label: that is read here, and is exact. Where it is not there, `archives.py` reads the public
archive of fifteen of them and recomputes the order (`order.py`).

Images stay as their files have them, neither shrunk nor turned by an EXIF tag, so that the stretch to the square is the
only resizing, as in the released code. What remains: TensorFlow decodes JPEG by a faster cosine transform than Pillow.

References:
    Zhai et al., A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark, 2019.
    Jia et al., Visual Prompt Tuning, ECCV 2022, and its released code: which slices.
"""

from __future__ import annotations

from pathlib import Path

from lamina.data.pictures import Source
from lamina.data.transfer.archives import ARCHIVES, read_archive
from lamina.data.transfer.sets import Entry, TransferSet, listed, missing, placed
from lamina.errors import DataError
from lamina.text import printable

_TRAIN, _VALIDATION, _BOTH, _TEST = "train800.txt", "val200.txt", "train800val200.txt", "test.txt"

#: name -> title, group, folder in the layout that is passed around, classes, test images (as far as we know)
_FACTS: dict[str, tuple[str, str, str, int, int]] = {
    "cifar100": ("CIFAR-100", "natural", "cifar", 100, 10_000),
    "caltech101": ("Caltech101", "natural", "caltech101", 102, 6_084),
    "dtd": ("Describable Textures", "natural", "dtd", 47, 1_880),
    "flowers102": ("Oxford Flowers102", "natural", "oxford_flowers102", 102, 6_149),
    "pets": ("Oxford-IIIT Pets", "natural", "oxford_iiit_pet", 37, 3_669),
    "svhn": ("SVHN, cropped", "natural", "svhn", 10, 26_032),
    "sun397": ("SUN397", "natural", "sun397", 397, 21_750),
    "camelyon": ("Patch Camelyon", "specialized", "patch_camelyon", 2, 32_768),
    "eurosat": ("EuroSAT, RGB", "specialized", "eurosat", 10, 5_400),
    "resisc45": ("Resisc45", "specialized", "resisc45", 45, 6_300),
    "retinopathy": ("Diabetic Retinopathy", "specialized", "diabetic_retinopathy", 5, 42_670),
    "clevr-count": ("CLEVR, count", "structured", "clevr_count", 8, 15_000),
    "clevr-distance": ("CLEVR, distance", "structured", "clevr_dist", 6, 15_000),
    "dmlab": ("DMLab frames", "structured", "dmlab", 6, 22_735),
    "kitti-distance": ("KITTI, distance", "structured", "kitti", 4, 711),
    "dsprites-location": ("dSprites, location", "structured", "dsprites_loc", 16, 73_728),
    "dsprites-orientation": ("dSprites, orientation", "structured", "dsprites_ori", 16, 73_728),
    "smallnorb-azimuth": ("smallNORB, azimuth", "structured", "smallnorb_azi", 18, 12_150),
    "smallnorb-elevation": ("smallNORB, elevation", "structured", "smallnorb_ele", 9, 12_150),
}


# Whole photographs are large once they are decoded: for the tests of SUN397 and Retinopathy we reckon with tens of GB.
# They lie in the cache, mapped and not in memory, so a step holds those of its batch alone, but at most 64 while they
# are decoded; `lamina data check` says what a set will take, and LAMINA_CACHE where it goes. Each is stretched anew
# whenever it is seen, which costs more than stretching one that was shrunk.
_AS_STORED = None


def read(dataset: TransferSet, root: Path, max_side: int) -> Source:
    """Return a data set in the layout in which VTAB-1K is passed around, or else from its public archive.

    Args:
        max_side: means nothing here: images are kept as they are stored.

    Raises:
        DataError: when it is not there, a line is no path and label, or an image has two roles.
    """
    folder = dataset.folders[0]
    place, looked = placed(root, [f"vtab-1k/{folder}", folder], lambda at: (at / _TEST).is_file())
    if place is None:
        source = read_archive(dataset, root, _AS_STORED)
        if source is None:
            raise missing(dataset, root, looked)
        return source
    test = entries(place / _TEST)
    classes = names(place)
    if (place / _TRAIN).is_file() and (place / _VALIDATION).is_file():
        train, validation = entries(place / _TRAIN), entries(place / _VALIDATION)
        return listed(dataset, train, validation, test, _AS_STORED, f"lists {_TRAIN}, {_VALIDATION}, {_TEST}", classes)
    if not (place / _BOTH).is_file():
        raise DataError(f"{dataset.name}: {place} has neither {_TRAIN} with {_VALIDATION} nor {_BOTH}")
    split = f"lists {_BOTH}, {_TEST}; none of validation images"
    return listed(dataset, entries(place / _BOTH), [], test, _AS_STORED, split, classes)


def entries(path: Path) -> list[Entry]:
    """Return what a list says: on each line the path of an image, from the list's folder, and its label.

    Raises:
        DataError: when it cannot be read, or some of its lines say something else.
    """
    shown = printable(str(path))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shown} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found: list[Entry] = []
    wrong: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place, _, label = line.strip().rpartition(" ")
        if not place.strip() or not label.isascii() or not label.isdigit():
            wrong.append(
                f"line {number}: must be a path and a label from 0, as in images/1.jpg 7; got {line.strip()[:80]!r}"
            )
            continue
        found.append((path.parent / place.strip(), int(label)))
    if wrong:
        raise DataError(f"{shown}, {wrong[0]}" + (f"; {len(wrong)} lines are like that" if len(wrong) > 1 else ""))
    return found


def names(place: Path) -> list[str]:
    """Return the names in classes.txt, a line each, where somebody has put it beside the lists; else none."""
    path = place / "classes.txt"
    if not path.is_file():
        return []
    found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len({*found}) != len(found):
        raise DataError(f"{printable(str(path))} has a name twice; each class has one of its own")
    return found


def _layout(name: str, folder: str) -> str:
    archive = f"; or the public archive, unpacked: {ARCHIVES[name].layout}" if name in ARCHIVES else ""
    return (
        f"vtab-1k/{folder} as VTAB-1K is passed around, images beside the lists {_TRAIN}, {_VALIDATION} and {_TEST} of "
        f"lines PATH LABEL{archive}"
    )


#: name -> data set
VTAB: dict[str, TransferSet] = {
    f"vtab-{name}": TransferSet(
        name=f"vtab-{name}",
        title=title,
        classes=classes,
        sizes=(800, 200, test),
        read=read,
        layout=_layout(name, folder),
        group=group,
        folders=(folder,),
    )
    for name, (title, group, folder, classes, test) in _FACTS.items()
}
