"""CLAP over prompts that live in null space: images are learned, too, and old ones do not feel it.

The first blocks of the image tower have prompts as in CLIP-NSP², whose steps are projected to the null spaces of what
old tasks looked at, and whose mean and deviation a loss holds. CLAP classifies what comes out. All learn together, by
Adam; in the stretch on old images prompts stay as they are.

Shared parts, in reading order:
    prompts              lamina.prompts.deep.DeepPrompts
    projected steps      lamina.protections.null_space.NullSpace
    loss on moments      lamina.protections.distribution.TokenMoments
    everything else      lamina.methods.clap.CLAP

References:
    Ours, from parts of others: Jha et al., CLAP4CLIP, NeurIPS 2024; Lu et al., Visual Prompt Tuning in Null Space for
    Continual Learning, NeurIPS 2024, the variant for CLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from lamina.backbones.tower import Tower
from lamina.data.stream import Task
from lamina.learner import Learner, Phase, all_but
from lamina.methods.clap import CLAP
from lamina.model import PromptedModel
from lamina.prompts.deep import DeepPrompts
from lamina.protections.distribution import TokenMoments
from lamina.protections.null_space import NullSpace
from lamina.protections.projector import Blend
from lamina.protections.spectrum import Cut


class CLAPNSP2(CLAP):
    """Settings beside those of CLAP; numbers of prompts are those of CLIP-NSP²."""

    text: Literal["hand", "coop", "attriclip"] = Field("hand", description="as of clap; maple has prompts of its own")
    length: int = Field(4, ge=3, description="prompt tokens in each block (M); fewer than 3 have no knee to cut at")
    blocks: int = Field(4, ge=1, description="so many of the first blocks have prompts")
    eta: float = Field(0.98, ge=0, le=1, description="0 lets every step of prompts through, 1 projects all of it")
    moments: float = Field(1.0, ge=0, description="weight of the loss that keeps mean and deviation of prompt tokens")
    lr: float = Field(0.001, gt=0, description="learning rate of Adam, falling to a thousandth by a cosine")

    def idle(self) -> dict[str, str]:
        return super().idle() | {"momentum": "with Adam, which has two of its own"}

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower with a text side; ConfigError where a text has no room."""
        learner = super().build(tower)
        prompts = DeepPrompts(range(min(self.blocks, tower.depth)), self.length, tower.width)
        learner.model, learner.cache = PromptedModel(tower, prompts, learner.model.head), "off"
        blend = Blend(eta=self.eta, normalize=True)
        null_space = NullSpace(tower, prompts, cut=Cut(knee="paper"), channels=blend, tokens=blend)
        learner.protections = [null_space, TokenMoments(prompts, weight=self.moments)]
        return learner

    def descent(self, lr: float) -> Callable[[list[nn.Parameter]], Optimizer]:
        return partial(torch.optim.Adam, lr=lr)

    def refine(self, task: Task) -> Sequence[Phase]:
        """Learn from the memory alone as CLAP does; prompts stay."""
        return [replace(phase, parameters=all_but("head.guidance.", "prompts.")) for phase in super().refine(task)]
