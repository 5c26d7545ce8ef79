"""How close lamina comes to what the frozen tower costs by itself.

    python benchmarks/speed.py                     both sizes; writes benchmarks/results/speed.json
    python benchmarks/speed.py --size "vit-nano, batch 64" --rounds 15 --threads 2 --clock wall

What is compared runs in turn in one process, forth and back, and every figure is the median of the
rounds' ratios with its quartiles. `--clock cpu` counts the processor time of all threads: with one
thread, other work on the machine disturbs it least. `--clock wall` is what a user waits for; use it,
with as many threads as cores, on a machine that does nothing else.

Terms:
    limit     timm's model in the same precision, best attention kernel: forward, and backward of
              activations down to the input of block 0
    own limit the same by lamina's tower without prompts, every row of the last block computed
    step      vpt-nsp2: forward, loss, backward, projected step of Adam; 4 prompt tokens per block
    look      forward with prompts and a tap that does nothing, or with `NullSpace.see`
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from lamina.backbones.timm_vit import TimmTower
from lamina.data.stream import Task
from lamina.methods.vpt_nsp2 import VPTNSP2
from lamina.model import Batch

RESULTS = Path(__file__).parent / "results" / "speed.json"
NANO = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 12, "num_heads": 3}
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    "vit-nano, batch 64": (NANO, 64, 64),
    "vit-b16, batch 8": ({}, 224, 8),
}
Calls = dict[str, Callable[[], object]]


class Bare(TimmTower):
    """A tower whose sequence asks for a gradient where it enters block 0."""

    def embed(self, inputs: Tensor) -> tuple[Tensor, None]:
        return super().embed(inputs)[0].detach().requires_grad_(), None


def vendor(model: VisionTransformer, dtype: torch.dtype, *, fused: bool) -> VisionTransformer:
    model = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def limit(model: VisionTransformer, images: Tensor) -> Callable[[], None]:
    images = images.to(model.cls_token.dtype)

    def run() -> None:
        x = model.norm_pre(model._pos_embed(model.patch_embed(images))).detach().requires_grad_()
        model.forward_head(model.norm(model.blocks(x)), pre_logits=True).float().square().mean().backward()

    return run


def own_limit(tower: Bare, images: Tensor) -> Callable[[], None]:
    return lambda: tower(images, all_rows=True).features.square().mean().backward()


class Method:
    """vpt-nsp2 in its second task."""

    def __init__(self, tower: TimmTower, images: Tensor) -> None:
        learner = VPTNSP2().build(tower)
        self.model, self.batch = learner.model, Batch(images, torch.arange(len(images)) % 10)
        self.null_space, self.moments = learner.protections
        task = Task(0, [f"class {i}" for i in range(10)], range(10), None, None)
        self.model.begin_task(task)
        self.look()
        self.null_space.end_look(lambda sums: sums)
        self.moments.end_look(lambda sums: sums)
        (phase,) = learner.phases(task)
        self.optimizer = phase.optimizer([p for p in self.model.parameters() if p.requires_grad])
        self.temperature = phase.temperature
        self.null_space.guard(self.optimizer).__enter__()

    def step(self) -> None:
        output = self.model(self.batch)
        terms = self.moments.terms(self.model) | output.terms
        loss = F.cross_entropy(output.logits / self.temperature, self.batch.labels) + sum(terms.values())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def forward(self) -> None:
        self.model.features(self.batch)

    @torch.no_grad()
    def tapped(self) -> None:
        self.model.features(self.batch, tap=lambda probe: None)

    @torch.no_grad()
    def look(self) -> None:
        self.null_space.begin_look()
        self.model.features(self.batch, tap=self.null_space.see)


def compare(calls: Calls, pairs: list[tuple[str, str]], rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Run all in turn; return the median and quartiles of the rounds' ratios of each pair."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for call in [*calls.values()] * 2:
        call()
    for i in range(rounds):
        for name in list(calls)[:: -1 if i % 2 else 1]:
            start = clock()
            calls[name]()
            took[name].append(clock() - start)
    rows = {}
    for one, other in pairs:
        ratios = [a / b for a, b in zip(took[one], took[other], strict=True)]
        low, middle, high = (round(q, 3) for q in statistics.quantiles(ratios, n=4))
        rows[f"{one} / {other}"] = {"median": middle, "quartiles": [low, high]}
        print(f"  {one + ' / ' + other:46s} {middle:.3f}  [{low:.3f}, {high:.3f}]", flush=True)
    return rows


def variants(model: VisionTransformer, images: Tensor, name: str) -> Calls:
    """Return what can be run in one precision, by name."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    method = Method(TimmTower(copy.deepcopy(model), dtype=dtype), images)
    bare = vendor(model, dtype, fused=dtype == torch.float32)
    calls: Calls = {
        "limit": limit(bare, images),
        "own limit": own_limit(Bare(copy.deepcopy(model), dtype=dtype), images),
        "step": method.step,
        "timm forward": torch.no_grad()(lambda: bare(images.to(dtype))),
        "forward": method.forward,
        "tapped": method.tapped,
        "look": method.look,
    }
    return {f"{name} {key}": call for key, call in calls.items()}


