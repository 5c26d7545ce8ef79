"""The plan of training that methods for transfer learning share: warm-up, a cosine, one rate for all or two.

VPT and what followed it train with SGD for a hundred passes; the learning rate rises through the first ten. A learning
rate here is the one that the optimizer gets: VPT's scripts multiply theirs by batch_size / 256. Biases and numbers,
such as gates, are not worn down. The rise begins at a tenth of the rate; `legacy_warmup` begins at 0 and changes the
rate once a pass, as the released code does, so that its first pass changes nothing.

References:
    Jia et al., Visual Prompt Tuning, ECCV 2022, appendix; the authors' repository KMnP/vpt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from lamina.config import Settings
from lamina.data.stream import Task
from lamina.heads.base import Head
from lamina.heads.choose import HeadName, head_of
from lamina.heads.linear import LinearHead
from lamina.learner import Learner, Phase, refinement
from lamina.model import PromptedModel
from lamina.schedules import Schedule, by_epoch, cosine, rising


class Tuned(Settings):
    """Settings of the plan; the defaults are VPT's for prompts, with the rate of its runs of 64 images a step."""

    epochs: int = Field(100, ge=1, description="passes over a task's images")
    warm_up: float = Field(0.1, ge=0, lt=1, description="share of training in which the learning rate rises")
    legacy_warmup: bool = Field(
        False, description="rise from 0 and change the rate once a pass, as the released code does"
    )
    batch_size: int = Field(64, ge=1, description="images in one step, over all devices")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="SGD with momentum 0.9, or AdamW")
    lr: float = Field(
        0.25, gt=0, description="learning rate at its highest, not scaled by anything; then it falls along a cosine"
    )
    weight_decay: float = Field(
        0.001, ge=0, description="of prompts and matrices; with SGD it joins the gradient, with AdamW it does not"
    )
    clip_norm: float = Field(0.0, ge=0, description="longest gradient a step may use, all together; 0 does not clip")
    temperature: float = Field(1.0, gt=0, description="divides the logits in the loss")
    head: HeadName = Field(
        "linear",
        description="classifier: a layer per task, the same by cosine, class statistics, or layers balanced on draws",
    )
    head_start: Literal["kaiming", "small"] = Field(
        "kaiming", description="of a linear layer: deviation (2 / classes)^0.5 and bias -ln 99, as VPT has it; or 0.02"
    )

    def head_for(self, features: int) -> Head:
        """Return a new classifier of features (B, F)."""
        return head_of(self.head, features, partial(LinearHead, start=self.head_start))

    def learner(self, model: PromptedModel, **options: Any) -> Learner:
        """Return a learner of a model with this plan."""
        return Learner(model, self.phases, refine=self.refine, **options)

    def refine(self, task: Task) -> Sequence[Phase]:
        """Balance the head over all classes, if it is of the kind that is balanced."""
        return [refinement()] if self.head == "refined" else []

    def phases(self, task: Task) -> Sequence[Phase]:
        """Train once on each task; only its own classes compete in the loss."""
        return [self.phase()] if len(task.classes) > 1 else []  # with one class there is nothing to tell apart

    def phase(self, slow: Iterable[nn.Parameter] = (), by: float = 1.0) -> Phase:
        """Return how a task is trained on; `slow` parameters learn at `by` times the learning rate."""
        return Phase(
            self.epochs,
            self.batch_size,
            self.descent(slow, by),
            "task",
            self.temperature,
            self.schedule(),
            clip_norm=self.clip_norm or None,
        )

    def schedule(self) -> Schedule:
        """Return the factor of the learning rate over training."""
        if self.legacy_warmup:
            return by_epoch(rising(self.warm_up, cosine()), self.epochs)
        return rising(self.warm_up, cosine(), start=0.1)

    def descent(self, slow: Iterable[nn.Parameter] = (), by: float = 1.0) -> Callable[[list[nn.Parameter]], Optimizer]:
        """Return what makes the optimizer: a group for each of the two rates, with and without decay."""
        kind: Any = {
            "sgd": partial(torch.optim.SGD, momentum=0.9, fused=True),
            "adamw": partial(torch.optim.AdamW, eps=1e-6, fused=True),
        }[self.optimizer]

        def make(parameters: list[nn.Parameter]) -> Optimizer:
            late = {id(parameter) for parameter in slow}
            groups = []
            for held in (False, True):
                rate = self.lr * by if held else self.lr
                for matrix in (True, False):
                    part = [p for p in parameters if (p.ndim > 1) == matrix and (id(p) in late) == held]
                    groups.append({"params": part, "lr": rate, "weight_decay": self.weight_decay if matrix else 0.0})
            return kind([group for group in groups if group["params"]], lr=self.lr)

        return make


class Baseline(Tuned):
    """Settings of what VPT compares prompts with: many images a step, AdamW, decay as their code has it."""

    warm_up: float = Field(0.05, ge=0, lt=1, description="share of training in which the learning rate rises")
    batch_size: int = Field(384, ge=1, description="images in one step, over all devices")
    optimizer: Literal["sgd", "adamw"] = Field("adamw", description="SGD with momentum 0.9, or AdamW")
    weight_decay: float = Field(0.01, ge=0, description="of matrices; with SGD, not AdamW, it joins the gradient")
