"""One HTML page about some runs. It opens without a network and holds no script.

Runs are compared only where that is fair: each stream and backbone has a section of its own, and protocols
that differ inside a section are set out above its numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from lamina.errors import DataError
from lamina.results.classes import class_table
from lamina.results.figures import (
    accuracy_curve,
    accuracy_matrix,
    drift_curves,
    forgetting_by_task,
    minus,
    prompt_usage,
    shares,
)
from lamina.results.page import POLICY, counted, duration, facts_list, html_table, number, percent_or_dash
from lamina.results.pictures import STRIP_STYLE, pictures_section
from lamina.results.records import PHASES, Record
from lamina.results.reliability import DIAGRAM_STYLE, detection_table, diagrams
from lamina.results.style import STYLE
from lamina.results.tables import Row, aggregate, flatten, measure_of, part_columns, percent, show
from lamina.storage import write_whole

_HEADLINE = {
    "accuracy": "Accuracy",
    "forgetting": "Forgetting",
    "average_accuracy": "Average accuracy",
    "bwt": "Backward transfer",
    "accuracy_task_aware": "Task-aware accuracy",
}
#: where some run measured them
_BESIDES = {
    "transfer": "Transfer to tasks to come",
    "ece": "Calibration error",
    "novel_auroc": "New classes, AUROC",
    "pixel_accuracy": "Accuracy of pixels",
    "miou_multi_scale": "mIoU, several scales",
}
#: of these, what is better when lower
_LOWER = {"forgetting": "forgetting", "ece": "calibration error"}


def write_report(records: Sequence[Record], path: Path, pictures: Mapping[str, bytes] | None = None) -> None:
    """Write the page, whole or not at all; `pictures` as `report` takes them.

    Raises:
        DataError: when there are no records.
        StorageError: when it could not be written; an older page is still there.
    """
    write_whole(Path(path), report(records, pictures))


def report(records: Sequence[Record], pictures: Mapping[str, bytes] | None = None) -> str:
    """Return the page as text.

    Args:
        pictures: PNGs by name, of what the runs look at; see `lamina.results.pictures`.

    Raises:
        DataError: when there are no records.
    """
    if not records:
        raise DataError("a report needs at least one run; got none")
    groups: dict[str, list[Record]] = {}
    for record in records:
        alike = [record.stream, record.backbone["fingerprint"]]
        groups.setdefault(json.dumps(alike), []).append(record)
    title = _title(records)
    links = [f'<li><a href="#{_anchor(i)}">{_group_name(g)}</a></li>' for i, g in enumerate(groups.values())]
    contents = f"<nav><ul>{''.join(links)}</ul></nav>" if len(groups) > 1 else ""
    sections = "".join(_section(index, group) for index, group in enumerate(groups.values()))
    learning = " of continual learning" if any(record.tasks > 1 for record in records) else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}; img-src data:">\n'
        f"<title>{title}</title>\n<style>\n{STYLE}\n{DIAGRAM_STYLE}\n{STRIP_STYLE}\n</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="eyebrow">{counted(len(records), "run")}{learning}</p>'
        f"<h1>{title}</h1>{contents}</header>\n{sections}{pictures_section(pictures or {})}\n"
        f"<footer>{_made_with(records)}</footer>\n</main>\n</body>\n</html>\n"
    )


def _title(records: Sequence[Record]) -> str:
    def some(names: Iterable[str], noun: str) -> str:
        names = list(dict.fromkeys(names))
        if len(names) > 3:
            return counted(len(names), noun)
        return escape(" and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names))

    return f"{some((r.method for r in records), 'method')} on {some((r.stream for r in records), 'stream')}"


def _section(index: int, records: Sequence[Record]) -> str:
    rows = aggregate(records)
    measure = measure_of(records)
    parts = [f'<h2 id="{_anchor(index)}">{_group_name(records)}</h2>', _protocol(rows), _headline(rows), _parts(rows)]
    parts.append(
        f"<h3>{_begun(measure)} as tasks arrive</h3>"
        f'<p class="say">Mean {measure}, in percent, over the tasks met so far. '
        f"Bands show one standard deviation over runs.</p>{accuracy_curve(rows)}"
    )
    lost = forgetting_by_task(rows)
    if lost:
        parts.append(
            "<h3>Forgetting of each task</h3>"
            f'<p class="say">Points from the best {measure} a task had earlier down to its last one. '
            f"Below zero, the task ended better than ever.</p>{lost}"
        )
    named = _run_names(rows)
    parts += [
        _matrices(rows),
        class_table(named),
        diagrams(named),
        detection_table(named),
        _drift(rows),
        _usage(rows),
        _costs(rows),
    ]
    parts += [_settings(rows), _classes(records)]
    parts.append(_origin(rows))
    return f"<section>{''.join(parts)}</section>"


def _protocol(rows: Sequence[Row]) -> str:
    """Return how the runs were measured: what they share, what differs, and what to beware of."""
    protocols = [row.records[0].protocol for row in rows]
    names = dict.fromkeys(name for protocol in protocols for name in protocol)
    common = [n for n in names if all(n in each and each[n] == protocols[0].get(n) for each in protocols)]
    facts = {name.replace("_", " "): number(protocols[0][name]) for name in common}
    parts = [facts_list({"backbone": rows[0].records[0].backbone["name"], **facts})]
    for name in (name for name in names if name not in common):
        values: dict[str, list[str]] = {}
        for row, each in zip(rows, protocols, strict=True):
            values.setdefault(number(each[name]) if name in each else "not said", []).append(row.name)
        said = [f"<b>{escape(value)}</b> for {escape(', '.join(who))}" for value, who in values.items()]
        word = escape(name.replace("_", " "))
        parts.append(f'<p class="say">Not measured alike, {word}: {"; ".join(said)}.</p>')
    for row, protocol in zip(rows, protocols, strict=True):
        batch = protocol.get("test_batch", "independent")
        skipped = protocol.get("skipped_images", 0)
        if batch != "independent":
            rule = "A prediction depends on the other images of its test batch."
            warning = f"{row.name}: protocol {batch}. {rule}"
            parts.append(f'<p class="warning">{escape(warning)}</p>')
        if skipped:
            warning = f"{row.name}: {number(skipped)} images could not be read and were left out."
            parts.append(f'<p class="warning">{escape(warning)}</p>')
    return "".join(parts)


def _headline(rows: Sequence[Row]) -> str:
    records = [record for row in rows for record in row.records]
    measure = measure_of(records)
    titles = {name: _measured(title, measure) for name, title in _HEADLINE.items()} | _BESIDES
    shown = {n: title for n, title in titles.items() if any(run.metrics.get(n) is not None for run in records)}
    lower = " and ".join(_LOWER[name] for name in shown if name in _LOWER).capitalize()
    better = f" {lower} {'are' if ' and ' in lower else 'is'} better when lower, the others when higher."
    parts = [f'<p class="say">In percent.{better if lower else ""}</p>']
    if any(len(row.records) > 1 for row in rows):
        body = []
        for row in rows:
            values = [row.spreads[name] for name in shown]
            cells = ["–" if value is None else minus(str(value)) for value in values]
            body.append([_row_name(row), str(len(row.records)), *cells])
        parts.append(html_table(["Method", "Runs", *shown.values()], body, lead=2))
        said = "Above, mean ± sample standard deviation over seeds. Below, the single runs."
        parts.append(f'<p class="say after">{said}</p>')
    body = []
    for row in rows:
        for record in row.records:
            cells = [percent_or_dash(record.metrics.get(name)) for name in shown]
            order = "–" if record.order_seed is None else str(record.order_seed)
            body.append([_row_name(row), str(record.seed), order, *cells])
    runs = html_table(["Method", "Seed", "Order", *shown.values()], body, lead=3)
    if len(records) > 12:
        runs = f"<details><summary>{counted(len(records), 'single run')}</summary>{runs}</details>"
    return "".join([*parts, runs])


def _parts(rows: Sequence[Row]) -> str:
    """Return the accuracy on each data set, of runs on several; nothing where there are none."""
    columns = part_columns([record for row in rows for record in row.records])
    if not columns:
        return ""
    head = ["Method", "Runs", "All test images", *map(escape, columns.values())]
    body = []
    for row in rows:
        spreads = [row.spreads.get(name) for name in ("accuracy_weighted", *columns)]
        cells = ["–" if value is None else minus(str(value)) for value in spreads]
        body.append([_row_name(row), str(len(row.records)), *cells])
    return (
        "<h3>Accuracy on each data set</h3>"
        '<p class="say">After the last task, with the classes of all data sets to choose from: the share of test '
        f"images that are right, in percent.</p>{html_table(head, body, lead=2)}"
    )


def _matrices(rows: Sequence[Row]) -> str:
    records = [record for row in rows for record in row.records]
    widest = max(len(record.matrix[-1]) for record in records)
    lowest = min(value for record in records for row in record.matrix for value in row)
    # One scale for the runs of a section: equal colours are equal accuracies, and all of it is used.
    palest = min(0.8, math.floor(lowest * 10) / 10)
    maps = [f"<div><h4>{name}</h4>{accuracy_matrix(r, palest)}</div>" for r, name in _run_names(rows)]
    return (
        f"<h3>{_begun(measure_of(records))} on each task</h3>"
        '<p class="say">A row for each task learned, a column for each task tested, in percent. '
        f"Colour runs from {100 * palest:.0f} to 100.</p>"
        f'<div class="maps" style="--least:{2.25 * widest + 6.5:.1f}rem">{"".join(maps)}</div>'
    )


def _drift(rows: Sequence[Row]) -> str:
    """Return the drift of old features by task and by block; nothing where none was measured."""
    figures = drift_curves(rows)
    if figures is None:
        return ""
    maps = [f"<div><h4>{_row_name(row)}</h4>{figure}</div>" for row, figure in figures]
    return (
        "<h3>Drift of old features</h3>"
        '<p class="say">How far test images of old tasks have moved since their own task was learned, in percent '
        "of their spread then; means over old tasks, on one scale. Above, the features as tasks arrive. Below, "
        "what each block puts out after the last task; of the last block, the features. Bands show one standard "
        f'deviation over runs.</p><div class="maps" style="--least:20rem">{"".join(maps)}</div>'
    )


def _usage(rows: Sequence[Row]) -> str:
    """Return which prompts test images choose, by task and by class; nothing where there is no pool."""
    named = [(record, name) for record, name in _run_names(rows) if record.usage]
    found = [own for record, _ in named for own in map(shares, record.usage) if own is not None]
    if not found:
        return ""
    # One scale for the runs of a section, in whole tens of percent.
    most = math.ceil(round(10 * max(map(max, found)), 6)) / 10
    maps = []
    for record, name in named:
        by_class = f"<details><summary>Prompts by class</summary>{_usage_by_class(record)}</details>"
        maps.append(f"<div><h4>{name}</h4>{prompt_usage(record, most)}{by_class}</div>")
    widest = max(len(record.usage) for record, _ in named)
    return (
        "<h3>Prompts that images choose</h3>"
        '<p class="say">A row for each prompt of the pool, a column for each task tested, after the last task learned: '
        "which share of the choices of its test images fell on the prompt, in percent. "
        f"Colour runs from 0 to {100 * most:.0f}.</p>"
        f'<div class="maps" style="--least:{2.25 * widest + 7.5:.1f}rem">{"".join(maps)}</div>'
    )


def _usage_by_class(record: Record) -> str:
    body = []
    for task, (names, table) in enumerate(zip(record.classes, record.usage, strict=False), start=1):
        for name, counts in zip(names, table, strict=True):
            own = shares([counts])
            if own is not None:  # a class whose test images came with another task chose nothing in this one
                body.append([escape(name), str(task), number(sum(counts)), *map(percent, own)])
    return html_table(["Class", "Task", "Choices", *(str(p + 1) for p in range(len(record.usage[0][0])))], body)


def _costs(rows: Sequence[Row]) -> str:
    records = [record for row in rows for record in row.records]
    head = ["Method", "Seed", "Train", "Look back", "Evaluate", "Total", "Peak memory", "Trainable", "Stored"]
    body, by_task = [], []
    for row in rows:
        for record in row.records:
            sums = [sum(record.seconds[phase]) for phase in PHASES]
            memory = "–" if record.peak_memory_mb is None else f"{number(round(record.peak_memory_mb))} MB"
            sizes = [number(record.trainable_parameters), number(record.stored_numbers)]
            times = [duration(total) for total in (*sums, sum(sums))]
            body.append([_row_name(row), str(record.seed), *times, memory, *sizes])
            for phase in PHASES:
                each = [f"{seconds:,.1f}".replace(",", "\u202f") for seconds in record.seconds[phase]]
                each += [""] * (max(len(other.matrix) for other in records) - len(each))
                by_task.append([_row_name(row), str(record.seed), phase.replace("_", " "), *each])
    tasks = [str(t + 1) for t in range(len(by_task[0]) - 3)]
    detail = html_table(["Method", "Seed", "Seconds to", *tasks], by_task)
    return (
        '<h3>Cost</h3><p class="say">Time over all tasks. Trainable parameters, and numbers stored beside '
        f"the frozen backbone.</p>{html_table(head, body)}"
        f"<details><summary>Seconds for each task</summary>{detail}</details>"
    )


def _settings(rows: Sequence[Row]) -> str:
    flat = [flatten({"method": row.records[0].method, **row.records[0].settings}) for row in rows]
    flat = [{k: v for k, v in values.items() if k not in ("seed", "order_seed")} for values in flat]
    names = list(dict.fromkeys(name for values in flat for name in values))
    equal = [n for n in names if all(n in values and values[n] == flat[0].get(n) for values in flat)]
    # A setting that many methods share says more about a difference than one that only one of them has.
    shared = {name: -sum(name in values for values in flat) for name in names}
    apart = sorted((name for name in names if name not in equal and name != "method"), key=shared.__getitem__)
    parts = ["<h3>Settings</h3>"]
    if apart:
        cells = [[escape(n), *(escape(show(v[n])) if n in v else "–" for v in flat)] for n in apart]
        heads = [_row_name(row) for row in rows]
        parts.append(f'<p class="say">What differs:</p>{html_table(["Setting", *heads], cells)}')
    common = {name: show(flat[0][name]) for name in equal if name != "method"}
    if common:
        said = "The same in all:" if len(rows) > 1 else ""
        parts.append(f'<p class="say after">{said}</p>{facts_list(common)}')
    return "".join(parts) if apart or common else ""


def _classes(records: Sequence[Record]) -> str:
    orders: dict[str, list[Record]] = {}
    for record in records:
        orders.setdefault(json.dumps(record.classes), []).append(record)
    parts = []
    for group in orders.values():
        seed = group[0].order_seed
        which = f", order {seed}" if len(orders) > 1 and seed is not None else ""
        part_of = {task: f"{part}, " for part, own in group[0].parts.items() for task in own}
        items = [
            f"<li>{escape(', '.join(names))} "
            f'<span class="aside">{escape(part_of.get(task, ""))}{counted(size, "test image")}</span></li>'
            for task, (names, size) in enumerate(zip(group[0].classes, group[0].test_sizes, strict=True))
        ]
        tasks = f'<ol class="tasks">{"".join(items)}</ol>'
        parts.append(f"<details><summary>Tasks and their classes{which}</summary>{tasks}</details>")
    return "".join(parts)


def _origin(rows: Sequence[Row]) -> str:
    def facts(record: Record) -> dict[str, str]:
        where = {"commit": record.commit or "unknown", "hardware": record.hardware}
        prints = {
            "stream fingerprint": record.stream_fingerprint,
            "backbone fingerprint": record.backbone["fingerprint"],
        }
        return {**where, **record.versions, **prints}

    named = _run_names(rows)
    all_facts = [facts(record) for record, _ in named]
    common = {n: value for n, value in all_facts[0].items() if all(f.get(n) == value for f in all_facts)}
    items = []
    for (record, name), own in zip(named, all_facts, strict=True):
        rest = [f"{word} {value}" for word, value in own.items() if word not in common]
        aside = f'<div class="aside">{escape(", ".join(rest))}</div>' if rest else ""
        items.append(f"<li><h4>{name}</h4>{aside}<code>{escape(record.command)}</code></li>")
    return f'<h3>How to run it again</h3>{facts_list(common)}<ul class="runs">{"".join(items)}</ul>'


def _row_name(row: Row) -> str:
    note = f' <span class="aside">{escape(row.note)}</span>' if row.note else ""
    return escape(", ".join(row.labels.values())) + note


def _run_names(rows: Sequence[Row]) -> list[tuple[Record, str]]:
    """Return every run with its name as HTML."""
    named = []
    for row in rows:
        for record in row.records:
            order = "" if record.order_seed is None else f", order {record.order_seed}"
            name = _row_name(row)
            comma = "," if "</span>" in name else ""
            named.append((record, f'{name}<span class="aside">{comma} seed {record.seed}{order}</span>'))
    return named


def _group_name(records: Sequence[Record]) -> str:
    return escape(f"{records[0].stream} with {records[0].backbone['name']}")


def _made_with(records: Sequence[Record]) -> str:
    versions = sorted({record.versions["lamina"] for record in records})
    return escape(f"Made with lamina {', '.join(versions)}.")


def _measured(title: str, measure: str) -> str:
    """Return the title of a column with what it is that was measured."""
    if measure == "accuracy":
        return title
    return title.replace("Accuracy", measure).replace("accuracy", measure)


def _begun(measure: str) -> str:
    """Return the measure as it begins a line; a name such as mIoU stays as it is."""
    return measure.capitalize() if measure.islower() else measure


def _anchor(index: int) -> str:
    return f"stream-{index + 1}"
