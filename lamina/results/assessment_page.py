"""One HTML page about how good a kept model is. It opens without a network and holds no script."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, Literal

from lamina import __version__
from lamina.results.assessment_fields import Assessment, Novelty
from lamina.results.figures import cell
from lamina.results.page import POLICY, counted, facts_list, html_table, number, percent_or_dash
from lamina.results.reliability import DIAGRAM_STYLE, reliability_diagram
from lamina.results.style import STYLE
from lamina.results.tables import flatten
from lamina.storage import write_whole
from lamina.text import printable

#: of images whose uncertainty is compared
_KINDS: tuple[Literal["right", "wrong", "unknown"], ...] = ("right", "wrong", "unknown")
#: more classes than this are folded away, below the weakest of them
_OPEN, _WEAKEST = 40, 12
#: names of a list that are written out
_NAMES = 10
#: what the page tells of each lesson; the model file holds more
_LESSON = ("name", "date", "method", "classes", "images", "held_out", "skipped")
#: what the page needs beyond the sheet of a report
_STYLE = """
.verdict{display:flex;flex-wrap:wrap;gap:1rem 2.6rem;margin:1.6rem 0 1rem}
.verdict dd{font-size:1.75rem;font-weight:650;letter-spacing:-.02em;line-height:1.2}
.gauge{display:inline-flex;align-items:baseline;gap:.7rem}
.left{display:block;text-align:left}
.gauge b{min-width:2.6rem;font-weight:550}
.gauge svg{width:6rem;height:.55rem;border-radius:2px;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.long .gauge svg{width:clamp(5rem,32vw,26rem);height:.8rem}
.track{fill:var(--rule)}.fill{fill:var(--c0)}
.name{overflow-wrap:anywhere}.data tbody .name{white-space:normal;min-width:8rem;max-width:22rem}
.lessons td{white-space:normal;overflow-wrap:anywhere}
.dense{border-spacing:1px}.dense td{min-width:1.15rem;height:1.2rem;padding:0;font-size:.58rem;border-radius:2px}
.dense th{font-size:.68rem}
.heat.map tbody th{max-width:13rem;overflow:hidden;text-overflow:ellipsis}
.heat.map thead th{text-align:center;padding:0}
.heat .none{background:var(--wash)}
@media (max-width:40rem){.verdict{gap:.8rem 1.6rem}.verdict dd{font-size:1.4rem}
.gauge svg,.long .gauge svg{width:3.5rem}
.gauge{gap:.3rem}.heat.map tbody th{max-width:7rem}.dense td{min-width:1.1rem;height:1.2rem;font-size:.5rem}}
""".strip()


def write_page(assessment: Assessment, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        StorageError: when it could not be written; an older page is still there.
    """
    write_whole(Path(path), page(assessment))


def page(assessment: Assessment) -> str:
    """Return the page as text."""
    model = assessment.model
    file = Path(str(model.get("file") or model.get("method") or "a kept model")).name
    title = f"{_text(file)} on {counted(assessment.images, 'image')}"
    parts = [_head(assessment), _verdict(assessment), _tasks(assessment), _reliability(assessment)]
    parts += [_classes(assessment), _confusions(assessment), _novelty(assessment), _uncertainty(assessment)]
    parts.append(_settings(assessment))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{title}</title>\n<style>\n{STYLE}\n{DIAGRAM_STYLE}\n{_STYLE}\n</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="eyebrow">How good a kept model is</p><h1>{title}</h1></header>\n'
        f"<section>{''.join(parts)}</section>\n"
        f"<footer>Made with lamina {escape(__version__)}.</footer>\n</main>\n</body>\n</html>\n"
    )


def _head(assessment: Assessment) -> str:
    """Return the model's plain facts, and what to beware of in the numbers."""
    plain: dict[str, Any] = {}
    for name, value in assessment.model.items():
        if isinstance(value, Mapping) and "name" in value:
            plain[name] = value["name"]
        elif name != "checksum" and not isinstance(value, Mapping | list):
            plain[name] = Path(str(value)).name if name == "file" else value
    parts = [facts_list(_worded(plain))]
    protocol = assessment.protocol
    said = ", ".join(f"{name} {value}" for name, value in _worded(flatten(protocol)).items())
    parts.append(f'<p class="say">Measured so: {escape(said)}.</p>' if said else "")
    batch, skipped = protocol.get("test_batch", "independent"), protocol.get("skipped_images", 0)
    if batch != "independent":
        rule = "A prediction depends on the other images of its test batch."
        parts.append(f'<p class="warning">Protocol {_text(batch)}. {rule}</p>')
    if skipped:
        parts.append(f'<p class="warning">Images that could not be read and were left out: {_text(skipped)}.</p>')
    return "".join(parts)


