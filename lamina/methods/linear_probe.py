"""Linear probe: a classifier on frozen features that grows by a block of columns per task.

The tower looks at each image once and its features are kept, so training takes seconds. It says what
prompts add to the frozen model. VPT's "Linear" is this method with `optimizer=sgd warm_up=0.1 epochs=100
batch_size=1024 head_start=kaiming` and rates from its grid: 50 to 0.05, times 4 for so many images a step.

Shared parts, in reading order:
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan                 lamina.methods.tuned.Tuned

References:
    Jia et al., Visual Prompt Tuning, ECCV 2022, table 1 (Linear).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from lamina.backbones.tower import Tower
from lamina.learner import Learner
from lamina.methods.tuned import Tuned
from lamina.model import PromptedModel


class LinearProbe(Tuned):
    """Settings; the defaults are ours."""

    epochs: int = Field(50, ge=1, description="passes over a task's features")
    warm_up: float = Field(0.0, ge=0, lt=1, description="share of training in which the learning rate rises")
    batch_size: int = Field(256, ge=1, description="features in one step, over all devices")
    optimizer: Literal["adam", "sgd", "adamw"] = Field(  # type: ignore[assignment]  # one more than others have
        "adam", description="Adam, SGD with momentum 0.9, or AdamW"
    )
    lr: float = Field(
        0.001, gt=0, description="learning rate at its highest, not scaled by anything; then it falls along a cosine"
    )
    weight_decay: float = Field(
        0.0, ge=0, description="of all weights with Adam, else of matrices; with AdamW it does not join the gradient"
    )
    head_start: Literal["kaiming", "small"] = Field(
        "small", description="of a linear layer: deviation 0.02; or (2 / classes)^0.5 and bias -ln 99, as VPT has it"
    )

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        return self.learner(PromptedModel(tower, None, self.head_for(tower.features)), cache="features")

    def descent(self, slow: Iterable[nn.Parameter] = (), by: float = 1.0) -> Callable[[list[nn.Parameter]], Optimizer]:
        """Return what makes the optimizer; with Adam one group for all, as this method has always had it."""
        if self.optimizer == "adam":
            return partial(torch.optim.Adam, lr=self.lr, weight_decay=self.weight_decay)
        return super().descent(slow, by)
