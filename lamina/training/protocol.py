"""Under which protocol a run is measured, in words and numbers for its record."""

from __future__ import annotations

from typing import Any

from lamina.data.stream import Stream
from lamina.data.transforms import InputSpec
from lamina.data.views import in_words
from lamina.learner import Learner
from lamina.training.kind import Kind


def protocol(
    run: Any, stream: Stream, learner: Learner, spec: InputSpec, kind: Kind, precision: str
) -> dict[str, str | int | float]:
    """Return what a reader of a run's numbers must know; what is as usual is often not said.

    Args:
        run: its `lamina.runs.RunSettings`.
        precision: of the frozen tower.
    """
    return {
        "kind": "joint" if learner.at_once else _kind(stream),
        **kind.protocol(),
        **stream.details,
        **({"online": "one pass"} if run.online else {}),
        **({"most_steps": run.most_steps} if run.most_steps is not None else {}),
        **({"memory": str(learner.memory)} if learner.memory is not None else {}),
        "tasks": len(stream),
        "classes": stream.columns,
        "train_images": sum(len(task.train) for task in stream),
        "test_images": sum(len(task.test) for task in stream),
        "tested_on": stream.tested_on,
        "image_size": spec.size,
        **({"normalization": run.normalization} if run.normalization != "backbone" else {}),
        "augmentation": in_words(run.views, run.augmentation, learner.cache == "features"),
        "precision": precision,
        **_test_batch(learner.model.transductive, run.eval_batch),
        "skipped_images": stream.skipped,
    }


def _kind(stream: Stream) -> str:
    return "one task" if len(stream) == 1 and stream.kind == "class-incremental" else stream.kind


def _test_batch(transductive: bool, size: int) -> dict[str, str | int]:
    """Return what a reader must know of the batches that test images came in: their size, where it may matter."""
    return {"test_batch": "transductive", "test_batch_size": size} if transductive else {"test_batch": "independent"}
