"""What the subcommands share: options, progress, how tables are printed, what happens when one is stopped."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina import __version__

if TYPE_CHECKING:
    from lamina.runs import RunSettings

#: what a process says when it was asked to stop and can be resumed ("try again", in sysexits.h)
STOPPED = 75

#: what of a recipe a command has said already
_OF_RECIPES = ("version", "method", "stream", "backbone")

app = typer.Typer(
    help="Let a pre-trained vision model keep learning: new classes arrive, the old images are gone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder that data sets lie in; else LAMINA_DATA, else the cache."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a setting: lr=0.003, stream.per_class=20."),
]


@app.callback(invoke_without_command=True)
def about_lamina(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Handle the options that stand before a subcommand."""
    if version:
        print(f"lamina {__version__}")
        raise typer.Exit


@contextmanager
def stoppable(again: str, folder: Path) -> Iterator[None]:
    """Say how to go on when work kept in `folder` is stopped, by a signal or from the keyboard."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        from lamina.training.trainer import Stopped

        if not isinstance(error, Stopped | KeyboardInterrupt):
            raise
        note(f"stopped; go on with `{again}`" if folder.exists() else "stopped; nothing was begun yet")
        raise typer.Exit(STOPPED if isinstance(error, Stopped) else 130) from None


def typed() -> str:
    """Return the command line as it was typed."""
    return shlex.join(["lamina", *sys.argv[1:]])


def progress_of(as_json: bool) -> Any:
    """Return what makes a watcher that draws bars; None where JSON is printed."""
    from lamina.console import progress

    return None if as_json else progress


def print_table(rows: list[dict[str, Any]], title: str | None = None) -> None:
    """Print rows with equal keys."""
    from rich.console import Console

    from lamina.console import table

    Console(width=None if sys.stdout.isatty() else 140).print(table(rows, title), highlight=False)


def note(text: str) -> None:
    """Tell people something without getting into what is printed."""
    print(text, file=sys.stderr, flush=True)


def note_recipe(run: RunSettings, used: Path | None, asked: bool) -> None:
    """Tell people which recipe a run starts from, or that the one for its method and stream is not for its backbone."""
    from lamina.config import read_toml
    from lamina.results.tables import flatten
    from lamina.runs import RECIPES

    there = RECIPES / run.method / f"{run.stream.name}.toml"
    if used is not None:
        values = {name: value for name, value in read_toml(used).items() if name not in _OF_RECIPES}
        own = values.pop("settings", {})  # of the method: `--set` takes them by their own names
        said = ", ".join(f"{name} {value}" for name, value in flatten(values | own).items())
        note(f"recipe {used.parent.name}/{used.name}" + (f": {said}" if said else ""))
    elif asked and there.exists():
        note(
            f"recipe {run.method}/{there.name} is for {read_toml(there)['backbone']} and is left out; settings that "
            "are not given are the method's own"
        )


def free_folder(folder: Path) -> Path:
    """Return `folder`, or the first of folder-2, folder-3, ... that does not exist."""
    number, found = 1, folder
    while found.exists():
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found
