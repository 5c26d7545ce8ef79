"""Turn a finished pre-training run into the file that ships with the package.

    python pretraining/export.py vit-nano --run runs/vit-nano
    python pretraining/export.py vit-nano-mae --run runs/vit-nano-mae
    python pretraining/export.py clip-nano --run runs/clip-nano

Weights are kept in float16: of vit-nano those without the classifier of the even classes; of vit-nano-mae the encoder;
of clip-nano the text side alone, its token table in eight bits with a scale for each row.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tomllib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from vit_nano import HERE, MEAN, STD

from lamina.backbones.load import BUNDLED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["vit-nano", "vit-nano-mae", "clip-nano"])
    parser.add_argument("--run", type=Path, required=True, help="folder of the pre-training run")
    arguments = parser.parse_args()
    name, run = arguments.name, arguments.run
    stem = name.replace("-", "_")
    settings = tomllib.loads((HERE / f"{stem}.toml").read_text())
    weights, facts = clip_nano(run, settings) if name == "clip-nano" else vit_nano(run, settings)
    said = {key: json.dumps(value) for key, value in facts.items()}
    save_file(weights, BUNDLED / f"{name}.safetensors", metadata=said)
    shutil.copyfile(run / "log.jsonl", HERE / f"{stem}.log.jsonl")


def vit_nano(run: Path, settings: dict) -> tuple[dict[str, Tensor], dict]:
    """Return the weights of an image tower and what the loader must know of them."""
    state = torch.load(run / "state.pt", weights_only=True)["model"]
    weights = {name: value.half().contiguous() for name, value in state.items() if not name.startswith("head.")}
    size = settings["model"]["img_size"]
    pixels = {
        "input_size": [3, size, size],
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    return weights, {"architecture": settings["model"], "pixels": pixels}


def clip_nano(run: Path, settings: dict) -> tuple[dict[str, Tensor], dict]:
    """Return the weights of a text side and what the loader must know of them."""
    state = torch.load(run / "aligned.pt", weights_only=True)
    scale = round(state.pop("logit_scale").item(), 2)
    rows, factors = in_eight_bits(state.pop("token_embedding.weight"))
    weights = {name: value.half().contiguous() for name, value in state.items()}
    weights |= {"token_embedding.weight": rows, "token_embedding.scale": factors}
    return weights, {"text": settings["text"], "images": "vit-nano", "logit_scale": scale}


def in_eight_bits(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return a table (n, D) as whole numbers from -127 to 127, and what each row is multiplied by (n, 1)."""
    factors = (table.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(table.dtype).tiny)
    return (table / factors).round().to(torch.int8), factors


if __name__ == "__main__":
    main()
