"""Tiny CLIP models in which every axis has a size of its own.

Images: B 7, N 17, D 48, H 3, L 3. Texts: B 6 of 77 rows, W 40, H 5, L 2. Both: F 24.
"""

import copy
import functools
import json

import open_clip
import torch
from open_clip import SimpleTokenizer
from safetensors.torch import save_file

from lamina.backbones.clip import ClipImageTower, TextSide
from lamina.backbones.clip_text import TextTower
from lamina.registry import default_backbone, method_class
from tests.backbones.conftest import stir
from tests.conftest import make_tiny_vit

VISION = {"layers": 3, "width": 48, "head_width": 16, "image_size": 32, "patch_size": 8}
TEXT = {"layers": 2, "width": 40, "heads": 5}

#: changes of the configuration that keep its towers plain
KINDS = {
    "plain": {},
    "quick": {"quick_gelu": True},
    "own attention": {"vision": {"block_type": "custom"}, "words": {"block_type": "custom"}},
    "quick own attention": {
        "quick_gelu": True,
        "vision": {"block_type": "custom"},
        "words": {"block_type": "custom"},
    },
    "layer scale": {"vision": {"ls_init_value": 0.5}, "words": {"ls_init_value": 0.5}},
    "patch dropout": {"vision": {"patch_dropout": 0.5}},
    "no pre-norm": {"vision": {"no_ln_pre": True}},
    "own epsilon": {"vision": {"norm_kwargs": {"eps": 0.1}}, "words": {"norm_kwargs": {"eps": 0.1}}},
    "custom text": {"kind": open_clip.CustomTextCLIP},
    "no projection": {"words": {"proj_type": "none"}},
    "biased projection": {"words": {"proj_bias": True}},
    "short": {"words": {"context_length": 19}},
}

TEXTS = [
    "a photo of a cat.",
    "a photo of a lawn mower.",
    "a bad photo of the aquarium fish.",
    "x",
    "a photo of a cat.",
    "a painting of a red train in the snow",
]

tokenizer = functools.cache(SimpleTokenizer)


@functools.cache
def _made(kind):
    torch.manual_seed(0)
    changes = dict(KINDS[kind])
    make = changes.pop("kind", open_clip.CLIP)
    vision, words = ({**base, **changes.pop(part, {})} for part, base in (("vision", VISION), ("words", TEXT)))
    return stir(make(24, vision, words, **changes))


def clip(kind="plain", dtype=torch.float32):
    """A tiny model of open_clip."""
    return copy.deepcopy(_made(kind)).to(dtype)


def tiny_clip(dtype=torch.float32):
    """The image tower of a tiny CLIP model, its text side with it."""
    model = clip()
    tower = ClipImageTower(model, dtype=dtype)
    tower.text = TextSide(TextTower(model, dtype=dtype), tokenizer(), 20.0)
    return tower


def tower_for(method, dtype=torch.float32):
    """A tiny tower that a method can have: with a text side where it reads the names of classes."""
    return tiny_clip(dtype) if "clip" in default_backbone(method_class(method)) else make_tiny_vit(dtype)


def clip_folder(path):
    """Write a tiny CLIP model into a new folder; return its name as a backbone."""
    path.mkdir()
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(clip().state_dict(), path / "open_clip_model.safetensors")
    return f"open_clip:local-dir:{path}"


def images(dtype=torch.float32):
    return torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def ids(*texts, length=77):
    return tokenizer()(list(texts or TEXTS), context_length=length)


def close(a, b, tolerance=1e-5):
    """Compare, relative to the largest value."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0), (a - b).abs().max()
