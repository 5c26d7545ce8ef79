"""What methods for CLIP cost: steps against the text tower's own work, with and without what is shared and kept.

    python benchmarks/clip_costs.py            writes benchmarks/results/clip-costs.json

Everything runs in turn in one process, forth and back, and figures are medians of ratios (see `speed.py`). Ten classes
of a task compete; batches have 32 images of a ViT-B/16, or 8 where every image has texts of its own.

Terms:
    texts           forward and backward of the text tower over the texts of one task, their opening shared
    whole texts     the same as open_clip does it: 77 rows of every text
    one by one      each image's texts encoded by themselves, as released code does
    from images     a step with the image tower's forward before it; else image features were kept
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed import compare, processor
from torch import Tensor
from torch.nn import functional as F

from lamina.backbones.load import load_backbone
from lamina.data.stream import Task
from lamina.heads.templates import templates_of
from lamina.heads.texts import HandTexts
from lamina.machine import commit
from lamina.model import Batch
from lamina.prompts.contexts import encoded, worded
from lamina.registry import method_class
from lamina.storage import write_whole

RESULTS = Path(__file__).parent / "results" / "clip-costs.json"
NAMES = [
    "goldfish",
    "bullfrog",
    "tarantula",
    "sea slug",
    "king penguin",
    "golden retriever",
    "lion",
    "bee",
    "bison",
    "barn",
]


def step_of(name: str, tower: Any, features: Tensor, **settings: Any) -> Callable[[], None]:
    """Return a training step of a method's first task on features (B, F)."""
    learner = method_class(name)(**settings).build(tower)
    model = learner.model
    task = Task(0, NAMES, range(len(NAMES)), None, None)  # type: ignore[arg-type]  # no image is read
    model.begin_task(task)
    (phase,) = learner.phases(task)
    optimizer = phase.optimizer([p for p in model.parameters() if p.requires_grad])
    labels = torch.arange(len(features)) % len(NAMES)
    model.train()

    def step() -> None:
        output = model(Batch(None, labels, features=features), 0)
        optimizer.zero_grad()
        (F.cross_entropy(output.logits, labels) + sum(output.terms.values())).backward()
        optimizer.step()

    return step


def one_by_one(tower: Any, features: Tensor) -> Callable[[], None]:
    """Return the step of AttriCLIP with every image's texts encoded whole and by themselves."""
    learner = method_class("attriclip")().build(tower)
    model, labels = learner.model, torch.arange(len(features)) % len(NAMES)
    model.begin_task(Task(0, NAMES, range(len(NAMES)), None, None))  # type: ignore[arg-type]
    texts = model.head.texts
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001)

    def step() -> None:
        contexts = texts.prompts[texts.choose(features)].flatten(1, 2)
        found = [
            F.normalize(encoded(texts.tower, texts._wording, context[None], share=False)[0], dim=-1)
            for context in contexts
        ]
        logits = model.head.scale * torch.einsum("be,bce->bc", F.normalize(features, dim=-1), torch.stack(found))
        optimizer.zero_grad()
        (F.cross_entropy(logits, labels) + sum(texts.terms(features).values())).backward()
        optimizer.step()

    return step


def text_limits(tower: Any, length: int) -> dict[str, Callable[[], None]]:
    """Return the text tower's own work for one step: with the opening shared, and as open_clip does it."""
    side = tower.text
    wording = worded(side, NAMES, length)
    contexts = torch.randn(1, length, side.tower.width).mul_(0.02).requires_grad_()

    def texts() -> None:
        encoded(side.tower, wording, contexts).sum().backward()

    def whole() -> None:
        mask, x = side.tower.mask, side.tower.table(wording.ids) + side.tower.positions
        x = torch.cat([x[:, :1], contexts.expand(len(NAMES), -1, -1).to(x.dtype), x[:, 1 + length :]], dim=1)
        for block in side.tower.blocks():
            q, k, v = block.project(block.norm(x))
            x = block.finish(x, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        side.tower.final_norm(x)[torch.arange(len(x)), wording.ids.argmax(1)].float().sum().backward()

    return {"texts": texts, "whole texts": whole}


def bank(classes: int, templates: str) -> dict[str, Any]:
    """Return what it takes to read many names under many templates with the small CLIP of ours."""
    tower = load_backbone("lamina:clip-nano", dtype=torch.bfloat16).tower
    texts = HandTexts(tower.text, templates_of(templates))  # type: ignore[arg-type]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    texts.begin_task(0, [f"thing number {i}" for i in range(classes)], range(classes))
    with torch.no_grad():
        texts()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    return {
        "classes": classes,
        "templates": len(texts.templates),
        "seconds": round(time.perf_counter() - start, 1),
        "more memory at the peak (MB)": round(grown),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = load_backbone("open_clip:ViT-B-16-quickgelu@random", dtype=torch.bfloat16)
    tower = backbone.tower
    images, features = torch.randn(32, 3, 224, 224), torch.randn(32, tower.features)

    def tower_alone() -> None:
        with torch.no_grad():
            tower(images)

    calls = {
        **text_limits(tower, 16),
        "coop": step_of("coop", tower, features),
        "clip-adapter": step_of("clip-adapter", tower, features),
        "attriclip": step_of("attriclip", tower, features[:8]),
        "attriclip, one by one": one_by_one(tower, features[:8]),
        "image tower": tower_alone,
    }
    pairs = [
        ("coop", "texts"),
        ("whole texts", "texts"),
        ("attriclip, one by one", "attriclip"),
        ("image tower", "coop"),
        ("image tower", "clip-adapter"),
    ]
    results = {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "torch": torch.__version__,
        "rounds": given.rounds,
        "ratios": compare(calls, pairs, given.rounds, time.process_time),
        "bank": bank(1000, "imagenet-80"),
    }
    write_whole(RESULTS, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
