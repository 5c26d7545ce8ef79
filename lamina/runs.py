"""Whole runs: from settings to a folder with checkpoints, a log and `results.json`.

settings.toml          everything that was asked, so that the run can be resumed or repeated
state.pt               the last checkpoint
log.jsonl              loss terms, learning rate and speed of every step
results.json           what came out; reports and tables need nothing else
learned.safetensors    what was learned, without the frozen backbone
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lamina.config import Settings, read_toml, write_toml
from lamina.data.parts import JoinedStream
from lamina.data.streams import StreamSettings, build_stream, usual_run
from lamina.errors import ConfigError, LaminaError, ResumeError
from lamina.machine import commit, hardware, peak_memory_mb, versions
from lamina.registry import default_backbone, method_class
from lamina.results.metrics import summary
from lamina.results.records import Record
from lamina.training.dense import DenseSettings

RECIPES = Path(__file__).parent / "recipes"
SETTINGS, RESULTS = "settings.toml", "results.json"


class RunSettings(Settings):
    """Everything that decides what a run does."""

    method: str = Field(description="see `lamina list methods`")
    stream: StreamSettings = Field(description="which images, in which order")
    backbone: str = Field(description="see `lamina list backbones`; what is not given is the method's own")
    seed: int = Field(0, ge=0, description="of everything random in training; the order of classes has its own")
    augmentation: str = Field("crop-flip", description="transform of training images")
    views: int | Literal["flip"] | None = Field(
        None,
        description="fixed views that training images show in turn: flip (plain, mirrored), or so many draws of the "
        "augmentation; else every pass draws anew, and cached features are those of plain images",
    )
    normalization: Literal["backbone", "unit", "half", "imagenet"] = Field(
        "backbone",
        description="mean and deviation of pixels: the backbone's own; unit feeds them from 0 to 1, half from -1 to 1, "
        "imagenet with those of ImageNet",
    )
    precision: Literal["auto", "bf16", "32"] = Field(
        "auto", description="of the frozen tower; auto takes bf16 where it is fast"
    )
    accelerator: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute")
    devices: int = Field(1, ge=1, description="processes, each with a device of its own")
    nodes: int = Field(1, ge=1, description="machines")
    checkpoint_every: int = Field(100, ge=0, description="steps between checkpoints; 0 saves between tasks only")
    workers: int = Field(0, ge=0, description="processes that load training images")
    eval_batch: int = Field(100, ge=1, description="images in one batch where nothing is trained")
    measure_novelty: bool = Field(
        False, description="measure after each task how well images of classes to come are told from known ones"
    )
    most_steps: int | None = Field(
        None, ge=1, description="a budget: the most steps that a phase of training takes, whatever its epochs"
    )
    measure_drift: bool = Field(False, description="measure how far features of old test images move")
    online: bool = Field(False, description="train on each image once: one pass, no repeated view")
    dense: DenseSettings | None = Field(None, description="of streams whose images have label maps; None is as usual")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="of the method; what is not given keeps its default"
    )

    @model_validator(mode="before")
    @classmethod
    def _backbone_of_the_method(cls, values: Any) -> Any:
        if "method" not in values:
            return values
        return {"backbone": default_backbone(method_class(values["method"])), **values}

    @field_validator("views", mode="before")
    @classmethod
    def _views_there_are(cls, views: Any, others: ValidationInfo) -> Any:
        if views is not None:
            from lamina.data.views import check_views

            check_views(views, others.data.get("augmentation", ""))
        return views


#: what may differ between a run and its continuation without changing what it computes
_FREE = ("devices", "nodes", "checkpoint_every", "workers")


def plan(
    method: str, stream: str | None = None, *, recipe: bool = True, overrides: Mapping[str, Any] | None = None
) -> tuple[RunSettings, Path | None]:
    """Turn a method's name, or a recipe's path, into the settings of a run; return the recipe used, too.

    Where a recipe for this method on this stream ships with the package, its settings are the starting
    point; `overrides` have the last word.

    Args:
        method: a method's name; a recipe as METHOD/NAME, as `lamina list recipes` has it; or a recipe's path.
        overrides: nested settings; a name that is not a setting of runs is one of the method.

    Raises:
        ConfigError: when a name or value is wrong.
    """
    values: dict[str, Any] = {}
    path: Path | None = None
    if method.endswith(".toml"):
        path = Path(method)
    elif (RECIPES / f"{method}.toml").exists():
        path = RECIPES / f"{method}.toml"
    else:
        method_class(method)
        path = _recipe(method, stream, (overrides or {}).get("backbone")) if recipe else None
        values["method"] = method
    if path is not None:
        values |= {name: value for name, value in read_toml(path).items() if name != "version"}
    if isinstance(values.get("stream"), str):
        values["stream"] = {"name": values["stream"]}
    if stream is not None:
        values["stream"] = {**values.get("stream", {}), "name": stream}
    if "stream" not in values:
        raise ConfigError("a run needs a stream: --stream NAME; `lamina list streams` shows what there is")
    values = {**usual_run(str(values["stream"].get("name", ""))), **values}
    values["settings"] = dict(values.get("settings", {}))
    for name, value in (overrides or {}).items():
        if name in ("stream", "settings", "dense"):
            if not isinstance(value, Mapping):
                raise ConfigError(f"--set {name} needs a name within it, as in {name}.NAME=VALUE; got {value!r}")
            values[name] = {**values.get(name, {}), **value}
        elif name in RunSettings.model_fields:
            values[name] = value
        else:
            values["settings"][name] = value
    run = RunSettings(**values)
    asked = {**(overrides or {}), **(overrides or {}).get("settings", {})}
    for name in run.settings:
        _misplaced(name, run.method)
    # here, so that a wrong setting is found before anything is loaded
    given = {name: value for name, value in run.settings.items() if name in asked}
    method_class(run.method)(**run.settings).heed(given, {})
    return run, path


def _misplaced(name: str, method: str) -> None:
    """Refuse a setting of runs or streams that was given as one of the method."""
    if name in method_class(method).model_fields:
        return
    if name in StreamSettings.model_fields:
        raise ConfigError(f"{name} is a setting of streams: give it as stream.{name}")
    near = get_close_matches(name, RunSettings.model_fields, n=1)
    if near and not get_close_matches(name, method_class(method).model_fields, n=1):
        raise ConfigError(f"no setting is called {name!r}; did you mean {near[0]!r}, a setting of runs?")


def _recipe(method: str, stream: str | None, backbone: str | None) -> Path | None:
    """Return the recipe for a method on a stream; None if there is none, or it was made for another backbone."""
    path = RECIPES / method / f"{stream}.toml"
    if not path.exists() or backbone not in (None, read_toml(path).get("backbone", backbone)):
        return None
    return path


def resumable(folder: Path) -> RunSettings:
    """Read the settings of a run that was begun in `folder`.

    Raises:
        ResumeError: when there is none.
    """
    if not (folder / SETTINGS).exists():
        # as deep as transfer puts runs, and no deeper: the folder may be anybody's
        below = sorted(file.parent for depth in (1, 2, 3) for file in folder.glob("*/" * depth + SETTINGS))
        move = f"name one that lies below it, as {below[0]}" if below else "start one with `lamina run`"
        raise ResumeError(f"{folder} holds no run: there is no {SETTINGS} in it; {move}")
    values = read_toml(folder / SETTINGS)
    if not isinstance(values.get("run"), dict):
        raise ResumeError(f"{folder / SETTINGS} says nothing of a run; start it anew with `lamina run`")
    return RunSettings(**values["run"])


def unfinished(paths: Iterable[Path]) -> list[Path]:
    """Return the folders under `paths` whose runs were begun and not finished."""
    begun = (file.parent for path in paths for file in path.rglob(SETTINGS))
    return sorted({folder for folder in begun if not (folder / RESULTS).exists()})


def execute(
    run: RunSettings,
    folder: Path,
    *,
    data: Path | None = None,
    command: str = "",
    resume: bool = False,
    progress: Callable[[], Any] | None = None,
) -> Record:
    """Run, or go on with, what the settings say; return the record that `results.json` holds.

    Args:
        data: where data sets lie; None looks in the usual places.
        command: what was typed, for the record.
        resume: go on from the last checkpoint in `folder`; otherwise the folder must hold no run.
        progress: makes a `lamina.training.progress.Progress`, in the process that reports.

    Raises:
        LaminaError: for everything that a user can mend.
        Stopped: when the process was asked to stop; the state is saved.
    """
    from lamina.training.launch import launch

    if not resume and (folder / SETTINGS).exists():
        then = resumable(folder)
        ended = (folder / RESULTS).exists()
        raise ResumeError(
            f"{folder} already holds a{' finished' if ended else ''} run of {then.method} on {then.stream.name} with "
            f"seed {then.seed}; {'' if ended else f'continue it with `lamina resume {folder}`, or '}give another --out"
        )
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no run; give another --out")
    outcome = launch(
        _work,
        run,
        folder,
        data,
        command,
        progress,
        accelerator=run.accelerator,
        devices=run.devices,
        nodes=run.nodes,
    )
    if isinstance(outcome, BaseException):
        raise outcome
    return Record.from_dict(outcome)


def complete(run: RunSettings, folder: Path, **arguments: Any) -> Record:
    """Return the record of a run in `folder`, after running what is missing of it; arguments as in `execute`."""
    if (folder / RESULTS).exists():
        return Record.read(folder / RESULTS)
    return execute(run, folder, resume=(folder / SETTINGS).exists(), **arguments)


def _work(fabric: Any, *arguments: Any) -> dict[str, Any] | BaseException:
    """Do one process's part. What comes back must cross a process boundary: plain values, and errors as values."""
    from lamina.training.trainer import Stopped

    try:
        return _run(fabric, *arguments).as_dict()
    except (LaminaError, Stopped) as error:
        return error


