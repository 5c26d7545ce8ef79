"""VPT-deep, trained on one task after another: prompts without protection (VPT-Seq).

Every block of the frozen tower has prompt tokens of its own. They are shared by all tasks and each
task trains them on; the classifier gets a block of columns per task, and keeps the old ones as they
are. Prompts may be stored in another width, be dropped in part, or be learned for the first blocks alone.

Shared parts, in reading order:
    prompts              lamina.prompts.deep.DeepPrompts
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of

References:
    Jia et al., Visual Prompt Tuning, ECCV 2022, section 3.2.
    Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024: the training
    settings, and the name VPT-Seq. Options: the code of Jia et al., KMnP/vpt.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.config import Settings
from lamina.data.stream import Task
from lamina.errors import ConfigError
from lamina.heads.choose import HeadName, head_of
from lamina.learner import Learner, Phase, refinement
from lamina.model import PromptedModel
from lamina.prompts.deep import DeepPrompts, DropoutMode, patch_bound
from lamina.schedules import steps_down


class InTurn(Settings):
    """Settings of plain deep prompts; the defaults are those of Lu et al. for ten tasks of CIFAR-100 on a ViT-B/16."""

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
        prompts, head = self.prompts_for(tower), head_of(self.head, self.layers * tower.features)
        model = PromptedModel(tower, prompts, head, layers=self.layers)
        return Learner(model, self.phases, refine=self.refine)

    def prompts_for(self, tower: Tower) -> DeepPrompts:
        """Return new prompts for a tower."""
        return DeepPrompts(range(tower.depth), self.length, tower.width)

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


class VPTDeep(InTurn):
    """Settings beside those; unless asked to, none of them changes anything."""

    depth: int = Field(0, ge=0, description="first blocks with prompts of their own, which travel on; 0: all blocks")
    projection: int = Field(0, ge=0, description="width of stored prompts, which one layer widens; 0: as they are used")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the numbers of prompts that are 0 in training")
    dropout_mode: DropoutMode = Field("per_sample", description="who has a mask of its own: each image, or each batch")
    start: Literal["unit", "patch"] = Field(
        "unit", description="prompts start uniform up to 1, or to (6 / (numbers in a patch + width))^0.5, as VPT has it"
    )

    def idle(self) -> dict[str, str]:
        return {} if self.dropout else {"dropout_mode": "where dropout is 0"}

    def prompts_for(self, tower: Tower) -> DeepPrompts:
        if self.depth > tower.depth:
            raise ConfigError(f"VPTDeep.depth must be at most {tower.depth}, the blocks there are; got {self.depth}")
        return DeepPrompts(
            range(self.depth or tower.depth),
            self.length,
            tower.width,
            bound=1.0 if self.start == "unit" else patch_bound(tower, self.projection or tower.width),
            onward=tower.depth if self.depth else None,
            projection=self.projection,
            dropout=self.dropout,
            dropout_mode=self.dropout_mode,
        )
