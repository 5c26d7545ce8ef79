"""Commands for researchers: methods over streams of tasks."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lamina.cli.shared import (
    Data,
    Json,
    Set,
    app,
    free_folder,
    note,
    note_recipe,
    print_table,
    progress_of,
    stoppable,
    typed,
)
from lamina.cli.told import percent

#: of the name of a run's folder, in bytes
_LONGEST = 200


#: what the demo compares, and what it does with CLIP
_DEMO = ("vpt-deep", "vpt-nsp2", "strata", "joint")
_CLIP_DEMO = ("zero-shot", "coop", "clip-nsp2")


@app.command()
def run(
    method: Annotated[str, typer.Argument(help="A method's name, or a recipe: METHOD/NAME as listed, or a path.")],
    stream: Annotated[
        str | None, typer.Option(help="Which images in which order, A or A+B; see `lamina list streams`.")
    ] = None,
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
    measure_drift: Annotated[
        bool, typer.Option("--measure-drift", help="Measure how far features of old test images move.")
    ] = False,
    online: Annotated[
        bool, typer.Option("--online", help="Train on each image once, whatever the method says.")
    ] = False,
    measure_novelty: Annotated[
        bool, typer.Option("--measure-novelty", help="Measure how well images of classes to come are noticed.")
    ] = False,
    views: Annotated[
        str | None,
        typer.Option(help="Fixed views of training images: flip, or so many draws of the augmentation."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a method over a stream of tasks and measure what it remembers."""
    from lamina.config import assignments
    from lamina.runs import execute, plan

    place = {"tasks": tasks, "skip_broken": skip_broken or None}
    pairs = [f"stream.{name}={json.dumps(value)}" for name, value in place.items() if value is not None]
    pairs += [f"views={views}"] if views is not None else []
    overrides = assignments([*(changes or []), *pairs])
    given = {"backbone": backbone, "seed": seed, "devices": devices, "precision": precision}
    given |= {"measure_drift": measure_drift or None, "measure_novelty": measure_novelty or None}
    given |= {"online": online or None}
    overrides |= {name: value for name, value in given.items() if value is not None}
    settings, used = plan(method, stream, recipe=recipe, overrides=overrides)
    named = f"{settings.method}-{settings.stream.name}".replace("/", "_").replace(":", "-")
    # the paths of two data sets may make a longer name than file systems allow
    folder = out or free_folder(Path("runs") / os.fsencode(named)[:_LONGEST].decode(errors="ignore"))
    if not as_json:
        note_recipe(settings, used, recipe)
    with stoppable(f"lamina resume {folder}", folder):
        record = execute(settings, folder, data=data, command=typed(), progress=progress_of(as_json))
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
    with stoppable(f"lamina resume {folder}", folder):
        record = execute(settings, folder, data=data, command=typed(), resume=True, progress=progress_of(as_json))
    _show([record], as_json, folder)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Folder of the demo's runs; else a new one below runs/.")] = None,
    clip: Annotated[
        bool, typer.Option("--clip", help="With CLIP: by the names of digits alone, with learned words, with prompts.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Learn ten digits two at a time, without and with protection, and compare: four to ten minutes."""
    from lamina import catalogue
    from lamina.results.report import write_report
    from lamina.runs import complete, plan

    said = {row["method"]: row["what it is"] for row in catalogue.rows("methods")}
    folder = out or free_folder(Path("runs") / ("demo-clip" if clip else "demo"))
    records, command = [], "lamina demo --clip" if clip else "lamina demo"
    for method in _CLIP_DEMO if clip else _DEMO:
        settings, _ = plan(method, "digits")
        if not as_json:
            note(f"{method}: {said[method]}")
        with stoppable(f"{command} --out {folder}", folder):
            records.append(complete(settings, folder / method, command=command, progress=progress_of(as_json)))
    page = folder / "report.html"
    write_report(records, page)
    _show(records, as_json, page)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold some.")],
    out: Annotated[Path | None, typer.Option(help="The page to write; else report.html in the first folder.")] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="What to print: accuracy,accuracy_task_aware,forgetting.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw one page that compares runs, and shows what `lamina explain` drew of them; it opens offline."""
    from lamina.results.pictures import find_pictures
    from lamina.results.records import find_records
    from lamina.results.report import write_report
    from lamina.results.tables import headline, usual_columns
    from lamina.runs import unfinished

    records = find_records(folders)
    for folder in unfinished(folders):
        note(f"left out, not finished: {folder}; go on with `lamina resume {folder}`")
    wanted = None if columns is None else [name.strip() for name in columns.split(",")]
    headline(records, wanted or usual_columns(records))  # so that a wrong column is found before anything is written
    page = out or (folders[0] if folders[0].is_dir() else folders[0].parent) / "report.html"
    write_report(records, page, find_pictures(folders))
    _show(records, as_json, page, wanted)


def _show(records: list[Any], as_json: bool, place: Path, columns: Sequence[str] | None = None) -> None:
    """Print the headline numbers of some runs, under which protocol they were measured, and where they lie."""
    if as_json:
        values = [record.as_dict() for record in records]
        print(json.dumps(values[0] if len(values) == 1 else values))
        return
    from lamina.results.groups import by_group
    from lamina.results.tables import by_part, headline, protocol_line, usual_columns

    streams = list(dict.fromkeys(record.stream for record in records))
    for stream in streams:
        own = [record for record in records if record.stream == stream]
        print_table(headline(own, columns or usual_columns(own)), title=stream if len(streams) > 1 else None)
        if each := by_part(own):
            print_table(each, title="accuracy over test images, of all data sets and of each")
        for line in dict.fromkeys(protocol_line(record) for record in own):
            print(line)
    if len(streams) > 1 and (groups := by_group(records)):
        print_table(groups, title="VTAB-1K, mean accuracy over data sets")
    if len(records) == 1 and records[0].old_drift:
        print(
            f"old features moved by {percent(records[0].old_drift[-1][-1])} of their spread "
            "(mean over old tasks, after the last task)"
        )
    print(f"written to {place}")
