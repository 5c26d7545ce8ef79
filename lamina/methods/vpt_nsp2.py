"""VPT-NSP²: deep prompts that move only where old tasks do not feel it.

Every block has prompt tokens of its own. After a task, two small matrices per block keep what the
task's images looked at; from then on every optimizer step of the prompts is projected to the null
spaces of the two. The projection takes for granted that layer normalisation goes on scaling prompts
as it did, so a loss holds the mean and deviation of each prompt token where the last task left them.

Shared parts, in reading order:
    prompts              lamina.prompts.deep.DeepPrompts
    projected steps      lamina.protections.null_space.NullSpace
    loss on moments      lamina.protections.distribution.TokenMoments
    classifier           lamina.heads.linear.LinearHead
    plan of training     lamina.methods.vpt_deep.VPTDeep

References:
    Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.heads.linear import LinearHead
from lamina.learner import Learner
from lamina.methods.vpt_deep import VPTDeep
from lamina.model import PromptedModel
from lamina.prompts.deep import DeepPrompts
from lamina.protections.distribution import TokenMoments
from lamina.protections.null_space import NullSpace


class VPTNSP2(VPTDeep):
    """Settings beside those of VPT-deep; the defaults are the paper's for ten tasks of CIFAR-100."""

    length: int = Field(4, ge=3, description="prompt tokens in each block (M); fewer than 3 have no knee to cut at")
    eta: float = Field(0.97, ge=0, le=1, description="0 lets every step through, 1 projects all of it")
    knee: Literal["paper", "code"] = Field(
        "paper",
        description="which rule says how many directions are free: the paper's or the released code's",
    )
    moments: float = Field(1.0, ge=0, description="weight of the loss that keeps mean and deviation of prompt tokens")

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        prompts = DeepPrompts(range(tower.depth), self.length, tower.width)
        return Learner(
            model=PromptedModel(tower, prompts, LinearHead(tower.features)),
            phases=self.phases,
            protections=[
                NullSpace(tower, prompts, eta=self.eta, knee=self.knee),
                TokenMoments(prompts, weight=self.moments),
            ],
        )
