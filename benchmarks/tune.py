"""Choose the settings of the recipes: the same number of tries for every method, never on what is reported.

    python benchmarks/tune.py tiny-even-10 --data DIR
    python benchmarks/tune.py digits

Tuning for `tiny-odd-10` happens on the other half of the classes, with half the images and fewer passes; tuning for
`digits` on a quarter of its training images that is held out. Every try and its result goes
to `benchmarks/results/tuning-STREAM.json`; what is there is not run again. The best try by final accuracy
is printed last, per method. clap has thirteen tries, on digits alone: names of even classes are known to clip-nano.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from lamina.registry import method_class
from lamina.runs import execute, plan
from lamina.storage import write_whole

ROOT = Path(__file__).resolve().parents[1]

#: what every try of a stream shares
SHARED: dict[str, dict[str, Any]] = {
    "tiny-even-10": {"stream": {"per_class": 25, "test_per_class": 25}, "settings": {"epochs": 5, "batch_size": 32}},
    "digits": {"stream": {"holdout": 0.25}, "settings": {"epochs": 8, "batch_size": 32}},
}

#: four tries a method; the first is always the paper's
RATES = [
    {"lr": 0.01, "temperature": 28.0},
    {"lr": 0.003, "temperature": 28.0},
    {"lr": 0.01, "temperature": 5.0},
    {"lr": 0.003, "temperature": 5.0},
]
#: for a batch of 32 where the authors' rate grows with the batch
POOL_RATES = [
    {"lr": 0.00375, "temperature": 1.0},
    {"lr": 0.00375, "temperature": 5.0},
    {"lr": 0.01, "temperature": 1.0},
    {"lr": 0.01, "temperature": 5.0},
]
PREFIX_RATES = [
    {"lr": 0.001, "temperature": 1.0},
    {"lr": 0.005, "temperature": 1.0},
    {"lr": 0.01, "temperature": 1.0},
    {"lr": 0.005, "temperature": 5.0},
]
#: for learned words, by SGD, and for what is learned beside features; clip-nano's cosines count a fifth of CLIP's
WORD_RATES = [{"lr": 0.002}, {"lr": 0.01}, {"lr": 0.05}, {"lr": 0.25}]
PHOTO = {"words": "a photo of a", "length": 4}
FEATURE_RATES = [{"lr": 0.001}, {"lr": 0.003}, {"lr": 0.01}, {"lr": 0.0003}]
#: the paper's; and on cosines, where a step of equal length moves less, so the anchor weighs as much less
CLAP = {"batch_size": 64, "lr": 0.001}
COSINE = {"batch_size": 64, "cosine": True, "lr": 0.3, "language": 0.05}
TRIES: dict[str, list[dict[str, Any]]] = {
    "vpt-deep": RATES,
    "joint": RATES,
    "vpt-nsp2": [
        {"lr": 0.01, "temperature": 28.0, "knee": "paper"},
        {"lr": 0.01, "temperature": 28.0, "knee": "code"},
        {"lr": 0.003, "temperature": 28.0, "knee": "code"},
        {"lr": 0.01, "temperature": 5.0, "knee": "code"},
    ],
    "linear-probe": RATES,
    "strata": [
        {"length": 0, "layers": 2},
        {"length": 0, "layers": 4},
        {"length": 16, "layers": 2, "lr": 0.001, "max_drift": 0.02},
        {"length": 16, "layers": 2, "lr": 0.01, "max_drift": 0.05},
    ],
    "ranpac": [{}],
    "l2p": POOL_RATES,
    "dualprompt": POOL_RATES,
    "coda-prompt": PREFIX_RATES,
    "l2p-pp": PREFIX_RATES,
    "clap": [
        {**CLAP, "epochs": 5},
        {**CLAP, "epochs": 20},
        {**COSINE, "epochs": 5},
        {**COSINE, "epochs": 20},
        {**COSINE, "epochs": 5, "balance": 10},
        {**COSINE, "epochs": 20, "balance": 10},
        {**COSINE, "epochs": 20, "balance": 10, "lr": 0.1, "language": 0.15},
        {**COSINE, "epochs": 20, "balance": 10, "lr": 0.1, "language": 0.0},
        {**COSINE, "epochs": 5, "lr": 0.03, "language": 0.5},
        {**COSINE, "epochs": 5, "lr": 0.6, "language": 0.025},
        {**CLAP, "epochs": 5, "memory": 0, "negatives": "task"},
        {**COSINE, "epochs": 20, "memory": 0, "negatives": "task"},
        {**COSINE, "epochs": 20, "memory": 0, "negatives": "task", "lr": 0.03, "language": 0.5},
    ],
    "coop": [{"lr": 0.002}, {"lr": 0.01, **PHOTO}, {"lr": 0.05, **PHOTO}, {"lr": 0.25, **PHOTO}],
    "bayes-prompt": WORD_RATES,
    "proda": WORD_RATES,
    "cocoop": WORD_RATES,
    "attriclip": [{"lr": 0.0016}, {"lr": 0.01}, {"lr": 0.05}, {"lr": 0.25}],
    "clip-adapter": FEATURE_RATES,
    "proof": FEATURE_RATES,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream", choices=sorted(SHARED))
    parser.add_argument("--methods", nargs="+", default=sorted(TRIES))
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / f"tuning-{given.stream}.json"
    shared = SHARED[given.stream]
    for number in range(max(map(len, TRIES.values()))):
        for method in given.methods:
            if number >= len(TRIES[method]):
                continue
            fields = method_class(method).model_fields
            settings = {name: value for name, value in shared["settings"].items() if name in fields}
            settings |= TRIES[method][number]
            idle = method_class(method)(**settings).idle()
            settings = {name: value for name, value in settings.items() if name not in idle}
            if any(row["method"] == method and row["settings"] == settings for row in tries(path)):
                continue
            overrides = {"stream": shared["stream"], **settings}
            run, _ = plan(method, given.stream, recipe=False, overrides=overrides)
            with tempfile.TemporaryDirectory() as folder:
                record = execute(run, Path(folder) / "run", data=given.data)
            keep = ("accuracy", "forgetting", "average_accuracy", "accuracy_task_aware")
            row = {"method": method, "settings": settings, "metrics": {name: record.metrics[name] for name in keep}}
            row["seconds"] = round(sum(map(sum, record.seconds.values())), 1)
            print(row, flush=True)
            facts = {"stream": given.stream, "changes": shared["stream"], "backbone": record.backbone}
            facts |= {"hardware": record.hardware, "commit": record.commit}
            with FileLock(f"{path}.lock"):  # copies of this program beside each other, for other methods
                write_whole(path, json.dumps({**facts, "tries": [*tries(path), row]}, indent=1) + "\n")
    for method in given.methods:
        rows = [row for row in tries(path) if row["method"] == method]
        print("best", max(rows, key=lambda row: row["metrics"]["accuracy"]))


def tries(path: Path) -> list[dict[str, Any]]:
    """Return the tries that a file of results holds."""
    return json.loads(path.read_text())["tries"] if path.exists() else []


if __name__ == "__main__":
    main()
