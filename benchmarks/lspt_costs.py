"""What prompts of transfer learning cost beside the frozen tower alone.

    python benchmarks/lspt_costs.py            writes benchmarks/results/lspt-costs.json

Steps (forward, loss, backward, SGD), in turn in one process on one thread, as multiples of the bare tower's forward
and backward down to the input of block 0; medians of ratios of processor time (see `speed.py`). ViT-B/16 with random
weights, 8 images of 224 pixels; vit-nano's size, 64 images of 64 pixels. Weights that are learned are in
float32 whatever the tower is in; what an LSTM multiplies is in the tower's precision.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from speed import SIZES, Bare, compare, inputs, own_limit, processor
from torch.nn import functional as F

from lamina.backbones.timm_vit import TimmTower
from lamina.machine import commit, keep_memory
from lamina.methods.gapt import GaPT
from lamina.methods.lspt import LSPT
from lamina.methods.vpt_shallow import VPTShallow
from lamina.model import Batch
from lamina.storage import write_whole
from lamina.training.launch import tower_dtype

RESULTS = Path(__file__).parent / "results" / "lspt-costs.json"
DEEP = {"carry": "none", "spatial": "none", "dropout": 0.0}
METHODS: dict[str, Any] = {
    "vpt-deep, 50 prompts": LSPT(length=50, **DEEP),
    "vpt-deep, 10 prompts": LSPT(length=10, **DEEP),
    "lspt, 10 prompts": LSPT(length=10, dropout=0.0),
    "lspt, 10 prompts, masks for each image": LSPT(length=10),
    "lspt, 10 prompts, k-means": LSPT(length=10, dropout=0.0, spatial="kmeans"),
    "gapt, 10 prompts": GaPT(length=10, dropout=0.0),
    "vpt-shallow, 10 prompts": VPTShallow(length=10),
}


def step_of(settings: Any, tower: TimmTower, images: torch.Tensor) -> Any:
    """Return what takes one step of a method."""
    learner = settings.build(tower)
    model, labels = learner.model.train(), torch.arange(len(images)) % 10
    model.head.begin_task(0, [f"class {i}" for i in range(10)], range(10))
    optimizer = settings.phase().optimizer([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(Batch(images, labels), 0).logits, labels).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    usual, sizes = tower_dtype("auto", torch.device("cpu")), {}
    for size, dtype in product(reversed(SIZES), dict.fromkeys((usual, torch.float32))):
        name = f"{size}, {str(dtype).removeprefix('torch.')}"
        print(name, flush=True)
        model, images = inputs(size)
        calls: dict[str, Any] = {"bare": own_limit(Bare(copy.deepcopy(model), dtype=dtype), images)}
        tower = TimmTower(copy.deepcopy(model), dtype=dtype)
        calls |= {each: step_of(settings, tower, images) for each, settings in METHODS.items()}
        sizes[name] = compare(calls, [(each, "bare") for each in METHODS], given.rounds, time.process_time)
    facts = {"date": datetime.date.today().isoformat(), "processor": processor(), "commit": commit()}
    facts |= {"rounds": given.rounds}
    write_whole(RESULTS, json.dumps({**facts, "sizes": sizes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
