"""Rows of a table from records: mean ± deviation over seeds, as Markdown, LaTeX or CSV.

Only runs of one method, on one stream, with one backbone, the same settings and the same protocol are
averaged. Everything else stays in a row of its own, with a note that says what sets it apart.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamina.errors import ConfigError, DataError, unknown
from lamina.results.records import LATER, METRICS, PIXELS, Record

#: what a reader sees above a column
TITLES = {
    "accuracy": "accuracy (%)",
    "accuracy_weighted": "weighted accuracy (%)",
    "average_accuracy": "average accuracy (%)",
    "forgetting": "forgetting (%)",
    "bwt": "BWT (%)",
    "accuracy_task_aware": "task-aware accuracy (%)",
    "transfer": "transfer (%)",
    "ece": "ECE (%)",
    "ece_batch_mean": "ECE, mean of batches (%)",
    "novel_auroc": "novel classes: AUROC (%)",
    "novel_aupr": "novel classes: AUPR (%)",
    "novel_fpr95": "novel classes: FPR95 (%)",
    "pixel_accuracy": "pixel accuracy (%)",
    "miou_multi_scale": "mIoU, several scales (%)",
}
COLUMNS = ("accuracy", "forgetting", "average_accuracy", "bwt")
_SEEDS = ("seed", "order_seed")
#: begins the name of a column with the accuracy on one data set of several
_ON = "accuracy."


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of a fraction over runs; no deviation with a single run."""

    mean: float
    deviation: float | None
    runs: int

    def __str__(self) -> str:
        """Return it as a person reads it, in percent.

        >>> str(Spread(0.8625, 0.0031, 3)), str(Spread(0.8625, None, 1))
        ('86.2 ± 0.3', '86.2')
        """
        tail = "" if self.deviation is None else f" ± {percent(self.deviation)}"
        return percent(self.mean) + tail


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seeds alone.

    Attributes:
        labels: what the row is called, in the fields that `aggregate` was asked for.
        note: what sets it apart from other rows with the same labels, and whether it is unfinished; or empty.
        spreads: each metric over the runs, and of runs on several data sets "accuracy.NAME" for each; None where a
            run lacks it.
        records: the runs.
    """

    labels: dict[str, str]
    note: str
    spreads: dict[str, Spread | None]
    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        """The labels and, in brackets, the note."""
        return ", ".join(self.labels.values()) + (f" ({self.note})" if self.note else "")


def percent(fraction: float) -> str:
    """Return a fraction in percent with one decimal, the way a table shows it.

    >>> percent(0.8625), percent(-0.0001)
    ('86.2', '0.0')
    """
    text = f"{100 * fraction:.1f}"
    return "0.0" if text == "-0.0" else text


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation (divided by n - 1).

    >>> spread([0.25, 0.75]).deviation == 0.125**0.5, spread([0.5])
    (True, Spread(mean=0.5, deviation=None, runs=1))
    """
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))


