"""What methods share that learn to tell classes apart by their names: who competes, old images, the plan of training.

Without old images only the classes of a task compete while it is learned: names that are nothing but negatives would
sink. With a memory of old images all classes met so far compete, and a stretch on the memory alone, in which each class
has as many images as any other, may close a task.

References:
    Jha et al., CLAP4CLIP: Continual Learning with Probabilistic Finetuning for Vision-Language Models, NeurIPS 2024:
    old images for CoOp, MaPLe and CLIP-Adapter, and the stretch on the memory at a tenth of the rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from lamina.config import Settings
from lamina.data.memory import Choice, Memory
from lamina.data.stream import Task
from lamina.learner import Learner, Phase
from lamina.model import PromptedModel
from lamina.schedules import Schedule, cosine


class ByName(Settings):
    """Settings of methods that compare images with the names of classes."""

    backbone: ClassVar[str] = "lamina:clip-nano"

    negatives: Literal["task", "seen"] = Field(
        "task", description="classes that compete in training: the task's own, or all met so far, as with a memory"
    )
    memory: int = Field(0, ge=0, description="old training images kept of each class, to be learned from again")
    memory_total: int = Field(0, ge=0, description="of all classes together, shared evenly; in place of memory")
    choose: Choice = Field("random", description="which images are kept")
    balance: int = Field(
        0, ge=0, description="passes over the memory alone after each task, at a tenth of the learning rate"
    )
    epochs: int = Field(5, ge=1, description="passes over a task's images")
    batch_size: int = Field(32, ge=1, description="images in one step, over all devices")
    lr: float = Field(0.002, gt=0, description="learning rate of SGD with momentum, falling to 0 by a cosine")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    names: dict[str, str] = Field({}, description="what to read instead of a class's own name")

    def idle(self) -> dict[str, str]:
        if not self.keeps:
            return dict.fromkeys(("balance", "choose"), "without a memory")
        idle = {"negatives": "with a memory, where all classes met so far compete"}
        return idle | ({"memory": "with memory_total"} if self.memory_total else {})

    @property
    def keeps(self) -> bool:
        """Whether there is a memory of old images."""
        return bool(self.memory or self.memory_total)

    @property
    def competing(self) -> Literal["task", "seen"]:
        """The classes that compete in training."""
        return "seen" if self.keeps else self.negatives

    def learner(self, model: PromptedModel, *, cache: Literal["off", "features"] = "off") -> Learner:
        """Return a model with this plan and this memory."""
        budget = {"total": self.memory_total} if self.memory_total else {"per_class": self.memory}
        memory = Memory(**budget, choose=self.choose) if self.keeps else None
        return Learner(model, self.phases, refine=self.refine, cache=cache, memory=memory)

    def phases(self, task: Task) -> Sequence[Phase]:
        """Train once on each task, and on old images where there are any."""
        return self.planned(task, self.epochs, self.lr, "task+memory" if self.keeps else "task")

    def refine(self, task: Task) -> Sequence[Phase]:
        """Close a task with the stretch on the memory, where one is asked for."""
        return self.planned(task, self.balance, self.lr / 10, "memory") if self.keeps and self.balance else []

    def descent(self, lr: float) -> Callable[[list[nn.Parameter]], Optimizer]:
        """Return what makes the optimizer."""
        return partial(torch.optim.SGD, lr=lr, momentum=self.momentum)

    def schedule(self, lr: float) -> Schedule:
        """Return the course of the learning rate `lr`."""
        return cosine()

    def planned(
        self, task: Task, epochs: int, lr: float, data: Literal["task", "task+memory", "memory"]
    ) -> Sequence[Phase]:
        """Return a phase, or none where there is nothing to tell apart."""
        if len(task.classes) < 2 and (self.competing == "task" or not task.index):
            return []
        step = self.descent(lr)
        return [Phase(epochs, self.batch_size, step, self.competing, schedule=self.schedule(lr), data=data)]
