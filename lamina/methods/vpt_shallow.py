"""VPT-shallow: prompt tokens enter before the first block and travel through all of them.

What a block makes of the prompts is what the next one gets. A classifier reads what the backbone says; prompts and
classifier are all that is learned, with the plan of transfer learning. On several tasks, prompts are trained on.

Shared parts, in reading order:
    prompts              lamina.prompts.shallow.ShallowPrompts
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan of training     lamina.methods.tuned.Tuned

References:
    Jia et al., Visual Prompt Tuning, ECCV 2022, section 3.2; the authors' repository KMnP/vpt.
"""

from __future__ import annotations

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.learner import Learner
from lamina.methods.tuned import Tuned
from lamina.model import PromptedModel
from lamina.prompts.deep import DropoutMode, patch_bound
from lamina.prompts.shallow import ShallowPrompts


class VPTShallow(Tuned):
    """Settings beside those of the plan."""

    length: int = Field(10, ge=0, description="prompt tokens (M); 0 trains the classifier alone")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the numbers of prompts that are 0 in training")
    dropout_mode: DropoutMode = Field("per_sample", description="who has a mask of its own: each image, or each batch")

    def idle(self) -> dict[str, str]:
        return {} if self.dropout else {"dropout_mode": "where dropout is 0"}

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        prompts = ShallowPrompts(
            tower.depth,
            self.length,
            tower.width,
            bound=patch_bound(tower, tower.width),
            dropout=self.dropout,
            dropout_mode=self.dropout_mode,
        )
        return self.learner(PromptedModel(tower, prompts, self.head_for(tower.features)))
