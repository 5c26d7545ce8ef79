"""What a test batch gives away: what was learned, read by each image for itself or by all of a batch together.

    python benchmarks/votes.py RUN [RUN ...] --data DIR [--name votes]       writes benchmarks/results/NAME.json

Takes finished runs of methods that have the setting `selection` (which prompts of a pool are taken) or `context`
(which images names look at). Test images come a task after another and sorted by class, as released code shows them, in
batches of several sizes; and once in no order, all tasks together. Whoever votes among images of one class, or looks at
them, learns from the batch which class it is likely to be: a leak, made visible.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file

from lamina.backbones.load import load_backbone
from lamina.data.stream import Split, Stream, Task
from lamina.data.streams import build_stream
from lamina.data.transforms import InputSpec
from lamina.machine import commit, hardware
from lamina.registry import method_class
from lamina.results.records import Record
from lamina.runs import RESULTS, resumable
from lamina.storage import write_whole
from lamina.training.evaluation import accuracies, summed
from lamina.training.feed import Feed
from lamina.training.launch import tower_dtype

OUT = Path(__file__).parent / "results"
SIZES = (1, 16, 128)
SETTINGS = ("selection", "context")


def ordered(task: Task, generator: np.random.Generator | None = None) -> Task:
    """Return a task whose test images are sorted by class, or in no order."""
    test = task.test
    places = np.argsort(test.columns, kind="stable") if generator is None else generator.permutation(len(test))
    return replace(task, test=Split(test.images, test.indices[places], test.columns[places]))


def measured(folder: Path, data: Path | None) -> dict[str, Any]:
    """Return the accuracies of one run under each way to choose."""
    run, record = resumable(folder), Record.read(folder / RESULTS)
    fabric = Fabric(accelerator="cpu", devices=1)
    backbone = load_backbone(run.backbone, dtype=tower_dtype(run.precision, fabric.device))
    spec = InputSpec(**backbone.pixels)
    stream: Stream = build_stream(run.stream, data, max_side=spec.max_side)
    setting, rows = next(name for name in SETTINGS if name in record.settings), []
    for selection in ("image", "batch"):
        learner = method_class(run.method)(**{**run.settings, setting: selection}).build(backbone.tower)
        for task in stream:
            learner.model.begin_task(task)
        learner.model.load_state_dict(load_file(folder / "learned.safetensors"), strict=False)
        for size in SIZES if selection == "batch" else SIZES[-1:]:
            feed = Feed.to(learner, fabric, spec, eval_batch=size)
            for order in ("sorted", "mixed"):
                tasks = [ordered(task) for task in stream]
                if order == "mixed":
                    tasks = [ordered(stream.merged(), np.random.default_rng(0))]
                found, _ = accuracies(
                    learner.model, tasks, lambda task, plain=feed.plain: plain(task.test), seed=0, reduce=summed(fabric)
                )
                rows.append({"choice": selection, "batch": size, "order": order, "accuracy": float(np.mean(found))})
                print(run.method, record.settings[setting], rows[-1], flush=True)
    what = {"method": run.method, "stream": run.stream.name, "seed": run.seed}
    return {**what, "trained": record.settings[setting], "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--name", default="votes", choices=["votes", "clap-context"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = [measured(folder, given.data) for folder in given.runs]
    about = {"commit": commit(), "hardware": hardware(torch.device("cpu"))}
    write_whole(OUT / f"{given.name}.json", json.dumps({**about, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
