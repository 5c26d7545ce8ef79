"""Commands for practitioners: a model file that learns, predicts and tells what it knows."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lamina.cli.shared import Json, app, note, print_table, progress_of, stoppable, typed
from lamina.cli.told import images, lesson_lines, percent, print_inspected, usual_line
from lamina.errors import ConfigError, LaminaError

#: of a prediction: its entropy; that of the mean of draws, what more images of the kind would not change of it, and
#: what they would
_UNSURE = ("entropy", "entropy_of_draws", "expected_entropy", "mutual_information")
#: columns of the table; what draws agree on and what they do not add up to the entropy of their mean
_TITLES = {"entropy": "entropy", "agree": "expected_entropy", "disagree": "mutual_information"}

#: what `predict` says at the end when some images could not be read
SOME_BROKEN = 3

Model = Annotated[Path, typer.Argument(help="The model file, for example shop.lamina.")]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Leave out images that cannot be read.")]
Precision = Annotated[str | None, typer.Option(help="Of the frozen model: auto, bf16 or 32; else as it was learned.")]


class Existing(StrEnum):
    """What to do about classes that are known already."""

    refuse = "refuse"
    extend = "extend"


class Format(StrEnum):
    """How predictions are printed."""

    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"


class Score(StrEnum):
    """Which novelty is told."""

    mahalanobis = "mahalanobis"
    energy = "energy"


@app.command()
def learn(
    model: Model,
    folder: Annotated[Path, typer.Argument(help="Images of the new classes: FOLDER/CLASS/*.jpg and the like.")],
    method: Annotated[str | None, typer.Option(help="For a new model; see `lamina list methods`. [strata]")] = None,
    backbone: Annotated[str | None, typer.Option(help="For a new model; see `lamina list backbones`.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a setting of the method: layers=4, length=16."),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="For CLIP: what is said of a class, for example 'a sketch of a {}.'; or a set.")
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(help='For CLIP: a TOML file of what classes are, n01443537 = "goldfish".'),
    ] = None,
    name: Annotated[str | None, typer.Option(help='What to call this lesson, for example "spring 2026".')] = None,
    existing: Annotated[
        Existing, typer.Option(help="Classes that are known already: refuse, or extend with more examples.")
    ] = Existing.refuse,
    holdout: Annotated[float, typer.Option(help="Share of the images kept aside to measure and calibrate.")] = 0.1,
    seed: Annotated[int | None, typer.Option(help="For a new model: of everything random in training.")] = None,
    precision: Precision = None,
    skip_broken: SkipBroken = False,
    discard: Annotated[bool, typer.Option("--discard", help="Drop a lesson that was begun and not finished.")] = False,
    as_json: Json = False,
) -> None:
    """Learn new classes from a folder into a model file, which is made if it is not there.

    A method whose classifier is trained tells the classes of one lesson apart, so it needs at least two; one whose
    classifier is made of statistics (strata, ranpac, nearest-mean, head=statistics) can do with one.
    """
    from lamina.config import assignments, read_toml
    from lamina.lessons import learn_folder
    from lamina.registry import method_class
    from lamina.training.stopping import stop_signals

    given = assignments(changes or [])
    if template is not None:
        given["templates"] = template
    if names is not None:
        given["names"] = read_toml(names)
        for key, said in given["names"].items():
            if not isinstance(said, str):
                raise ConfigError(f"{names} says what classes are, in words; got {key} = {said!r}")
    for option, field in (("--template", "templates"), ("--names", "names")):
        if method is not None and field in given and field not in method_class(method).model_fields:
            raise ConfigError(f"{option}: {method} reads no {field}; `lamina show {method}` has its settings")
    watch = progress_of(as_json)
    with stoppable(typed(), model.with_name(f".{model.name}.learning")), stop_signals() as should_stop:
        done = learn_folder(
            model,
            folder,
            method=method,
            backbone=backbone,
            settings=given,
            name=name,
            existing=existing.value,
            holdout=holdout,
            seed=seed,
            precision=precision,  # type: ignore[arg-type]  # checked where it is used
            skip_broken=skip_broken,
            discard=discard,
            progress=watch() if watch is not None else None,
            should_stop=should_stop,
        )
    for unknown in [key for key in given.get("names", {}) if key not in done.file.classes] if names is not None else ():
        note(f"{names} says what {unknown!r} is, and no class is called so yet")
    if as_json:
        said = {"model": str(model), "checksum": done.file.checksum, "texts": done.texts, "lessons_left": done.left}
        print(json.dumps(said | done.lesson.model_dump()))
        return
    if done.before:
        note(f"{model} had learned this already, before it was interrupted")
    for line in lesson_lines(done):
        print(line)
    if len(done.file.lessons) == 1 and (usual := usual_line(done.file.method, given)):
        print(usual)
    print(f"written to {model}")


@app.command()
def predict(
    model: Model,
    paths: Annotated[list[str], typer.Argument(help='Images, folders, patterns; "-" reads paths from standard input.')],
    form: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.table,
    top: Annotated[int, typer.Option(min=1, help="Name so many classes.")] = 1,
    novelty: Annotated[Score, typer.Option(help="Which novelty to tell.")] = Score.mahalanobis,
    flag_novel: Annotated[
        bool, typer.Option("--flag-novel", help="Mark images that look like nothing that was learned.")
    ] = False,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Tell how uncertain each prediction is, in nats, and why.")
    ] = False,
    also: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", help="For CLIP: further classes to choose from, by their names alone."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images that go through the model together.")] = 64,
    precision: Precision = None,
) -> None:
    """Say what is in pictures, as results come; exit code 3 when some could not be read."""
    from lamina.console import reading_shown
    from lamina.continual import ContinualModel
    from lamina.predictions import predict as predictions

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    kept = ContinualModel.load(model, precision=precision)  # type: ignore[arg-type]  # checked where it is used
    if flag_novel and kept.confidence.scale(novelty.value) is None:
        raise ConfigError(f"{model} never had images held out, so nothing says what is new; learn with --holdout 0.1")
    further = list(dict.fromkeys(part.strip() for part in (also or "").split(",") if part.strip()))
    if also is not None and not further:
        raise ConfigError(f"--also takes names with commas between them; got {also!r}")
    for known in [name for name in further if name in kept.classes]:
        note(f"{known!r} of --also is a class that the model has learned; it is in the choice already")
    found = predictions(kept, paths, sys.stdin, top=top, batch=batch, score=novelty.value, also=further)
    broken = 0

    def counted() -> Iterator[Any]:
        nonlocal broken
        for prediction in found:
            broken += prediction.error is not None
            yield prediction

    try:
        with reading_shown():
            for line in _printed(counted(), form, top, flag_novel, uncertainty):
                print(line, flush=True)
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if broken:
        note(f"{broken} image{'s' if broken > 1 else ''} could not be read")
        raise typer.Exit(SOME_BROKEN)


@app.command()
def evaluate(
    model: Model,
    folder: Annotated[Path, typer.Argument(help="Labelled images: FOLDER/CLASS/*.jpg and the like.")],
    out: Annotated[Path | None, typer.Option(help="Write a page with all details, for example report.html.")] = None,
    skip_broken: SkipBroken = False,
    precision: Precision = None,
    as_json: Json = False,
) -> None:
    """Measure how good a model is: per task, per class, confusions, calibration; folders of unknown classes measure
    how well it notices what is new.
    """
    from lamina.console import reading_shown
    from lamina.continual import ContinualModel
    from lamina.modelfile import ModelFile
    from lamina.predictions import evaluate as evaluated
    from lamina.results import assessment
    from lamina.results.assessment_page import write_page
    from lamina.text import printable

    _spare(model, out)
    file = ModelFile.read(model)
    kept = ContinualModel.load(file, precision=precision)  # type: ignore[arg-type]  # checked where it is used
    with reading_shown():
        found = evaluated(kept, file, folder, skip_broken=skip_broken)
    if out is not None:
        write_page(found, out)
    if as_json:
        print(json.dumps(found.as_dict()))
        return
    print_table(assessment.rows_overview(found))
    if unknown := found.protocol["unknown_classes"]:
        shown = ", ".join(map(printable, unknown))
        print(f"not among the known classes, so counted as new ({images(found.protocol['unknown_images'])}): {shown}")
    print_table(assessment.rows_tasks(found), title="by task")
    print_table(assessment.rows_classes(found), title="by class")
    if rows := assessment.rows_confusions(found):
        print_table(rows, title="taken for another")
    for line in assessment.reliability_lines(found):
        print(line)
    if out is not None:
        print(f"written to {out}")


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """Show what a model has learned, how much room is left, and how far old classes may have moved."""
    from lamina.continual import ContinualModel
    from lamina.modelfile import ModelFile
    from lamina.predictions import facts, room

    file = ModelFile.read(model)
    known: dict[str, Any] = {"model": str(model), "bytes": model.stat().st_size, **facts(file)}
    try:
        kept = ContinualModel.load(file)
        known["room"], known["lessons_left"] = room(kept), kept.model.tasks_left
    except LaminaError as error:  # the backbone is not to be had here, or is another
        known["room"], known["room_unknown"] = [], str(error)
    if as_json:
        print(json.dumps(known))
        return
    print_inspected(known, file)


@app.command()
def export(
    model: Model,
    onnx: Annotated[Path, typer.Option("--onnx", help="The file to write; a .json with class names goes beside it.")],
) -> None:
    """Write a model as one ONNX file, and class names and pre-processing as JSON beside it."""
    from lamina.continual import ContinualModel
    from lamina.export import describe, export_onnx
    from lamina.modelfile import ModelFile
    from lamina.predictions import facts

    page = onnx.with_suffix(".json")
    if page == onnx:
        raise ConfigError(f"class names go to {page}, so the model needs another suffix: --onnx {onnx.stem}.onnx")
    _spare(model, onnx, page)
    file = ModelFile.read(model)
    kept = ContinualModel.load(file, precision="32")
    verified = export_onnx(
        kept.model,
        onnx,
        size=kept.spec.size,
        mean=kept.spec.mean,
        std=kept.spec.std,
        temperature=kept.confidence.temperature,
    )
    describe(
        page,
        file=onnx.name,
        classes=kept.classes,
        tasks=[lesson.classes for lesson in kept.lessons],
        features=kept.backbone.tower.features,
        pixels=kept.spec,
        model=facts(file),
        temperature=kept.confidence.temperature,
        verified=verified,
    )
    checked = (
        "ONNX Runtime gives the scores of --precision 32" if verified else "not checked: ONNX Runtime is not installed"
    )
    print(f"written to {onnx} ({checked}) and {page}")


@app.command()
def sample(
    name: Annotated[str, typer.Argument(help="What to write; there is digits.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
) -> None:
    """Write a small data set as folders of images, to try the other commands with."""
    from lamina.data.sample import write_sample

    for folder in write_sample(name, out):
        print(folder)


def _spare(model: Path, *outputs: Path | None) -> None:
    """Refuse to write over the model itself."""
    for out in outputs:
        if out is not None and out.resolve() == model.resolve():
            raise ConfigError(f"{out} is the model; choose another file to write to")


def _printed(predictions: Iterable[Any], form: Format, top: int, flag_novel: bool, uncertainty: bool) -> Iterator[str]:
    """Yield the lines to print, one by one."""
    from lamina.text import printable

    if form is Format.json:
        between = "["
        for prediction in predictions:
            yield between + json.dumps(prediction.as_dict())
            between = ","
        yield "]" if between == "," else "[]"
    elif form is Format.jsonl:
        for prediction in predictions:
            yield json.dumps(prediction.as_dict())
    elif form is Format.csv:
        line = _Line()
        writer = csv.writer(line, lineterminator="")
        numbers = range(1, top + 1)
        writer.writerow(
            [
                "path",
                *(f"{what}_{i}" for i in numbers for what in ("class", "probability")),
                "novelty",
                "novel",
                *(_UNSURE if uncertainty else ()),
                "error",
            ]
        )
        yield line.text
        for p in predictions:
            pairs = [value for pair in p.top for value in pair] + [""] * (2 * (top - len(p.top)))
            unsure = [p.uncertainty.get(name) for name in _UNSURE] if uncertainty else []
            writer.writerow([printable(p.path), *pairs, p.novelty, p.novel, *unsure, p.error])
            yield line.text
    else:
        columns = "".join(f"{title:>8}  " for title in _TITLES) if uncertainty else ""
        yield f"{'probability':>11}  {'novelty':>7}  {columns}class, image"
        for p in predictions:
            if p.error is not None:
                yield f"{'':>11}  {'':>7}  {'':>{len(columns)}}{printable(p.path)}: {printable(p.error)}"
                continue
            mark = "new? " if flag_novel and p.novel else ""
            others = "".join(f", {printable(name)} {percent(share)}" for name, share in p.top[1:])
            said = f"{mark}{printable(p.top[0][0])}{others}"
            parts = [p.uncertainty.get(name) for name in _TITLES.values()] if uncertainty else []
            told = "".join(f"{'–' if value is None else f'{value:.2f}':>8}  " for value in parts)
            yield f"{percent(p.top[0][1]):>11}  {p.novelty:>7.2f}  {told}{said}  {printable(p.path)}"


class _Line:
    """A file for csv that keeps the last line."""

    text = ""

    def write(self, text: str) -> None:
        self.text = text
