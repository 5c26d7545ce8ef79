"""ADE20K as its public archive of scene parsing has it: 150 classes, 20,210 images to learn from, 2,000 to test on.

Below the root of data sets: ADEChallengeData2016/images/{training,validation}/*.jpg, and as many label maps in
ADEChallengeData2016/annotations/{training,validation}/*.png. The names of classes are those of objectInfo150.txt.

References:
    Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lamina.data.decode import rgb
from lamina.data.dense_streams import DenseSource
from lamina.data.labelled import IGNORE
from lamina.data.pictures import hashed
from lamina.errors import DataError

FOLDER, NAMES = "ADEChallengeData2016", "objectInfo150.txt"
CLASSES = 150

#: images to learn from and to test on, as far as we know
SIZES = (20_210, 2_000)


class LabelledFiles:
    """Photographs and label maps that each have a file of their own, read whenever they are wanted.

    In a map, 0 stands for a pixel that no class has, and c + 1 for label c.

    Args:
        images, maps: (n,), the files of each.
        palette: names of the labels, from 0.

    Raises:
        DataError: when an image and its map have different sizes, or one cannot be read, where not told to skip those.
    """

    def __init__(self, images: Sequence[Path], maps: Sequence[Path], palette: Sequence[str]) -> None:
        self.images, self.maps, self.palette = images, maps, palette
        self.labels, self.broken = np.zeros(len(images), np.int64), np.zeros(0, np.int64)
        self.fingerprint = ""

    def opened(self, wanted: np.ndarray, skip_broken: bool) -> LabelledFiles:
        """Return the same, after a look at the size of every image wanted and its map."""
        out = LabelledFiles(self.images, self.maps, self.palette)
        broken = []
        for index in wanted.tolist():
            try:
                out.compare(index)
            except DataError:
                if not skip_broken:
                    raise
                broken.append(index)
        out.broken = np.array(broken, np.int64)
        files = (path for index in wanted for path in (self.images[index], self.maps[index]))
        out.fingerprint = hashed(*(_stamp(path) for path in files))
        return out

    def compare(self, index: int) -> None:
        """Look at the headers of one image and its map; DataError where their sizes differ or one cannot be read."""
        sizes = []
        for path in (self.images[index], self.maps[index]):
            with _open(path) as file:
                sizes.append(f"{file.height} x {file.width}")
        if sizes[0] != sizes[1]:
            raise DataError(
                f"{self.images[index]} is {sizes[0]} pixels and its label map {sizes[1]}; each image needs a map of "
                "its own size"
            )

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        """Return one image (3, height, width), uint8."""
        pixels = _read(self.images[index], colour=True)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def batch(self, indices: np.ndarray) -> None:
        """Return nothing: images have several sizes."""

    def mask(self, index: int) -> Tensor:
        """Return the label of each pixel of one image (height, width), uint8.

        Raises:
            DataError: when the map has a label that is not in the palette, told as the file has it.
        """
        stored = _read(self.maps[index], colour=False)
        if (highest := int(stored.max(initial=0))) > len(self.palette):
            raise DataError(
                f"{self.maps[index]} has label {highest}; labels of such files go from 1 to {len(self.palette)}, and 0 "
                "stands for none"
            )
        # 0 wraps round to 255, which is what no class has
        assert IGNORE == 255
        return torch.from_numpy(stored - np.uint8(1))

    def address(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.images[index])


def ade20k(root: Path) -> DenseSource:
    """Return ADE20K from below `root`.

    Raises:
        DataError: when it is not there, or images and label maps do not go together.
    """
    place = ade20k_path(root)
    if place is None:
        raise missing(root)
    palette = palette_of(place / NAMES)
    train, test = (LabelledFiles(*_files(place, half), palette) for half in ("training", "validation"))
    return DenseSource(palette, train, test)


def ade20k_path(root: Path) -> Path | None:
    """Return where ADE20K lies below `root`, which may be its own folder; or None."""
    own = [root] if root.name == FOLDER else []
    return next((place for place in (root / FOLDER, root / "ade20k" / FOLDER, *own) if place.is_dir()), None)


def missing(root: Path) -> DataError:
    """Return the error for an archive that is not there: where it was looked for, the next move."""
    return DataError(
        f"ade20k was not found; looked for {root / FOLDER}, {root / 'ade20k' / FOLDER}; put the unpacked folder of "
        "the public archive there, or name another folder: --data DIR (`lamina data` takes DIR alone) or LAMINA_DATA"
    )


def halves_of(place: Path, half: str) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the images and the label maps of one half by what their names have in common, in its order."""
    return (
        {path.stem: path for path in sorted((place / "images" / half).glob("*.jpg"))},
        {path.stem: path for path in sorted((place / "annotations" / half).glob("*.png"))},
    )


def _files(place: Path, half: str) -> tuple[list[Path], list[Path]]:
    """Return the images of one half, in the order of their names, and their label maps."""
    images, maps = halves_of(place, half)
    if not images:
        raise DataError(f"{place / 'images' / half} holds no .jpg; unpack the whole archive")
    if alone := images.keys() ^ maps.keys():
        raise DataError(
            f"{place}: each image in images/{half} needs a label map of its name in annotations/{half}, and the other "
            f"way round; {min(alone)} is in one of them alone ({len(alone)} such); see `lamina data check ade20k`"
        )
    return list(images.values()), list(maps.values())


def palette_of(path: Path) -> list[str]:
    """Return the names of classes; a class by its number where nothing says how it is called."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    except OSError:
        lines = []
    names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    if len(names) != CLASSES:
        return [f"class {number}" for number in range(1, CLASSES + 1)]
    # two classes may share their first word
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, start=1)]


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(_sentence(path, error)) from None


def _read(path: Path, *, colour: bool) -> np.ndarray:
    with _open(path) as file:
        if not colour and file.mode not in ("L", "P"):
            raise DataError(
                f"{path} is an image of mode {file.mode}; a label map has one byte for each pixel (mode L or P)"
            )
        try:
            # of a palette image, the indices are the labels
            return np.asarray(rgb(file) if colour else file, np.uint8)
        except (OSError, ValueError) as error:
            raise DataError(_sentence(path, error)) from None


def _sentence(path: Path, error: Exception) -> str:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{path} cannot be read ({said}); get it anew, or leave such images out with --skip-broken"


def _stamp(path: Path) -> str:
    # where a folder lies, and when it was unpacked, say nothing of what is in it; 4 GB take long to hash
    return f"{path.name} {path.stat().st_size}"
