"""Turn a finished pre-training run into the file that ships with the package.

    python pretraining/export.py --run runs/vit-nano

Weights are kept in float16, without the classifier of the even classes.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path

import torch
from safetensors.torch import save_file
from vit_nano import HERE, MEAN, STD

from lamina.backbones.load import BUNDLED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the pre-training run")
    run = parser.parse_args().run
    model = tomllib.loads((HERE / "vit_nano.toml").read_text())["model"]
    state = torch.load(run / "state.pt", weights_only=True)["model"]
    weights = {name: value.half().contiguous() for name, value in state.items() if not name.startswith("head.")}
    size = model["img_size"]
    pixels = {
        "input_size": [3, size, size],
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    facts = {"architecture": json.dumps(model), "pixels": json.dumps(pixels)}
    save_file(weights, BUNDLED / "vit-nano.safetensors", metadata=facts)
    (HERE / "vit_nano.log.jsonl").write_text((run / "log.jsonl").read_text())


if __name__ == "__main__":
    main()
