"""VPT-PGP: deep prompts that move out of the way of old tokens.

After a task, what enters each block is looked at once more. From then on the block's prompts take no step
along directions that old tokens, or the prompts as they were, use. Where VPT-NSP² asks what the queries of old
images see of a step, this asks for the tokens themselves: it leaves out the projections to queries and
keys, the norm, the softmax and the values, so it is a heuristic, and here for comparison.

No code was released for it: Lu et al. report it beside theirs. The share is that of L2P-PGP.

Shared parts, in reading order:
    prompts              lamina.prompts.deep.DeepPrompts
    settings of steps    lamina.methods.protected.AwayFromOld
    projected steps      lamina.protections.subspace.Subspace
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan of training     lamina.methods.vpt_deep.InTurn

References:
    Qiao et al., Prompt Gradient Projection for Continual Learning, ICLR 2024.
    Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024: the comparison.
"""

from __future__ import annotations

from lamina.backbones.tower import Tower
from lamina.learner import Learner
from lamina.methods.protected import AwayFromOld
from lamina.methods.vpt_deep import InTurn
from lamina.prompts.deep import DeepPrompts
from lamina.protections.subspace import Subspace


class VPTPGP(AwayFromOld, InTurn):
    """Settings beside those of VPT-deep."""

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        learner = super().build(tower)
        prompts = learner.model.prompts
        assert isinstance(prompts, DeepPrompts)
        learner.protections = [
            Subspace(
                prompts.layers,
                lambda maps: {prompts.value(i): maps[i] for i in prompts.layers},
                features="tokens",
                width=tower.width,
                share=self.prompt_share,
                apply=self.apply,
                own=lambda: {i: prompts.value(i) for i in prompts.layers},
            )
        ]
        return learner
