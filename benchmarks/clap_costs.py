"""What a step of CLAP costs on kept features, against that of a linear classifier on the same.

    python benchmarks/clap_costs.py            writes benchmarks/results/clap-costs.json

Everything runs in turn in one process, forth and back, on one thread; figures are medians of ratios of processor time
(see `speed.py`), and multiply-adds of one step, forward and backward, counted by PyTorch. Batches of 64 features of
clip-nano, ten tasks of equal size, 20 draws.

Terms:
    linear          one layer on the features: the step that everything is a multiple of
    Gaussians       CLAP without its attention: encoders of ten tasks, draws, all losses
    CLAP            whole, each image its own context
    saturated       CLAP once more, with logits so far apart that gradients fall below 1e-38, with and without taking
                    these for 0 as `lamina.training.launch.denormals_flushed` does
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed import compare, processor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lamina.backbones.load import load_backbone
from lamina.machine import commit, keep_memory
from lamina.methods.clap import CLAP
from lamina.model import Batch
from lamina.storage import write_whole
from lamina.training.launch import denormals_flushed, tower_dtype

RESULTS = Path(__file__).parent / "results" / "clap-costs.json"
BATCH, TASKS, CLASSES = 64, 10, (50, 100, 200)
#: deviation of saturated logits
SATURATED = 150.0


def step_of(model: torch.nn.Module, score: Callable[[], tuple[torch.Tensor, Any]], labels: torch.Tensor) -> Any:
    """Return what takes one step of SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        logits, terms = score()
        logits = logits if logits.ndim == 3 else logits[None]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits))) + sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def multiply_adds(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() // 2


def flushing(model: torch.nn.Module, batch: Batch, labels: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Return how many times longer a step takes that computes with numbers below 1e-38 than one that does not."""
    with torch.no_grad():
        factor = SATURATED / model(batch, TASKS - 1).logits.std()

    def score() -> tuple[torch.Tensor, Any]:
        logits, terms = model(batch, TASKS - 1)[:2]
        return factor * logits, terms

    step = step_of(model, score, labels)

    def flushed() -> None:
        with denormals_flushed():
            step()

    ratio = compare({"kept": step, "flushed": flushed}, [("kept", "flushed")], rounds, time.process_time)
    return {"logits": SATURATED, "times": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    tower = load_backbone("lamina:clip-nano", dtype=tower_dtype("auto", torch.device("cpu"))).tower
    rows = []
    for classes in CLASSES:
        torch.manual_seed(0)
        features, labels = torch.randn(BATCH, tower.features), torch.randint(classes, (BATCH,))
        linear = torch.nn.Linear(tower.features, classes)
        calls = {"linear": step_of(linear, lambda layer=linear, x=features: (layer(x), {}), labels)}
        for name, settings in (("Gaussians", {"guidance": False}), ("CLAP", {})):
            model, size = CLAP(**settings).build(tower).model, classes // TASKS
            for task in range(TASKS):
                columns = range(task * size, (task + 1) * size)
                model.head.begin_task(task, [f"thing {column}" for column in columns], list(columns))
            model.train()
            batch = Batch(None, labels, features=features)
            calls[name] = step_of(model, lambda model=model, batch=batch: model(batch, TASKS - 1)[:2], labels)
        adds = {name: multiply_adds(step) for name, step in calls.items()}
        pairs = [("Gaussians", "linear"), ("CLAP", "linear"), ("CLAP", "Gaussians")]
        print(f"{classes} classes", flush=True)
        times = compare(calls, pairs, given.rounds, time.process_time)
        print(adds, flush=True)
        rows.append({"classes": classes, "multiply_adds": adds, "times": times})
        if classes == 100:
            saturated = flushing(model, batch, labels, given.rounds)
    facts = {"date": datetime.date.today().isoformat(), "processor": processor(), "commit": commit()}
    values = {**facts, "batch": BATCH, "tasks": TASKS, "rows": rows, "saturated": saturated}
    write_whole(RESULTS, json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
