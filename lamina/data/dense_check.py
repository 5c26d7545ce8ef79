"""What is missing or wrong with a data set whose images have label maps, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lamina.data.ade20k import FOLDER, NAMES, SIZES, LabelledFiles, ade20k_path, halves_of, missing, palette_of
from lamina.data.checked import Checked, few, sample
from lamina.data.labelled import labelled
from lamina.data.scenes import digit_scenes
from lamina.errors import DataError
from lamina.text import printable

_LAYOUT = (
    f"{FOLDER} with photographs in images/training and images/validation, *.jpg, and a label map for each, of its name "
    "and its size, in annotations/training and annotations/validation, *.png"
)


def _ade20k(root: Path) -> Checked:
    """Look at ADE20K: its folders, whether images and maps go together, their sizes, and the labels of a sample."""
    found = Checked("ade20k", _LAYOUT)
    place = ade20k_path(root)
    if place is None:
        found.wrong.append(str(missing(root)))
        return found
    palette = palette_of(place / NAMES)
    found.classes, found.split = len(palette), "the archive's folders training and validation"
    if not (place / NAMES).is_file():
        found.remarks.append(f"there is no {NAMES}, so classes are called by their numbers")
    for (half, role), expected in zip((("training", "training"), ("validation", "test")), SIZES, strict=True):
        images, maps = halves_of(place, half)
        found.roles[role] = len(images)
        for folder, files, suffix in (("images", images, ".jpg"), ("annotations", maps, ".png")):
            if not files:
                what = f"holds no {suffix}" if (place / folder / half).is_dir() else "is not there"
                found.wrong.append(f"{printable(str(place / folder / half))} {what}")
        if images and len(images) != expected:
            found.remarks.append(f"differs from what we expected: {len(images)} {role} images, not {expected}")
        if images and maps:
            found.wrong += _unpaired(half, images, maps) + _of_pairs(half, images, maps, palette)
    return found


def _unpaired(half: str, images: Mapping[str, Path], maps: Mapping[str, Path]) -> list[str]:
    wrong = []
    for what, own, others, lacks in (
        ("images", images, maps, f"label map in annotations/{half}"),
        ("label maps", maps, images, f"image in images/{half}"),
    ):
        if alone := sorted(own.keys() - others.keys()):
            wrong.append(f"{len(alone)} of {len(own)} {half} {what} have no {lacks}: {few(alone)}")
    return wrong


def _of_pairs(half: str, images: Mapping[str, Path], maps: Mapping[str, Path], palette: Sequence[str]) -> list[str]:
    """Return what is wrong with images and their maps: the sizes of all, and the pixels of a sample."""
    both = sorted(images.keys() & maps.keys())
    pairs = LabelledFiles([images[stem] for stem in both], [maps[stem] for stem in both], palette)
    unlike = _refused(range(len(both)), pairs.compare)
    # what differs in size was told, and cannot be taken apart
    rest = np.setdiff1d(np.arange(len(both)), [index for index, _ in unlike])
    tried = rest[sample(len(rest))].tolist()
    broken = _refused(tried, partial(labelled, pairs))
    return [
        f"{len(bad)} of {count} {half} images {what}, the first: {bad[0][1]}"
        for bad, count, what in (
            (unlike, len(both), "differ in size from their label maps or cannot be opened"),
            (broken, len(tried), "that were tried have labels outside the palette or cannot be read"),
        )
        if bad
    ]


def _refused(indices: Sequence[int] | range, look: Callable[[int], object]) -> list[tuple[int, str]]:
    """Return the images that a look refuses, and why."""
    bad = []
    for index in indices:
        try:
            look(index)
        except DataError as error:
            bad.append((index, printable(str(error))))
    return bad


def _scenes(root: Path) -> Checked:
    """Make the scenes of digits and look at a sample; they come from scikit-learn, and no file is asked for."""
    source = digit_scenes()
    found = Checked("segment-digits", "nothing: scenes are made of scikit-learn's digits", classes=len(source.classes))
    found.split = "digits that only the test scenes show"
    for role, pictures in (("training", source.train), ("test", source.test)):
        found.roles[role] = len(pictures.labels)
        tried = sample(len(pictures.labels))
        bad = _refused(tried.tolist(), partial(labelled, pictures.opened(tried, skip_broken=False)))
        found.wrong += [f"{role} {why}" for _, why in bad[:1]]
    return found


#: name of a stream -> how its data set is looked at, from the folder of data sets
DENSE: dict[str, Callable[[Path], Checked]] = {"ade20k": _ade20k, "segment-digits": _scenes}
