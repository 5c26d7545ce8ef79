"""Is a model as sure as it is right, and does it notice what is new? Diagrams and tables for any page."""

from __future__ import annotations

from collections.abc import Sequence

from lamina.results.assessment_fields import Bin
from lamina.results.page import counted, facts_list, html_table, number, percent_or_dash
from lamina.results.records import Record

#: what a page that has a diagram needs beyond the sheet of a report
DIAGRAM_STYLE = """
.chart{max-width:44rem;margin-top:.8rem}
.bar{fill:var(--c0);fill-opacity:.8}.count{fill:var(--soft);fill-opacity:.45}
.gap{fill:var(--c1);fill-opacity:.16;stroke:var(--c1);stroke-width:1.2;stroke-dasharray:3 2}
.ideal{stroke:var(--soft);stroke-dasharray:5 4}
.axis{stroke:var(--soft)}
svg .small{font-size:10px}
.key{width:1.1rem;height:.9rem;flex:none}
""".strip()

#: marks of the diagram, and what they stand for
_KEYS = (("bar", "accuracy of a bin"), ("gap", "its gap to the mean confidence"), ("count", "images of a bin"))


def reliability_diagram(bins: Sequence[Bin]) -> str:
    """Return the diagram with its legend, once for wide screens and once for narrow ones."""
    drawings = "".join(
        f'<div class="{name}">{diagram(bins, width, height)}</div>'
        for name, width, height in (("wide", 700, 470), ("narrow", 360, 400))
    )
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 16 14" aria-hidden="true"><rect class="{kind}" x="1" y="2" width="14" '
        f'height="10"/></svg><span>{said}</span></li>'
        for kind, said in _KEYS
    )
    return f'<ul class="legend">{items}</ul><div class="chart">{drawings}</div>'


def bins_of(rows: Sequence[Sequence[float]]) -> list[Bin]:
    """Return equal bins of confidence from rows of images, the sum of their confidences, and how many were right.

    >>> bins_of([[0, 0, 0], [4, 3, 2]])[1]
    {'low': 0.5, 'high': 1.0, 'images': 4, 'confidence': 0.75, 'accuracy': 0.5}
    """
    return [
        Bin(
            low=place / len(rows),
            high=(place + 1) / len(rows),
            images=int(images),
            confidence=confidence / images if images else None,
            accuracy=right / images if images else None,
        )
        for place, (images, confidence, right) in enumerate(rows)
    ]


def diagrams(named: Sequence[tuple[Record, str]]) -> str:
    """Return a reliability diagram of each run after the last task; nothing where none was measured.

    Args:
        named: runs, each with its name as HTML.
    """
    maps = [
        f"<div><h4>{name}</h4>{reliability_diagram(bins_of(r.reliability))}{_errors(r)}</div>"
        for r, name in named
        if r.reliability
    ]
    if not maps:
        return ""
    return (
        "<h3>Is it as sure as it is right?</h3>"
        '<p class="say">Test images of all tasks after the last one, by the probability of the answer. Where bars end '
        "on the dashed line, the probability can be taken at its word; below it, the model is too sure. The mean of "
        "single batches' errors, which some released code reports, is large for small batches in any case.</p>"
        f'<div class="maps" style="--least:22rem">{"".join(maps)}</div>'
    )


def _errors(record: Record) -> str:
    said = {"expected error (ECE)": "ece", "mean of single batches' errors": "ece_batch_mean"}
    return facts_list({title: f"{percent_or_dash(record.metrics.get(name))} %" for title, name in said.items()})


def detection_table(named: Sequence[tuple[Record, str]]) -> str:
    """Return how well scores tell images of classes to come from known ones; nothing where it was not measured."""
    body = []
    for record, name in named:
        for score in record.detection[0] if record.detection else ():
            stages = [stage[score] for stage in record.detection]
            means = [sum(stage[figure] for stage in stages) / len(stages) for figure in ("auroc", "aupr", "fpr95")]
            body.append([name, score, *map(percent_or_dash, means)])
    if not body:
        return ""
    return (
        "<h3>Images of classes to come</h3>"
        '<p class="say">After each task but the last, how well a score tells test images of classes met so far from '
        "those of all later tasks, in percent; means over stages. AUROC is 50 for a guess; AUPR rises with the share "
        "of classes met; FPR95 is the share of new images that pass where 95 % of the known ones do.</p>"
        f"{html_table(['Run', 'Score', 'AUROC', 'AUPR', 'FPR95'], body)}"
    )


def diagram(bins: Sequence[Bin], width: int, height: int) -> str:
    """Return the drawing alone, in classes of `DIAGRAM_STYLE`: accuracy by confidence, and how many images of each."""
    left, right, top, foot = 44, 12, 10, 128
    floor, step = height - foot, (width - left - right) / len(bins)
    high, most = floor - top, max(each["images"] for each in bins)
    parts = []
    for tick in range(0, 101, 20):
        x, y = left + (width - left - right) * tick / 100, floor - high * tick / 100
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 17}" text-anchor="middle">{tick}</text>')
    strip, deep = height - 22, foot - 76
    for index, each in enumerate(bins):
        accuracy, confidence = each["accuracy"], each["confidence"]
        if accuracy is None or confidence is None:
            continue
        x, wide = left + index * step + 1, step - 2
        said = f"{counted(each['images'], 'image')}, accuracy {percent_or_dash(accuracy)} %"
        said = f"<title>{said}, mean confidence {percent_or_dash(confidence)} %</title>"
        upper, lower = floor - high * max(accuracy, confidence), floor - high * min(accuracy, confidence)
        long = max(deep * each["images"] / most, 1)
        parts.append(f"<g>{said}{_box('bar', x, floor - high * accuracy, wide, high * accuracy)}")
        parts.append(f"{_box('gap', x, upper, wide, lower - upper)}{_box('count', x, strip - long, wide, long)}")
        place = f'x="{x + wide / 2:.1f}" y="{strip - long - 4:.1f}"'
        shown = number(each["images"]) if width > 400 else _short(each["images"])
        parts.append(f'<text class="small" {place} text-anchor="middle">{shown}</text></g>')
    parts.append(f'<line class="ideal" x1="{left}" y1="{floor}" x2="{width - right}" y2="{top}"/>')
    parts.append(f'<line class="axis" x1="{left}" y1="{strip}" x2="{width - right}" y2="{strip}"/>')
    centre = (left + width - right) / 2
    parts.append(f'<text x="{centre}" y="{floor + 34}" text-anchor="middle">confidence (%)</text>')
    parts.append(f'<text x="{centre}" y="{height - 4}" text-anchor="middle">images of each bin</text>')
    label = "Accuracy by confidence, against the diagonal"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _box(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def _short(number: int) -> str:
    """Return a number in at most four characters.

    >>> [_short(number) for number in (999, 1234, 99_950, 1_234_567)]
    ['999', '1.2k', '100k', '1.2m']
    """
    if number < 1000:
        return str(number)
    size, unit = (number / 1e3, "k") if number < 999_500 else (number / 1e6, "m")
    return f"{size:.1f}{unit}" if size < 9.95 else f"{size:.0f}{unit}"
