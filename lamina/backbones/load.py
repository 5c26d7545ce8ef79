"""Names of backbones to frozen towers.

lamina:NAME         a small backbone of ours that ships with the package; clip-nano is vit-nano with a text side
timm:NAME.TAG       a timm model with its published weights, fetched once and then kept by timm
timm:NAME@PATH      the same architecture with weights from a local file: timm's, or one that `checkpoints.py` knows
timm:NAME@random    the same architecture untrained, for measuring speed

Both towers of a CLIP model, the text side as `Tower.text` of the image tower; published weights are kept by open_clip:

open_clip:MODEL:TAG             an open_clip model with published weights
open_clip:MODEL:PATH            the same with weights from a local file; whether they want QuickGELU, only you know
open_clip:MODEL@random          the same untrained
open_clip:local-dir:FOLDER      a folder with open_clip_config.json and weights

Behind a name may stand what features are read from, if not what the backbone itself says, and of timm's and ours how
large images are, if not as large as in pre-training:

NAME#mean_patch     cls (the class token), mean_patch (the mean of all patches), mean_all (of all patches and prompts)
NAME#cls,fresh      the same, behind a last norm with weight 1 and bias 0; `pretrained` is the backbone's own
NAME#512px          images of 512 x 512 pixels; what the backbone knows of places is resampled to their patches
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lamina.backbones.checkpoints import load_weights
from lamina.backbones.timm_vit import TimmTower
from lamina.backbones.tower import FinalNorm, Pooling, Tower
from lamina.errors import ConfigError, LaminaError, UnsupportedBackbone, unknown

if TYPE_CHECKING:
    from lamina.backbones.clip import TextSide

BUNDLED = Path(__file__).parent / "bundled"

#: the smallest image side that open_clip builds, where a text side is all that is wanted
_NO_IMAGES = {"layers": 0, "width": 64, "image_size": 1, "patch_size": 1}


@dataclass(frozen=True)
class Backbone:
    """A frozen tower under its name, and the pixels that it takes.

    Attributes:
        name: as given, with what features are read from.
        tower: frozen, in the dtype asked for.
        pixels: size, mean, std, interpolation and crop_pct, as in timm's data configuration.
    """

    name: str
    tower: Tower
    pixels: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """A hash of all weights, those of a text side included."""
        text = self.tower.text
        return self.tower.fingerprint if text is None else f"{self.tower.fingerprint}-{text.tower.fingerprint}"


def bundled_names() -> list[str]:
    """Return the backbones that ship with the package."""
    return sorted(f"lamina:{path.stem}" for path in BUNDLED.glob("*.safetensors"))


def load_backbone(name: str, *, dtype: torch.dtype = torch.float32) -> Backbone:
    """Load a frozen tower by name.

    Args:
        name: see the head of this file.
        dtype: of the frozen weights.

    Raises:
        ConfigError: when the name or its weights cannot be found, or it has not what is to be read, or a side of that
            many pixels is not a whole number of patches.
        UnsupportedBackbone: when its blocks cannot be prompted.
    """
    asked = _parts(name)
    plain = asked.plain
    family, colon, rest = plain.partition(":")
    if family == "open_clip" and rest:
        from lamina.backbones.clip_load import load_clip  # only here: its import takes a while

        if asked.size is not None:
            raise UnsupportedBackbone(f"{name}: towers of open_clip keep their size; leave {asked.size}px out")
        pair, said = load_clip(plain, rest, dtype=dtype)
        return Backbone(name, _read_by(pair, name, asked), said)
    text: TextSide | None = None
    model: torch.nn.Module
    if family == "lamina" and colon:
        with torch.random.fork_rng(devices=[]):  # models are built with random weights before they get ours
            weights, facts = _bundled(plain, rest)
            if "text" in facts:
                text = _text_side(weights, facts, dtype=dtype)
                weights, facts = _bundled(plain, facts["images"])
            model = _vit(weights, facts)
    elif family == "timm" and rest:
        model = _timm(plain, rest)
    else:
        raise ConfigError(
            f"{unknown('backbone', plain, bundled_names())}; or timm:NAME, or open_clip:MODEL:TAG, see "
            "`lamina list backbones`"
        )
    if not isinstance(model, VisionTransformer):
        raise UnsupportedBackbone(f"{plain} is a {type(model).__name__}; lamina can prompt timm's VisionTransformer")
    config = resolve_model_data_config(model)
    if asked.size is not None:
        _resize(model, name, asked.size)
    pixels = {
        "size": asked.size or config["input_size"][-1],
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
    }
    tower = TimmTower(model, dtype=dtype)
    tower.text = text
    return Backbone(name, _read_by(tower, name, asked), pixels)


class _Parts(NamedTuple):
    """A backbone's name, what features are read from, behind which norm, and the side of images in pixels."""

    plain: str
    pooling: Pooling | None = None
    norm: FinalNorm = "pretrained"
    size: int | None = None


