"""What prompt pools cost beyond vpt-deep: steps, predictions and weights.

    python benchmarks/pool_costs.py            writes benchmarks/results/pool-costs.json

Steps and predictions are compared as ratios in one process, forth and back, in medians (see `speed.py`). The query
comes with the images, as in evaluation, where it is cached, unless a row says that it is asked for. The weights are
all that a method keeps in memory, its frozen backbone included, over those of the backbone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed import SIZES, compare, inputs, processor
from torch.nn import functional as F

from lamina.backbones.timm_vit import TimmTower
from lamina.data.stream import Task
from lamina.model import Batch
from lamina.registry import method_class
from lamina.storage import write_whole

RESULTS = Path(__file__).parent / "results" / "pool-costs.json"
#: name -> method, settings, and whether the query is cached
ROWS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "vpt-deep": ("vpt-deep", {}, False),
    "l2p": ("l2p", {}, True),
    "l2p, query asked": ("l2p", {}, False),
    "l2p, early query": ("l2p", {"query": "early", "entry": 4}, False),
    "dualprompt": ("dualprompt", {}, True),
    "coda-prompt": ("coda-prompt", {}, True),
    "cprompt": ("cprompt", {}, True),
}
TASKS = [  # no image is read
    Task(t, [f"class {10 * t + i}" for i in range(10)], range(10 * t, 10 * t + 10), None, None)  # type: ignore[arg-type]
    for t in range(2)
]


def calls_of(method: str, settings: dict[str, Any], cached: bool, size: str) -> tuple[Callable, Callable, float]:
    """Return a training step of a method's second task, a prediction, and the share of its weights."""
    network, images = inputs(size)
    learner = method_class(method)(**settings).build(TimmTower(network, dtype=torch.bfloat16))
    model = learner.model
    for task in TASKS:
        model.begin_task(task)
    share = weight(model) / weight(model.tower)  # before the first forward, which packs what is frozen
    batch = Batch(images, 10 + torch.arange(len(images)) % 10)
    if cached:
        batch = batch._replace(query=model.query(batch))
    (phase,) = learner.phases(TASKS[1])
    optimizer = phase.optimizer([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        model.train()
        output = model(batch, 1)
        loss = F.cross_entropy(output.logits[:, 10:] / phase.temperature, batch.targets - 10)
        optimizer.zero_grad()
        (loss + sum(output.terms.values())).backward()
        optimizer.step()

    @torch.no_grad()
    def predict() -> None:
        model.eval()
        model(batch._replace(labels=None))

    return step, predict, share


def weight(module: torch.nn.Module) -> int:
    """Return the bytes of all that a module keeps."""
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    results: dict[str, Any] = {
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rounds": given.rounds,
        "sizes": {},
    }
    for size in SIZES:
        print(size, flush=True)
        made = {name: calls_of(*row, size) for name, row in ROWS.items()}
        pairs = [(name, "vpt-deep") for name in ROWS if name != "vpt-deep"]
        results["sizes"][size] = {
            kind: compare({name: made[name][place] for name in ROWS}, pairs, given.rounds, time.process_time)
            for place, kind in enumerate(("step", "prediction"))
        } | {"weights": {name: round(share, 3) for name, (_, _, share) in made.items()}}
        write_whole(RESULTS, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
