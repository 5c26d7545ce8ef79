"""What it costs to ask the kernel for memory again in every step: steps with and without `lamina.machine.keep_memory`.

    python benchmarks/memory.py [--rounds 7]        writes benchmarks/results/memory.json

Two processes of one thread each take steps in turn, one of which keeps the memory that it frees.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from lamina.backbones.load import load_backbone
from lamina.machine import commit, hardware, keep_memory, peak_memory_mb
from lamina.model import Batch
from lamina.registry import default_backbone, method_class
from lamina.storage import write_whole

OUT = Path(__file__).parent / "results" / "memory.json"
#: method -> images in a step, classes of one task
STEPS = {"vpt-deep": (64, 10), "l2p": (32, 10), "clap": (64, 100)}


def step_of(method: str) -> Callable[[], None]:
    """Return what takes one step of training on images that are noise."""
    kind, (images, classes) = method_class(method), STEPS[method]
    learner = kind().build(load_backbone(default_backbone(kind), dtype=torch.bfloat16).tower)
    model = learner.model.train()
    for part, arguments in ((model.head, ([f"thing {i}" for i in range(classes)],)), (model.prompts, ())):
        if part is not None:
            part.begin_task(0, *arguments, list(range(classes)))
    features, labels = torch.randn(images, model.tower.features), torch.randint(classes, (images,))
    pixels = None if learner.cache == "features" else torch.randn(images, 3, 64, 64)
    batch = Batch(pixels, labels, query=features, features=features if pixels is None else None)
    learned = [value for value in model.parameters() if value.requires_grad]

    def step() -> None:
        output = model(batch, task=0)
        logits = output.logits.mean(0) if output.logits.ndim == 3 else output.logits
        loss = torch.nn.functional.cross_entropy(logits, labels) + sum(output.terms.values())
        for value in learned:
            value.grad = None
        loss.backward()

    return step


def take_steps(method: str, keep: bool) -> None:
    """Take a step for each line that is read, and say how many seconds it took."""
    torch.set_num_threads(1)
    if keep and not keep_memory():
        raise SystemExit("this allocator cannot be told to keep memory")
    step = step_of(method)
    for _ in range(3):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        step()
        print(json.dumps([time.process_time() - start, peak_memory_mb(torch.device("cpu"))]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return take_steps(given.worker[0], given.worker[1] == "keep")
    rows = []
    for method in STEPS:
        workers = {
            name: subprocess.Popen(
                [sys.executable, __file__, "--worker", method, name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in ("plain", "keep")
        }
        said: dict[str, list[list[float]]] = {name: [] for name in workers}
        for worker in workers.values():
            worker.stdout.readline()
        for _ in range(given.rounds):
            for name, worker in workers.items():
                worker.stdin.write("step\n")
                worker.stdin.flush()
                said[name].append(json.loads(worker.stdout.readline()))
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
        seconds = {name: median(second for second, _ in steps) for name, steps in said.items()}
        memory = {name: steps[-1][1] for name, steps in said.items()}
        rows.append({"method": method, "seconds": seconds, "peak_memory_mb": memory})
        print(method, {name: round(value, 3) for name, value in seconds.items()}, memory, flush=True)
    facts = {"commit": commit(), "hardware": hardware(torch.device("cpu")), "rounds": given.rounds}
    write_whole(OUT, json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
