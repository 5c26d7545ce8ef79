"""What there is: methods, streams, backbones and recipes, and what this machine has for them."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from lamina.config import Settings, read_toml
from lamina.errors import ConfigError, unknown
from lamina.registry import default_backbone, method_class, method_names


def rows(kind: str) -> list[dict[str, Any]]:
    """Return a row for each method, stream, backbone, recipe, or setting of runs, with its name and what it is."""
    lists = {"methods": _methods, "streams": _streams, "backbones": _backbones, "recipes": _recipes}
    return (lists | {"settings": _settings})[kind]()


def about(method: str) -> dict[str, Any]:
    """Return a method's description and references, and a row for each of its settings.

    Raises:
        ConfigError: when nobody knows the method.
    """
    kind = method_class(method)
    return {"method": method, "text": _module_text(kind), "settings": _rows_of(kind)}


def recipe(name: str) -> dict[str, Any]:
    """Return what a recipe says, as METHOD/NAME, and its text.

    Raises:
        ConfigError: when there is none of that name.
    """
    from lamina.runs import RECIPES

    path = RECIPES / f"{name}.toml"
    if not path.exists():
        raise ConfigError(unknown("recipe", name, [row["recipe"] for row in _recipes()]))
    return {"recipe": name, "text": path.read_text().rstrip(), **read_toml(path)}


def health(data: Path | None) -> dict[str, Any]:
    """Return versions, devices, folders, and which data sets and backbones were found."""
    import torch

    from lamina.data.cache import cache_root
    from lamina.data.sources import data_root, find_sets
    from lamina.machine import hardware, versions
    from lamina.training.launch import tower_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        **versions(),
        "device": hardware(device),
        "precision": str(tower_dtype("auto", device)).removeprefix("torch."),
        "data": str(data_root(data)),
        "cache": str(cache_root()),
        "data sets": [
            {"name": name, "found": "yes" if path else "no", "where": str(path) if path else what}
            for name, path, what in find_sets(data)
        ],
        "backbones": _backbones(),
    }


def _methods() -> list[dict[str, Any]]:
    kinds = {name: method_class(name) for name in method_names()}
    return [
        {"method": name, "backbone": default_backbone(kind), "what it is": _module_text(kind).splitlines()[0]}
        for name, kind in kinds.items()
    ]


def _streams() -> list[dict[str, Any]]:
    from lamina.data.streams import STREAMS

    several = "the tasks of A, then those of B, or of more; in a PATH, a plus is written twice"
    return [
        *({"stream": name, "what it is": row.description} for name, row in STREAMS.items()),
        {"stream": "A+B", "what it is": several},
    ]


def _backbones() -> list[dict[str, Any]]:
    from lamina.backbones.load import BUNDLED, bundled_names

    ours = [
        {
            "backbone": name,
            "what it is": (BUNDLED / f"{name.partition(':')[2]}.md").read_text().splitlines()[2],
        }
        for name in bundled_names()
    ]
    return [
        *ours,
        {
            "backbone": "timm:NAME.TAG",
            "what it is": "a vision transformer of timm with its published weights",
        },
        {"backbone": "timm:NAME@PATH", "what it is": "the same architecture with weights from a local file"},
        {
            "backbone": "timm:NAME@random",
            "what it is": "the same architecture untrained, for measuring speed",
        },
        {"backbone": "open_clip:MODEL:TAG", "what it is": "both towers of a CLIP model with published weights"},
        {"backbone": "open_clip:MODEL:PATH", "what it is": "the same with weights from a local file"},
        {"backbone": "open_clip:MODEL@random", "what it is": "the same untrained, for measuring speed"},
        {"backbone": "open_clip:local-dir:FOLDER", "what it is": "a folder with open_clip_config.json and weights"},
        {
            "backbone": "NAME#READ-OUT",
            "what it is": "the same without texts, features read from cls, mean_patch or mean_all, behind a pretrained "
            "or a fresh norm: lamina:vit-nano#mean_all,fresh",
        },
    ]


def _recipes() -> list[dict[str, Any]]:
    from lamina.runs import RECIPES

    found = []
    for path in sorted(RECIPES.rglob("*.toml")):
        recipe = read_toml(path)
        found.append(
            {
                "recipe": f"{path.parent.name}/{path.stem}",
                "backbone": recipe.get("backbone") or default_backbone(method_class(recipe["method"])),
                "what it is": path.read_text().splitlines()[0].lstrip("# "),
                "ran": "not yet" if "ours: not yet run" in path.read_text() else "yes",
            }
        )
    return found


def _settings() -> list[dict[str, Any]]:
    """Return what `--set` changes beside settings of the method."""
    from lamina.data.streams import StreamSettings
    from lamina.runs import RunSettings
    from lamina.training.dense import DenseSettings

    apart = ("method", "stream", "dense", "settings")
    return [
        *(row for row in _rows_of(RunSettings) if row["setting"] not in apart),
        *_rows_of(StreamSettings, "stream."),
        *_rows_of(DenseSettings, "dense."),
    ]


def _rows_of(kind: type[Settings], before: str = "") -> list[dict[str, Any]]:
    """Return a row for each setting of a kind, its name after `before`."""
    return [
        {
            "setting": before + name,
            "default": "" if field.is_required() else field.default,
            "limits": _limits(field),
            "meaning": field.description or "",
        }
        for name, field in kind.model_fields.items()
    ]


def _module_text(kind: type) -> str:
    return inspect.cleandoc(importlib.import_module(kind.__module__).__doc__ or "")


def _limits(field: Any) -> str:
    """Return the limits of a setting as people write them: "3 or more", "0 to 1"."""
    bounds = {
        name: getattr(mark, name) for mark in field.metadata for name in ("ge", "gt", "le", "lt") if hasattr(mark, name)
    }
    if "ge" in bounds and "le" in bounds:
        return f"{bounds['ge']} to {bounds['le']}"
    words = {"ge": "{} or more", "gt": "above {}", "le": "{} or less", "lt": "below {}"}
    if bounds:
        return ", ".join(words[name].format(value) for name, value in bounds.items())
    return _kind(field.annotation).removesuffix(" or nothing")


def _kind(value: Any) -> str:
    """Return a value that is allowed as it is typed, or a type as people call it."""
    parts = get_args(value)
    if get_origin(value) in (Literal, Union, UnionType):
        return " or ".join(map(_kind, parts))
    if get_origin(value) in (list, dict):
        return f"list of {_kind(parts[0])}s" if get_origin(value) is list else f"table of {_kind(parts[1])}s by name"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(value, str(value))
