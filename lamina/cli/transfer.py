"""The command for transfer to one task: settings chosen on validation images, tested over seeds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lamina.cli.shared import Data, Json, Set, app, note, note_recipe, print_table, progress_of, stoppable, typed


@app.command()
def transfer(
    method: Annotated[str, typer.Argument(help="A method's name, or a recipe: METHOD/NAME as listed, or a path.")],
    stream: Annotated[str, typer.Argument(help="Which images, all classes at once; see `lamina list streams`.")],
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE,VALUE", help="Values to choose from: lr=0.01,0.1; else around the usual rate."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many of 42, 44, 82, 100, 800 to test with.")] = 3,
    backbone: Annotated[str | None, typer.Option(help="The frozen model; see `lamina list backbones`.")] = None,
    changes: Set = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; else one below runs/, gone on with.")] = None,
    data: Data = None,
    recipe: Annotated[
        bool, typer.Option(help="Start from the recipe for this method and stream, where there is one.")
    ] = True,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out images that cannot be read.")] = False,
    as_json: Json = False,
) -> None:
    """Choose settings on validation images, learn anew from all, test over several seeds, as VTAB-1K does."""
    from lamina.config import assignments
    from lamina.selection import SUMMARY, grid_of, transfer as search, transfer_plan

    pairs = [*(changes or []), *(["stream.skip_broken=true"] if skip_broken else [])]
    overrides = assignments(pairs) | ({"backbone": backbone} if backbone is not None else {})
    settings, used = transfer_plan(method, stream, recipe=recipe, overrides=overrides)
    if not as_json:
        note_recipe(settings, used, recipe)
    named = f"transfer-{settings.method}-{settings.stream.name}".replace("/", "_").replace(":", "-")
    folder = out or Path("runs") / os.fsencode(named)[:200].decode(errors="ignore")
    with stoppable(typed(), folder):
        summary = search(
            settings,
            folder,
            grid=grid_of(grid) if grid else None,
            seeds=seeds,
            tell=(lambda text: None) if as_json else note,
            data=data,
            command=typed(),
            progress=progress_of(as_json),
        )
    if as_json:
        print(json.dumps(summary))
        return
    _show(summary)
    print(f"written to {folder / SUMMARY}")


def _show(summary: dict[str, Any]) -> None:
    from lamina.results.tables import Spread, percent, show

    if summary["trials"]:
        print_table(
            [
                {
                    **{name: show(value) for name, value in trial["settings"].items()},
                    f"validation {summary['measure']} (%)": percent(trial["accuracy"])
                    if trial["accuracy"] is not None
                    else "diverged"
                    if "diverged" in trial
                    else f"left out: {trial['left_out']}",
                    "chosen": "yes" if trial["settings"] == summary["chosen"] else "",
                }
                for trial in summary["trials"]
            ]
        )
    chosen = ", ".join(f"{name} {show(value)}" for name, value in summary["chosen"].items()) or "the settings given"
    seeds = ", ".join(map(str, summary["seeds"]))
    came_out = f"{summary['measure']} {Spread(**summary['accuracy'])} %"
    print(f"{summary['method']} on {summary['stream']}: {came_out} (seeds {seeds}; {chosen})")
    said = [f"{name.replace('_', ' ')} {show(value)}" for name, value in summary["protocol"].items()]
    how = (
        f"chosen by {summary['rule']}, of {len(summary['trials'])} settings" if summary["trials"] else "nothing chosen"
    )
    print(", ".join([f"{summary['stream']} with {summary['backbone']}", how, *said]))
