"""Pieces of HTML that all pages are made of."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from lamina.results.figures import minus
from lamina.results.tables import percent, show

#: a page that may fetch nothing and run nothing, whatever a class name holds
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it must be."""
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


def facts_list(facts: dict[str, str]) -> str:
    """Return names and values as a list of facts; both are text, not HTML."""
    items = [f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items()]
    return f'<dl class="facts">{"".join(items)}</dl>' if items else ""


def number(value: Any) -> str:
    """Return a whole number with its thousands apart, anything else as `show` has it."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}".replace(",", "\u202f") if whole else show(value)


def percent_or_dash(value: float | None) -> str:
    """Return a fraction in percent, without the sign; a dash for None."""
    return "–" if value is None else minus(percent(value))


def duration(seconds: float) -> str:
    """Return a duration as a person says it.

    >>> [duration(seconds) for seconds in (0.04, 12.34, 59.97, 245, 3599.8, 8000)]
    ['0.04 s', '12.3 s', '1 min 00 s', '4 min 05 s', '1 h 00 min', '2 h 13 min']
    """
    if seconds < 59.95:
        return f"{seconds:.2f} s" if 0 < seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def html_table(head: Sequence[str], body: Sequence[Sequence[str]], lead: int = -1) -> str:
    """Return a table of cells that are HTML already; the first column names the row, `lead` is in bold."""

    def row(cells: Sequence[str], tag: str) -> str:
        out = []
        for place, cell in enumerate(cells):
            kind = tag if place else "th"
            names = ["name"] * (place == 0) + ["lead"] * (place == lead and tag == "td")
            mark = f' class="{" ".join(names)}"' if names else ""
            scope = f' scope="{"col" if tag == "th" else "row"}"' if kind == "th" else ""
            out.append(f"<{kind}{scope}{mark}>{cell}</{kind}>")
        return f"<tr>{''.join(out)}</tr>"

    lines = "".join(row(cells, "td") for cells in body)
    table = f'<table class="data"><thead>{row(head, "th")}</thead><tbody>{lines}</tbody></table>'
    return f'<div class="scroll">{table}</div>'
