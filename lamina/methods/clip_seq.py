"""CLIP-Seq: prompts in the first blocks of the image tower, trained on one task after another; texts are fixed.

Each of the first blocks has prompt tokens that all tasks learn, beside the scale of cosines; nothing protects them.
Class weights are what the frozen text tower makes of templates, so a class needs no image to be named. `refine = true`
adds what the authors do for CLIP-NSP²: after each task, a copy of the projection to the space of texts is balanced on
features drawn from a Gaussian per class, over all classes met so far. Whether their numbers for CLIP-Seq are with it,
they do not say.

Shared parts, in reading order:
    prompts              lamina.prompts.deep.DeepPrompts
    texts                lamina.heads.texts.HandTexts; templates by name: lamina.heads.templates
    classifier           lamina.heads.text.TextHead, or lamina.heads.projected.ProjectedTextHead

References:
    Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024: the variant for CLIP without
    its projection; VPTinNSforCL at 0d9c547.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from lamina.backbones.tower import Tower
from lamina.config import Settings
from lamina.data.memory import Memory
from lamina.data.stream import Task
from lamina.heads.projected import ProjectedTextHead
from lamina.heads.templates import templates_of
from lamina.heads.text import TextHead
from lamina.heads.texts import HandTexts, text_side
from lamina.learner import Learner, Phase, decaying, refinement
from lamina.model import PromptedModel
from lamina.prompts.deep import DeepPrompts
from lamina.schedules import steps_down


class CLIPSeq(Settings):
    """Settings; the defaults are those of the released code for ten tasks of CIFAR-100, and of the paper for decay."""

    backbone: ClassVar[str] = "lamina:clip-nano"
    called: ClassVar[str] = "clip-seq"

    length: int = Field(4, ge=0, description="prompt tokens in each block (M); 0 trains the scale of cosines alone")
    blocks: int = Field(
        4, ge=1, description="so many of the first blocks have prompts; the paper says 3, its code has 4"
    )
    templates: str | list[str] = Field(
        "cifar", description="what is said of a class: a set by name, a template with one {}, or several"
    )
    names: dict[str, str] = Field({}, description="what to read instead of a class's own name")
    memory: int = Field(
        0,
        ge=0,
        description="old training images kept of each class, to be learned from again; all classes compete then",
    )
    epochs: int = Field(
        20, ge=1, description="passes over a task's images; the paper's code writes 10, of a set repeated twice"
    )
    batch_size: int = Field(220, ge=1, description="images in one step, over all devices")
    lr: float = Field(
        0.001, gt=0, description="learning rate of Adam, divided by 10 after 0.5 and again after 0.8 of a task"
    )
    weight_decay: float = Field(5e-5, ge=0, description="of prompts, by Adam; it joins the gradient")
    refine: bool = Field(False, description="balance a copy of the image projection after each task, on draws")
    refine_epochs: int = Field(50, ge=1, description="passes over the draws, anew each time")
    refine_draws: int = Field(256, ge=1, description="features drawn of each class for one pass")

    def idle(self) -> dict[str, str]:
        return {} if self.refine else dict.fromkeys(("refine_epochs", "refine_draws"), "with refine=false")

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when it has no text side, or a template no place for a name.
        """
        texts = HandTexts(text_side(tower, self.called), templates_of(self.templates), self.names)
        bare, projection = tower.unprojected() if self.refine else (tower, None)
        make = partial(ProjectedTextHead, features=bare.features, projection=projection) if self.refine else TextHead
        head = make(texts, learn_scale=True)  # names cost nothing; which compete is said by a phase
        prompts = DeepPrompts(range(min(self.blocks, tower.depth)), self.length, tower.width)
        memory = Memory(per_class=self.memory) if self.memory else None
        return Learner(PromptedModel(bare, prompts, head), self.phases, refine=self.balanced, memory=memory)

    def phases(self, task: Task) -> Sequence[Phase]:
        """Train once on each task, and on old images where there are any."""
        if len(task.classes) < 2 and not (self.memory and task.index):
            return []  # there is nothing to tell apart
        adam, schedule = decaying(torch.optim.Adam, self.weight_decay, lr=self.lr), steps_down(at=(0.5, 0.8), by=0.1)
        if self.memory:
            return [Phase(self.epochs, self.batch_size, adam, "seen", schedule=schedule, data="task+memory")]
        return [Phase(self.epochs, self.batch_size, adam, schedule=schedule)]

    def balanced(self, task: Task) -> Sequence[Phase]:
        """Balance the projection over all classes, if that is asked for."""
        if not self.refine or (len(task.classes) < 2 and not task.index):
            return []
        sgd = decaying(torch.optim.SGD, 1e-4, lr=1e-3, momentum=0.9, nesterov=True)
        phase = refinement(self.refine_epochs, self.refine_draws)
        return [replace(phase, optimizer=sgd, parameters=_projection)]


def _projection(model: PromptedModel) -> list[nn.Parameter]:
    return list(model.head.get_submodule("projection").parameters())