def _run(
    fabric: Any,
    run: RunSettings,
    folder: Path,
    data: Path | None,
    command: str,
    progress: Callable[[], Any] | None,
) -> Record:
    import torch

    from lamina.backbones.load import load_backbone
    from lamina.data.transforms import InputSpec
    from lamina.seeds import seed_at
    from lamina.training import checkpoint
    from lamina.training.feed import Feed
    from lamina.training.kinds import kind_of
    from lamina.training.launch import tower_dtype
    from lamina.training.meter import DriftMeter
    from lamina.training.protocol import protocol
    from lamina.training.stopping import stop_signals
    from lamina.training.trainer import Trainer

    dtype = tower_dtype(run.precision, fabric.device)
    backbone = load_backbone(run.backbone, dtype=dtype)
    spec = InputSpec(**backbone.pixels).fed(run.normalization)
    with fabric.rank_zero_first(local=True):  # the first process on a machine decodes, the others read its cache
        stream = build_stream(run.stream, data, max_side=spec.max_side)
    torch.manual_seed(seed_at(run.seed, "build"))
    method = method_class(run.method)(**run.settings)
    kind = kind_of(stream, run)
    learner = kind.adapted(method.build(backbone.tower), spec)
    feed = Feed.to(
        learner,
        fabric,
        spec,
        augmentation=run.augmentation,
        views=run.views,
        seed=run.seed,
        eval_batch=run.eval_batch,
        workers=run.workers,
        transform=kind.transform,
    )
    asked = {name: value for name, value in run.model_dump().items() if name not in _FREE}
    # a checkpoint from before they were there has none
    for name in ("dense", "measure_drift", "measure_novelty", "most_steps", "online", "normalization", "views"):
        if asked[name] == RunSettings.model_fields[name].default:
            del asked[name]
    identity = {
        **asked,
        "settings": method.model_dump(),
        "precision": str(dtype).removeprefix("torch."),
        "stream fingerprint": stream.fingerprint,
        "backbone fingerprint": backbone.fingerprint,
    }
    trainer = Trainer(
        learner,
        feed,
        fabric,
        seed=run.seed,
        run_dir=folder,
        checkpoint_every=run.checkpoint_every,
        identity=identity,
        progress=progress() if progress is not None and fabric.is_global_zero else None,
        meter=DriftMeter(stream) if run.measure_drift and not learner.at_once else None,
        online=run.online,
        most_steps=run.most_steps,
        novelty=run.measure_novelty,
        kind=kind,
    )
    trainer.restore(stream)
    trainer.check(stream)
    if fabric.is_global_zero and not (folder / SETTINGS).exists():  # not before all that was asked for was found
        write_toml(folder / SETTINGS, {"run": run.model_dump(), "command": command})
    with stop_signals() as trainer.should_stop:
        trainer.run(stream)
    test = [len(task.test) for task in stream]
    record = Record(
        method=run.method,
        settings=method.model_dump(),
        stream=stream.name,
        stream_fingerprint=stream.fingerprint,
        backbone={"name": run.backbone, "fingerprint": backbone.fingerprint},
        seed=run.seed,
        order_seed=stream.order_seed,
        protocol=protocol(run, stream, learner, spec, kind, identity["precision"]),
        classes=[list(task.classes) for task in stream],
        matrix=trainer.matrix,
        matrix_task_aware=trainer.matrix_task_aware,
        test_sizes=test,
        future=trainer.future,
        calibration=trainer.calibration,
        reliability=trainer.reliability,
        detection=trainer.detection,
        metrics={
            **summary(
                trainer.matrix,
                test,
                trainer.matrix_task_aware,
                trainer.future,
                trainer.calibration,
                trainer.batch_calibration,
                trainer.detection,
            ),
            **trainer.figures,
        },
        seconds=trainer.seconds,
        peak_memory_mb=peak_memory_mb(fabric.device),
        trainable_parameters=learner.model.trainable_parameters,
        stored_numbers=sum(
            t.numel() for t in _tensors([learner.model.learned(), *(p.state_dict() for p in learner.protections)])
        ),
        versions=versions(),
        hardware=hardware(fabric.device, fabric.world_size),
        commit=commit(),
        finished=True,
        command=command,
        drift=trainer.meter.drift if trainer.meter is not None else [],
        usage=trainer.usage,
        by_class=trainer.by_class,
        parts={name: list(own) for name, own in stream.parts.items()} if isinstance(stream, JoinedStream) else {},
    )
    if fabric.is_global_zero:
        checkpoint.save_learned(folder, learner.model.learned())
        record.write(folder / RESULTS)
    return record


def _tensors(value: Any) -> list[Any]:
    """Return every tensor inside nested mappings and lists."""
    if isinstance(value, Mapping):
        return [tensor for part in value.values() for tensor in _tensors(part)]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if hasattr(value, "numel") else []
