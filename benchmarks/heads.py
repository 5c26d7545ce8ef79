"""What protection and closed-form heads cost beyond vpt-deep.

    python benchmarks/heads.py            writes benchmarks/results/heads.json

Steps are compared as ratios in one process, forth and back, in medians (see `benchmarks/speed.py`); the closed
forms are timed once, since they happen once a task.
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
from lamina.heads.statistics import Discriminant, Ridge
from lamina.model import Batch
from lamina.registry import method_class
from lamina.storage import write_whole

RESULTS = Path(__file__).parent / "results" / "heads.json"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "vpt-deep": ("vpt-deep", {}),
    "vpt-nsp2": ("vpt-nsp2", {}),
    "vpt-deep, 16 tokens": ("vpt-deep", {"length": 16}),
    "vpt-nsp2-exact": ("vpt-nsp2-exact", {"kept": 0.99}),
    "vpt-deep, statistics": ("vpt-deep", {"head": "statistics"}),
}
PAIRS = [
    ("vpt-nsp2", "vpt-deep"),
    ("vpt-nsp2-exact", "vpt-deep, 16 tokens"),
    ("vpt-nsp2-exact", "vpt-deep"),
    ("vpt-deep, statistics", "vpt-deep"),
]


def step_of(method: str, settings: dict[str, Any], size: str) -> Callable[[], None]:
    """Return a training step of a method's second task."""
    model, images = inputs(size)
    learner = method_class(method)(**settings).build(TimmTower(model, dtype=torch.bfloat16))
    batch = Batch(images, torch.arange(len(images)) % 10)
    task = Task(0, [f"class {i}" for i in range(10)], range(10), None, None)  # type: ignore[arg-type]  # no image is read
    learner.model.begin_task(task)
    watchers = [watcher for watcher in learner.protections if watcher.looks_at == "probes"]
    for watcher in learner.protections:
        watcher.begin_look()
    with torch.no_grad():
        learner.model.features(batch, tap=lambda probe: [watcher.see(probe) for watcher in watchers] and None)
    for watcher in learner.protections:
        watcher.end_look(lambda sums: sums)
    (phase,) = learner.phases(task)
    optimizer = phase.optimizer([p for p in learner.model.parameters() if p.requires_grad])
    for watcher in learner.protections:
        watcher.guard(optimizer).__enter__()

    def step() -> None:
        output = learner.model(batch)
        terms = [term for watcher in learner.protections for term in watcher.terms(learner.model).values()]
        loss = F.cross_entropy(output.logits / phase.temperature, batch.targets) + sum(terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def closed_forms(wide: bool) -> dict[str, float]:
    """Return the seconds of a head's look at 200 classes of 768 features, and of its solution."""
    generator = torch.Generator().manual_seed(0)
    images, classes = 4000, 200
    features = torch.randn(images, 768, generator=generator)
    columns = torch.arange(images) % classes
    heads: dict[str, Any] = {
        "discriminant": Discriminant(768),
        "ridge, cross-validated": Ridge(768),
        "ridge on 2,000, cross-validated": Ridge(768, width=2000),
    }
    if wide:
        heads["ridge on 10,000, fixed"] = Ridge(768, width=10_000, ridge=1.0)
        heads["ridge on 10,000, cross-validated"] = Ridge(768, width=10_000)
    seconds = {}
    for name, head in heads.items():
        head.begin_task(0, [str(c) for c in range(classes)], range(classes))
        start = time.perf_counter()
        for rows in range(0, images, 100):
            head.collect(features[rows : rows + 100], columns[rows : rows + 100])
        head.end_look(lambda sums: sums)
        looked = time.perf_counter()
        head.solve()
        seconds[f"{name}: look, per 1,000 images"] = round((looked - start) / images * 1000, 3)
        seconds[f"{name}: solve"] = round(time.perf_counter() - looked, 3)
        print(name, seconds[f"{name}: solve"], flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2, help="of the closed forms; steps are timed on one")
    parser.add_argument("--no-wide", action="store_true", help="leave out the projection on 10,000 features")
    given = parser.parse_args()
    torch.set_num_threads(1)
    steps = {}
    for size in SIZES:
        print(size, flush=True)
        calls = {name: step_of(method, settings, size) for name, (method, settings) in METHODS.items()}
        steps[size] = compare(calls, PAIRS, given.rounds, time.process_time)
    torch.set_num_threads(given.threads)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    results = {
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads of the closed forms": given.threads,
        "rounds": given.rounds,
        "steps, processor time": steps,
        "closed forms, seconds": closed_forms(not given.no_wide),
    }
    write_whole(RESULTS, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
