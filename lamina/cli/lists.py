"""Commands that tell what there is."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from lamina.cli.shared import Data, Json, app, print_table


class Kind(StrEnum):
    """What `list` can list."""

    methods = "methods"
    streams = "streams"
    backbones = "backbones"
    recipes = "recipes"
    settings = "settings"


@app.command("list")
def list_(kind: Annotated[Kind, typer.Argument(help="What to list.")], as_json: Json = False) -> None:
    """List methods, streams, backbones, recipes, or what `--set` changes beside settings of a method."""
    from lamina.catalogue import rows

    found = rows(kind.value)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print_table(found)


@app.command()
def show(
    method: Annotated[str, typer.Argument(help="A method's name; or a recipe, METHOD/NAME as listed.")],
    as_json: Json = False,
) -> None:
    """Show what a method does, its settings with limits and defaults, and its sources; or what a recipe says."""
    from lamina.catalogue import about, recipe

    found = recipe(method) if "/" in method else about(method)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(found["text"])
    if "/" not in method and found["settings"]:
        print()
        print_table(found["settings"])


@app.command()
def doctor(data: Data = None, as_json: Json = False) -> None:
    """Show versions, devices, and which data sets and backbones were found."""
    from lamina.catalogue import health

    found = health(data)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        if isinstance(value, list):
            print()
            print_table(value, title=name)
        else:
            print(f"{name:<12} {value}")
