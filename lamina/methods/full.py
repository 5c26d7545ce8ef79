"""Full fine-tuning: all weights of the tower are trained, on one task after another.

The reference point of transfer learning; over several tasks it is what forgets most, since nothing holds the weights.
They are trained in float32 whatever the frozen tower's precision, from what rounding has left of them; with
`--precision 32` that is all. The tower stays in evaluation mode: no dropout and no dropped paths. What was learned, and
with it a checkpoint and a model file, is as large as the backbone.

Shared parts, in reading order:
    tower                lamina.backbones.tower.Tower, as its method `tuned` makes it
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan                 lamina.methods.tuned.Baseline

References:
    Jia et al., Visual Prompt Tuning, ECCV 2022, table 1 (Full); the authors' repository KMnP/vpt.
"""

from __future__ import annotations

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.learner import Learner
from lamina.methods.tuned import Baseline
from lamina.model import PromptedModel


class Full(Baseline):
    """Settings; the plan is that of VPT's baselines: AdamW, 0.0001 per 256 images, decay as their code has it."""

    lr: float = Field(
        0.00015, gt=0, description="learning rate at its highest, not scaled by anything; then it falls along a cosine"
    )

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one image tower, of which a copy is trained."""
        return self.learner(PromptedModel(tower.tuned(self.tunes), None, self.head_for(tower.features)))

    def tunes(self, name: str) -> bool:
        """Say whether the parameter of this name is trained."""
        return True
