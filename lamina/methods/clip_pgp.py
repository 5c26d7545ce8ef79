"""CLIP-PGP: a few image tokens for all tasks, which move out of the way of old ones, and words for each task.

Prompt tokens enter the image tower once, with the patches. All tasks learn them, and from the second task on they take
no step along directions that old tokens at block 0, or the prompts as they were, use. Each task has words of its own
before the names of its classes; they stay when it is over. All classes met so far compete in predictions, whatever task
they are of. (The released code lets a batch compete among the tasks up to the last one that it has images of.)

It is a heuristic, as L2P-PGP is: what images look for, blocks behind the first, and the values are left out. The
norm before block 0 is counted in as far as it multiplies channels. The released code finds directions among images, not
among channels, and projects gradients; see L2P-PGP. Its images are normalised as CIFAR's, here they are as CLIP's.

Shared parts, in reading order:
    prompts, images      lamina.prompts.stacked.FreePrompts
    settings of steps    lamina.methods.protected.AwayFromOld
    projected steps      lamina.protections.subspace.Subspace
    words                lamina.heads.texts.ContextTexts
    classifier           lamina.heads.text.TextHead
    plan of training     lamina.methods.by_name.ByName

References:
    Qiao et al., Prompt Gradient Projection for Continual Learning, ICLR 2024; the authors' repository
    JingyangQiao/prompt-gradient-projection at c566b81.
    Wang et al., S-Prompts Learning with Pre-trained Transformers, NeurIPS 2022: where prompts and words stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.data.stream import Task
from lamina.heads.text import TextHead
from lamina.heads.texts import ContextTexts, text_side
from lamina.learner import Learner, Phase
from lamina.methods.by_name import ByName
from lamina.methods.protected import AwayFromOld
from lamina.model import PromptedModel
from lamina.prompts.stacked import FreePrompts
from lamina.protections.subspace import Subspace
from lamina.schedules import Schedule, by_epoch, cosine


class CLIPPGP(AwayFromOld, ByName):
    """Settings; the defaults are those of the released code for ten tasks of CIFAR-100."""

    length: int = Field(10, ge=1, description="prompt tokens among the patches (M)")
    context: int = Field(16, ge=1, description="learned words of each task (n)")
    prompt_share: float = Field(
        0.9, ge=0, le=1, description="share of old tokens and prompts that prompts must leave alone; 0 lets them move"
    )
    lr: float = Field(0.01, gt=0, description="learning rate of SGD with momentum, falling by a cosine once an epoch")
    weight_decay: float = Field(2e-4, ge=0, description="of SGD")
    first_lr: float = Field(0.001, gt=0, description="learning rate in the first task")
    first_weight_decay: float = Field(5e-4, ge=0, description="weight decay in the first task")

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when it has no text side.
        """
        texts = ContextTexts(text_side(tower, "clip-pgp"), self.context, scope="task", names=self.names)
        prompts = FreePrompts(tower, 1, self.length, bound=tower.width**-0.5)
        learner = self.learner(PromptedModel(tower, prompts, TextHead(texts, negatives=self.competing)))
        learner.protections = [
            Subspace(
                [0],
                lambda maps: {prompts.values[0]: maps[0]},
                features="tokens",
                width=tower.width,
                share=self.prompt_share,
                apply=self.apply,
                own=lambda: {0: tower.pre_norm(prompts.values[0])},
                scale=tower.pre_weight(),
            )
        ]
        return learner

    def phases(self, task: Task) -> Sequence[Phase]:
        """Train once on each task; the first one has a rate and a decay of its own."""
        if task.index:
            rate, decay = self.lr, self.weight_decay
        else:
            rate, decay = self.first_lr, self.first_weight_decay
        sgd = partial(torch.optim.SGD, lr=rate, momentum=self.momentum, weight_decay=decay)
        return [replace(phase, optimizer=sgd) for phase in super().phases(task)]

    def schedule(self, lr: float) -> Schedule:
        return by_epoch(cosine(), self.epochs)
