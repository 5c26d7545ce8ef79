"""Figures of a report, drawn as SVG and HTML by hand: they follow the page's colours, light or dark.

Colour never stands alone: lines have markers and dashes, cells have their values printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from lamina.results.metrics import forgetting_per_task
from lamina.results.records import Record
from lamina.results.tables import Row, Spread, percent, spread

COLOURS = 8
Place = Callable[[float], float]
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


def _row_means(record: Record) -> list[float]:
    return [sum(row) / len(row) for row in record.matrix]


def _curve(rows: Sequence[Row], series: Sequence[list[Spread]], tasks: int, width: int, height: int) -> str:
    left, right, top, bottom = 44, 14, 12, 40
    lows = [point.mean - (point.deviation or 0) for line in series for point in line]
    highs = [point.mean + (point.deviation or 0) for line in series for point in line]
    low, high = _limits(min(lows), max(highs))

    def across(t: float) -> float:
        return round(left + (width - left - right) * (t / (tasks - 1) if tasks > 1 else 0.5), 1)

    def up(value: float) -> float:
        return round(top + (height - top - bottom) * (high - min(max(value, low), high)) / (high - low), 1)

    parts = [_axes((width, height, left, right, bottom), tasks, (low, high), across, up)]
    for index, (row, line) in enumerate(zip(rows, series, strict=True)):
        parts.append(_line(index, row, line, across, up, tasks))
    label = "Mean accuracy over the tasks met so far, after each task"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _axes(
    box: tuple[int, int, int, int, int], tasks: int, limits: tuple[float, float], across: Place, up: Place
) -> str:
    width, height, left, right, bottom = box
    low, high = limits
    step = 0.1 if high - low <= 0.55 else 0.2
    parts = []
    for tick in range(math.ceil(round(low / step, 6)), math.floor(round(high / step, 6)) + 1):
        y = up(tick * step)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{100 * tick * step:.0f}</text>')
    room = max(1, round(tasks * 34 / (width - left - right)))
    for t in range(0, tasks, room):
        parts.append(f'<text x="{across(t)}" y="{height - bottom + 18}" text-anchor="middle">{t + 1}</text>')
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 4}" text-anchor="middle">tasks learned</text>')
    return "".join(parts)


def _line(index: int, row: Row, line: list[Spread], across: Place, up: Place, tasks: int) -> str:
    style = f'class="line c{index % COLOURS}"{_dash(index)}'
    name = escape(row.name)
    if row.records[0].at_once:
        y = up(line[0].mean)
        parts = [f'<line {style} x1="{across(0)}" x2="{across(tasks - 1)}" y1="{y}" y2="{y}"/>']
        return "".join(parts) + _marker(index, across(tasks - 1), y, f"{name}, all at once: {line[0]} %")
    parts = []
    if any(point.deviation for point in line):
        above = [f"{across(t)},{up(point.mean + (point.deviation or 0))}" for t, point in enumerate(line)]
        below = [f"{across(t)},{up(point.mean - (point.deviation or 0))}" for t, point in enumerate(line)]
        parts.append(f'<polygon class="band c{index % COLOURS}" points="{" ".join(above + below[::-1])}"/>')
    points = " ".join(f"{across(t)},{up(point.mean)}" for t, point in enumerate(line))
    parts.append(f'<polyline {style} points="{points}"/>')
    for t, point in enumerate(line):
        runs = f", {point.runs} runs" if point.runs > 1 else ""
        title = f"{name}, after task {t + 1}: {point} %{runs}"
        parts.append(_marker(index, across(t), up(point.mean), title))
    return "".join(parts)


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
    line = f'<line class="line c{index % COLOURS}"{_dash(index)} x1="1" x2="29" y1="7" y2="7"/>'
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
