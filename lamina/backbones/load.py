"""Names of backbones to frozen towers.

lamina:NAME         a small backbone of ours that ships with the package
timm:NAME.TAG       a timm model with its published weights, fetched once and then kept by timm
timm:NAME@PATH      the same architecture with weights from a local file
timm:NAME@random    the same architecture untrained, for measuring speed

Both towers of a CLIP model, the text side as `Tower.text` of the image tower; published weights are kept by open_clip:

open_clip:MODEL:TAG             an open_clip model with published weights
open_clip:MODEL:PATH            the same with weights from a local file; whether they want QuickGELU, only you know
open_clip:MODEL@random          the same untrained
open_clip:local-dir:FOLDER      a folder with open_clip_config.json and weights
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer

from lamina.backbones.timm_vit import TimmTower
from lamina.backbones.tower import Tower
from lamina.errors import ConfigError, UnsupportedBackbone, unknown

BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Backbone:
    """A frozen tower under its name, and the pixels that it takes.

    Attributes:
        name: as given.
        tower: frozen, in the dtype asked for.
        pixels: size, mean, std, interpolation and crop_pct, as in timm's data configuration.
    """

    name: str
    tower: Tower
    pixels: dict[str, Any]


def bundled_names() -> list[str]:
    """Return the backbones that ship with the package."""
    return sorted(f"lamina:{path.stem}" for path in BUNDLED.glob("*.safetensors"))


def load_backbone(name: str, *, dtype: torch.dtype = torch.float32) -> Backbone:
    """Load a frozen tower by name.

    Args:
        name: see the head of this file.
        dtype: of the frozen weights.

    Raises:
        ConfigError: when the name or its weights cannot be found.
        UnsupportedBackbone: when its blocks cannot be prompted.
    """
    family, colon, rest = name.partition(":")
    if family == "open_clip" and rest:
        from lamina.backbones.clip_load import load_clip  # only here: its import takes a while

        tower, shown = load_clip(name, rest, dtype=dtype)
        return Backbone(name, tower, shown)
    if family == "lamina" and colon:
        model = _bundled(name, rest)
    elif family == "timm" and rest:
        model = _timm(name, rest)
    else:
        raise ConfigError(
            f"{unknown('backbone', name, bundled_names())}; or timm:NAME, or open_clip:MODEL:TAG, see "
            "`lamina list backbones`"
        )
    if not isinstance(model, VisionTransformer):
        raise UnsupportedBackbone(f"{name} is a {type(model).__name__}; lamina can prompt timm's VisionTransformer")
    config = resolve_model_data_config(model)
    pixels = {
        "size": config["input_size"][-1],
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
    }
    return Backbone(name, TimmTower(model, dtype=dtype), pixels)


def _bundled(name: str, stem: str) -> torch.nn.Module:
    path = BUNDLED / f"{stem}.safetensors"
    if name not in bundled_names():
        raise ConfigError(unknown("backbone", name, bundled_names()))
    with safe_open(path, framework="pt") as file:
        weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - not a mapping
        facts = file.metadata()
    model = VisionTransformer(num_classes=0, **json.loads(facts["architecture"]))
    model.load_state_dict(weights)
    model.pretrained_cfg = json.loads(facts["pixels"])
    return model


def _timm(name: str, rest: str) -> torch.nn.Module:
    architecture, at, weights = rest.partition("@")
    if not timm.is_model(architecture):
        raise ConfigError(unknown("timm model", architecture, timm.list_models()).partition(" Known:")[0])
    if weights == "random":
        with torch.random.fork_rng(devices=[]):  # the same weights in every process, or a run could not be resumed
            torch.manual_seed(0)
            return timm.create_model(architecture, pretrained=False, num_classes=0)
    if at and not Path(weights).is_file():
        raise ConfigError(f"{name}: there is no file {weights}")
    place = {"file": weights} if at else None
    try:
        return timm.create_model(architecture, pretrained=True, num_classes=0, pretrained_cfg_overlay=place)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        hint = "" if at else "; without a network, give a local file: timm:NAME@PATH"
        raise ConfigError(
            f"the weights of {name} cannot be loaded ({str(error).strip().splitlines()[0]}){hint}"
        ) from None
