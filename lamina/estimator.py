"""A model that keeps learning, with scikit-learn's manners.

`fit` and `partial_fit` learn, `predict`, `predict_proba`, `score` and `novelty` use what was learned. Nothing here
trains: `ContinualModel` does. What stands here is how images and labels of many kinds become what it takes.
"""

from __future__ import annotations

import operator
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score
from torch.utils.data import Dataset

from lamina.confidence import SCORES, Sureness
from lamina.continual import ContinualModel
from lamina.data.cache import cache_in
from lamina.data.folder import held_out
from lamina.data.given import Given, Labels, given, label_type, labels_of
from lamina.data.material import Material
from lamina.errors import ConfigError, DataError, unknown
from lamina.modelfile import ModelFile
from lamina.training.launch import Precision

#: images that go through the model together; it changes the speed, not the result
_BATCH = 64

#: parameters that are part of what was learned, and those that a further call may change
_KEPT, _CHANGED = ("method", "backbone", "seed", "augmentation"), ("settings", "precision", "accelerator")


class ContinualClassifier(ClassifierMixin, BaseEstimator):
    """An image classifier that learns one task after another and keeps what it knew.

    Every `partial_fit` is one task, of which no image is kept. Images `X` may be given as

    - a list of paths, or an array of them: read as `lamina predict` reads them;
    - a list of PIL images, arrays (h, w, 3) or (h, w), tensors (3, h, w) or (1, h, w), of any sizes;
    - an array (n, h, w, 3), or (n, h, w) in grey; a tensor (n, 3, h, w) or (n, 1, h, w);
    - a torch.utils.data.Dataset of images or of pairs (image, label), each of which is read once.

    Whole numbers count from 0 to 255, floats from 0 to 1. The same picture gets the same answer in whatever way it is
    given, except that large JPEGs are decoded at a reduced size when they come as paths.

    Labels are all whole numbers, all text, all booleans, or all floats without a fraction. The columns of
    `predict_proba` follow `classes_`: in order of arrival, and sorted among the classes that one call brought. A
    column therefore never moves when more is learned; after `fit`, or a single `partial_fit`, `classes_` is sorted as
    everywhere in scikit-learn.

    Args:
        method, backbone: names, as in `lamina list`; None takes the method's own backbone.
        settings: of the method; None takes the defaults for lessons. May be changed between calls, which changes the
            settings named and no others.
        seed: of everything random in training, and of which images are kept aside.
        precision: of the frozen backbone: "auto", "bf16" or "32".
        augmentation: name of the transform of training images.
        holdout: share of the images of each class that is kept aside to measure and calibrate; see
            `lamina.data.folder.held_out`.
        existing: "refuse" classes that are known already, or "extend" them with further images.
        accelerator: where to compute: "auto", "cpu" or "cuda".

    Attributes:
        classes_: (C,), labels in the order of their columns.
        lessons_: the audit trail, a dict per task.
        model_: the `ContinualModel` behind it; its classes are the labels as text.
    """

    def __init__(
        self,
        method: str = "strata",
        backbone: str | None = None,
        settings: Mapping[str, Any] | None = None,
        seed: int = 0,
        precision: Precision = "auto",
        augmentation: str = "crop-flip",
        holdout: float = 0.1,
        existing: Literal["refuse", "extend"] = "refuse",
        accelerator: str = "auto",
    ) -> None:
        self.method = method
        self.backbone = backbone
        self.settings = settings
        self.seed = seed
        self.precision = precision
        self.augmentation = augmentation
        self.holdout = holdout
        self.existing = existing
        self.accelerator = accelerator

    # ── learning ───────────────────────────────────────────────────────────────────────────────────

    def fit(self, X: Any, y: Any = None) -> Self:
        """Forget everything, then learn one task; when that fails, nothing is forgotten either.

        Args and errors are those of `partial_fit`.
        """
        return self._learn(X, y, None, anew=True)

    def partial_fit(self, X: Any, y: Any = None, classes: Any = None) -> Self:
        """Learn one task. When that fails, everything is as it was before.

        Args:
            y: (n,), a label per image; None takes those of a Dataset.
            classes: the labels that may occur in `y`, as a check; None lets all pass. A class gets its column when
                its first images arrive, so unlike elsewhere in scikit-learn, nothing need be announced.

        Raises:
            ConfigError: when a parameter is wrong or cannot be changed any more, a class is known already, or the task
                is too small for the method.
            DataError: when images or labels are not what they should be; both errors are ValueErrors.
            TrainingError: when the loss is not finite.
        """
        return self._learn(X, y, classes, anew=not self.__sklearn_is_fitted__())

    def _learn(self, X: Any, y: Any, classes: Any, *, anew: bool) -> Self:
        self._check_parameters(anew)
        images = given(X)
        if y is None and not isinstance(X, Dataset):
            raise DataError(
                f"{type(self).__name__} requires y to be passed, but the target y is None; only a Dataset brings labels"
            )
        found = Labels(y) if y is not None else None
        if found is not None and len(found.columns) != len(images):
            raise DataError(f"y must have a label for each image; got {len(found.columns)} for {len(images)} images")
        if not len(images):
            raise DataError("there is nothing to learn from: X has no image")
        with _kept_generators(), tempfile.TemporaryDirectory(prefix="lamina-", ignore_cleanup_errors=True) as work:
            model = self._model_to_teach(anew)
            with cache_in(Path(work)):
                kept = images.kept(model.spec.max_side)
                found = found or Labels(images.labels)
                self._check_labels(found, None if anew else model, classes)
                kept.labels = found.columns
                places = np.arange(len(kept))
                aside = held_out(found.columns, self.holdout, model.seed, [str(place) for place in places])
                material = Material(kept, found.names, train=places[~aside], held=places[aside])
                model.learn(material, existing=self.existing, base=None if anew else self._file().checksum)
        self.model_, self._type = model, found.type
        self._begun = {name: getattr(self, name) for name in (*_KEPT, *_CHANGED)}
        return self

    def _check_parameters(self, anew: bool) -> None:
        if self.existing not in ("refuse", "extend"):
            raise ConfigError(unknown("way to treat existing classes", str(self.existing), ("refuse", "extend")))
        if self.precision not in ("auto", "bf16", "32"):
            raise ConfigError(unknown("precision", str(self.precision), ("auto", "bf16", "32")))
        for name, kind, what in (("seed", operator.index, "a whole number"), ("holdout", float, "a number")):
            try:
                kind(getattr(self, name))
            except (TypeError, ValueError):
                raise ConfigError(f"{name} must be {what}; got {getattr(self, name)!r}") from None
        for name in () if anew else _KEPT:
            had, asked = self._begun[name], getattr(self, name)
            if asked != had:
                raise ConfigError(
                    f"the model was begun with {name} {had!r} and keeps it; got {asked!r}. Use fit, or another model"
                )

    def _model_to_teach(self, anew: bool) -> ContinualModel:
        """Return a new model, or the one there is; it is made again where a parameter was changed since."""
        if anew:
            return ContinualModel(
                self.method,
                self.backbone,
                settings=self.settings,
                seed=operator.index(self.seed),
                precision=self.precision,
                augmentation=self.augmentation,
                accelerator=self.accelerator,
            )
        if all(getattr(self, name) == self._begun[name] for name in _CHANGED):
            return self.model_
        return ContinualModel.load(
            self.model_.file(), settings=self.settings, precision=self.precision, accelerator=self.accelerator
        )

    def _check_labels(self, found: Labels, model: ContinualModel | None, classes: Any) -> None:
        if model is not None and found.type != self._type:
            raise DataError(f"labels must be {self._type}, as those learned so far; got {found.type}")
        if classes is not None:
            allowed = Labels(classes)
            if surplus := [name for name in found.names if name not in allowed.names or found.type != allowed.type]:
                raise DataError(f"y must have labels of `classes` alone; got {', '.join(surplus)}")
        known = [name for name in found.names if model is not None and name in model.classes]
        if known and self.existing == "refuse":
            raise ConfigError(
                f"the model knows {', '.join(known)} already; rename what is new, or give known classes further "
                "examples with existing='extend'"
            )

    # ── predicting ─────────────────────────────────────────────────────────────────────────────────

    def predict(self, X: Any) -> np.ndarray:
        """Return the most likely label of each image (n,); errors are those of `predict_proba`."""
        return self._labels(self._said(given(X)))

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return probabilities (n, C), float64, in the order of `classes_`.

        Raises:
            NotFittedError: when nothing was learned yet.
            DataError: when an image cannot be read.
        """
        probabilities = self._said(given(X)).probabilities.double()
        return (probabilities / probabilities.sum(1, keepdim=True)).numpy()

    def novelty(self, X: Any, score: str = SCORES[0]) -> np.ndarray:
        """Return how new images look (n,), float64: 0 is a typical known image, above 1 looks new.

        Raw scores, higher for newer, as long as no image was ever held out. Errors are those of `predict_proba`.

        Args:
            score: "mahalanobis", by distance from the classes, or "energy", by the scores of the classifier.
        """
        if score not in SCORES:
            raise ConfigError(unknown("novelty score", score, SCORES))
        return self._said(given(X)).novelty[score].double().numpy()

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return the accuracy, a fraction in [0, 1].

        Args:
            y: (n,), the right labels; None takes those of a Dataset.
        """
        images = given(X)
        predicted = self._labels(self._said(images))
        right = Labels(images.labels if y is None and isinstance(X, Dataset) else y).values
        return float(accuracy_score(right, predicted, sample_weight=sample_weight))

    @torch.inference_mode()
    def _said(self, images: Given) -> Sureness:
        model = self._fitted()
        ready, parts = images.ready(model.plain, model.spec.max_side), []
        while group := list(islice(ready, _BATCH)):
            parts.append(model.judge(torch.stack(group)))
        if not parts:
            return Sureness(torch.zeros(0, len(model.classes)), {name: torch.zeros(0) for name in SCORES})
        novelty = {name: torch.cat([part.novelty[name] for part in parts]) for name in SCORES}
        return Sureness(torch.cat([part.probabilities for part in parts]), novelty)

    def _labels(self, said: Sureness) -> np.ndarray:
        return self.classes_[said.probabilities.argmax(1).numpy()]

    # ── what it knows ──────────────────────────────────────────────────────────────────────────────

    @property
    def classes_(self) -> np.ndarray:
        """Labels (C,), in the order of their columns."""
        names = self._fitted().classes
        return labels_of(self._type, names)

    @property
    def lessons_(self) -> list[dict[str, Any]]:
        """The audit trail, a dict per task; classes are in text, as in the model file."""
        return [lesson.model_dump() for lesson in self._fitted().lessons]

    def _fitted(self) -> ContinualModel:
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(f"this {type(self).__name__} knows no class yet; call fit or partial_fit first")
        return self.model_

    def __sklearn_is_fitted__(self) -> bool:
        return "model_" in vars(self)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.three_d_array, tags.input_tags.string = False, True, True
        return tags

    # ── keeping it ─────────────────────────────────────────────────────────────────────────────────

    def save(self, path: Path | str) -> None:
        """Keep all that was learned in a model file, with which the command line can work as well.

        Raises:
            NotFittedError: when nothing was learned yet.
            StorageError: when it cannot be written; what was there before is still there.
        """
        self._file().write(Path(path))

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        precision: Precision | None = None,
        holdout: float = 0.1,
        existing: Literal["refuse", "extend"] = "refuse",
        accelerator: str = "auto",
    ) -> Self:
        """Take up a model file; one that `lamina learn` made has labels that are text.

        Args:
            precision: None takes the one that the file was learned in.
            holdout, existing: of what is learned from now on; a file does not keep them.

        Raises:
            ModelFileError: when the file is broken or does not fit its method or backbone.
            ConfigError: when the backbone is not to be had.
        """
        file = ModelFile.read(Path(path))
        with _kept_generators():
            model = ContinualModel.load(file, precision=precision, accelerator=accelerator)
        out = cls(
            method=file.method,
            backbone=file.backbone["name"],
            settings=file.settings,
            seed=file.seed,
            precision="bf16" if model.precision == "bfloat16" else "32",
            augmentation=model.augmentation,
            holdout=holdout,
            existing=existing,
            accelerator=accelerator,
        )
        out.model_, out._type = model, label_type(file.run.get("labels"), model.classes)
        out._begun = {name: getattr(out, name) for name in (*_KEPT, *_CHANGED)}
        return out

    def _file(self) -> ModelFile:
        file = self._fitted().file()
        return replace(file, run={**file.run, "labels": self._type})

    def __getstate__(self) -> dict[str, Any]:
        # the frozen backbone is not part of what was learned, and is looked up again
        state = dict(super().__getstate__())
        return {**state, "model_": self._file()} if self.__sklearn_is_fitted__() else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "model_" in state:
            with _kept_generators():
                model = ContinualModel.load(state["model_"], accelerator=state["accelerator"])
            state = {**state, "model_": model}
        super().__setstate__(state)


@contextmanager
def _kept_generators() -> Iterator[None]:
    """Leave torch's global generators as they were found, those of GPUs included where they are in use."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield
