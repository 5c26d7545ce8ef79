"""The classification loss, over the columns that compete."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lamina.data.stream import Task, places
from lamina.learner import Phase


def classify(logits: Tensor, labels: Tensor, task: Task, phase: Phase) -> Tensor:
    """Return the mean cross-entropy in float32.

    Args:
        logits: (B, C), or (S, B, C) from a head that draws; then the loss is averaged over draws.
        labels: (B,), columns.
        task: whose columns compete when the phase says `classes="task"`.
    """
    logits = logits.float() / phase.temperature
    if phase.classes == "task":
        logits, labels = logits[..., list(task.columns)], places(labels, task.columns)
    if logits.ndim == 3:
        labels = labels.expand(len(logits), -1).flatten()
        logits = logits.flatten(0, 1)
    return F.cross_entropy(logits, labels)
