"""A built-in data set written out as folders of images, to try the commands with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lamina.data.pictures import Pictures, Source
from lamina.data.sources import digits
from lamina.errors import ConfigError, StorageError, unknown

_SAMPLES: Mapping[str, Callable[[], Source]] = {"digits": digits}


def write_sample(name: str, out: Path, parts: int = 3) -> list[Path]:
    """Write a data set as folders of PNG files, and return those folders: OUT/1, OUT/2, ..., OUT/test.

    OUT/1/CLASS/* to OUT/N/CLASS/* hold the training images, their classes dealt to the parts in order and as
    equally as can be, larger parts first; OUT/test/CLASS/* holds the test images of all classes. A file is
    called after its image's index in the data set, and has its very pixels.

    Raises:
        ConfigError: when nobody knows the name, `out` holds something, or a part would have no class.
        StorageError: when it cannot be written.
    """
    if name not in _SAMPLES:
        raise ConfigError(unknown("sample", name, _SAMPLES))
    source = _SAMPLES[name]()
    if not 1 <= parts <= len(source.classes):
        raise ConfigError(f"parts of sample {name!r} must be from 1 to {len(source.classes)}; got {parts}")
    out = out.expanduser()
    written = []
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} is not an empty folder; a sample is written to a new or empty one")
        for number, labels in enumerate(np.array_split(np.arange(len(source.classes)), parts), start=1):
            written.append(_write(source.train, labels, source.classes, out / str(number)))
        written.append(_write(source.test, np.arange(len(source.classes)), source.classes, out / "test"))
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(f"a sample could not be written to {out}: {reason}; empty it and try again") from error
    return written


def _write(pictures: Pictures, labels: np.ndarray, classes: Sequence[str], folder: Path) -> Path:
    wanted = np.flatnonzero(np.isin(pictures.labels, labels))
    images = pictures.opened(wanted, skip_broken=False)
    for label in labels:
        (folder / classes[label]).mkdir(parents=True)
    for index in wanted.tolist():
        pixels = images.image(index).permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(folder / classes[images.labels[index]] / f"{index:04d}.png")
    return folder
