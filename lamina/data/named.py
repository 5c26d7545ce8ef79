"""Streams by name: which data set each reads, and the settings it has unless others are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina.data import sources
from lamina.data.ade20k import ade20k
from lamina.data.domains import DIGIT_DOMAINS, digit_domains
from lamina.data.folder import domain_folder_source, folder_source
from lamina.data.parts import unescaped
from lamina.data.pictures import Source
from lamina.data.scenes import digit_scenes
from lamina.data.transfer.named import FAMILIES, SHOWN, TRANSFER
from lamina.data.transfer.sets import TransferSet
from lamina.errors import ConfigError, unknown


@dataclass(frozen=True)
class NamedStream:
    """A row of the table of streams.

    Attributes:
        description: one line for people.
        source: from (what follows the colon in the name, root of the data sets, max_side) to the data set.
        values: settings that hold unless others are given.
        run: settings of runs that hold unless a recipe or somebody gives others: how images are shown.
    """

    description: str
    source: Callable[[str, Path, int], Source]
    values: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)


def _tiny(parity: str, per_class: int | None) -> NamedStream:
    images = f"the first {per_class}" if per_class else "all 500"
    purpose = "" if parity == "odd" else ", for tuning only"
    return NamedStream(
        f"Tiny-ImageNet, {parity} labels: ten tasks of ten classes, {images} images of each{purpose}",
        lambda path, root, max_side: sources.tiny_imagenet(root),
        {"tasks": 10, "classes": parity} | ({"per_class": per_class} if per_class else {}),
    )


def _tiny_at_once(per_class: int) -> NamedStream:
    return NamedStream(
        f"Tiny-ImageNet, odd labels: one task of a hundred classes, the first {per_class} images of each",
        lambda path, root, max_side: sources.tiny_imagenet(root),
        {"tasks": 1, "classes": "odd", "per_class": per_class},
    )


def _transfer(own: TransferSet) -> NamedStream:
    family = own.name.partition("-")[0]
    benchmark = FAMILIES[family] + (f", {own.group}" if own.group else "")
    return NamedStream(
        f"{benchmark}: {own.title}, all classes as one task; see `lamina data check`",
        lambda path, root, max_side: own.source(root, max_side),
        {"tasks": 1},
        SHOWN[family],
    )


#: name -> how to build it; `folder:PATH` stands for every name that begins with `folder:`, and so on
STREAMS: dict[str, NamedStream] = {
    "digits": NamedStream(
        "scikit-learn's handwritten digits, 8 x 8 pixels: five tasks of two classes; needs no files",
        lambda path, root, max_side: sources.digits(),
        {"tasks": 5},
    ),
    "folder:PATH": NamedStream(
        "a folder of images, train/CLASS/* and test/CLASS/* or val/CLASS/*: one task unless told otherwise",
        lambda path, root, max_side: folder_source(Path(path), max_side),
        {"tasks": 1},
    ),
    "digits-domains": NamedStream(
        f"the digits in {len(DIGIT_DOMAINS)} domains, a task each: {', '.join(DIGIT_DOMAINS)}; needs no files",
        lambda path, root, max_side: digit_domains(),
    ),
    "folder-domains:PATH": NamedStream(
        "a folder of images, train/DOMAIN/CLASS/* and test/DOMAIN/CLASS/*: the same classes again, a domain a task",
        lambda path, root, max_side: domain_folder_source(Path(path), max_side),
    ),
    "cifar10": NamedStream(
        "CIFAR-10, 32 x 32 pixels: five tasks of two classes; downloaded if it is not there",
        lambda path, root, max_side: sources.cifar("cifar10", root),
        {"tasks": 5},
    ),
    "cifar100": NamedStream(
        "CIFAR-100, 32 x 32 pixels: ten tasks of ten classes; downloaded if it is not there",
        lambda path, root, max_side: sources.cifar("cifar100", root),
        {"tasks": 10},
    ),
    "tiny-imagenet": NamedStream(
        "Tiny-ImageNet, 64 x 64 pixels: ten tasks of twenty classes",
        lambda path, root, max_side: sources.tiny_imagenet(root),
        {"tasks": 10},
    ),
    "segment-digits": NamedStream(
        "scenes of digits with a label for each pixel, 64 x 64 pixels: one task of eleven classes; needs no files",
        lambda path, root, max_side: digit_scenes(),
        {"tasks": 1},
    ),
    "ade20k": NamedStream(
        "ADE20K, photographs with a label for each pixel: one task of 150 classes",
        lambda path, root, max_side: ade20k(root),
        {"tasks": 1},
    ),
    "tiny-odd-10": _tiny("odd", 50),
    "tiny-odd-10-full": _tiny("odd", None),
    "tiny-odd-1x10": _tiny_at_once(10),
    "tiny-odd-1x50": _tiny_at_once(50),
    "tiny-even-10": _tiny("even", 50),
    "tiny-even-10-full": _tiny("even", None),
    **{name: _transfer(own) for name, own in TRANSFER.items()},
}


def named_stream(name: str) -> tuple[NamedStream, str]:
    """Return the row for the name of a stream, or of a part of one, and the path in the name if it has one.

    Raises:
        ConfigError: when nobody knows the name, or the path is missing.
    """
    kind, _, path = name.partition(":")
    if (row := STREAMS.get(f"{kind}:PATH")) is not None:
        if path in ("", "PATH"):
            raise ConfigError(f"stream {name!r} needs the path of a folder, as in {kind}:photos/birds")
        return row, unescaped(path)
    if name not in STREAMS:
        families = [f"{family}-NAME" for family in FAMILIES]
        if name in families:
            begins = name.removesuffix("NAME")
            raise ConfigError(
                f"{name} stands for one of {', '.join(each for each in TRANSFER if each.startswith(begins))}"
            )
        shown = [*(STREAMS.keys() - TRANSFER.keys()), *families]
        raise ConfigError(unknown("stream", name, STREAMS, shown=shown))
    return STREAMS[name], ""
