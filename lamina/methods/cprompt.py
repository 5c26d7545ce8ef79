"""CPrompt: prompts per task, and a classifier that is trained as it will be used.

Two things differ between training and evaluation where every task has prompts of its own. Test images may get the
wrong task's prompts; so the classifier learns from prompts of tasks drawn at random, while a second one, thrown
away after each task, teaches the prompts. And old columns compete in evaluation that had no say in training;
so prompts also learn to make old columns answer flatly on new images, unless new columns win already. Test
images find their prompts by a key for each class. Classifier and keys read the tower before its final norm.

The defaults are those of the authors' code for ten tasks of CIFAR-100, but for two: keys are drawn as classes come, not
for all classes in advance, so that their number need not be known; and weight decay leaves keys of old tasks alone.

Shared parts, in reading order:
    prompts              lamina.prompts.consistent.ConsistentPrompts
    classifier           lamina.heads.consistent.ConsistentHead

References:
    Gao et al., Consistent Prompting for Rehearsal-Free Continual Learning, CVPR 2024; the authors'
    repository Zhanxin-Gao/CPrompt at 5a946dd.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.config import Settings
from lamina.data.stream import Task
from lamina.heads.consistent import ConsistentHead
from lamina.learner import Learner, Phase
from lamina.model import PromptedModel
from lamina.prompts.consistent import ConsistentPrompts
from lamina.prompts.prefix import blocks_of
from lamina.schedules import cosine


class CPrompt(Settings):
    """Settings; the defaults are for ten tasks of CIFAR-100 on a ViT-B/16."""

    length: int = Field(50, ge=1, description="prompt tokens that enter at each block with prompts (M)")
    blocks: list[int] | None = Field(
        None, description="blocks at which prompts enter, from 0; left out, those of 0 and 5 that the backbone has"
    )
    keys_in_advance: int = Field(
        0, ge=0, description="keys drawn before the first task, for so many classes; others are drawn as classes come"
    )
    smoothing: float = Field(1.0, ge=0, description="weight of the loss that flattens answers of old columns")
    flatness: float = Field(1.2, ge=1, description="temperature of the flatter answers")
    margin: float = Field(
        0.0,
        ge=0,
        description="an old answer is left alone where the highest new logit exceeds its highest by more than this",
    )
    epochs: int = Field(18, ge=1, description="passes over a task's images")
    batch_size: int = Field(16, ge=1, description="images in one step, over all devices")
    lr: float = Field(
        0.01, gt=0, description="learning rate of gradient descent; falls with every step, to 0 along half a cosine"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of gradient descent")
    weight_decay: float = Field(5e-4, ge=0, description="of gradient descent; it joins the gradient")

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when the tower does not have the blocks at which prompts are to enter.
        """
        tower = tower.unnormed()
        prompts = ConsistentPrompts(
            blocks_of(self.blocks, [0, 5], tower.depth, "CPrompt.blocks"),
            self.length,
            tower.width,
            tower.features,
            keys_in_advance=self.keys_in_advance,
        )
        head = ConsistentHead(tower.features, weight=self.smoothing, flatness=self.flatness, margin=self.margin)
        return Learner(PromptedModel(tower, prompts, head), self.phases)

    def phases(self, task: Task) -> Sequence[Phase]:
        """Train once on each task; only its own classes compete in the loss."""
        descent = partial(torch.optim.SGD, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        return [Phase(self.epochs, self.batch_size, descent, schedule=cosine())]
