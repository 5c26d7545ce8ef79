"""Linear probe: a classifier on frozen features that grows by a block of columns per task.

The tower looks at each image once and its features are kept, so training takes seconds. It says what
prompts add to the frozen model.

Shared parts, in reading order:
    classifier           lamina.heads.linear.LinearHead
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.config import Settings
from lamina.data.stream import Task
from lamina.heads.linear import LinearHead
from lamina.learner import Learner, Phase
from lamina.model import PromptedModel
from lamina.schedules import cosine


class LinearProbe(Settings):
    """Settings."""

    epochs: int = Field(50, ge=1, description="passes over a task's features")
    batch_size: int = Field(256, ge=1, description="features in one step, over all devices")
    lr: float = Field(0.001, gt=0, description="learning rate of Adam at the start; it falls along half a cosine")
    weight_decay: float = Field(0.0, ge=0, description="of Adam; it joins the gradient")
    temperature: float = Field(1.0, gt=0, description="divides the logits in the loss")

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        return Learner(PromptedModel(tower, None, LinearHead(tower.features)), self.phases, cache="features")

    def phases(self, task: Task) -> Sequence[Phase]:
        """Train once on each task; only its own classes compete in the loss."""
        return [
            Phase(
                epochs=self.epochs,
                batch_size=self.batch_size,
                optimizer=partial(torch.optim.Adam, lr=self.lr, weight_decay=self.weight_decay),
                classes="task",
                temperature=self.temperature,
                schedule=cosine(),
            )
        ]
