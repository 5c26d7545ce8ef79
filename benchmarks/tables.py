"""Rewrite the generated tables of README.md and docs/ from benchmarks/results; `--check` only looks for stale ones.

    python benchmarks/tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. `null-space/EXPERIMENT` stands for each
experiment in `benchmarks/results/null-space.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.errors import ConfigError, DataError, LaminaError, unknown
from lamina.results.records import Record, read_records
from lamina.results.tables import aggregate, show, spread, to_markdown
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
    "tiny-odd-10": Source("tiny-odd-10.json"),
}
EXPERIMENTS = "null-space"
LONG, COSTS = "long-streams", "heads"
PAGES = (ROOT / "README.md", ROOT / "docs" / "null-space.md")


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


def experiment(values: Mapping[str, Any], name: str) -> str:
    """Return the Markdown table of one experiment: a row for each variant, run or not yet run.

    Args:
        values: what `benchmarks/null_space.py` wrote.
    """
    if name not in values["experiments"]:
        raise ConfigError(unknown("experiment", name, values["experiments"]))
    records = [Record.from_dict(record) for record in values["records"]]
    lines = [
        "| variant | accuracy (%) | forgetting (%) | new tasks (%) | drift (%) | looking back (% of training) | n |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    used = []
    for row in values["experiments"][name]:
        runs = [
            record
            for record in records
            if (record.method, record.settings) == (row["method"], row["settings"]) and record.seed in row["seeds"]
        ]
        used += runs
        cells = [
            [run.metrics["accuracy"] for run in runs],
            [run.metrics["forgetting"] for run in runs],
            [sum(line[-1] for line in run.matrix) / len(run.matrix) for run in runs],
            [run.old_drift[-1][-1] for run in runs if run.old_drift],
            [sum(run.seconds["look_back"]) / sum(run.seconds["train"]) for run in runs if any(run.seconds["train"])],
        ]
        shown = [str(spread(cell)) if cell else "–" if runs else "not yet run" for cell in cells]
        lines.append(f"| {row['name']} | {' | '.join(shown)} | {len(runs)} |")
    return "\n".join(lines) + "\n" + (f"\n{caption(used)}\n" if used else "")


def long_streams(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table of what `benchmarks/long_streams.py` wrote: a row for each run and measure."""
    shown = sorted({row["task"] for run in runs for row in run["rows"]})
    lines = [
        f"| method | tasks | measure | {' | '.join(f'task {task}' for task in shown)} |",
        f"|---|---:|---|{'---:|' * len(shown)}",
    ]
    for run in runs:
        at = {row["task"]: row for row in run["rows"]}
        for measure in run["rows"][0]:
            if measure != "task":
                cells = [str(at[task][measure]) if task in at else "–" for task in shown]
                lines.append(f"| {run['method']} | {run['tasks']} | {measure} | {' | '.join(cells)} |")
    commits = _values(f"`{run['commit'][:12]}`" for run in runs)
    return "\n".join(lines) + f"\n\n{_values(run['hardware'] for run in runs)}; commit {commits}.\n"


def costs(values: Mapping[str, Any]) -> str:
    """Return the Markdown tables of what `benchmarks/heads.py` wrote: steps compared, and closed forms."""
    lines = ["| step against step | on | times as long (quartiles) |", "|---|---|---:|"]
    for size, pairs in values["steps, processor time"].items():
        for pair, found in pairs.items():
            low, high = found["quartiles"]
            lines.append(f"| {pair} | {size} | {found['median']:.3f} ({low:.3f} to {high:.3f}) |")
    lines += ["", "| closed form, 200 classes, 768 features | seconds |", "|---|---:|"]
    lines += [f"| {name} | {seconds} |" for name, seconds in values["closed forms, seconds"].items()]
    said = f"{values['processor']}, steps on one thread, closed forms on {values['threads of the closed forms']}"
    return "\n".join(lines) + f"\n\nMedians of {values['rounds']} rounds; {said}; commit `{values['commit'][:12]}`.\n"


def caption(records: Sequence[Record]) -> str:
    """Return the protocol, backbone, hardware and commit in one line; where runs differ, every value."""
    names = dict.fromkeys(name for record in records for name in record.protocol)
    protocol = [
        f"{name.replace('_', ' ')} {_values(r.protocol[name] for r in records if name in r.protocol)}" for name in names
    ]
    backbones = _values(f"`{record.backbone['name']}`" for record in records)
    commits = _values(f"`{record.commit}`" if record.commit else "unknown" for record in records)
    said = [
        f"Mean ± sample standard deviation over n seeds, in percent; {', '.join(protocol)}",
        f"backbone {backbones}",
        _values(record.hardware for record in records),
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
        if part and group == EXPERIMENTS:
            body = experiment(json.loads((results / f"{group}.json").read_text()), part)
        elif name in (LONG, COSTS):
            found = json.loads((results / f"{name}.json").read_text())
            body = long_streams(found) if name == LONG else costs(found)
        elif name in TABLES:
            body = table(read_records(results / TABLES[name].file), TABLES[name].columns)
        else:
            raise ConfigError(unknown("table", name, [*TABLES, LONG, COSTS]))
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


def _values(values: Iterable[Any]) -> str:
    return " / ".join(dict.fromkeys(" ".join(show(value).split()) for value in values))


if __name__ == "__main__":
    sys.exit(main())