def aggregate(records: Sequence[Record], by: Sequence[str] = ("method",)) -> list[Row]:
    """Return one row for each set of runs that differ in their seeds alone, in order of appearance.

    Runs with other class orders (`order_seed`) are averaged too, as long as the classes are the same and
    equal orders mean equal streams; where one order has two stream fingerprints, the images differ, and every
    fingerprint gets a row of its own. Unfinished runs are never averaged with finished ones.

    Args:
        records: the runs.
        by: fields that name a row, such as "method", "stream", "backbone" (its name) or "protocol.precision".

    Raises:
        ConfigError: when a record has no such field.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_identity(record), []).append(record)
    runs = [part for group in groups.values() for part in _by_stream(group)]
    labels = [{name: _label(part[0], name) for name in by} for part in runs]
    rows = []
    for part, own in zip(runs, labels, strict=True):
        peers = [other for other, theirs in zip(runs, labels, strict=True) if theirs == own]
        spreads = {name: _spread_of([run.metrics.get(name) for run in part]) for name in (*METRICS, *LATER)}
        for name in part[0].parts:
            spreads[_ON + name] = _spread_of([run.part_accuracies.get(name) for run in part])
        rows.append(Row(own, _note(part, peers), spreads, tuple(part)))
    return rows


def to_markdown(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """Return a Markdown table: labels, then metrics in percent, then the number of runs."""
    cells = [[_plain(cell) for cell in line] for line in _grid(rows, columns)]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    texts = len(cells[0]) - len(columns) - 1
    rule = "|".join(["---"] * texts + ["---:"] * (len(columns) + 1))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]]) + "\n"


def to_latex(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """Return a LaTeX table for the package booktabs: labels, metrics in percent, the number of runs."""
    head, *body = _grid(rows, columns)
    texts = len(head) - len(columns) - 1
    lines = []
    for line in body:
        names = [_latex(cell) for cell in line[:texts]]
        numbers = [cell if cell == "–" else f"${cell.replace('±', chr(92) + 'pm')}$" for cell in line[texts:]]
        lines.append(" & ".join([*names, *numbers]).replace("–", "--") + r" \\")
    top = " & ".join(map(_latex, head)) + r" \\"
    shape = "l" * texts + "r" * (len(columns) + 1)
    parts = [rf"\begin{{tabular}}{{{shape}}}", r"\toprule", top, r"\midrule", *lines, r"\bottomrule"]
    return "\n".join([*parts, r"\end{tabular}"]) + "\n"


def to_csv(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """Return comma-separated values for a program: fractions in full, mean and deviation apart."""
    _check(columns, rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = list(rows[0].labels) if rows else []
    numbers = [f"{column}_{kind}" for column in columns for kind in ("mean", "deviation")]
    writer.writerow([*names, "note", *numbers, "runs", "seeds"])
    for row in rows:
        values: list[Any] = []
        for column in columns:
            value = row.spreads.get(column)
            values += ["", ""] if value is None else [value.mean, value.deviation]
        seeds = " ".join(str(record.seed) for record in row.records)
        writer.writerow([*row.labels.values(), row.note, *values, len(row.records), seeds])
    return out.getvalue()


def headline(records: Sequence[Record], columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """Return the rows of a table for a terminal: a name, then metrics in percent, then the number of runs.

    Raises:
        ConfigError: when there is no such metric.
        DataError: when accuracies with the task given are asked for, of a run that was not told the tasks of images.
    """
    _check(columns)
    for record in records if "accuracy_task_aware" in columns else ():
        if not record.matrix_task_aware:
            raise DataError(
                f"{record.method} on {record.stream} with seed {record.seed} was evaluated without the task of each "
                "image, so it has no accuracy_task_aware; run it anew, or leave that column out"
            )
    head, *body = _grid(aggregate(records), columns)
    return [dict(zip(head, line, strict=True)) for line in body]


def usual_columns(records: Sequence[Record]) -> list[str]:
    """Return the columns to show where none are asked for: the usual ones, and what some runs measured besides."""
    measured = {"transfer": ("transfer", "ece"), "novel_auroc": ("novel_auroc",), **{name: (name,) for name in PIXELS}}
    there = {name for run in records for name, value in run.metrics.items() if value is not None}
    usual = COLUMNS if measure_of(records) == "accuracy" else COLUMNS[:1]
    more = (name for first, names in measured.items() if first in there for name in names)
    return [*(name for name in usual if name in there or name == COLUMNS[0]), *more]


def measure_of(records: Sequence[Record]) -> str:
    """Return what the matrices of runs hold; "accuracy" where that differs from run to run."""
    first, *others = {record.measure for record in records} or {"accuracy"}
    return "accuracy" if others else first


def by_part(records: Sequence[Record]) -> list[dict[str, str]]:
    """Return the rows of a table of accuracies over test images: of all data sets together, then of each.

    Empty where all runs are on one data set. Each accuracy is a share of test images, after the last task, with the
    classes of all data sets to choose from; so the first is the mean of the others, weighted by their images.
    """
    columns = part_columns(records)
    if not columns:
        return []
    head, *body = _grid(aggregate(records), ("accuracy_weighted", *columns))
    return [dict(zip(head, line, strict=True)) for line in body]


def part_columns(records: Sequence[Record]) -> dict[str, str]:
    """Return the columns that hold the accuracy on one data set of several, and the name of each data set."""
    return {_ON + name: name for record in records for name in record.parts}


def protocol_line(record: Record) -> str:
    """Return under which protocol a run was measured, in one line."""
    said = [f"{name.replace('_', ' ')} {show(value)}" for name, value in record.protocol.items()]
    return ", ".join([f"{record.stream} with {record.backbone['name']}", *said])


def flatten(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested settings with dotted names; an empty table keeps its place.

    >>> flatten({"lr": 0.1, "stream": {"tasks": 3}})
    {'lr': 0.1, 'stream.tasks': 3}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{before}{name}."))
        else:
            flat[f"{before}{name}"] = value
    return flat


def _identity(record: Record) -> str:
    """Return everything that must be equal before two runs are averaged."""
    return json.dumps(
        {
            "method": record.method,
            "stream": record.stream,
            "classes": sorted({name for task in record.classes for name in task}),
            "tasks": record.tasks,
            "test_images": sum(record.test_sizes),
            "backbone": record.backbone["fingerprint"],
            "settings": {k: v for k, v in record.settings.items() if k not in _SEEDS},
            "protocol": record.protocol,
            "finished": record.finished,
            # Two unfinished runs that stopped after different tasks, or learned them at once, do not mix.
            "rows": [len(row) for row in record.matrix],
        },
        sort_keys=True,
    )


def _by_stream(group: list[Record]) -> list[list[Record]]:
    """Return the group whole, or split by stream fingerprint where one order of classes has several."""
    orders: dict[int | None, set[str]] = {}
    for record in group:
        orders.setdefault(record.order_seed, set()).add(record.stream_fingerprint)
    if all(len(fingerprints) == 1 for fingerprints in orders.values()):
        return [group]
    parts: dict[str, list[Record]] = {}
    for record in group:
        parts.setdefault(record.stream_fingerprint, []).append(record)
    return list(parts.values())


def _spread_of(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    # A mean over some of the runs would stand beside a number of runs that it does not have.
    return spread(known) if len(known) == len(values) else None


def _note(part: Sequence[Record], peers: Sequence[Sequence[Record]]) -> str:
    facts = [_facts(other[0]) for other in peers]
    own = _facts(part[0])
    differing = [name for name in dict.fromkeys(k for f in facts for k in f) if not _same(facts, name)]
    if "backbone" in differing:
        differing = [name for name in differing if name != "backbone fingerprint"]
    if "stream" in differing:
        differing = [name for name in differing if name != "stream fingerprint"]
    if all(len({r.stream_fingerprint for r in other}) > 1 for other in peers):
        # Each peer mixes several orders of classes; the first one's fingerprint says nothing about the row.
        differing = [name for name in differing if name != "stream fingerprint"]
    stated = {name.replace("_", " ") for other in peers for name in other[0].protocol}
    # A protocol states what is out of the ordinary: a run that is silent on it has nothing to add.
    said = [
        f"{name} {show(own[name])}" if name in own else f"no {name}"
        for name in differing
        if name in own or name not in stated
    ]
    if not part[0].finished:
        said.append(f"unfinished, {len(part[0].matrix[-1])} of {part[0].tasks} tasks")
    return ", ".join(said)


def _facts(record: Record) -> dict[str, Any]:
    return {
        "stream": record.stream,
        "stream fingerprint": record.stream_fingerprint[:8],
        "backbone": record.backbone["name"],
        "backbone fingerprint": record.backbone["fingerprint"][:8],
        **flatten({k: v for k, v in record.settings.items() if k not in _SEEDS}),
        **{name.replace("_", " "): value for name, value in record.protocol.items()},
    }


def _same(facts: Sequence[Mapping[str, Any]], name: str) -> bool:
    return len({json.dumps(each.get(name, "\0")) for each in facts}) == 1


def show(value: Any) -> str:
    """Return a setting as its TOML file would have it, without quotes.

    >>> show(True), show(1e-05), show([1, 2]), show("odd")
    ('true', '1e-05', '[1, 2]', 'odd')
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _label(record: Record, name: str) -> str:
    value: Any = record.as_dict()
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ConfigError(unknown("field", name, record.as_dict()))
        value = value[part]
    if name == "backbone":
        value = value["name"]
    return show(value)


