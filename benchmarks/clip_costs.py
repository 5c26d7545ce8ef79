"""What methods for CLIP cost: steps against the text tower's own work, with and without what is shared and kept.

    python benchmarks/clip_costs.py            writes benchmarks/results/clip-costs.json

Everything runs in turn in one process, forth and back, on one thread; figures are medians of ratios of processor time
(see `speed.py`). Ten classes of a task compete, batches have 32 images. What costs each image the same is run for a
few images and multiplied: "one by one" for 2, the image tower for 8.

Terms:
    texts           forward and backward of the text tower over the texts of one task, their opening shared
    whole texts     the same as open_clip does it: 77 rows of every text
    one by one      each image's whole texts encoded by themselves, as released code does
    to their ends   the same, no row computed behind the end of the longest text
    all different   features and keys at random: hardly two images choose the same prompts in the same order
    digits          a batch of scikit-learn's digits, at the first step or after passes over all of them
    image tower     its forward, which features that are kept on disk save
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
from lamina.backbones.tower import Tower
from lamina.data.stream import Task
from lamina.data.streams import StreamSettings, build_stream
from lamina.data.transforms import InputSpec, transform
from lamina.heads.templates import templates_of
from lamina.heads.texts import HandTexts
from lamina.machine import commit
from lamina.model import Batch
from lamina.prompts.contexts import Wording, encoded, worded
from lamina.registry import method_class
from lamina.storage import write_whole
from lamina.training.launch import tower_dtype

RESULTS = Path(__file__).parent / "results" / "clip-costs.json"
SIZES = {"clip-nano": "lamina:clip-nano", "ViT-B/16": "open_clip:ViT-B-16-quickgelu@random"}
DTYPE = tower_dtype("auto", torch.device("cpu"))
BATCH, ONE_BY_ONE, IMAGES = 32, 2, 8
#: passes over the digits before a batch is measured again
PASSES = 2
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


class Training:
    """A method in its first task, on features (B, F) with labels (B,)."""

    def __init__(self, name: str, tower: Tower, features: Tensor, labels: Tensor, names: list[str] = NAMES) -> None:
        learner = method_class(name)().build(tower)
        self.model, self.features, self.labels = learner.model, features, labels
        task = Task(0, names, range(len(names)), None, None)  # type: ignore[arg-type]  # no image is read
        self.model.begin_task(task)
        (phase,) = learner.phases(task)
        self.optimizer = phase.optimizer([p for p in self.model.parameters() if p.requires_grad])
        self.model.train()

    def step(self) -> None:
        output = self.model(Batch(None, self.labels, features=self.features), 0)
        self._learn(output.logits, output.terms)

    def one_by_one(self, *, whole: bool) -> None:
        """Take the step of AttriCLIP for the first images, each one's texts encoded by themselves."""
        head: Any = self.model.head
        texts, features, labels = head.texts, self.features[:ONE_BY_ONE], self.labels[:ONE_BY_ONE]
        found = []
        for context in texts.prompts[texts.choose(features)].flatten(1, 2):
            alone = read_whole if whole else read_to_ends
            found.append(F.normalize(alone(texts.tower, texts._wording, context[None]), dim=-1))
        logits = head.scale * torch.einsum("bf,bcf->bc", F.normalize(features, dim=-1), torch.stack(found))
        self._learn(logits, {}, labels)

    def _learn(self, logits: Tensor, terms: dict[str, Tensor], labels: Tensor | None = None) -> None:
        loss = F.cross_entropy(logits, self.labels if labels is None else labels)
        self.optimizer.zero_grad()
        (loss + sum(terms.values())).backward()
        self.optimizer.step()

    @property
    def choices(self) -> int:
        """How many different choices of prompts the images made."""
        texts: Any = self.model.head.texts
        return len(texts.choose(self.features).unique(dim=0))


def read_whole(tower: Any, wording: Wording, contexts: Tensor) -> Tensor:
    """Return the features (C, F) of texts with one context (1, n, W) behind the start token, all 77 rows computed."""
    length, classes = contexts.shape[1], len(wording.ids)
    x = tower.table(wording.ids)
    x = torch.cat([x[:, :1], contexts.expand(classes, -1, -1).to(x.dtype), x[:, 1 + length :]], dim=1) + tower.positions
    for block in tower.blocks():
        q, k, v = block.project(block.norm(x))
        x = block.attended(x, F.scaled_dot_product_attention(q, k, v, attn_mask=tower.mask))
        x = x + block.branch(x)
    return tower.pool(x[torch.arange(classes), wording.ids.argmax(1)][:, None]).float()


def read_to_ends(tower: Any, wording: Wording, contexts: Tensor) -> Tensor:
    return encoded(tower, wording, contexts, share=False)[0]


