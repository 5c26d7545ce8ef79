"""VPT-NSP² that keeps its promise: old features stay where they are, or move by a bound that was measured.

In VPT-NSP² prompts pass a layer norm, so a null space protects old features to first order at best; few
prompt tokens leave no null space among them; and normalised, blended projectors only damp the rest. Here
prompts enter after the norm, so keys and values are affine in them and a step in both null spaces changes
nothing at all, however long it is; there are more tokens; and projectors are projectors. No loss has to
hold moments of prompts.

Real images leave no exact null space, so a share of what they use must be given away. How much is chosen
after every task: as much as lets the move that the first task made, projected, shift features of some of
the task's images by no more than `max_drift` of their spread.

Shared parts, in reading order:
    prompts              lamina.prompts.deep.DeepPrompts, after the norm
    projected steps      lamina.protections.bounded.BoundedNullSpace, or with `kept` given
                         lamina.protections.null_space.NullSpace
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan of training     lamina.methods.vpt_deep.InTurn

References:
    Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024, section 4: the two
    conditions. Prompts after the norm, plain projectors and the measured bound are ours.
"""

from __future__ import annotations

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.learner import Learner
from lamina.methods.vpt_deep import InTurn
from lamina.prompts.deep import DeepPrompts
from lamina.protections.bounded import BoundedNullSpace
from lamina.protections.null_space import NullSpace
from lamina.protections.projector import Blend
from lamina.protections.spectrum import Cut


class VPTNSP2Exact(InTurn):
    """Settings beside those of VPT-deep."""

    length: int = Field(
        16, ge=1, description="prompt tokens in each block (M); the paper's 4 leave old images no null space"
    )
    max_drift: float = Field(
        0.05, ge=0, description="how far one task may move old features, as a share of their spread; chooses the cut"
    )
    kept: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of each spectrum that steps must leave alone, instead of max_drift; 1 is exact",
    )

    def idle(self) -> dict[str, str]:
        return {} if self.kept is None else {"max_drift": "where kept is given, since nothing is measured"}

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        learner = super().build(tower)
        prompts = DeepPrompts(range(tower.depth), self.length, tower.width, normed=True)
        learner.model.prompts = prompts
        if self.kept is None:
            null_space: NullSpace = BoundedNullSpace(tower, prompts, max_drift=self.max_drift)
        else:
            cut, blend = Cut(knee="energy", kept=self.kept), Blend(normalize=False)
            null_space = NullSpace(tower, prompts, cut=cut, channels=blend, tokens=blend, right_alone=True)
        learner.protections = [null_space]
        return learner
