"""Using a kept model: what is in these pictures, how good is it, what has it learned?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamina.confidence import SCORES, Confidence, Sureness
from lamina.continual import ContinualModel
from lamina.data.folder import labelled_folder
from lamina.data.incoming import Incoming, batches, expand, incoming
from lamina.errors import ConfigError, DataError
from lamina.heads.base import Head
from lamina.modelfile import ModelFile
from lamina.results.assessment import Assessment, assess


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        path: as given.
        top: (class, probability) pairs, most likely first; empty when the image could not be read.
        novelty: 0 is a typical known image, above 1 looks new; None without an image.
        novel: novelty is above 1; None where nothing was held out, so that no threshold is known.
        uncertainty: entropy of the prediction in nats, and its parts where the method draws; empty without an image.
        error: why the image could not be read.
    """

    path: str
    top: Sequence[tuple[str, float]] = ()
    novelty: float | None = None
    novel: bool | None = None
    uncertainty: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "path": self.path,
            "class": self.top[0][0] if self.top else None,
            "probability": self.top[0][1] if self.top else None,
            "top": [{"class": name, "probability": probability} for name, probability in self.top],
            "novelty": self.novelty,
            "novel": self.novel,
            "uncertainty": dict(self.uncertainty),
            "error": self.error,
        }


def predict(
    model: ContinualModel,
    arguments: Sequence[str],
    stdin: Iterable[str] | None = None,
    *,
    top: int = 3,
    batch: int = 64,
    score: str = SCORES[0],
    also: Sequence[str] = (),
) -> Iterator[Prediction]:
    """Yield a prediction per image, in order, while later images are still being decoded.

    Args:
        arguments: files, folders, glob patterns; "-" for paths on `stdin`.
        top: how many classes to name.
        batch: images that go through the model together; it changes the speed, not the result.
        score: which novelty to tell.
        also: further classes to choose from by their names alone.

    Raises:
        ConfigError: when `also` is asked of a method that cannot score a class by its name.
    """
    known = model.confidence.scale(score) is not None
    head = _beside(model, also) if also else None
    names = [*model.classes, *(name for name in dict.fromkeys(also) if name not in model.classes)]
    return _predictions(model, arguments, stdin, names, head, known, top=top, batch=batch, score=score)


def _beside(model: ContinualModel, names: Sequence[str]) -> Head:
    """Return a head that scores further classes by their names, behind those that were learned."""
    head = model.model.head.preview(names)
    if head is None:
        raise ConfigError(
            f"{model.method} needs images of a class, so it cannot tell {', '.join(names)} by name; a model made with "
            "--method zero-shot, coop or another for CLIP can"
        )
    return head


def _predictions(
    model: ContinualModel,
    arguments: Sequence[str],
    stdin: Iterable[str] | None,
    names: Sequence[str],
    head: Head | None,
    known: bool,
    *,
    top: int,
    batch: int,
    score: str,
) -> Iterator[Prediction]:
    images = incoming(expand(arguments, stdin), model.plain, model.spec.max_side)
    for group in batches(images, batch):
        said = _said(model, group, head)
        for item in group:
            if item.pixels is None:
                yield Prediction(item.path, error=item.error)
                continue
            probabilities, novelty, unsure = next(said)
            best = probabilities.topk(min(top, len(names)))
            pairs = [(names[column], p) for column, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
            new = float(novelty[score])
            yield Prediction(item.path, pairs, new, new > 1 if known else None, unsure)


def _said(
    model: ContinualModel, group: Sequence[Incoming], head: Head | None
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, float]]]:
    pixels = [item.pixels for item in group if item.pixels is not None]
    if not pixels:
        return
    said = model.judge(torch.stack(pixels), head)
    for place in range(len(pixels)):
        novelty = {name: values[place] for name, values in said.novelty.items()}
        unsure = {name: float(values[place]) for name, values in said.uncertainty.items()}
        yield said.probabilities[place], novelty, unsure


def evaluate(model: ContinualModel, file: ModelFile, folder: Path, *, skip_broken: bool = False) -> Assessment:
    """Classify FOLDER/CLASS/* and compare; classes that the model does not know measure its novelty scores.

    Raises:
        DataError: when the folder has none of the model's classes, or an image cannot be read.
    """
    names, files = labelled_folder(folder, model.spec.max_side)
    columns = {name: column for column, name in enumerate(model.classes)}
    if not any(name in columns for name in names):
        raise DataError(f"{folder} has no class that the model knows; it knows {', '.join(model.classes)}")
    labels = np.array([columns.get(name, -1) for name in names])[files.labels]
    parts: list[Sureness] = []
    good: list[int] = []
    place = 0
    for group in batches(incoming(iter(files.paths), model.plain, model.spec.max_side), 64):
        for item in group:
            if item.pixels is not None:
                good.append(place)
            elif not skip_broken:
                raise DataError(f"{item.path} cannot be read: {item.error}; mend it, or leave it out by --skip-broken")
            place += 1
        pixels = [item.pixels for item in group if item.pixels is not None]
        if pixels:
            parts.append(model.judge(torch.stack(pixels)))
    if not good:
        raise DataError(f"no image in {folder} can be read")
    labels = labels[good]
    probabilities = torch.cat([part.probabilities for part in parts]).numpy()
    novelty = {name: torch.cat([part.novelty[name] for part in parts]).numpy() for name in SCORES}
    unsure = {name: torch.cat([part.uncertainty[name] for part in parts]).numpy() for name in parts[0].uncertainty}
    known = labels >= 0
    return assess(
        model=facts(file),
        protocol={
            "images": int(known.sum()),
            "unknown_images": int((~known).sum()),
            "unknown_classes": [name for name in names if name not in columns],
            "skipped_images": place - len(good),
            "image_size": model.spec.size,
            "precision": model.precision,
            "test_batch": "independent",  # a kept model whose predictions were not is refused
            "temperature": model.confidence.temperature,
        },
        classes=model.classes,
        class_tasks=file.class_tasks,
        task_names=[lesson.name for lesson in model.lessons],
        labels=labels[known],
        probabilities=probabilities[known],
        novelty={name: values[known] for name, values in novelty.items()},
        thresholds={name: 1.0 for name in SCORES if model.confidence.scale(name) is not None},
        unknown_novelty={name: values[~known] for name, values in novelty.items()} if (~known).any() else None,
        uncertainty={name: values[known] for name, values in unsure.items()},
        unknown_uncertainty={name: values[~known] for name, values in unsure.items()},
    )


def facts(file: ModelFile) -> dict[str, Any]:
    """Return what a model file says of itself; needs no backbone."""
    return {
        "method": file.method,
        "settings": file.settings,
        "backbone": file.backbone,
        "precision": file.precision,
        "seed": file.seed,
        "checksum": file.checksum,
        "classes": file.classes,
        "temperature": Confidence(**file.confidence).temperature,
        "lessons": [lesson.model_dump() for lesson in file.lessons],
    }


def room(model: ContinualModel) -> list[dict[str, Any]]:
    """Return, per block, how many directions old tasks use, of how many, and the share of their energy in those."""
    return [
        {"block": room.layer, "what": room.what, "used": room.used, "of": room.size, "energy_kept": room.kept}
        for protection in model.learner.protections
        for room in protection.room()
    ]
