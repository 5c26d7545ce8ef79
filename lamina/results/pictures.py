"""What finished runs look at, as `lamina explain` drew it beside them: pictures for a report."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from lamina.results.records import record_files
from lamina.text import printable

#: folders of a run in which maps lie, with a number behind the second and later ones; and their picture
FOLDER, PICTURE = "explained", "maps.png"

#: what a page with wide pictures needs: room for a strip, and paper below it in the dark, too
STRIP_STYLE = ".strip{display:block;min-width:52rem;width:100%;height:auto;background:#fff;border-radius:.4rem}"


def find_pictures(paths: Iterable[Path | str]) -> dict[str, bytes]:
    """Return the PNG pictures in the folders of runs, each under the folder's name, in order of path.

    Args:
        paths: as for `lamina.results.records.find_records`; a file stands for the folder that it is in.

    Raises:
        DataError: when a path does not exist or leads to no record.
    """
    runs = dict.fromkeys(file.parent for file in record_files(paths))
    found = [file for run in runs for file in sorted(run.glob(f"{FOLDER}*/{PICTURE}"))]
    return {f"{file.parent.parent.name}/{file.parent.name}": file.read_bytes() for file in found}


def embedded(picture: bytes, alt: str) -> str:
    """Return a PNG as HTML that needs no other file; `alt` is text, not HTML."""
    inside = b64encode(picture).decode()
    said = escape(printable(alt))
    return f'<div class="scroll"><img class="strip" alt="{said}" src="data:image/png;base64,{inside}"></div>'


def pictures_section(pictures: Mapping[str, bytes]) -> str:
    """Return a section with pictures of what runs look at; nothing where there are none."""
    if not pictures:
        return ""
    shown = [
        f"<h3>{escape(printable(name))}</h3>{embedded(png, f'Maps of images, drawn in {name}')}"
        for name, png in pictures.items()
    ]
    said = (
        "For each image and block, which patches are like the prompts, and what the class token attends to. Each map "
        "is stretched from its own least value to its largest; the page beside a picture has the numbers."
    )
    return f'<section><h2>What models look at</h2><p class="say">{said}</p>{"".join(shown)}</section>\n'