def _verdict(assessment: Assessment) -> str:
    calibration, top = assessment.calibration, assessment.top_k
    said = {"Accuracy": assessment.accuracy, "Mean over classes": assessment.accuracy_per_class_mean}
    if top["k"] < len(assessment.classes):
        said[f"Among the {top['k']} likeliest"] = top["accuracy"]
    said["Calibration error (ECE)"] = calibration["ece"]
    numbers = "".join(f"<div><dt>{name}</dt><dd>{percent_or_dash(value)} %</dd></div>" for name, value in said.items())
    right = round(assessment.accuracy * assessment.images)
    over = calibration["confidence"] - assessment.accuracy
    mood = "too sure of itself" if over > 0.01 else "too modest" if over < -0.01 else "about as sure as it is right"
    lines = [
        f"{number(right)} of {counted(assessment.images, 'image')} named right.",
        f"Its mean confidence is {percent_or_dash(calibration['confidence'])} %: on the whole it is {mood}.",
    ]
    seen = [(each["accuracy"], each) for each in assessment.classes if each["accuracy"] is not None]
    if len(seen) > 1:
        accuracy, weakest = min(seen, key=lambda pair: pair[0])
        lines.append(f"Weakest class: <b>{_text(weakest['name'])}</b>, {percent_or_dash(accuracy)} %.")
    if assessment.confusions:
        worst = assessment.confusions[0]
        names = f"<b>{_text(worst['true'])}</b> taken for <b>{_text(worst['predicted'])}</b>"
        lines.append(f"Most frequent mistake: {names}, {counted(worst['count'], 'image')}.")
    empty = len(assessment.classes) - len(seen)
    if empty:
        verb = "has" if empty == 1 else "have"
        whom = counted(empty, "class").replace("classs", "classes")
        lines.append(f"{whom} of the model {verb} no test image and no part in the means.")
    return f'<dl class="verdict">{numbers}</dl><p class="say">{" ".join(lines)}</p>'


def _tasks(assessment: Assessment) -> str:
    body = []
    for each in assessment.tasks:
        name = str(each["task"]) if each["name"] is None else f"{each['task']} {_text(each['name'])}"
        body.append([name, number(each["classes"]), number(each["images"]), _gauge(each["accuracy"])])
    table = html_table(["Task", "Classes", "Images", "Accuracy (%)"], body)
    said = "A class belongs to the task it first came with; all classes compete for every image."
    return f'<h3>Accuracy on each task</h3><p class="say">{said}</p><div class="long">{table}</div>'


def _reliability(assessment: Assessment) -> str:
    bins = assessment.calibration["bins"]
    calibration = assessment.calibration
    numbers = {
        "expected error (ECE)": f"{percent_or_dash(calibration['ece'])} %",
        "largest error (MCE)": f"{percent_or_dash(calibration['mce'])} %",
        "Brier score": f"{calibration['brier']:.3f}",
        "negative log-likelihood": f"{calibration['nll']:.3f}",
    }
    body = [
        [
            f"{percent_or_dash(b['low'])} to {percent_or_dash(b['high'])}",
            number(b["images"]),
            *map(percent_or_dash, (b["confidence"], b["accuracy"])),
        ]
        for b in bins
    ]
    table = html_table(["Confidence (%)", "Images", "Mean confidence (%)", "Accuracy (%)"], body)
    return (
        '<h3>Is it as sure as it is right?</h3><p class="say">Images by the probability of the answer. Where bars '
        "end on the dashed line, the probability can be taken at its word; below it, the model is too sure.</p>"
        f"{reliability_diagram(bins)}{facts_list(numbers)}"
        f"<details><summary>Numbers of the diagram</summary>{table}</details>"
    )


def _classes(assessment: Assessment) -> str:
    head = ["Class", "Task", "Images", "Accuracy (%)", "Precision (%)", "Mean probability (%)"]
    head.append(_left("Most often taken for"))

    def row(each: Mapping[str, Any]) -> list[str]:
        other = each["most_confused_with"]
        times = f' <span class="aside">{number(each["confused_images"])} ×</span>'
        numbers = [
            _gauge(each["accuracy"]),
            percent_or_dash(each["precision"]),
            percent_or_dash(each["mean_probability"]),
        ]
        taken = _left("–" if other is None else _text(other) + times)
        return [_text(each["name"]), str(each["task"]), number(each["images"]), *numbers, taken]

    said = (
        "Precision: of the images given this name, how many are right. Mean probability: what images of the class "
        "were given for it. A class without test images has a dash."
    )
    parts = [f'<h3>Accuracy on each class</h3><p class="say">{said}</p>']
    rows = html_table(head, [row(each) for each in assessment.classes])
    if len(assessment.classes) > _OPEN:
        seen = [(each["accuracy"], each) for each in assessment.classes if each["accuracy"] is not None]
        weakest = [each for _, each in sorted(seen, key=lambda pair: pair[0])[:_WEAKEST]]
        parts.append(f"<h4>The {len(weakest)} weakest</h4>{html_table(head, [row(each) for each in weakest])}")
        rows = f"<details><summary>All {len(assessment.classes)} classes</summary>{rows}</details>"
    return "".join([*parts, rows])


