"""A finished model, ready to be looked into: from a model file, or from the folder of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lamina.backbones.load import load_backbone
from lamina.continual import ContinualModel
from lamina.data.material import GONE
from lamina.data.stream import Stream, Task
from lamina.data.transforms import InputSpec, Transform, transform
from lamina.errors import ModelFileError, ResumeError
from lamina.learner import Learner
from lamina.model import PromptedModel
from lamina.registry import method_class
from lamina.results.records import Record
from lamina.runs import RESULTS, resumable
from lamina.seeds import seed_at
from lamina.training.checkpoint import LEARNED
from lamina.training.launch import Precision, tower_dtype
from lamina.training.segmentation import Segmentation


@dataclass(frozen=True)
class Opened:
    """A model as it was left.

    Attributes:
        name: of the file or the folder.
        method, backbone: names, as in `lamina list`.
        model: in evaluation mode, on its device.
        device: what it computes on.
        plain: the way of an image to the pixels that the backbone takes.
        classes: names (C), by column.
        temperature: what scores are divided by to be those of probabilities.
    """

    name: str
    method: str
    backbone: str
    model: PromptedModel
    device: torch.device
    plain: Transform
    classes: Sequence[str]
    temperature: float

    @property
    def precision(self) -> str:
        """The dtype of the frozen tower, by name."""
        return str(next(self.model.tower.parameters()).dtype).removeprefix("torch.")


def open_model(path: Path, precision: Precision | None = None) -> Opened:
    """Open a model file, or the folder of a finished run.

    Args:
        precision: of the frozen model; None takes the one that it was learned with.

    Raises:
        ModelFileError: when there is neither, or a model file is broken.
        ResumeError: when a folder holds no run, or one that is not finished.
        ConfigError: when the backbone is not to be had here.
    """
    if path.is_dir():
        return _run(path, precision)
    if not path.exists():
        raise ModelFileError(f"{path} does not exist; name a model file, or the folder of a finished run")
    kept = ContinualModel.load(path, precision=precision)
    return Opened(
        name=path.name,
        method=kept.method,
        backbone=kept.backbone.name,
        model=kept.model.eval(),
        device=kept.fabric.device,
        plain=kept.plain,
        classes=kept.classes,
        temperature=kept.confidence.temperature,
    )


def _run(folder: Path, precision: Precision | None) -> Opened:
    run = resumable(folder)
    if not (folder / RESULTS).exists() or not (folder / LEARNED).exists():
        raise ResumeError(f"the run in {folder} is not finished; go on with `lamina resume {folder}`")
    record = Record.read(folder / RESULTS)
    device = torch.device("cuda" if run.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    learned_in = {"bfloat16": "bf16", "float32": "32"}.get(str(record.protocol.get("precision")), run.precision)
    backbone = load_backbone(run.backbone, dtype=tower_dtype(precision or learned_in, device))  # type: ignore[arg-type]
    found, wanted = backbone.fingerprint, record.backbone["fingerprint"]
    if found != wanted:
        raise ResumeError(
            f"the run in {folder} learned on {run.backbone} with fingerprint {wanted}; the one found here has {found}: "
            "get the same weights again"
        )
    tasks, spec = _tasks(record), InputSpec(**backbone.pixels).fed(run.normalization)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at(run.seed, "build"))
        learner = method_class(run.method)(**run.settings).build(backbone.tower)
        if record.protocol.get("kind") == "segmentation":
            learner = Segmentation(run.dense).adapted(learner, spec)
        stages = [Stream(record.stream, tasks, 0, "").merged()] if learner.at_once else tasks
        for task in stages:
            learner.model.begin_task(task)
    _fill(learner.model, folder)
    return Opened(
        name=folder.resolve().name,
        method=run.method,
        backbone=run.backbone,
        model=learner.model.to(device).eval(),
        device=device,
        plain=transform("plain", spec),
        classes=list(dict.fromkeys(name for task in tasks for name in task.classes)),
        temperature=_temperature(learner, stages[-1]),
    )


def _tasks(record: Record) -> list[Task]:
    """Return the tasks of a run without their images: a class gets its column when its name first comes."""
    columns: dict[str, int] = {}
    for name in (name for names in record.classes for name in names):
        columns.setdefault(name, len(columns))
    wanted = record.protocol.get("classes", len(columns))
    if len(columns) != wanted:
        raise ResumeError(
            f"the run learned {wanted} classes, and {len(columns)} names are written down: two classes are called the "
            "same, so that nobody can tell which is which"
        )
    return [
        Task(index, names, [columns[name] for name in names], GONE, GONE) for index, names in enumerate(record.classes)
    ]


def _fill(model: PromptedModel, folder: Path) -> None:
    """Give a model what a run has learned."""
    try:
        learned: dict[str, Any] = load_file(folder / LEARNED)
        missing, surplus = model.load_state_dict(learned, strict=False)
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".:")
        raise ResumeError(f"{folder / LEARNED} does not fit the run in {folder}: {reason}") from None
    lost = model.not_frozen(missing) + surplus
    if lost:
        raise ResumeError(f"{folder / LEARNED} holds other tensors than the run needs; the first is {lost[0]!r}")


def _temperature(learner: Learner, last: Task) -> float:
    """Return what scores are divided by to be those that the loss saw last, as a run's calibration has it."""
    phases = [*learner.phases(last), *learner.refine(last)]
    return phases[-1].temperature if phases and learner.model.head.statistics is None else 1.0
