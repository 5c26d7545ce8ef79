"""Rewrite the generated tables of README.md and docs/ from benchmarks/results; `--check` only looks for stale ones.

    python benchmarks/tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. `STUDY/EXPERIMENT` stands for an experiment of a
study (see `study.py`), such as `null-space/control`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from views import SHOWN, listed

from lamina import catalogue
from lamina.errors import ConfigError, DataError, LaminaError, unknown
from lamina.registry import default_backbone, method_class
from lamina.results.records import Record, read_records
from lamina.results.tables import aggregate, spread, to_markdown
from lamina.storage import write_whole

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"(<!-- table: (?P<name>[^\n]+?) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """Where a table comes from: a file in the folder of results, and the metrics to show."""

    file: str
    columns: tuple[str, ...] = ("accuracy", "forgetting")


TABLES = {
    "demo": Source("demo.json"),
    "demo-clip": Source("demo-clip.json", ("accuracy", "forgetting", "transfer", "ece")),
    "tiny-odd-10": Source("tiny-odd-10.json"),
}


class Cell(NamedTuple):
    """A column of an experiment: its title, what a run has there, and how the values of all runs are shown."""

    title: str
    value: Callable[[Record], float | None]
    show: Callable[[list[float]], str] = lambda values: str(spread(values))


def _share(part: Sequence[float], whole: Sequence[float]) -> float | None:
    return sum(part) / sum(whole) if any(whole) else None


def _mean(values: list[float]) -> str:
    return f"{fmean(values):,.0f}"


CELLS = {
    "accuracy": Cell("accuracy (%)", lambda run: run.metrics["accuracy"]),
    "miou": Cell("mIoU (%)", lambda run: run.metrics["accuracy"]),
    "pixels": Cell("pixel accuracy (%)", lambda run: run.metrics["pixel_accuracy"]),
    "task-aware": Cell("task-aware accuracy (%)", lambda run: run.metrics["accuracy_task_aware"]),
    "forgetting": Cell("forgetting (%)", lambda run: run.metrics["forgetting"]),
    "average": Cell("average accuracy (%)", lambda run: run.metrics["average_accuracy"]),
    "bwt": Cell("BWT (%)", lambda run: run.metrics["bwt"]),
    "transfer": Cell("transfer (%)", lambda run: run.metrics.get("transfer")),
    "ece": Cell("ECE (%)", lambda run: run.metrics.get("ece")),
    "novel": Cell("novel: AUROC (%)", lambda run: run.metrics.get("novel_auroc")),
    "fpr95": Cell("novel: FPR95 (%)", lambda run: run.metrics.get("novel_fpr95")),
    "new tasks": Cell("new tasks (%)", lambda run: sum(line[-1] for line in run.matrix) / len(run.matrix)),
    "drift": Cell("drift (%)", lambda run: run.old_drift[-1][-1] if run.old_drift else None),
    "looking back": Cell(
        "looking back (% of training)", lambda run: _share(run.seconds["look_back"], run.seconds["train"])
    ),
    "training": Cell("training, s a task", lambda run: fmean(run.seconds["train"]), _mean),
    "evaluation": Cell("evaluation, s in all", lambda run: sum(run.seconds["evaluate"]), _mean),
    "memory": Cell("peak memory (MB)", lambda run: run.peak_memory_mb, _mean),
    "learned": Cell("learned numbers", lambda run: run.trainable_parameters, _mean),
    "stored": Cell("stored numbers", lambda run: run.stored_numbers, _mean),
}
#: file of a study -> what its tables show
STUDIES = {
    "null-space": ("accuracy", "forgetting", "new tasks", "drift", "looking back"),
    "clip": (
        *("accuracy", "average", "forgetting", "bwt", "transfer", "ece", "novel", "fpr95"),
        *("training", "memory", "learned"),
    ),
    "lspt": ("accuracy", "task-aware", "forgetting", "training", "memory", "learned"),
    "pools": ("accuracy", "task-aware", "forgetting", "training", "evaluation", "memory", "learned", "stored"),
}
EXPERIMENTS = {  # of a study, whose tables show something else
    "clip/ablation": ("accuracy", "average", "forgetting", "ece", "novel", "training"),
    "clip/samples": ("accuracy", "ece", "novel", "training", "evaluation"),
    "lspt/pixels": ("miou", "pixels", "training", "memory", "learned"),
    "clip/memory": ("accuracy", "average", "bwt", "transfer", "ece", "novel", "learned"),
}
NAMES = ("null-space", "prompt-pools", "clip", "clap", "transfer")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES))


def table(records: Sequence[Record], columns: Sequence[str]) -> str:
    """Return a Markdown table of finished runs, and under it how and where they were measured.

    Raises:
        DataError: when a run is not finished, or the same run is there twice.
    """
    for record in records:
        if not record.finished:
            raise DataError(f"{record.method} with seed {record.seed} is not finished; run it to its end")
    rows = aggregate(records)
    for row in rows:
        seeds = [(record.seed, record.order_seed) for record in row.records]
        twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        if twice:
            # A repeated seed is no new evidence, yet it would shrink the deviation.
            raise DataError(f"{row.name} has seed {twice[0]} with order {twice[1]} twice; keep one run")
    return f"{to_markdown(rows, columns)}\n{caption(records)}\n"


def experiment(values: Mapping[str, Any], name: str, columns: Sequence[str], more: Sequence[Record] = ()) -> str:
    """Return the Markdown table of one experiment: a row for each variant; below it, which have no run yet.

    Args:
        values: what a `Study` wrote.
        columns: names in `CELLS`.
        more: records of other files that count as run.
    """
    if name not in values["experiments"]:
        raise ConfigError(unknown("experiment", name, values["experiments"]))
    records = [*map(Record.from_dict, values["records"]), *more]
    lines = [
        f"| variant | {' | '.join(CELLS[column].title for column in columns)} | n |",
        f"|---|{'---:|' * len(columns)}---:|",
    ]
    used, waiting = [], []
    for row in values["experiments"][name]:
        runs = {record.seed: record for record in records if is_run_of(record, row)}
        if not runs:
            waiting.append(row["name"])
            continue
        used += runs.values()
        cells = []
        for column in columns:
            found = [value for run in runs.values() if (value := CELLS[column].value(run)) is not None]
            cells.append(CELLS[column].show(found) if found else "–")
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {len(runs)} |")
    below = [f"Not yet run: {'; '.join(waiting)}."] * bool(waiting) + [caption(used)] * bool(used)
    return "\n\n".join(["\n".join(lines)] * bool(used) + below) + "\n"


def is_run_of(record: Record, row: Mapping[str, Any]) -> bool:
    """Say whether a record is of a row; one from before a setting was there is of a run with its default."""
    before = {name: value for name, value in row["settings"].items() if name in record.settings}
    defaults = {name: value for name, value in row["settings"].items() if name not in record.settings}
    fields = method_class(record.method).model_fields if defaults else {}
    return (
        (record.method, record.settings, record.stream) == (row["method"], before, row["stream"])
        and all(name in fields and fields[name].default == value for name, value in defaults.items())
        and record.seed in row["seeds"]
        and ("online" in record.protocol) == bool(row["run"].get("online"))
    )


def methods(results: Path, backbone: str) -> str:
    """Return the Markdown table of all methods that have a backbone where none is asked for: what each is, how good.

    Accuracies are those of recipes on `METHODS_ON`, from every file of results that holds such runs.
    """
    found: dict[tuple[str, int], Record] = {}
    for name in RECORDS:
        path = results / f"{name}.json"
        for record in read_records(path) if path.exists() else ():
            if name == METHODS_ON or _is_of_recipe(record):
                found.setdefault((record.method, record.seed), record)
    rows = []
    for row in catalogue.rows("methods"):
        runs = [record for (method, _), record in found.items() if method == row["method"]]
        if default_backbone(method_class(row["method"])) == backbone:
            mean = fmean(run.metrics["accuracy"] or 0.0 for run in runs) if runs else -1.0
            said = CELLS["accuracy"].show([run.metrics["accuracy"] or 0.0 for run in runs]) if runs else "not yet run"
            rows.append((-mean, f"| `{row['method']}` | {row['what it is']} | {said} | {len(runs)} |"))
    lines = ["| method | what it is | accuracy (%) | n |", "|---|---|---:|---:|", *(line for _, line in sorted(rows))]
    used = [record for record in found.values() if record.backbone["name"] == backbone]
    return "\n".join(lines) + f"\n\n`{METHODS_ON}`. {caption(used)}\n" if used else "\n".join(lines) + "\n"


def _is_of_recipe(record: Record) -> bool:
    """Say whether a run was one of its method's recipe, with nothing changed."""
    return record.stream == METHODS_ON and "online" not in record.protocol and " --set " not in record.command