def _confusions(assessment: Assessment) -> str:
    parts = ["<h3>What is taken for what</h3>"]
    if not assessment.confusions:
        return "".join([*parts, '<p class="say">No image was named wrong.</p>'])
    if assessment.confusion_matrix is not None:
        said = "A row for each true class, a column for each answer, in percent of the row's images."
        parts.append(f'<p class="say">{said}</p>{_map(assessment, assessment.confusion_matrix)}')
    body = [
        [_text(pair["true"]), _left(_text(pair["predicted"])), number(pair["count"]), percent_or_dash(pair["share"])]
        for pair in assessment.confusions
    ]
    table = html_table(["Class", _left("Taken for"), "Images", "Share of the class (%)"], body)
    return "".join([*parts, f'<p class="say after">The worst pairs, most images first.</p>{table}'])


def _map(assessment: Assessment, matrix: list[list[int]]) -> str:
    names = [_text(each["name"]) for each in assessment.classes]
    heads = "".join(f'<th scope="col" title="{name}">{place + 1}</th>' for place, name in enumerate(names))
    body = []
    for place, counts in enumerate(matrix):
        cells = []
        for column, count in enumerate(counts):
            if not count:
                cells.append('<td class="none"></td>')
                continue
            share = count / sum(counts)
            shown = f"{100 * share:.0f}" if share >= 0.005 else "<1"
            cells.append(cell(escape(shown), share, "accuracy" if place == column else "lost"))
        head = f'<th scope="row" title="{names[place]}">{place + 1} {names[place]}</th>'
        body.append(f"<tr>{head}{''.join(cells)}</tr>")
    dense = " dense" if len(matrix) > 16 else ""
    top = f"<thead><tr><th></th>{heads}</tr></thead>"
    return f'<div class="scroll"><table class="heat map{dense}">{top}<tbody>{"".join(body)}</tbody></table></div>'


def _uncertainty(assessment: Assessment) -> str:
    if not assessment.uncertainty:
        return ""
    body = [
        [_text(name).replace("_", " "), *("–" if each[kind] is None else f"{each[kind]:.3f}" for kind in _KINDS)]
        for name, each in assessment.uncertainty.items()
    ]
    said = (
        "Means over images, in nats. They should be larger where the answer is wrong, and largest where none is right."
    )
    if len(body) > 1:
        said += (
            " What draws disagree on (mutual information), more images of the kind would settle; the rest of their "
            "entropy (expected entropy) they would not."
        )
    table = html_table(["Measure", "Named right", "Named wrong", "Of unknown classes"], body)
    return f'<h3>Is it unsure where it is wrong?</h3><p class="say">{said}</p>{table}'


def _novelty(assessment: Assessment) -> str:
    if not assessment.novelty:
        return ""
    parts = [
        '<h3>Does it notice what it does not know?</h3><p class="say">Images of classes it never learned should '
        "score higher than those of classes it knows. AUROC is 50 % for a guess; the false alarms are the known "
        "images flagged when 95 % of the unknown ones are.</p>"
    ]
    for name, each in assessment.novelty.items():
        facts = {
            "AUROC": f"{percent_or_dash(each['auroc'])} %",
            "false alarms (FPR95)": f"{percent_or_dash(each['fpr95'])} %",
        }
        if each["threshold"] is not None:
            facts["threshold"] = f"{each['threshold']:.4g}"
            facts["known flagged"] = f"{percent_or_dash(each['flagged_known'])} %"
            facts["unknown flagged"] = f"{percent_or_dash(each['flagged_unknown'])} %"
        counts = (("c0", "known", each["known"], ""), ("c1", "unknown", each["unknown"], ' stroke-dasharray="6 3"'))
        legend = "".join(
            f'<li><svg class="swatch" viewBox="0 0 30 14" aria-hidden="true"><line class="line {colour}"{dash} x1="1" '
            f'x2="29" y1="7" y2="7"/></svg><span>{kind}</span> <b>{counted(images, "image")}</b></li>'
            for colour, kind, images, dash in counts
        )
        drawings = "".join(
            f'<div class="{kind}">{_shares(each, width, 240)}</div>' for kind, width in (("wide", 700), ("narrow", 360))
        )
        parts.append(f'<h4 class="after">{_text(name)}</h4><ul class="legend">{legend}</ul>')
        parts.append(f'<div class="chart">{drawings}</div>{facts_list(facts)}')
    return "".join(parts)


