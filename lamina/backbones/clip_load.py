"""Names of open_clip models to towers; see the head of `load.py`."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import SimpleTokenizer
from safetensors import SafetensorError
from torch import nn

from lamina.backbones.clip import ClipImageTower, TextSide, check_image
from lamina.backbones.clip_text import TextTower, check_text
from lamina.errors import ConfigError, UnsupportedBackbone, unknown

#: what a folder's weights may be called, the likeliest first
_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
_OLD_FILES = ("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "pytorch_model.bin", "model.pth")
_BROKEN = (OSError, RuntimeError, ValueError, KeyError, AttributeError, EOFError, StopIteration, SafetensorError)


def load_clip(name: str, rest: str, *, dtype: torch.dtype) -> tuple[ClipImageTower, dict[str, Any]]:
    """Load the two towers of a CLIP model, one as `text` of the other, and the pixels that they take.

    Args:
        name: the backbone's, for messages.
        rest: of it, behind "open_clip:".
        dtype: of the frozen weights.

    Raises:
        ConfigError: when the name or its weights cannot be found, or weights and activation do not belong together.
        UnsupportedBackbone: when a tower is of a kind that lamina cannot prompt.
    """
    model_name, colon, weights = rest.partition(":")
    if model_name == "local-dir":
        config, pixels, path = _folder(name, Path(weights))
        model = _built(name, config)
        _fill(model, name, path)
        return _towers(name, model, config, pixels, dtype)
    model_name, _, how = (model_name, "", "") if colon else rest.partition("@")
    config = _config(model_name)
    model_name = _plain(model_name)
    if not weights and how != "random":
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)) or "none"
        raise ConfigError(
            f"{name} does not say which weights; add :PATH of a local file, @random, or :TAG, one of these: {tags}"
        )
    pixels = _published(name, model_name, config, weights) if weights else {}
    model = _built(name, config)
    if weights:
        _fill(model, name, _fetched(name, pixels) if pixels else Path(weights))
    return _towers(name, model, config, pixels, dtype)


def _towers(
    name: str, model: Any, config: dict[str, Any], pixels: dict[str, Any], dtype: torch.dtype
) -> tuple[ClipImageTower, dict[str, Any]]:
    height, width = model.visual.image_size
    if height != width:
        raise UnsupportedBackbone(f"{name} takes pictures of {height} x {width}; lamina shows square ones alone")
    text = config["text_cfg"]
    tokenizer: Any = SimpleTokenizer(context_length=model.context_length, **text.get("tokenizer_kwargs", {}))
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(f"{name} knows {model.vocab_size} words, fewer than its tokenizer's {tokenizer.vocab_size}")
    scale, bias = model.logit_scale.exp().item(), model.logit_bias
    tower = ClipImageTower(model, dtype=dtype)
    tower.text = TextSide(TextTower(model, dtype=dtype), tokenizer, scale, None if bias is None else bias.item())
    shown = {
        "size": width,
        "mean": tuple(pixels.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        "std": tuple(pixels.get("std", open_clip.OPENAI_DATASET_STD)),
        "interpolation": pixels.get("interpolation", "bicubic"),
        "crop_pct": 1.0,  # also where the weights saw pictures squeezed into a square
    }
    return tower, shown


def _plain(model_name: str) -> str:
    return model_name.replace("/", "-")


def _config(model_name: str) -> dict[str, Any]:
    if _plain(model_name) not in open_clip.list_models():
        raise ConfigError(unknown("open_clip model", model_name, open_clip.list_models()).partition(" Known:")[0])
    return open_clip.get_model_config(_plain(model_name))


def _folder(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Return what a folder says of its model and of its pixels, and the file that has the weights."""
    facts = folder / "open_clip_config.json"
    try:
        said = json.loads(facts.read_text(encoding="utf-8"))
        config, pixels = said["model_cfg"], said.get("preprocess_cfg", {})
        whole = {"embed_dim", "vision_cfg", "text_cfg"} <= set(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ConfigError(f"{name}: {facts} must be there and hold a model_cfg with embed_dim, vision_cfg and text_cfg")
    for names in (_FILES, _OLD_FILES):
        for file in names:
            if (folder / file).is_file():
                return config, pixels, folder / file
    raise ConfigError(f"{name}: no weights in {folder}; one of these must be there: {', '.join(_FILES + _OLD_FILES)}")


def _published(name: str, model_name: str, config: dict[str, Any], weights: str) -> dict[str, Any]:
    """Return what open_clip says of published weights, nothing for those of a local file.

    Raises:
        ConfigError: when there are no such weights, or they were trained with another activation than the model has.
    """
    quick = "-quickgelu"
    twin = model_name.removesuffix(quick) if model_name.endswith(quick) else model_name + quick
    own, other = (open_clip.get_pretrained_cfg(model, weights) for model in (model_name, twin))
    trained, has = ((own or other).get("quick_gelu", False), config.get("quick_gelu", False))
    if (own or other) and trained != has:
        words = {True: "QuickGELU", False: "GELU"}
        raise ConfigError(
            f"the weights {weights!r} were trained with {words[trained]} and {model_name} computes {words[has]}, which "
            f"spoils them; take open_clip:{twin}:{weights}"
        )
    if own or Path(weights).is_file():
        return own
    if Path(weights).suffix or Path(weights).name != weights:
        raise ConfigError(f"{name}: there is no file {weights!r}")
    raise ConfigError(
        unknown(f"weight tag of {model_name}", weights, open_clip.list_pretrained_tags_by_model(model_name))
    )


def _built(name: str, config: dict[str, Any]) -> nn.Module:
    """Return a model with random weights, the same in every process, or a run could not be resumed.

    Raises:
        UnsupportedBackbone: before anything is fetched.
    """
    image, text = config["vision_cfg"], config["text_cfg"]
    tokenizer = text.get("hf_tokenizer_name")
    foreign = {
        f"its image tower is timm's {image.get('timm_model_name')}": image.get("timm_model_name"),
        f"its text tower is Hugging Face's {text.get('hf_model_name')}": text.get("hf_model_name"),
        f"its texts need the tokenizer {tokenizer} of Hugging Face": tokenizer,
        "it writes texts, too (CoCa)": "multimodal_cfg" in config,
    }
    for reason in (reason for reason, there in foreign.items() if there):
        raise UnsupportedBackbone(
            f"{name}: {reason}; lamina takes open_clip's own transformers with open_clip's own tokenizer. Image "
            "towers of timm can be had as timm:NAME"
        )
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind(**arguments)
    except (TypeError, AssertionError, KeyError) as error:
        raise ConfigError(f"{name}: open_clip cannot build what the configuration says ({error})") from None
    check_image(model)
    check_text(model)
    return model.eval()


def _fetched(name: str, found: dict[str, Any]) -> Path:
    try:
        return Path(open_clip.download_pretrained(found))
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the weights of {name} cannot be fetched ({_short(error)}); without a network, give a local file: "
            "open_clip:MODEL:PATH"
        ) from None


def _fill(model: nn.Module, name: str, path: Path) -> None:
    """Load weights from a file, never with code that it may hold."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on archives; what matters is in our message
            open_clip.load_checkpoint(model, str(path))
    except (*_BROKEN, pickle.UnpicklingError) as error:
        if isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error):
            raise ConfigError(
                f"{path} holds more than weights, and loading it could run code; lamina does not. If you trust it, "
                "convert it once: safetensors.torch.save_file(open_clip.factory.load_state_dict(PATH, "
                "weights_only=False), 'weights.safetensors')"
            ) from None
        raise ConfigError(f"the weights of {name} cannot be loaded from {path} ({_short(error)})") from None


def _short(error: BaseException) -> str:
    """Return an error's first words in one line."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 200 else words[:200] + " ..."
