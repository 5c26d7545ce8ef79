"""What null spaces are worth: the experiments of docs/null-space.md.

    python benchmarks/null_space.py --data DIR [--only ablation heads]

Every run is a variant of a recipe on `tiny-odd-10`, with its drift measured. What is in
`benchmarks/results/null-space.json` is not run again; what is half done is resumed; two copies of this
program beside each other share the work. `python benchmarks/tables.py` then rewrites the tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from lamina.console import PlainProgress
from lamina.registry import method_class
from lamina.runs import complete, plan
from lamina.storage import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "null-space.json"
STREAM = "tiny-odd-10"
#: passes over a task's images in sweeps, where the recipes take eight: a quarter of the time
SWEEP = 2


class Variant(NamedTuple):
    """A row of a table.

    Attributes:
        name: what the row is called.
        method: whose recipe it starts from.
        settings: what is changed in it.
        seeds: one run each.
    """

    name: str
    method: str
    settings: dict[str, Any]
    seeds: tuple[int, ...] = (0,)


def _parts(b1: bool, b2: bool, loss: bool) -> Variant:
    names = [name for name, there in (("B1", b1), ("B2", b2), ("LN loss", loss)) if there]
    settings = {"use_b1": b1, "use_b2": b2, "use_ln_loss": loss}
    seeds = (0, 1, 2) if len(names) == 3 else (0,)
    return Variant(" + ".join(names) or "none", "vpt-nsp2", settings, seeds)


#: experiment -> its rows
EXPERIMENTS: dict[str, list[Variant]] = {
    "ablation": [
        _parts(*parts)
        for parts in (
            (False, False, False),
            (True, True, True),
            (True, False, False),
            (False, True, False),
            (True, True, False),
            (True, False, True),
            (False, True, True),
        )
    ],
    "control": [
        Variant("projectors", "vpt-nsp2", {}, (0, 1, 2)),
        Variant("the same gain, no directions", "vpt-nsp2", {"gain_control": True}, (0, 1, 2)),
        Variant("projectors, class statistics, two passes", "vpt-nsp2", {"epochs": SWEEP, "head": "statistics"}),
        Variant(
            "the same gain, class statistics, two passes",
            "vpt-nsp2",
            {"epochs": SWEEP, "head": "statistics", "gain_control": True},
        ),
    ],
    "correction": [
        Variant("none", "vpt-nsp2", {}, (0, 1, 2)),
        Variant("affine", "vpt-nsp2", {"ln_correction": "affine"}),
        Variant("affine + center", "vpt-nsp2", {"ln_correction": "affine", "center": True}),
    ],
    "exact": [
        Variant("vpt-nsp2", "vpt-nsp2", {}, (0, 1, 2)),
        Variant("vpt-nsp2-exact", "vpt-nsp2-exact", {}, (0, 1, 2)),
    ],
    "heads": [
        Variant(f"{method}, {head}", method, {"epochs": SWEEP, "head": head})
        for head in ("linear", "statistics", "refined", "cosine")
        for method in ("vpt-deep", "vpt-nsp2", "vpt-nsp2-exact")
    ],
    "eta": [Variant(f"eta {eta}", "vpt-nsp2", {"epochs": SWEEP, "eta1": eta, "eta2": eta}) for eta in (0.9, 0.97, 1.0)]
    + [Variant("1.0, not normalised", "vpt-nsp2", {"epochs": SWEEP, "eta1": 1.0, "eta2": 1.0, "normalize": False})],
    "drift": [
        Variant(f"max_drift {bound}", "vpt-nsp2-exact", {"epochs": SWEEP, "max_drift": bound})
        for bound in (0.05, 0.1, 0.4)
    ]
    + [
        Variant(f"kept {kept}", "vpt-nsp2-exact", {"epochs": SWEEP, "kept": kept}) for kept in (0.8, 0.9, 0.99, 0.999)
    ],
    "strata": [
        Variant("strata", "strata", {}, (0, 1, 2)),
        Variant("reading the last block alone", "strata", {"layers": 1}),
        Variant("with 16 prompts", "strata", {"length": 16}),
    ],
}


def wanted(experiments: list[str]) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Yield method, settings and seed of every run that is needed, each once, first seeds first."""
    variants = [variant for name in experiments for variant in EXPERIMENTS[name]]
    seen = set()
    for seed in sorted({seed for variant in variants for seed in variant.seeds}):
        for variant in variants:
            run = key(variant.method, variant.settings, seed)
            if seed in variant.seeds and run not in seen:
                seen.add(run)
                yield variant.method, variant.settings, seed


def key(method: str, settings: dict[str, Any], seed: int) -> str:
    """Return what tells a run from others: its method, its whole settings and its seed."""
    return json.dumps([method, whole(method, settings), seed], sort_keys=True)


def whole(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return all settings of a method: the recipe's, the defaults, and what is changed in them."""
    run, _ = plan(method, STREAM, overrides={"settings": settings})
    return method_class(method)(**run.settings).model_dump()


def experiments() -> dict[str, list[dict[str, Any]]]:
    """Return what the tables are made of, for the file of results."""
    return {
        name: [{**variant._asdict(), "settings": whole(variant.method, variant.settings)} for variant in variants]
        for name, variants in EXPERIMENTS.items()
    }


def known(path: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return the records in the file of results, by `key`."""
    records = json.loads(path.read_text())["records"] if path.exists() else []
    return {json.dumps([r["method"], r["settings"], r["seed"]], sort_keys=True): r for r in records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/null-space"), help="folder of the runs")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for method, settings, seed in wanted(given.only):
        run = key(method, settings, seed)
        words = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
        label = "-".join([method, *words, str(seed)]).replace('"', "")
        try:
            with FileLock(given.out / f"{label}.lock", blocking=False):
                if run in known():
                    continue
                overrides = {"seed": seed, "measure_drift": True, "settings": settings}
                planned, _ = plan(method, STREAM, overrides=overrides)
                sets = "".join(f" --set {word}" for word in words)
                command = f"lamina run {method} --stream {STREAM} --seed {seed} --measure-drift{sets}"
                folder = given.out / label
                record = complete(planned, folder, data=given.data, command=command, progress=PlainProgress)
        except Timeout:
            continue  # another copy of this program is at it
        with FileLock(given.out / "results.lock"):
            records = {**known(), run: record.as_dict()}
            write_whole(RESULTS, json.dumps({"experiments": experiments(), "records": list(records.values())}) + "\n")
        print(label, {name: round(value, 4) for name, value in record.metrics.items() if value is not None}, flush=True)


if __name__ == "__main__":
    main()
