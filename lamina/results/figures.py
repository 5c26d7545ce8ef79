"""Figures of a report, drawn as SVG and HTML by hand: they follow the page's colours, light or dark.

Colour never stands alone: lines have markers and dashes, cells have their values printed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lamina.results.metrics import forgetting_per_task
from lamina.results.records import Record
from lamina.results.tables import Row, Spread, percent, spread

COLOURS = 8
_DASHES = ("", "6 3", "2 3", "9 3 2 3")
#: opacity from which text on a cell changes colour, for a contrast of 4.3:1 or better in both themes
_MIDDLE, _STRONG = 0.58, 0.74


def minus(text: str) -> str:
    """Return text with typographic minus signs before numbers.

    >>> minus("-7.7 ± 0.2")
    '−7.7 ± 0.2'
    """
    return text.replace("-", "−")


def accuracy_curve(rows: Sequence[Row]) -> str:
    """Return a figure of the mean accuracy over the tasks met so far, after each task; one line per row.

    Runs of a row are averaged; the band is one sample standard deviation on each side. A row whose method
    learns all tasks at once is a level line. The figure holds a wide and a narrow drawing; the page's style
    shows one of them.
    """
    series = [[spread(means) for means in zip(*map(_row_means, row.records), strict=True)] for row in rows]
    tasks = max(record.tasks for row in rows for record in row.records)
    drawings = [
        f'<div class="{name}">{_curve(rows, series, tasks, width, height)}</div>'
        for name, width, height in (("wide", 920, 380), ("narrow", 360, 300))
    ]
    order = sorted(range(len(rows)), key=lambda index: -series[index][-1].mean)
    entries = "".join(
        f"<li>{_swatch(index)}<span>{escape(rows[index].name)}</span> <b>{series[index][-1]}</b></li>"
        for index in order
    )
    return f'<ul class="legend">{entries}</ul>{"".join(drawings)}'


def accuracy_matrix(record: Record, palest: float = 0.0) -> str:
    """Return a heat map of one run: a row for each task learned, a column for each task tested.

    Args:
        record: the run.
        palest: the accuracy that has next to no colour; 1 has all of it.
    """
    columns = len(record.matrix[-1])
    body = []
    for t, row in enumerate(record.matrix):
        head = "all at once" if record.at_once else f"after {t + 1}"
        cells = [cell(percent(value), (value - palest) / (1 - palest), "accuracy") for value in row]
        cells += ["<td></td>"] * (columns - len(row))
        mean = f'<td class="mean">{percent(sum(row) / len(row))}</td>'
        body.append(f'<tr><th scope="row">{head}</th>{"".join(cells)}{mean}</tr>')
    return _heat("learned", [_task_head(record, task) for task in range(columns)], body)


def shares(counts: Sequence[Sequence[int]]) -> list[float] | None:
    """Return each prompt's share of the choices that rows of counts add up to; None where nothing was chosen.

    >>> shares([[1, 0, 2], [0, 0, 1]]), shares([[0, 0, 0]])
    ([0.25, 0.0, 0.75], None)
    """
    sums = [sum(prompt) for prompt in zip(*counts, strict=True)]
    return [one / sum(sums) for one in sums] if any(sums) else None


def prompt_usage(record: Record, most: float = 1.0) -> str:
    """Return a heat map of one run: a row for each prompt of its pool, a column for each task tested.

    A cell is the share of the choices of a task's test images that fell on the prompt.

    Args:
        record: a run with `usage`.
        most: the share that has all of the colour.
    """
    tasks = [shares(table) for table in record.usage]
    body = []
    for prompt in range(len(record.usage[0][0])):
        line = [own[prompt] if own is not None else None for own in tasks]
        cells = ["<td></td>" if share is None else cell(percent(share), share / most, "accuracy") for share in line]
        known = [share for share in line if share is not None]
        mean = f'<td class="mean">{percent(sum(known) / len(known)) if known else ""}</td>'
        body.append(f'<tr><th scope="row">prompt {prompt + 1}</th>{"".join(cells)}{mean}</tr>')
    return _heat("chosen", [_task_head(record, task) for task in range(len(tasks))], body)


def forgetting_by_task(rows: Sequence[Row]) -> str | None:
    """Return a heat map of the forgetting of each task, a line per row, averaged over its runs.

    None when no run has learned two tasks one after the other.
    """
    lines = []
    for row in rows:
        lost = [forgetting_per_task(record.matrix) for record in row.records]
        if lost[0]:
            lines.append((row, [sum(values) / len(values) for values in zip(*lost, strict=True)]))
    if not lines:
        return None
    columns = max(len(values) for _, values in lines)
    most = max(abs(value) for _, values in lines for value in values) or 1.0
    body = []
    for row, values in lines:
        cells = [cell(percent(v), 0.85 * abs(v) / most, "lost" if v > 0 else "gained") for v in values]
        cells += ["<td></td>"] * (columns - len(values))
        mean = f'<td class="mean">{minus(percent(sum(values) / len(values)))}</td>'
        body.append(f'<tr><th scope="row">{escape(row.name)}</th>{"".join(cells)}{mean}</tr>')
    return _heat("", [f'<th scope="col">{task + 1}</th>' for task in range(columns)], body)


def drift_curves(rows: Sequence[Row]) -> list[tuple[Row, str]] | None:
    """Return for each row with measured drift a figure of two drawings: over the tasks, and over the blocks.

    The first one follows the features, after each task but the first; the second one goes through the blocks
    after the last task. Both show means over old tasks, and over the runs that measured drift. All drawings
    have one scale, from zero. None when no run has measured the drift of an old task.
    """
    drawn = []
    for index, row in enumerate(rows):
        runs = [record.old_drift for record in row.records if record.old_drift]
        if runs:
            over_tasks = [spread([blocks[-1] for blocks in after]) for after in zip(*runs, strict=True)]
            over_blocks = [spread(values) for values in zip(*(run[-1] for run in runs), strict=True)]
            drawn.append((index, row, over_tasks, over_blocks))
    if not drawn:
        return None
    most = max(point.mean + (point.deviation or 0) for *_, one, other in drawn for point in (*one, *other))
    high, step = _round_up(most)
    figures = []
    for index, row, over_tasks, over_blocks in drawn:
        parts = []
        for points, first, unit, what in (
            (over_tasks, 2, "tasks learned", "after task"),
            (over_blocks, 0, "block", "block"),
        ):
            frame = _Frame(360, 220, len(points), 0.0, high)
            titles = [f"{escape(row.name)}, {what} {first + place}: {_said(p)}" for place, p in enumerate(points)]
            inside = _axes(frame, step, first, unit) + _trace(frame, index, points, titles)
            label = f"Drift of old features by {unit}"
            parts.append(f'<svg viewBox="0 0 360 220" role="img" aria-label="{label}">{inside}</svg>')
        figures.append((row, "".join(parts)))
    return figures


def _row_means(record: Record) -> list[float]:
    return [sum(row) / len(row) for row in record.matrix]


@dataclass(frozen=True)
class _Frame:
    """Where things stand in a drawing: `count` places across, values from `low` to `high` upwards."""

    width: int
    height: int
    count: int
    low: float
    high: float
    left: int = 44
    right: int = 14
    top: int = 12
    bottom: int = 40

    def across(self, place: float) -> float:
        share = place / (self.count - 1) if self.count > 1 else 0.5
        return round(self.left + (self.width - self.left - self.right) * share, 1)

    def up(self, value: float) -> float:
        share = (self.high - min(max(value, self.low), self.high)) / (self.high - self.low)
        return round(self.top + (self.height - self.top - self.bottom) * share, 1)


def _curve(rows: Sequence[Row], series: Sequence[list[Spread]], tasks: int, width: int, height: int) -> str:
    lows = [point.mean - (point.deviation or 0) for line in series for point in line]
    highs = [point.mean + (point.deviation or 0) for line in series for point in line]
    low, high = _limits(min(lows), max(highs))
    frame = _Frame(width, height, tasks, low, high)
    parts = [_axes(frame, 0.1 if high - low <= 0.55 else 0.2, 1, "tasks learned")]
    for index, (row, line) in enumerate(zip(rows, series, strict=True)):
        parts.append(_line(frame, index, row, line))
    label = "Mean accuracy over the tasks met so far, after each task"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _axes(frame: _Frame, step: float, first: int, unit: str) -> str:
    """Return the lines at multiples of `step` and the numbers of the places, which begin with `first`."""
    left, right = frame.left, frame.width - frame.right
    digits = max(0, -math.floor(round(math.log10(100 * step), 6)))
    parts = []
    for tick in range(math.ceil(round(frame.low / step, 6)), math.floor(round(frame.high / step, 6)) + 1):
        y = frame.up(tick * step)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{100 * tick * step:.{digits}f}</text>')
    room = max(1, round(frame.count * 34 / (right - left)))
    for place in range(0, frame.count, room):
        x, y = frame.across(place), frame.height - frame.bottom + 18
        parts.append(f'<text x="{x}" y="{y}" text-anchor="middle">{first + place}</text>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle}" y="{frame.height - 4}" text-anchor="middle">{unit}</text>')
    return "".join(parts)


def _line(frame: _Frame, index: int, row: Row, line: list[Spread]) -> str:
    name = escape(row.name)
    if row.records[0].at_once:
        y, start, end = frame.up(line[0].mean), frame.across(0), frame.across(frame.count - 1)
        level = f'<line {_stroke(index)} x1="{start}" x2="{end}" y1="{y}" y2="{y}"/>'
        return level + _marker(index, end, y, f"{name}, all at once: {line[0]} %")
    titles = [f"{name}, after task {t + 1}: {_said(point)}" for t, point in enumerate(line)]
    return _trace(frame, index, line, titles)


def _trace(frame: _Frame, index: int, points: Sequence[Spread], titles: Sequence[str]) -> str:
    """Return a line through points with a marker at each, and a band where any has a deviation."""
    parts = []
    if any(point.deviation for point in points):
        above = [f"{frame.across(t)},{frame.up(p.mean + (p.deviation or 0))}" for t, p in enumerate(points)]
        below = [f"{frame.across(t)},{frame.up(p.mean - (p.deviation or 0))}" for t, p in enumerate(points)]
        parts.append(f'<polygon class="band c{index % COLOURS}" points="{" ".join(above + below[::-1])}"/>')
    places = [(frame.across(t), frame.up(point.mean)) for t, point in enumerate(points)]
    parts.append(f'<polyline {_stroke(index)} points="{" ".join(f"{x},{y}" for x, y in places)}"/>')
    parts += [_marker(index, x, y, title) for (x, y), title in zip(places, titles, strict=True)]
    return "".join(parts)


def _said(point: Spread) -> str:
    return f"{point} %" + (f", {point.runs} runs" if point.runs > 1 else "")


def _round_up(most: float) -> tuple[float, float]:
    """Return the end of a scale from zero that holds `most`, and a step of 1, 2 or 5 that divides it in 3 to 6.

    >>> _round_up(0.031), _round_up(1.52), _round_up(0.0)
    ((0.04, 0.01), (2.0, 0.5), (0.01, 0.002))
    """
    most = max(most, 0.01)
    power = 10.0 ** math.floor(math.log10(most / 3))
    step = max(power * factor for factor in (1, 2, 5) if power * factor <= most / 3 * (1 + 1e-9))
    return round(math.ceil(round(most / step, 6)) * step, 9), round(step, 9)


def _limits(low: float, high: float) -> tuple[float, float]:
    """Return a range of whole tenths around the values, at least 0.2 wide, inside [0, 1].

    >>> _limits(0.62, 0.97), _limits(0.99, 1.0)
    ((0.6, 1.0), (0.8, 1.0))
    """
    bottom = max(0.0, math.floor(round(low * 10, 6)) / 10)
    top = min(1.0, math.ceil(round(high * 10, 6)) / 10)
    if top - bottom < 0.2:
        bottom = max(0.0, round(top - 0.2, 1))
        top = round(max(top, bottom + 0.2), 1)
    return bottom, top


def _stroke(index: int) -> str:
    return f'class="line c{index % COLOURS}"{_dash(index)}'


def _dash(index: int) -> str:
    pattern = _DASHES[index // COLOURS % len(_DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _marker(index: int, x: float, y: float, title: str = "") -> str:
    shapes = (
        f'<circle cx="{x}" cy="{y}" r="3.6"/>',
        f'<rect x="{x - 3.3:.1f}" y="{y - 3.3:.1f}" width="6.6" height="6.6"/>',
        f'<path d="M{x} {y - 4.4:.1f}l4.4 7.6h-8.8z"/>',
        f'<path d="M{x} {y - 4.8:.1f}l4.8 4.8-4.8 4.8-4.8-4.8z"/>',
        f'<path d="M{x} {y + 4.4:.1f}l4.4-7.6h-8.8z"/>',
    )
    inside = f"<title>{title}</title>" if title else ""
    return f'<g class="mark c{index % COLOURS}">{inside}{shapes[index % len(shapes)]}</g>'


def _swatch(index: int) -> str:
    line = f'<line {_stroke(index)} x1="1" x2="29" y1="7" y2="7"/>'
    return f'<svg class="swatch" viewBox="0 0 30 14" aria-hidden="true">{line}{_marker(index, 15, 7)}</svg>'


def cell(text: str, strength: float, kind: str) -> str:
    """Return a table cell whose colour is as strong as `strength`, from 0 to 1."""
    opacity = round(0.04 + 0.96 * min(max(strength, 0.0), 1.0), 3)
    tone = "strong" if opacity >= _STRONG else "middle" if opacity >= _MIDDLE else "weak"
    return f'<td class="{kind} {tone}" style="--o:{opacity}">{minus(text)}</td>'


def _task_head(record: Record, task: int) -> str:
    names = escape(", ".join(record.classes[task]))
    return f'<th scope="col" title="{names}">{task + 1}</th>'


def _heat(corner: str, heads: Sequence[str], body: Sequence[str]) -> str:
    top = f'<tr><th>{corner}</th>{"".join(heads)}<th scope="col" class="mean">mean</th></tr>'
    table = f'<table class="heat"><thead>{top}</thead><tbody>{"".join(body)}</tbody></table>'
    return f'<div class="scroll">{table}</div>'
