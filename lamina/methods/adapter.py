"""Adapters: a small network behind the MLP of every block, trained on one task after another.

It sits inside the residual branch and starts as one that says nothing. All tasks share the adapters; the classifier
gets a block of columns per task.

Shared parts, in reading order:
    adapters             lamina.prompts.adapters.Adapters, of lamina.prompts.adapters.SerialAdapter
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan                 lamina.methods.tuned.Baseline

References:
    Pfeiffer et al., AdapterFusion, EACL 2021; as a baseline in Jia et al., Visual Prompt Tuning, ECCV 2022, table 1.
    The released code (KMnP/vpt) starts both layers at zero, so that one bias alone ever learns; here Down does not.
"""

from __future__ import annotations

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.learner import Learner
from lamina.methods.tuned import Baseline
from lamina.model import PromptedModel
from lamina.prompts.adapters import Adapters, SerialAdapter, hidden_width


class Adapter(Baseline):
    """Settings; the plan is that of VPT's baselines: AdamW, 0.001 per 256 images, decay as their code has it."""

    reduction: int = Field(8, ge=1, description="how many times fewer hidden numbers an adapter has than a token")
    hidden: int | None = Field(None, ge=1, description="hidden numbers of an adapter; left out, width / reduction")
    lr: float = Field(
        0.0015, gt=0, description="learning rate at its highest, not scaled by anything; then it falls along a cosine"
    )

    def idle(self) -> dict[str, str]:
        """A width that is given needs no reduction."""
        return super().idle() | ({} if self.hidden is None else {"reduction": f"with hidden={self.hidden}"})

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        hidden = self.hidden or hidden_width(tower.width, self.reduction)
        adapters = Adapters([SerialAdapter(tower.width, hidden) for _ in range(tower.depth)])
        return self.learner(PromptedModel(tower, adapters, self.head_for(tower.features)))