def digits(tower: Tower, spec: InputSpec) -> tuple[Tensor, Tensor, list[str]]:
    """Return the features (n, F) of scikit-learn's digits for training, their labels (n,) and the ten names."""
    task = build_stream(StreamSettings(name="digits")).merged()
    plain, split = transform("plain", spec), task.train
    with torch.no_grad():
        parts = [
            tower(torch.stack([plain(split.images.image(int(i))) for i in part])).features
            for part in torch.as_tensor(split.indices).split(256)
        ]
    return torch.cat(parts), torch.as_tensor(split.columns), list(task.classes)


def on_digits(tower: Tower, spec: InputSpec) -> tuple[Training, Training]:
    """Return AttriCLIP on a batch of digits at its first step, and after some passes over all of them."""
    features, labels, names = digits(tower, spec)
    mixed = torch.randperm(len(labels))
    first, later = (
        Training("attriclip", tower, features[mixed[:BATCH]], labels[mixed[:BATCH]], names) for _ in range(2)
    )
    for _ in range(PASSES):
        for batch in torch.randperm(len(labels)).split(BATCH):
            later.features, later.labels = features[batch], labels[batch]
            later.step()
    later.features, later.labels = first.features, first.labels
    return first, later


def measure(size: str, rounds: int) -> dict[str, Any]:
    """Compare everything with one backbone."""
    backbone = load_backbone(SIZES[size], dtype=DTYPE)
    tower: Any = backbone.tower
    spec = InputSpec(**backbone.pixels)
    features, labels = torch.randn(BATCH, tower.features), torch.arange(BATCH) % len(NAMES)
    images = torch.randn(IMAGES, 3, spec.size, spec.size)
    coop, adapter = (Training(name, tower, features, labels) for name in ("coop", "clip-adapter"))
    bank = {"all different": Training("attriclip", tower, features, labels)}
    with torch.no_grad():
        keys: Any = bank["all different"].model.head.texts.keys  # type: ignore[union-attr]
        keys.normal_()
    if size == "clip-nano":  # the other one has random weights, which see nothing in images
        first, later = on_digits(tower, spec)
        bank |= {"digits, first step": first, f"digits, after {PASSES} passes": later}
    wording = worded(tower.text, NAMES, 16)
    contexts = torch.randn(1, 16, tower.text.tower.width).mul_(0.02).requires_grad_()

    def image_tower() -> None:
        with torch.no_grad():
            tower(images)

    calls: dict[str, Callable[[], object]] = {
        "texts": lambda: encoded(tower.text.tower, wording, contexts).sum().backward(),
        "whole texts": lambda: read_whole(tower.text.tower, wording, contexts).sum().backward(),
        "coop": coop.step,
        "clip-adapter": adapter.step,
        "image tower": image_tower,
        **{f"attriclip, {name}": training.step for name, training in bank.items()},
        "one by one": lambda: bank["all different"].one_by_one(whole=True),
        "one by one, to their ends": lambda: bank["all different"].one_by_one(whole=False),
    }
    choices = {f"attriclip, {name}": training.choices for name, training in bank.items()}
    each = {"image tower": BATCH / IMAGES, "one by one": BATCH / ONE_BY_ONE}
    pairs = [("coop", "texts"), ("whole texts", "texts"), ("image tower", "coop"), ("image tower", "clip-adapter")]
    pairs += [(one, other) for one in ("one by one", "one by one, to their ends") for other in choices]
    found = {}
    for pair, ratio in compare(calls, pairs, rounds, time.process_time).items():
        by = each.get(pair.split(" / ")[0].removesuffix(", to their ends"), 1)
        found[pair] = {
            "median": round(by * ratio["median"], 3),
            "quartiles": [round(by * q, 3) for q in ratio["quartiles"]],
        }
    for method in ("coop", "clip-adapter"):
        ratio = found[f"image tower / {method}"]
        found[f"epoch of {method} from images / from kept features"] = {
            "median": round(1 + ratio["median"], 3),
            "quartiles": [round(1 + q, 3) for q in ratio["quartiles"]],
        }
    return {"ratios": found, "choices in the batch": choices}


def reading(classes: int, templates: str) -> dict[str, Any]:
    """Return what it takes to read many names under many templates with the small CLIP of ours."""
    tower = load_backbone("lamina:clip-nano", dtype=DTYPE).tower
    texts = HandTexts(tower.text, templates_of(templates))  # type: ignore[arg-type]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    texts.begin_task(0, [f"thing number {i}" for i in range(classes)], range(classes))
    with torch.no_grad():
        texts()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    return {
        "classes": classes,
        "templates": len(texts.templates),
        "seconds": round(time.process_time() - start, 1),
        "more memory at the peak (MB)": round(grown),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "torch": torch.__version__,
        "towers in": str(DTYPE).removeprefix("torch."),
        "rounds": given.rounds,
        "images in a batch": BATCH,
        "bank": reading(1000, "imagenet-80"),  # first, as what a process held at most never falls
        "sizes": {},
    }
    for size in SIZES:
        print(size)
        results["sizes"][size] = measure(size, given.rounds)
    write_whole(RESULTS, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
