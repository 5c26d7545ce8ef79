"""Commands that look at data sets on disk."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lamina.cli.shared import Json, app

data_app = typer.Typer(help="Look at data sets on disk.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")


@data_app.callback()
def about_data() -> None:
    """Look at data sets on disk."""


@data_app.command()
def check(
    name: Annotated[str, typer.Argument(help="A stream of transfer learning: fgvc-cub, vtab-dtd, medical-isic.")],
    path: Annotated[
        Path | None, typer.Argument(help="Folder that data sets lie in, or its own; else LAMINA_DATA, else the cache.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what is missing or wrong with a data set; exit code 2 where it cannot be used."""
    from lamina.data.sources import data_root
    from lamina.data.transfer.check import check as look

    found = look(name, data_root(path))
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        if found.roles:
            counts = ", ".join(f"{count} {role}" for role, count in found.roles.items())
            print(f"{found.name}: {found.classes} classes; images: {counts}; split by {found.split}")
        for remark in found.remarks:
            print(f"note: {remark}")
        for each in found.wrong:
            print(f"wrong: {each}")
        print("what was found can be used" if not found.wrong else "it cannot be used as it is")
    if found.wrong:
        raise typer.Exit(2)
