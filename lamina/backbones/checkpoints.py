"""Weights in files that others published, brought to the names that timm gives them.

- Masked auto-encoders (He et al., CVPR 2022): the encoder under `model`, alone or with a decoder and a mask token.
- MoCo v3 (Chen et al., ICCV 2021): two encoders, `module.base_encoder` and `module.momentum_encoder`, and a predictor
  under `state_dict`; files of linear probes have one encoder, `module`. The first is what the authors evaluate.
- Supervised models in JAX (`.npz`), which timm reads itself.
- Whatever else timm converts.

Files are read without running code. Position grids of another size are interpolated, by timm.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from lamina.errors import ConfigError

#: where files keep the weights, the averaged ones first; at the top where there is none of these
_PLACES = ("state_dict_ema", "model_ema", "state_dict", "model")
#: what wraps names, from the outside in
_WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.", "base_encoder.")
#: beginnings of names of what only pre-training needs
_PRETRAINING = ("momentum_encoder.", "momentum", "projector", "predictor")
#: beginnings of names of classifiers, of which a tower has none
_CLASSIFIERS = ("head.", "head_dist.", "fc.")


def load_weights(model: VisionTransformer, architecture: str, path: Path) -> None:
    """Load the weights of a file into a timm model without a classifier.

    Args:
        architecture: the model's name.

    Raises:
        ConfigError: when the file cannot be read, holds no weights, or they are not those of the model.
    """
    if path.suffix == ".npz":
        _from_jax(model, architecture, path)
        return
    weights = encoder(read(path))
    if not weights:
        raise ConfigError(f"{path} holds no weights by name, but what pre-training alone needs; give another file")
    try:
        weights = _as_timm_names(weights, model, architecture)
    except (KeyError, ValueError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"the weights in {path} are not those of {architecture} ({_line(error)})") from None
    wanted = model.state_dict()
    weights = {name: value for name, value in weights.items() if name in wanted or not _unread(name)}
    said = [
        _listed("knows no", [name for name in weights if name not in wanted]),
        _listed("finds no", [name for name in wanted if name not in weights]),
        _listed(
            "wants another shape of",
            [name for name, value in weights.items() if name in wanted and value.shape != wanted[name].shape],
        ),
    ]
    if any(said):
        raise ConfigError(
            f"the weights in {path} are not those of {architecture}: it {', and '.join(filter(None, said))}"
        )
    model.load_state_dict(weights)


def read(path: Path) -> dict[str, Tensor]:
    """Return the named weights in a file, safetensors or PyTorch's, without running code that it may hold.

    Raises:
        ConfigError: when it cannot be read so, or holds no weights by name.
    """
    held: Any
    try:
        if path.suffix == ".safetensors":
            held = load_file(path)
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, SafetensorError, OSError, EOFError, zipfile.BadZipFile) as error:
        if _would_run_code(error):
            raise ConfigError(
                f"{path} holds more than tensors, and to read the rest could run code; where you trust its origin, "
                "keep the tensors alone: python -c \"import torch; old = torch.load('OLD', weights_only=False); "
                "torch.save(old.get('state_dict', old.get('model')), 'NEW')\", and name NEW"
            ) from None
        raise ConfigError(f"{path} cannot be read ({_line(error)}); get it anew") from None
    for place in _PLACES:
        if isinstance(held, Mapping) and isinstance(held.get(place), Mapping):
            held = held[place]
            break
    weights = {str(name): value for name, value in held.items()} if isinstance(held, Mapping) else {}
    weights = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    if not weights:
        raise ConfigError(
            f"{path} holds no weights by name; give a state dict, at the top or under state_dict or model"
        )
    return weights


def encoder(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the encoder alone, without what wraps their names and what only pre-training needs.

    >>> list(encoder({"module.base_encoder.norm.bias": torch.ones(1), "module.predictor.0.weight": torch.ones(1)}))
    ['norm.bias']
    """
    named: dict[str, Tensor] = {}
    for name, value in weights.items():
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
        named[name] = value
    hidden = any(name.startswith("decoder") for name in named)  # timm takes a mask token alone for that of a DINOv2
    dropped = (*_PRETRAINING, "decoder", "mask_token") if hidden else _PRETRAINING
    return {name: value for name, value in named.items() if not name.startswith(dropped)}


def _as_timm_names(weights: dict[str, Tensor], model: VisionTransformer, architecture: str) -> dict[str, Tensor]:
    """Let timm convert what else it knows, and interpolate positions and patches of another size."""
    how: dict[str, Any] = {"interpolation": "bilinear", "antialias": False} if "flexi" in architecture else {}
    return checkpoint_filter_fn(weights, model, adapt_layer_scale=True, **how)


def _from_jax(model: VisionTransformer, architecture: str, path: Path) -> None:
    try:
        model.load_pretrained(str(path))
    except (KeyError, ValueError, RuntimeError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"the weights in {path} are not those of {architecture} ({_line(error)})") from None


def _unread(name: str) -> bool:
    return name.startswith(_CLASSIFIERS) or name == "mask_token"


def _listed(verb: str, names: Iterable[str]) -> str:
    """Return a part of a sentence with the first five of some names and how many more there are; "" for none."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{verb} {', '.join(names[:5])}{more}" if names else ""


def _would_run_code(error: Exception) -> bool:
    """Say whether a file was refused for what it asks to be built, not for being broken."""
    text = str(error)
    return any(said in text for said in ("Unsupported global", "Unsupported class", "legacy .tar", "TorchScript"))


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
