"""GaPT: one set of prompts, and for each block a gate that says how much it may change them.

Gates start almost closed, so every block is shown the same prompts, and learn which blocks are worth listening to. Each
block's attention has a temperature besides, held between 0.01 and 10: right after every step, not in the forward pass
as in the released code, where a checkpoint may differ from what is evaluated.

Shared parts, in reading order:
    prompts              lamina.prompts.gated.GatedPrompts
    temperatures         lamina.protections.limits.Limits
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan of training     lamina.methods.tuned.Tuned

References:
    Yoo et al., Improving Visual Prompt Tuning for Self-supervised Vision Transformers, ICML 2023; the authors'
    repository ryongithub/GatedPromptTuning.
"""

from __future__ import annotations

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.learner import Learner
from lamina.methods.tuned import Tuned
from lamina.model import PromptedModel
from lamina.prompts.deep import DropoutMode, patch_bound
from lamina.prompts.gated import GatedPrompts
from lamina.protections.limits import Limits


class GaPT(Tuned):
    """Settings beside those of the plan; the defaults are those of the released example for CUB."""

    length: int = Field(100, ge=0, description="prompt tokens (M)")
    gate_init: float = Field(5.0, description="gates start at the sigmoid of minus this; the code's own default is 10")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of the numbers of prompts that are 0 in training")
    dropout_mode: DropoutMode = Field("per_sample", description="who has a mask of its own: each image, or each batch")
    lr: float = Field(
        0.1, gt=0, description="learning rate at its highest, also of gates and temperatures; falls along a cosine"
    )
    weight_decay: float = Field(0.0, ge=0, description="of prompts and matrices, not of gates and temperatures")

    def idle(self) -> dict[str, str]:
        return {} if self.dropout else {"dropout_mode": "where dropout is 0"}

    def prompts_for(self, tower: Tower) -> GatedPrompts:
        """Return new prompts for a tower."""
        return GatedPrompts(
            tower.depth,
            self.length,
            tower.width,
            gate_init=self.gate_init,
            bound=patch_bound(tower, tower.width),
            dropout=self.dropout,
            dropout_mode=self.dropout_mode,
        )

    def limits(self, prompts: GatedPrompts) -> Limits:
        """Return what holds the temperatures of prompts."""
        return Limits(prompts.temperatures, 0.01, 10.0)

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        prompts = self.prompts_for(tower)
        model = PromptedModel(tower, prompts, self.head_for(tower.features))
        return self.learner(model, protections=[self.limits(prompts)])