#: where the accuracies of the table of methods come from: a stream, and files of results
METHODS_ON, RECORDS = "tiny-odd-10", ("tiny-odd-10", "pools", "clip", "lspt")
#: tables of methods -> the backbone of theirs
BACKBONES = {"methods": "lamina:vit-nano", "methods for CLIP": "lamina:clip-nano"}


def caption(records: Sequence[Record]) -> str:
    """Return the protocol, backbone, hardware and commit in one line; where runs differ, every value."""
    names = dict.fromkeys(name for record in records for name in record.protocol)
    protocol = [
        f"{name.replace('_', ' ')} {listed(r.protocol[name] for r in records if name in r.protocol)}" for name in names
    ]
    backbones = listed(f"`{record.backbone['name']}`" for record in records)
    commits = listed(f"`{record.commit}`" if record.commit else "unknown" for record in records)
    said = [
        f"Mean ± sample standard deviation over n seeds, in percent; {', '.join(protocol)}",
        f"backbone {backbones}",
        listed(record.hardware for record in records),
        f"commit {commits}",
    ]
    return "; ".join(said) + "."


def rewrite(text: str, results: Path) -> tuple[str, list[str]]:
    """Return the text with every table made anew, and the names of those that changed.

    Raises:
        ConfigError: when a block names no table of `TABLES`, or is not closed.
        DataError: when its file of results is missing or broken.
    """
    opened, closed = text.count("<!-- table: "), text.count("<!-- /table -->")
    if not opened == closed == len(_BLOCK.findall(text)):
        raise ConfigError(f"each '<!-- table: NAME -->' needs a '<!-- /table -->'; got {opened} and {closed}")
    changed = []

    def fresh(block: re.Match[str]) -> str:
        name = block["name"]
        group, _, part = name.partition("/")
        if part and group in STUDIES:
            study = json.loads((results / f"{group}.json").read_text())
            others = [results / f"{other}.json" for other in study.get("also", ())]
            more = [record for path in others if path.exists() for record in read_records(path)]
            body = experiment(study, part, EXPERIMENTS.get(name, STUDIES[group]), more)
        elif name in SHOWN:
            body = SHOWN[name](json.loads((results / f"{name}.json").read_text()))
        elif name in BACKBONES:
            body = methods(results, BACKBONES[name])
        elif name in TABLES:
            body = table(read_records(results / TABLES[name].file), TABLES[name].columns)
        else:
            raise ConfigError(unknown("table", name, [*TABLES, *SHOWN, *BACKBONES]))
        if body != block["body"]:
            changed.append(name)
        return f"{block[1]}{body}{block[4]}"

    return _BLOCK.sub(fresh, text), changed


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when all is fresh, 1 when `--check` found a stale table, 2 when one cannot be made."""
    parser = argparse.ArgumentParser(description="Rewrite the generated tables of README.md and docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if one is stale")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args(arguments)
    stale = False
    for page in given.pages:
        try:
            text = page.read_text(encoding="utf-8")
            new, changed = rewrite(text, given.results)
            if changed and not given.check:
                write_whole(page, new)
        except (LaminaError, OSError) as error:
            sys.stderr.write(f"{error}\n")
            return 2
        for name in changed:
            said = "is stale; run python benchmarks/tables.py" if given.check else "rewritten"
            sys.stdout.write(f"{page.name}: table '{name}' {said}\n")
        stale |= bool(changed)
    return 1 if stale and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
