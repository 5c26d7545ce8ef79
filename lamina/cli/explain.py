"""`lamina explain`: what a model looks at."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lamina.cli.models import Precision
from lamina.cli.shared import Json, app, free_folder


@app.command()
def explain(
    model: Annotated[Path, typer.Argument(help="A model file, or the folder of a finished run.")],
    paths: Annotated[list[str], typer.Argument(help='Images, folders, patterns; "-" reads paths from standard input.')],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; else a new one: NAME-explained, or RUN/explained.")
    ] = None,
    post_norm: Annotated[
        bool, typer.Option("--post-norm", help="Compare prompts and patches behind the first norm of a block.")
    ] = False,
    precision: Precision = None,
    as_json: Json = False,
) -> None:
    """Draw what a model looks at, block by block: which patches are like its prompts, what the class token attends to.

    Writes a page that opens offline (maps.html), a picture (maps.png) and the numbers (maps.npz). Those of a run lie in
    its folder, where `lamina report` finds the picture.
    """
    from lamina.console import reading_shown
    from lamina.explain.opened import open_model
    from lamina.explain.page import write
    from lamina.explain.seen import explain as explained
    from lamina.results.pictures import FOLDER
    from lamina.text import printable

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    opened = open_model(model, precision)  # type: ignore[arg-type]  # checked where it is used
    with reading_shown():
        found = explained(opened, paths, sys.stdin, post_norm=post_norm)
    folder = out or free_folder(model / FOLDER if model.is_dir() else Path(f"{Path(opened.name).stem}-explained"))
    written = write(found, folder)
    if as_json:
        print(json.dumps({**found.as_dict(), "files": list(map(str, written))}))
        return
    for note in found.notes:
        print(note)
    for seen in found.images:
        print(f"{printable(seen.path)}: {seen.said}".rstrip(": "))
    print(f"written to {', '.join(map(str, written))}")