def measure(size: str, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Compare everything at one size."""
    calls, pairs = {}, []
    for name in ("bf16", "fp32"):
        calls |= variants(*inputs(size), name)
        for one, others in {
            "step": ("limit", "own limit"),
            "own limit": ("limit",),
            "tapped": ("timm forward", "forward"),
            "look": ("timm forward", "forward"),
        }.items():
            pairs += [(f"{name} {one}", f"{name} {other}") for other in others]
    pairs += [(f"bf16 {each}", "fp32 limit") for each in ("limit", "own limit", "step")]
    return compare(calls, pairs, rounds, clock)


def inputs(size: str) -> tuple[VisionTransformer, Tensor]:
    arguments, side, batch = SIZES[size]
    torch.manual_seed(0)
    return VisionTransformer(num_classes=0, **arguments), torch.randn(batch, 3, side, side)


def projectors(rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Decompose 12 second moments (768, 768) of falling spectrum in float64."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 3000, 768, dtype=torch.float64, generator=generator)
    rows = rows * torch.logspace(0, -4, 768, dtype=torch.float64) @ torch.linalg.qr(rows[:, :768]).Q
    moments = rows.mT @ rows
    calls: Calls = {
        "eigh": lambda: [torch.linalg.eigh(m) for m in moments],
        "svd": lambda: [torch.linalg.svd(m) for m in moments],
    }
    return compare(calls, [("eigh", "svd")], rounds, clock)


def peak(size: str, name: str) -> int:
    """Run one variant twice; return by how many MiB this process grew at most."""
    call = variants(*inputs(size), name.split()[0])[name]
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
    call(), call()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith(key))) // 1024


def peaks(size: str) -> dict[str, int]:
    """Return for some variants what they hold at most, in MiB, beyond the models and plain weights."""
    found = {}
    for name in ("bf16 limit", "bf16 step", "fp32 limit", "fp32 step"):
        command = [sys.executable, __file__, "--peak", size, name]
        found[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"  growth by {name:36s} {found[name]} MiB", flush=True)
    return found


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def write(results: dict[str, Any], only: str | None) -> None:
    """Keep what is known so far: a long run may be cut short."""
    if only is None:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="only one size; nothing is written")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        return print(peak(*arguments.peak))
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    results: dict[str, Any] = {
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": arguments.threads,
        "clock": arguments.clock,
        "rounds": arguments.rounds,
        "prompt tokens per block": VPTNSP2().length,
        "sizes": {},
    }
    for size in [arguments.size] if arguments.size else SIZES:
        print(size)
        results["sizes"][size] = measure(size, arguments.rounds, clock) | {"growth in MiB": peaks(size)}
        write(results, arguments.size)
    print("projectors, 12 x 768 x 768, float64")
    results["projectors"] = projectors(arguments.rounds, clock)
    write(results, arguments.size)


if __name__ == "__main__":
    main()
