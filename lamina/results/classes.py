"""How each class was told, in runs that measured classes one by one."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lamina.results.page import html_table, percent_or_dash
from lamina.results.records import Record


def class_table(named: Sequence[tuple[Record, str]]) -> str:
    """Return the measure for each class, a column for each run; nothing where no run has it.

    Args:
        named: runs, with their names as HTML.
    """
    found = [(record, name) for record, name in named if record.by_class]
    if not found:
        return ""
    classes = dict.fromkeys(each for record, _ in found for each in record.by_class)
    body = [[escape(each), *(percent_or_dash(record.by_class.get(each)) for record, _ in found)] for each in classes]
    measure = "Intersection over union" if {record.measure for record, _ in found} == {"mIoU"} else "The measure"
    return (
        "<details><summary>Each class</summary>"
        f'<p class="say">{measure} on test images, in percent; a dash where no test image shows the class.</p>'
        f"{html_table(['Class', *(name for _, name in found)], body)}</details>"
    )
