"""Data sets that torchvision downloads and unpacks, each to where `archives.py` looks for it.

Others are read from disk alone. Of those that torchvision has, KITTI comes without the devkit that says which video an
image is of, and Caltech101 and SUN397 cannot be split from their archives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina.data.sources import why_not
from lamina.errors import DataError
from lamina.text import printable


@dataclass(frozen=True)
class Download:
    """How torchvision gets a data set.

    Attributes:
        kind: its class in torchvision.datasets.
        folder: where it unpacks, below the folder of data sets; torchvision adds folders of its own.
        parts: arguments of each call that is needed.
    """

    kind: str
    folder: str = "."
    parts: Sequence[Mapping[str, Any]] = field(default_factory=lambda: ({},))


def _splits(*names: str) -> list[dict[str, str]]:
    return [{"split": name} for name in names]


_CLEVR = Download("CLEVRClassification")

#: name of a stream -> how it is downloaded. VTAB's CIFAR-100 lies where the stream `cifar100` has it.
DOWNLOADS: Mapping[str, Download] = {
    "cifar10": Download("CIFAR10", "cifar10"),
    "cifar100": Download("CIFAR100", "cifar100"),
    "vtab-cifar100": Download("CIFAR100", "cifar100"),
    "vtab-dtd": Download("DTD"),
    "vtab-flowers102": Download("Flowers102"),
    "vtab-pets": Download("OxfordIIITPet"),
    "vtab-svhn": Download("SVHN", "svhn", _splits("train", "test")),
    # torchvision needs h5py and gdown for it, and says so
    "vtab-camelyon": Download("PCAM", ".", _splits("train", "val", "test")),
    "vtab-eurosat": Download("EuroSAT"),
    "vtab-clevr-count": _CLEVR,
    "vtab-clevr-distance": _CLEVR,
}


def download(name: str, root: Path) -> None:
    """Have torchvision download and unpack a data set below `root`; what it finds there it leaves.

    Args:
        name: one of DOWNLOADS.

    Raises:
        DataError: when it could not be downloaded.
    """
    import torchvision.datasets

    own = DOWNLOADS[name]
    place = root.expanduser() / own.folder
    make = getattr(torchvision.datasets, own.kind)
    try:
        place.mkdir(parents=True, exist_ok=True)
        for part in own.parts:
            make(str(place), download=True, **part)
    except Exception as error:  # torchvision raises URLError, OSError, RuntimeError, and http.client's own errors
        raise DataError(
            f"{name} could not be downloaded to {printable(str(place))}: {why_not(error)}; try again, or put the "
            "public archive there yourself, as `lamina data check` says"
        ) from None
