"""VPT-deep, trained on one task after another: prompts without protection (VPT-Seq).

Every block of the frozen tower has prompt tokens of its own. They are shared by all tasks and each
task trains them on; the classifier gets a block of columns per task, and keeps the old ones as they
are.

Shared parts, in reading order:
    prompts              lamina.prompts.deep.DeepPrompts
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of

References:
    Jia et al., Visual Prompt Tuning, ECCV 2022, section 3.2.
    Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024: the training
    settings, and the name VPT-Seq.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.config import Settings
from lamina.data.stream import Task
from lamina.heads.choose import HeadName, head_of
from lamina.learner import Learner, Phase, refinement
from lamina.model import PromptedModel
from lamina.prompts.deep import DeepPrompts
from lamina.schedules import steps_down


class VPTDeep(Settings):
    """Settings; the defaults are those of Lu et al. for ten tasks of CIFAR-100 on a ViT-B/16."""

    length: int = Field(4, ge=0, description="prompt tokens in each block (M); 0 trains the classifier alone")
    epochs: int = Field(
        100,
        ge=1,
        description="passes over a task's images; the paper's code writes 10, of a set repeated 10 times",
    )
    batch_size: int = Field(256, ge=1, description="images in one step, over all devices")
    lr: float = Field(
        0.01, gt=0, description="learning rate of Adam, divided by 10 after 0.5 and again after 0.8 of a task"
    )
    weight_decay: float = Field(
        5e-5, ge=0, description="of Adam; it joins the gradient, and is projected with it where steps are"
    )
    temperature: float = Field(28.0, gt=0, description="divides the logits in the loss")
    head: HeadName = Field(
        "linear",
        description="classifier: a layer per task, the same by cosine, class statistics, or layers balanced on draws",
    )
    layers: int = Field(1, ge=1, description="from how many of the last blocks the classifier reads, side by side")

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        prompts = DeepPrompts(range(tower.depth), self.length, tower.width)
        head = head_of(self.head, self.layers * tower.features)
        return Learner(PromptedModel(tower, prompts, head, layers=self.layers), self.phases, refine=self.refine)

    def refine(self, task: Task) -> Sequence[Phase]:
        """Balance the head over all classes, if it is of the kind that is balanced."""
        return [refinement()] if self.head == "refined" else []

    def phases(self, task: Task) -> Sequence[Phase]:
        """Train once on each task; only its own classes compete in the loss."""
        # With one class there is nothing to tell apart, and decay alone would wear the prompts down.
        return [self.phase()] if len(task.classes) > 1 else []

    def phase(self) -> Phase:
        """Return how a task is trained on."""
        return Phase(
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=partial(torch.optim.Adam, lr=self.lr, weight_decay=self.weight_decay),
            classes="task",
            temperature=self.temperature,
            schedule=steps_down(at=(0.5, 0.8), by=0.1),
        )
