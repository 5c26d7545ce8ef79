"""Commands that look at data sets on disk, and get some of them there."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamina.cli.shared import Json, app, note
from lamina.text import printable

if TYPE_CHECKING:
    from lamina.data.checked import Checked

data_app = typer.Typer(help="Look at data sets on disk, or get one.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")


@data_app.callback()
def about_data() -> None:
    """Look at data sets on disk, or get one."""


@data_app.command()
def check(
    name: Annotated[
        str, typer.Argument(help="A stream: vtab-dtd, fgvc-cub, ade20k, cifar100; see `lamina list streams`.")
    ],
    path: Annotated[
        Path | None, typer.Argument(help="Folder that data sets lie in, or its own; else LAMINA_DATA, else the cache.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what is missing or wrong with a data set; exit code 2 where it cannot be used."""
    from lamina.data.sources import data_root
    from lamina.data.transfer.check import check as look
    from lamina.errors import DataError

    if path is not None and not path.expanduser().exists():
        raise DataError(f"{printable(str(path))} does not exist; name the folder that data sets lie in")
    _tell(look(name, data_root(path)), as_json)


@data_app.command()
def get(
    name: Annotated[str, typer.Argument(help="A stream whose data set torchvision downloads: vtab-dtd, cifar100.")],
    path: Annotated[
        Path | None, typer.Argument(help="Folder that data sets lie in; else LAMINA_DATA, else the cache.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Download a data set unless it is there, and say what was found; exit code 2 where it cannot be used."""
    from lamina.data.sources import data_root
    from lamina.data.transfer.check import got

    root = data_root(path)
    _tell(got(name, root, lambda: note(f"downloading {name} to {printable(str(root))}")), as_json)


def _tell(found: Checked, as_json: bool) -> None:
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
