"""The `lamina` command: each function is one subcommand and ends in one call into the library."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lamina import __version__
from lamina.errors import LaminaError

#: what a process says when it was asked to stop and can be resumed ("try again", in sysexits.h)
STOPPED = 75

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


class Kind(StrEnum):
    """What `list` can list."""

    methods = "methods"
    streams = "streams"
    backbones = "backbones"
    recipes = "recipes"


@app.command()
def run(
    method: Annotated[str, typer.Argument(help="A method's name, or a recipe: METHOD/NAME as listed, or a path.")],
    stream: Annotated[str | None, typer.Option(help="Which images in which order; see `lamina list streams`.")] = None,
    backbone: Annotated[str | None, typer.Option(help="The frozen model; see `lamina list backbones`.")] = None,
    tasks: Annotated[int | None, typer.Option(help="Number of tasks, if not the stream's own.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of training; the order of classes has its own.")] = None,
    changes: Set = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; else a new one below runs/.")] = None,
    data: Data = None,
    recipe: Annotated[
        bool, typer.Option(help="Start from the recipe for this method and stream, where there is one.")
    ] = True,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out images that cannot be read.")] = False,
    devices: Annotated[int | None, typer.Option(help="Processes, each with a device of its own.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of the frozen model: auto, bf16 or 32.")] = None,
    as_json: Json = False,
) -> None:
    """Run a method over a stream of tasks and measure what it remembers."""
    from lamina.config import assignments
    from lamina.runs import execute, plan

    place = {"tasks": tasks, "skip_broken": skip_broken or None}
    pairs = [f"stream.{name}={json.dumps(value)}" for name, value in place.items() if value is not None]
    overrides = assignments([*(changes or []), *pairs])
    given = {"backbone": backbone, "seed": seed, "devices": devices, "precision": precision}
    overrides |= {name: value for name, value in given.items() if value is not None}
    settings, used = plan(method, stream, recipe=recipe, overrides=overrides)
    folder = out or _free(
        Path("runs") / f"{settings.method}-{settings.stream.name}".replace("/", "_").replace(":", "-")
    )
    if used is not None and not as_json:
        _note(f"recipe {used.parent.name}/{used.name}" + (f": {settings.settings}" if settings.settings else ""))
    with _stoppable(f"lamina resume {folder}", folder):
        record = execute(settings, folder, data=data, command=_typed(), progress=_progress(as_json))
    _show([record], as_json, folder)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="Folder of a run that was interrupted.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Go on with an interrupted run, exactly where it stopped."""
    from lamina.runs import execute, resumable

    settings = resumable(folder)
    with _stoppable(f"lamina resume {folder}", folder):
        record = execute(settings, folder, data=data, command=_typed(), resume=True, progress=_progress(as_json))
    _show([record], as_json, folder)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Folder of the demo's runs; else a new one below runs/.")] = None,
    as_json: Json = False,
) -> None:
    """Learn ten digits two at a time, without and with protection, and compare: under three minutes."""
    from lamina.results.report import write_report
    from lamina.runs import complete, plan

    folder = out or _free(Path("runs") / "demo")
    records = []
    for method in ("vpt-deep", "vpt-nsp2", "joint"):
        settings, _ = plan(method, "digits")
        if not as_json:
            _note(
                f"{method}: five tasks of two digits each" if method != "joint" else f"{method}: all ten digits at once"
            )
        with _stoppable(f"lamina demo --out {folder}", folder):
            records.append(complete(settings, folder / method, command="lamina demo", progress=_progress(as_json)))
    page = folder / "report.html"
    write_report(records, page)
    _show(records, as_json, page)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold some.")],
    out: Annotated[Path | None, typer.Option(help="The page to write; else report.html in the first folder.")] = None,
    as_json: Json = False,
) -> None:
    """Draw one page that compares runs; it opens offline."""
    from lamina.results.records import find_records
    from lamina.results.report import write_report

    records = find_records(folders)
    page = out or (folders[0] if folders[0].is_dir() else folders[0].parent) / "report.html"
    write_report(records, page)
    _show(records, as_json, page)


@app.command("list")
def list_(kind: Annotated[Kind, typer.Argument(help="What to list.")], as_json: Json = False) -> None:
    """List methods, streams, backbones or recipes."""
    from lamina.catalogue import rows

    found = rows(kind.value)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    _print_table(found)


@app.command()
def show(method: Annotated[str, typer.Argument(help="A method's name.")], as_json: Json = False) -> None:
    """Show what a method does, its settings with limits and defaults, and its sources."""
    from lamina.catalogue import about

    found = about(method)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(found["text"] + "\n")
    if found["settings"]:
        _print_table(found["settings"])


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
            _print_table(value, title=name)
        else:
            print(f"{name:<12} {value}")


@app.callback(invoke_without_command=True)
def about_lamina(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Handle the options that stand before a subcommand."""
    if version:
        print(f"lamina {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command; an error of ours is one line and exit code 2."""
    try:
        app()
    except LaminaError as error:
        print("lamina: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


@contextmanager
def _stoppable(again: str, folder: Path) -> Iterator[None]:
    """Say how to go on when a run is stopped, by a signal or from the keyboard."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        from lamina.training.trainer import Stopped

        if not isinstance(error, Stopped | KeyboardInterrupt):
            raise
        _note(f"stopped; go on with `{again}`" if folder.exists() else "stopped; nothing was begun yet")
        raise typer.Exit(STOPPED if isinstance(error, Stopped) else 130) from None


def _typed() -> str:
    return shlex.join(["lamina", *sys.argv[1:]])


def _progress(as_json: bool) -> Any:
    from lamina.console import progress

    return None if as_json else progress


def _show(records: list[Any], as_json: bool, place: Path) -> None:
    """Print the headline numbers of some runs, under which protocol they were measured, and where they lie."""
    if as_json:
        values = [record.as_dict() for record in records]
        print(json.dumps(values[0] if len(values) == 1 else values))
        return
    from lamina.results.tables import headline, protocol_line

    _print_table(headline(records))
    for line in dict.fromkeys(protocol_line(record) for record in records):
        print(line)
    print(f"written to {place}")


def _print_table(rows: list[dict[str, Any]], title: str | None = None) -> None:
    from rich.console import Console

    from lamina.console import table

    Console(width=None if sys.stdout.isatty() else 140).print(table(rows, title), highlight=False)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _free(folder: Path) -> Path:
    """Return `folder`, or the first of folder-2, folder-3, ... that does not exist."""
    number, found = 1, folder
    while found.exists():
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found