def _parts(name: str) -> _Parts:
    """Split a backbone's name from what is asked of it: "lamina:vit-nano#mean_all,fresh,96px".

    A file's name may hold a # of its own.

    Raises:
        ConfigError: when nothing is called so.
    """
    plain, mark, said = name.rpartition("#")
    if not mark or Path(name.partition("@")[2]).is_file():
        return _Parts(name)
    words = [word.strip() for word in said.split(",")]
    poolings, norms = ([word for word in words if word in get_args(kind)] for kind in (Pooling, FinalNorm))
    sizes = [word for word in words if re.fullmatch("[0-9]{1,5}px", word)]
    for word in words:
        if word not in (*poolings, *norms, *sizes):
            known = [*get_args(Pooling), *get_args(FinalNorm)]
            raise ConfigError(f"{name}: {unknown('read-out', word, known)}; or a size, such as 512px")
    if max(len(poolings), len(norms), len(sizes)) > 1:
        raise ConfigError(
            f"{name}: features are read in one way; got {said}: name one pooling, one norm and one size at most"
        )
    parts: dict[str, Any] = {"pooling": poolings[:1], "norm": norms[:1], "size": [int(size[:-2]) for size in sizes]}
    return _Parts(plain, **{key: values[0] for key, values in parts.items() if values})


def _read_by(tower: Tower, name: str, asked: _Parts) -> Tower:
    """Return a tower whose features are read as asked."""
    if asked.pooling is None and asked.norm == "pretrained":
        return tower
    try:
        return tower.reading(asked.pooling, asked.norm)
    except LaminaError as error:
        raise type(error)(f"{name}: {error}") from None


def _resize(model: VisionTransformer, name: str, size: int) -> None:
    """Make a model take images of size x size pixels: embeddings of places are resampled to their patches.

    Raises:
        ConfigError: when such an image is not a whole number of patches.
    """
    height, width = model.patch_embed.patch_size
    least = math.lcm(height, width)
    if size % least or not size:
        near = max(least, size // least * least)
        raise ConfigError(
            f"{name}: patches have {height} x {width} pixels, so an image's side is a multiple of {least}; got {size}: "
            f"take {near}px or {near + least}px"
        )
    model.set_input_size(img_size=(size, size))


def _bundled(name: str, stem: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights in a file of ours, float32, and what it says of them."""
    if f"lamina:{stem}" not in bundled_names():
        raise ConfigError(unknown("backbone", name, bundled_names()))
    with safe_open(BUNDLED / f"{stem}.safetensors", framework="pt") as file:
        weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - not a mapping
        facts = {key: json.loads(said) for key, said in file.metadata().items()}
    return weights, facts


def _vit(weights: dict[str, Tensor], facts: dict[str, Any]) -> VisionTransformer:
    model = VisionTransformer(num_classes=0, **facts["architecture"])
    model.load_state_dict(weights)
    model.pretrained_cfg = facts["pixels"]
    return model


def _text_side(weights: dict[str, Tensor], facts: dict[str, Any], *, dtype: torch.dtype) -> TextSide:
    """Return the text side that a file of ours holds.

    Args:
        weights: those of open_clip's `TextTransformer`, its token table as whole numbers (49408, D) and what each row
            is multiplied by, `token_embedding.scale` (49408, 1): a table of floats would be most of the package.
        facts: `text`, the configuration of the transformer; `images`, the backbone of ours whose features its own
            live beside; `logit_scale`.
    """
    # only here: their import takes a while
    from open_clip import CustomTextCLIP, SimpleTokenizer

    from lamina.backbones.clip import TextSide
    from lamina.backbones.clip_text import TextTower

    weights["token_embedding.weight"] *= weights.pop("token_embedding.scale")
    features = weights["text_projection"].shape[1]
    model: Any = CustomTextCLIP(features, _NO_IMAGES, facts["text"])
    model.text.load_state_dict(weights)
    tokenizer: Any = SimpleTokenizer(context_length=model.context_length)
    return TextSide(TextTower(model, dtype=dtype), tokenizer, facts["logit_scale"])


def _timm(name: str, rest: str) -> torch.nn.Module:
    architecture, at, weights = rest.partition("@")
    if not timm.is_model(architecture):
        raise ConfigError(unknown("timm model", architecture, timm.list_models()).partition(" Known:")[0])
    if weights == "random":
        with torch.random.fork_rng(devices=[]):  # the same weights in every process, or a run could not be resumed
            torch.manual_seed(0)
            return timm.create_model(architecture, pretrained=False, num_classes=0)
    if at:
        if not Path(weights).is_file():
            raise ConfigError(f"{name}: there is no file {weights}")
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(architecture, pretrained=False, num_classes=0)
        if isinstance(model, VisionTransformer):  # others are refused, whatever their weights
            load_weights(model, architecture, Path(weights))
        return model
    try:
        return timm.create_model(architecture, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(
            f"the weights of {name} cannot be loaded ({str(error).strip().splitlines()[0]}); without a network, give a "
            "local file: timm:NAME@PATH"
        ) from None
