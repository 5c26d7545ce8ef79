"""One HTML page of what a model looks at, and the files beside it. It opens without a network and holds no script."""

from __future__ import annotations

from html import escape
from pathlib import Path

from PIL import Image

from lamina import __version__
from lamina.explain.drawing import grid, png, strip
from lamina.explain.seen import Explanation, Seen
from lamina.results.page import POLICY, counted, facts_list, html_table, percent_or_dash
from lamina.results.pictures import PICTURE, STRIP_STYLE, embedded
from lamina.results.style import STYLE
from lamina.storage import write_whole
from lamina.text import printable

PAGE, ARRAYS = "maps.html", "maps.npz"


def write(found: Explanation, folder: Path) -> list[Path]:
    """Write the page, the picture and the arrays, each whole or not at all; return where they lie.

    Raises:
        StorageError: when one could not be written.
    """
    strips = [strip(found, seen) for seen in found.images]
    contents: dict[str, str | bytes] = {PAGE: page(found, strips), PICTURE: png(grid(strips)), ARRAYS: found.npz()}
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]


def page(found: Explanation, strips: list[Image.Image]) -> str:
    """Return the page as text."""
    title = f"{_text(found.facts['model'])} on {counted(len(found.images), 'image')}"
    notes = " ".join(found.notes)
    said = (
        "Each map is stretched from its own least value to its largest, so colours compare patches of one map, not "
        "maps; dark is little, light is much. Weights are averaged over heads; what class token and prompts get is "
        "left out and the rest is not scaled up."
    )
    images = "".join(_section(found, seen, drawn) for seen, drawn in zip(found.images, strips, strict=True))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}; img-src data:">\n'
        f"<title>{title}</title>\n<style>\n{STYLE}\n{STRIP_STYLE}\n</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="eyebrow">What a model looks at</p><h1>{title}</h1></header>\n'
        f'<section>{facts_list(found.facts)}<p class="say">{_text(notes)}</p><p class="say">{said}</p></section>\n'
        f"{images}<footer>Made with lamina {escape(__version__)}.</footer>\n</main>\n</body>\n</html>\n"
    )


def _section(found: Explanation, seen: Seen, drawn: Image.Image) -> str:
    return (
        f'<section><h2>{_text(seen.path)}</h2><p class="say">{escape(seen.said)}</p>'
        f"{embedded(png(drawn), f'Maps of {seen.path}, one for each block')}"
        f"<details><summary>Numbers</summary>{_numbers(seen)}</details></section>\n"
    )


def _numbers(seen: Seen) -> str:
    """Return a row for each block: what enters, what prompts get, and between what values its cosines lie."""
    maps = seen.maps
    body = []
    for block, own in enumerate(maps.each):
        mean = maps.cosine[block]
        ends = [f"{float(end):.3f}".replace("-", "−") for end in (mean.min(), mean.max())] if len(own) else ["–", "–"]
        entering = f"{len(own)}" + (f" and {maps.prefixes[block]} rows" if maps.prefixes[block] else "")
        body.append([str(block), entering, percent_or_dash(float(maps.on_prompts[block])), *ends])
    return html_table(["Block", "Prompt tokens", "Weight on prompts (%)", "Least cosine", "Largest cosine"], body)


def _text(value: str) -> str:
    return escape(printable(value))
