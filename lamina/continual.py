"""A model that keeps learning: one lesson after another, in memory.

`lessons.py` keeps it in a file, `estimator.py` gives it scikit-learn's manners; the loop is the one that
runs streams. A lesson is the next task of a stream, of which only its own images are there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor

from lamina.audit import Lesson, now
from lamina.backbones.load import load_backbone
from lamina.confidence import Confidence, Sureness, entropy, gaussians, learn_confidence, sureness
from lamina.config import read_toml
from lamina.data.material import GONE, Material
from lamina.data.stream import Stream, Task
from lamina.data.transforms import InputSpec, Transform, still_of, transform
from lamina.drift import lesson_drift
from lamina.errors import ConfigError, DataError, LaminaError, ModelFileError
from lamina.heads.base import Head
from lamina.heads.moments import ClassStatistics
from lamina.learner import Learner, check_lessons
from lamina.model import Batch, Output, PromptedModel
from lamina.modelfile import ModelFile
from lamina.registry import default_backbone, method_class
from lamina.seeds import seed_at
from lamina.training.evaluation import averaged, scores
from lamina.training.feed import Feed
from lamina.training.launch import Precision, tower_dtype
from lamina.training.progress import Progress
from lamina.training.trainer import Trainer

#: steps between checkpoints: what Ctrl-C or a crash can cost at most
_CHECKPOINT_EVERY = 20

#: so many images at most does the drift get measured on
_DRIFT_IMAGES = 100


def lesson_settings(method: str) -> dict[str, Any]:
    """Return what lessons change in the defaults of a method."""
    return read_toml(Path(__file__).with_name("lessons.toml")).get(method, {})


class ContinualModel:
    """A frozen backbone, a method, and what it has learned so far.

    Args:
        method, backbone: names, as in `lamina list`; None takes the method's own backbone.
        settings: of the method; what is not given is as `lesson_settings` or its defaults have it.
        seed: of everything random in training.
        precision: of the frozen tower.
        augmentation: name of the transform of training images.
        accelerator: where to compute: "auto", "cpu" or "cuda".

    Attributes:
        lessons: the audit trail, a line per task.
        run: facts that whoever keeps the model adds to its file; JSON.
        spec: the pixels that the backbone takes.

    Raises:
        ConfigError: when a name or a setting is wrong, or the method cannot learn in lessons (`check_lessons`).
    """

    def __init__(
        self,
        method: str = "strata",
        backbone: str | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        seed: int = 0,
        precision: Precision = "auto",
        augmentation: str = "crop-flip",
        accelerator: str = "auto",
        _empty: bool = False,
    ) -> None:
        self.method, self.seed, self.augmentation = method, seed, augmentation
        self.settings = method_class(method)(**{**lesson_settings(method), **(settings or {})})
        self.fabric = Fabric(accelerator=accelerator, devices=1)
        dtype = tower_dtype(precision, self.fabric.device)
        self.precision = str(dtype).removeprefix("torch.")
        self.backbone = load_backbone(backbone or default_backbone(method_class(method)), dtype=dtype)
        self.spec = InputSpec(**self.backbone.pixels)
        self.run: dict[str, Any] = {}
        self.lessons: tuple[Lesson, ...] = ()
        self.confidence = Confidence()
        try:
            with torch.device("meta"):  # takes no memory, whatever the settings ask for
                built = self._fresh()[0]
        except RuntimeError as error:
            raise ConfigError(f"{method} cannot be made with these settings: {str(error).splitlines()[0]}") from None
        check_lessons(method, built)
        if not _empty:
            self.settings.heed(settings or {}, lesson_settings(method))
            self._use(*self._fresh())

    @classmethod
    def load(
        cls,
        file: ModelFile | Path | str,
        *,
        settings: Mapping[str, Any] | None = None,
        precision: Precision | None = None,
        accelerator: str = "auto",
    ) -> ContinualModel:
        """Take up a model where a file left it.

        Args:
            settings: what to change in the method's settings from now on.
            precision: None takes the one that the file was learned in.

        Raises:
            ModelFileError: when the file is broken or does not fit its method or backbone.
            ConfigError: when the backbone is not to be had, or a changed setting does not fit what was learned.
        """
        if not isinstance(file, ModelFile):
            file = ModelFile.read(Path(file))
        try:
            method_class(file.method)(**file.settings)
            confidence = Confidence(**file.confidence)
        except ConfigError as error:
            raise ModelFileError(f"the model file cannot be used here: {error}") from None
        out = cls(
            file.method,
            file.backbone["name"],
            settings={**file.settings, **(settings or {})},
            seed=file.seed,
            precision=precision or ("bf16" if file.precision == "bfloat16" else "32"),
            augmentation=file.run.get("augmentation", "crop-flip"),
            accelerator=accelerator,
            _empty=True,
        )
        found, wanted = out.backbone.fingerprint, file.backbone["fingerprint"]
        if found != wanted:
            raise ModelFileError(
                f"the model was learned on {file.backbone['name']} with fingerprint {wanted}; the one found here has "
                f"{found}: get the same weights again"
            )
        out.settings.heed(settings or {}, file.settings)
        out.run, out.lessons, out.confidence = dict(file.run), file.lessons, confidence
        if wrong := out._misfit(file):
            given = settings or {}
            if had := [f"{name}={value!r}" for name, value in file.settings.items() if given.get(name, value) != value]:
                raise ConfigError(f"{' or '.join(had)} shapes what was learned and has to stay: {wrong}")
            raise ModelFileError(wrong)
        learner, statistics = out._fresh()
        try:
            with torch.random.fork_rng(devices=[]):
                out._trainer(learner, statistics).adopt(out._past, file.learned, file.memory)
        except (LaminaError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ModelFileError(f"what the model file remembers does not fit {file.method}: {error}") from None
        out._use(learner, statistics)
        return out

    def _misfit(self, file: ModelFile) -> str | None:
        """Compare shapes with those of a model that takes no memory, lest a hostile file ask for too much."""
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            learner, _ = self._fresh()
            for task in self._past:
                learner.model.begin_task(task)
            wanted = {name: tuple(value.shape) for name, value in learner.model.learned().items()}
        found = {name: tuple(value.shape) for name, value in file.learned.items()}
        wrong = next((name for name in {**wanted, **found} if wanted.get(name) != found.get(name)), None)
        if wrong is None:
            return None
        shapes = [str(shapes.get(wrong, "nothing")) for shapes in (wanted, found)]
        return f"{self.method} with these settings has {shapes[0]} as {wrong!r}, the model file has {shapes[1]}"

    # ── what it knows ──────────────────────────────────────────────────────────────────────────────

    @property
    def classes(self) -> list[str]:
        """Names of the classes met so far, by column."""
        return list(dict.fromkeys(name for lesson in self.lessons for name in lesson.classes))

    @property
    def model(self) -> PromptedModel:
        """The network."""
        return self.learner.model

    @property
    def plain(self) -> Transform:
        """The way of an image to the pixels that the backbone takes."""
        return transform(still_of(self.augmentation), self.spec)

    def file(self) -> ModelFile:
        """Return all that was learned, ready to be written."""
        return ModelFile(
            method=self.method,
            settings=self.settings.model_dump(),
            backbone={"name": self.backbone.name, "fingerprint": self.backbone.fingerprint},
            precision=self.precision,
            seed=self.seed,
            run={**self.run, "augmentation": self.augmentation},
            confidence=self.confidence.model_dump(),
            lessons=self.lessons,
            learned={name: value.detach().cpu().clone() for name, value in self.model.learned().items()},
            memory=self._trainer(self.learner, self.statistics).memory(),
        )

    # ── predicting ─────────────────────────────────────────────────────────────────────────────────

    @torch.inference_mode()
    def judge(self, pixels: Tensor, head: Head | None = None) -> Sureness:
        """Return probabilities, novelty and uncertainty of images (B, 3, size, size), uint8, as `plain` makes them.

        Args:
            head: from `Head.preview`, for probabilities over further classes, too, and what is uncertain about these;
                novelty is as without.

        Raises:
            ConfigError: when nothing was learned yet.
        """
        if not self.lessons:
            raise ConfigError("this model knows no class yet; let it learn some first")
        logits, features = self._scored(Batch(self.fabric.to_device(self.plain.normalised(pixels))), self.model)
        draws = (head or self.model.head).eval().samples_of(features)
        said = sureness(logits, features, self._gaussians, self.confidence, draws)
        if head is not None:
            wider = averaged(Output(head(features).logits, {})).float() / self.confidence.temperature
            shares = wider.softmax(-1)
            said = Sureness(shares, said.novelty, {**said.uncertainty, "entropy": entropy(shares)})
        novelty, unsure = ({name: part.cpu() for name, part in parts.items()} for parts in said[1:])
        return Sureness(said.probabilities.cpu(), novelty, unsure)

    def _scored(self, batch: Batch, model: PromptedModel) -> tuple[Tensor, Tensor]:
        """Return logits (B, C) and features (B, F), with one run of the tower."""
        model.eval()
        features, _ = model.features(batch)
        return scores(model, batch._replace(features=features)), features

    # ── learning ───────────────────────────────────────────────────────────────────────────────────

    def learn(
        self,
        material: Material,
        *,
        name: str | None = None,
        existing: Literal["refuse", "extend"] = "refuse",
        base: str | None = None,
        work: Path | None = None,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Lesson:
        """Learn one more task; return its line of the audit trail. Nothing changes unless all goes well.

        Args:
            name: what to call the lesson.
            existing: what to do about classes that are known already: refuse them, or learn more of them.
            base: checksum of the file that this model came from, for the audit trail.
            work: folder of checkpoints, from which a lesson that was interrupted goes on.

        Raises:
            ConfigError: when a class is known already, or the task is one that the method or a protection cannot take.
            ResumeError: when `work` holds another lesson.
            TrainingError: when the loss is not finite.
            Stopped: when `should_stop` says so; the state is in `work`.
        """
        task = self._task(material, existing)
        identity = {
            "method": self.method,
            "settings": self.settings.model_dump(),
            "backbone": self.backbone.fingerprint,
            "precision": self.precision,
            "augmentation": self.augmentation,
            "images": material.fingerprint,
            "classes": list(material.names),
            "model file": base,
        }
        with torch.random.fork_rng(devices=[]):
            learner, statistics = self._fresh()
            trainer = self._trainer(
                learner,
                statistics,
                run_dir=work,
                checkpoint_every=_CHECKPOINT_EVERY,
                identity=identity,
                progress=progress,
            )
            past = self._trainer(self.learner, self.statistics)
            if not trainer.restore(Stream("lessons", [*self._past, task], 0, material.fingerprint)):
                trainer.adopt(self._past, self.model.learned(), past.memory())
            for protection in learner.protections:
                protection.check([task])
            trainer.should_stop = should_stop
            statistics.grow(max([len(self.classes) - 1, *task.columns]) + 1)
            trainer.learn(task, tasks=len(self.lessons) + 1)
            lesson, confidence = self._examined(task, material, name, base, trainer, statistics)
        self.lessons, self.confidence = (*self.lessons, lesson), confidence
        self._use(learner, statistics)
        return lesson

    def _task(self, material: Material, existing: str) -> Task:
        known = {name: column for column, name in enumerate(self.classes)}
        again = [name for name in material.names if name in known]
        if again and existing != "extend":
            same = " (from these very images)" if self.lessons[-1].data == material.fingerprint else ""
            raise ConfigError(
                f"the model knows {', '.join(map(repr, again))} already{same}; rename what is new, or give known "
                "classes further examples with --existing extend"
            )
        if not len(material.train):
            raise DataError("there is nothing to learn from: no image is left for training")
        columns = dict(known)
        for class_name in material.names:
            columns.setdefault(class_name, len(columns))
        order = sorted(material.names, key=columns.__getitem__)
        places = [columns[class_name] for class_name in material.names]
        task = Task(
            index=len(self.lessons),
            classes=order,
            columns=[columns[class_name] for class_name in order],
            train=material.split(material.train, places),
            test=material.split(material.held, places),
        )
        if len(order) < 2 and self.learner.model.head.looks_at == "nothing":
            raise ConfigError(
                f"{self.method} tells the classes of one lesson apart and learns nothing from one alone; got "
                f"{order[0]!r}. Add another class, or keep a model whose classifier is made of statistics: strata, "
                "ranpac, nearest-mean, or another method with head=statistics"
            )
        return task

    def _examined(
        self,
        task: Task,
        material: Material,
        name: str | None,
        base: str | None,
        trainer: Trainer,
        statistics: ClassStatistics,
    ) -> tuple[Lesson, Confidence]:
        """Look at the held-out images: how good, how sure, how new, how far moved."""
        model, feed = trainer.learner.model, trainer.feed
        with torch.inference_mode():
            parts = [(*self._scored(batch, model), batch.targets) for batch in feed.plain(task.test)]
            logits, features, labels = (
                (torch.cat(column).cpu() for column in zip(*parts, strict=True))
                if parts
                else (torch.zeros(0, max(task.columns) + 1), torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64))
            )
            confidence = learn_confidence(self.confidence, logits, features, labels, gaussians(statistics))
        drift = None
        if self.lessons:
            sample = task.test if len(task.test) else task.train
            drift = lesson_drift(
                self.model,
                model,
                feed.plain(sample.some(_DRIFT_IMAGES)),
                trainer.learner.protections,
                [protection.state_dict() for protection in self.learner.protections],
                self.statistics.spread(),
            )
        seconds = {stretch: round(trainer.seconds[stretch][task.index], 3) for stretch in ("train", "look_back")}
        lesson = Lesson(
            name=name,
            date=now(),
            method=self.method,
            classes=list(task.classes),
            columns=list(task.columns),
            images=len(task.train),
            held_out=len(task.test),
            skipped=material.skipped,
            seconds=None if "SOURCE_DATE_EPOCH" in os.environ else seconds,
            accuracy=float((logits.argmax(-1) == labels).double().mean()) if len(labels) else None,
            drift=drift,
            data=material.fingerprint,
            base=base,
        )
        return lesson, confidence

    # ── parts ──────────────────────────────────────────────────────────────────────────────────────

    def _fresh(self) -> tuple[Learner, ClassStatistics]:
        """Build the method, and what gathers class statistics: its head if that does so anyway, or an observer."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_at(self.seed, "build"))
            learner = self.settings.build(self.backbone.tower)
        return learner, learner.model.head.statistics or ClassStatistics(learner.model.width)

    def _use(self, learner: Learner, statistics: ClassStatistics) -> None:
        self.learner, self.statistics = learner, statistics
        self._gaussians = gaussians(statistics)

    def _trainer(self, learner: Learner, statistics: ClassStatistics, **arguments: Any) -> Trainer:
        feed = Feed.to(learner, self.fabric, self.spec, augmentation=self.augmentation, seed=self.seed)
        observers = [] if statistics is learner.model.head.statistics else [statistics]
        return Trainer(learner, feed, self.fabric, seed=self.seed, observers=observers, **arguments)

    @property
    def _past(self) -> list[Task]:
        """The lessons so far, as tasks whose images are gone."""
        return [Task(i, lesson.classes, lesson.columns, GONE, GONE) for i, lesson in enumerate(self.lessons)]
