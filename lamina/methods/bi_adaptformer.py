"""Bi-AdaptFormer: a small network beside the MLP of every block, whose weights take one bit each.

It reads what the MLP reads before its norm. A weight is trained as a number and used as one of two, so that what would
have to be stored of it is a bit; a model file keeps the numbers, since the next task trains them on.

Shared parts, in reading order:
    adapters             lamina.prompts.adapters.Adapters, of lamina.prompts.adapters.ParallelAdapter
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan                 lamina.methods.tuned.Tuned

References:
    Jie, Wang and Deng, Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy,
    ICCV 2023; the authors' repository JieShibo/PETL-ViT, which also drops paths of the backbone, shows images that
    are not normalised and tells the best test accuracy of all passes: none of these is imitated.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.learner import Learner
from lamina.methods.tuned import Tuned
from lamina.model import PromptedModel
from lamina.prompts.adapters import Adapters, ParallelAdapter


class BiAdaptFormer(Tuned):
    """Settings; the plan is that of the authors. They choose the scale for each data set; 1 is our default."""

    hidden: int = Field(32, ge=1, description="hidden numbers of an adapter; the paper also has 1")
    bits: int = Field(1, ge=0, le=8, description="of each weight as it is used; 0 takes weights as they are")
    scale: float = Field(1.0, gt=0, description="multiplies what an adapter says")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of hidden numbers that a training step leaves out")
    optimizer: Literal["sgd", "adamw"] = Field("adamw", description="SGD with momentum 0.9, or AdamW")
    lr: float = Field(
        0.001, gt=0, description="learning rate at its highest, not scaled by anything; then it falls along a cosine"
    )
    weight_decay: float = Field(
        0.0001, ge=0, description="of matrices; with SGD it joins the gradient, with AdamW it does not"
    )

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        parts = [
            ParallelAdapter(tower.width, self.hidden, bits=self.bits, scale=self.scale, dropout=self.dropout)
            for _ in range(tower.depth)
        ]
        return self.learner(PromptedModel(tower, Adapters(parts), self.head_for(tower.features)))