def _grid(rows: Sequence[Row], columns: Sequence[str]) -> list[list[str]]:
    """Return the cells of a table for people, head first; the column of notes only where there are any."""
    _check(columns, rows)
    notes = any(row.note for row in rows)
    names = list(rows[0].labels) if rows else []
    measure = measure_of([record for row in rows for record in row.records])
    titles = [_title(column, measure) for column in columns]
    grid = [[*names, *(["note"] if notes else []), *titles, "n"]]
    for row in rows:
        spreads = [row.spreads.get(column) for column in columns]
        numbers = ["–" if value is None else str(value) for value in spreads]
        grid.append([*row.labels.values(), *([row.note] if notes else []), *numbers, str(len(row.records))])
    return grid


def _title(column: str, measure: str) -> str:
    if column in METRICS:
        return TITLES[column].replace("accuracy", measure)
    return TITLES.get(column) or f"{column.removeprefix(_ON)} (%)"


def _check(columns: Sequence[str], rows: Sequence[Row] = ()) -> None:
    known = dict.fromkeys([*METRICS, *LATER, *(name for row in rows for name in row.spreads)])
    for column in columns:
        if column not in known:
            raise ConfigError(unknown("metric", column, known))


def _plain(cell: str) -> str:
    """Return a cell that neither Markdown nor the HTML inside it can take for something else."""
    cell = " ".join(cell.split())
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("&", "&amp;").replace("<", "&lt;")


def _latex(cell: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in " ".join(cell.split()))