def _shares(novelty: Novelty, width: int, height: int) -> str:
    """Return two outlines of the same bins, each as shares of its own images."""
    left, right, top, floor = 12, 12, 18, height - 40
    histogram = novelty["histogram"]
    low, high = histogram["low"], histogram["high"]
    shares = [[count / sum(counts) for count in counts] for counts in (histogram["known"], histogram["unknown"])]
    most, step = max(max(row) for row in shares), (width - left - right) / len(shares[0])
    parts = [f'<line class="axis" x1="{left}" x2="{width - right}" y1="{floor}" y2="{floor}"/>']
    for row, style in zip(shares, ('class="line c0"', 'class="line c1" stroke-dasharray="6 3"'), strict=True):
        points = [f"{left},{floor}"]
        for index, share in enumerate(row):
            y = f"{floor - (floor - top) * share / most:.1f}"
            points += [f"{left + index * step:.1f},{y}", f"{left + (index + 1) * step:.1f},{y}"]
        outline = " ".join([*points, f"{width - right},{floor}"])
        parts.append(f'<polygon class="band {style[12:14]}" points="{outline}"/><polyline {style} points="{outline}"/>')
    for tick in range(5):
        x, anchor = left + (width - left - right) * tick / 4, "start" if tick == 0 else "end" if tick == 4 else "middle"
        value = f"{low + (high - low) * tick / 4:.3g}".replace("-", "−")
        parts.append(f'<text x="{x:.1f}" y="{floor + 17}" text-anchor="{anchor}">{value}</text>')
    threshold = novelty["threshold"]
    if threshold is not None and low <= threshold <= high:
        place = (threshold - low) / (high - low)
        x, anchor = left + (width - left - right) * place, "end" if place > 0.5 else "start"
        parts.append(f'<line class="ideal" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 14}" y2="{floor}"/>')
        shift = -6 if place > 0.5 else 6
        parts.append(f'<text x="{x + shift:.1f}" y="{top - 5}" text-anchor="{anchor}">threshold</text>')
    centre = (left + width - right) / 2
    parts.append(f'<text x="{centre}" y="{height - 4}" text-anchor="middle">novelty; higher is more novel</text>')
    label = "Share of images by novelty, for known and unknown classes"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _settings(assessment: Assessment) -> str:
    parts = ["<h3>Settings and protocol</h3>", facts_list(_worded(flatten(assessment.protocol)))]
    # The classes have a table of their own, and so have the lessons.
    own = {name: value for name, value in assessment.model.items() if name not in ("classes", "lessons")}
    parts.append(f'<p class="say">Of the model:</p>{facts_list(_worded(flatten(own)))}')
    lessons = assessment.model.get("lessons")
    if isinstance(lessons, list) and lessons and all(isinstance(each, Mapping) for each in lessons):
        names = [name for name in _LESSON if any(name in each for each in lessons)]
        body = [[str(n + 1), *(_left(_text(each.get(name))) for name in names)] for n, each in enumerate(lessons)]
        table = html_table(["Lesson", *(_left(name.replace("_", " ")) for name in names)], body)
        parts.append(f'<p class="say">What it learned, in order:</p><div class="lessons">{table}</div>')
    return "".join(parts)


def _worded(facts: Mapping[str, Any]) -> dict[str, str]:
    return {printable(name.replace("_", " ")): _shown(value) for name, value in facts.items()}


def _shown(value: Any) -> str:
    """Return a value as a person reads it: "–" for none, the first few of many names."""
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        more = f" and {len(value) - _NAMES} more" if len(value) > _NAMES else ""
        return printable(", ".join(value[:_NAMES])) + more
    if isinstance(value, float):
        return f"{value:.6g}"
    # Not made printable: the thin space between thousands would be written as an escape.
    return "–" if value is None else number(value) if isinstance(value, int) else printable(number(value))


def _text(value: Any) -> str:
    return escape(_shown(value))


def _gauge(fraction: float | None) -> str:
    if fraction is None:
        return "–"
    fill = f'<rect class="track" width="100" height="10"/><rect class="fill" width="{100 * fraction:.1f}" height="10"/>'
    svg = f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{fill}</svg>'
    return f'<span class="gauge">{svg}<b>{percent_or_dash(fraction)}</b></span>'


def _left(cell: str) -> str:
    return f'<span class="left">{cell}</span>'
