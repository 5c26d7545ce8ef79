"""CLIP-Adapter: a small residual bottleneck on the frozen features of images, or of class names, or of both.

The classifier is CLIP's own, from templates. The bottleneck is kept from task to task; the released code of its
continual use makes a new one for each (`reinit_each_task`), and so learns old classes from kept images alone.

The defaults are the paper's formula and ratio, with rate and passes for few images. The authors' code has a second ReLU
(`final_relu`), and its continual use trains by SGD (`optimizer`, `momentum`, `weight_decay`).

Shared parts, in reading order:
    bottleneck          lamina.heads.adapter.Adapter
    classifier          lamina.heads.adapter.AdapterHead
    texts               lamina.heads.texts.HandTexts; templates by name: lamina.heads.templates
    plan of training    lamina.methods.by_name.ByName

References:
    Gao et al., CLIP-Adapter: Better Vision-Language Models with Feature Adapters, 2021, section 3; the repository
    gaopengcuhk/CLIP-Adapter. Jha et al., CLAP4CLIP, NeurIPS 2024: its continual use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from lamina.backbones.tower import Tower
from lamina.heads.adapter import Adapter, AdapterHead
from lamina.heads.templates import templates_of
from lamina.heads.texts import HandTexts, text_side
from lamina.learner import Learner, Phase
from lamina.methods.by_name import ByName
from lamina.model import PromptedModel


class ClipAdapter(ByName):
    """Settings; bottleneck and ratio are the paper's, passes and batches those of its continual use."""

    templates: str | list[str] = Field(
        "photo", description="what is said of a class: a set by name, a template with one {}, or several"
    )
    ratio: float = Field(0.2, ge=0, le=1, description="how much of an image's features comes from the bottleneck")
    text_ratio: float = Field(0.0, ge=0, le=1, description="the same of a class name's; 0 leaves names as they are")
    reduction: int = Field(4, ge=1, description="the bottleneck is so many times narrower than the features")
    final_relu: bool = Field(False, description="let nothing below zero out of the bottleneck, as the released code")
    reinit_each_task: bool = Field(False, description="begin every task with a new bottleneck")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD with momentum")
    lr: float = Field(0.001, gt=0, description="learning rate, falling to 0 by a cosine")
    weight_decay: float = Field(0.01, ge=0, description="of the optimizer")

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        if self.optimizer == "adamw":
            idle["momentum"] = "with optimizer=adamw, which has two of its own"
        if not self.ratio and not self.text_ratio:
            others = set(ClipAdapter.model_fields) - {"templates", "names", "ratio", "text_ratio"}
            idle |= dict.fromkeys(others, "where ratio and text_ratio are 0, since nothing is learned")
        return idle

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when it has no text side, or a template no place for a name.
        """
        texts = HandTexts(text_side(tower, "clip-adapter"), templates_of(self.templates), self.names)
        images, names = (
            Adapter(tower.features, ratio, reduction=self.reduction, final_relu=self.final_relu) if ratio else None
            for ratio in (self.ratio, self.text_ratio)
        )
        head = AdapterHead(texts, images=images, names=names, reset=self.reinit_each_task, negatives=self.competing)
        return self.learner(PromptedModel(tower, None, head), cache="features")

    def planned(self, *arguments: Any) -> Sequence[Phase]:
        """Return a phase, or none where there is nothing to learn."""
        return super().planned(*arguments) if self.ratio or self.text_ratio else []

    def descent(self, lr: float) -> Callable[[list[nn.Parameter]], Optimizer]:
        """Return what makes the optimizer."""
        if self.optimizer == "adamw":
            return partial(torch.optim.AdamW, lr=lr, weight_decay=self.weight_decay)
        return partial(torch.optim.SGD, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay)
