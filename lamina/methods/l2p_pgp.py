"""L2P-PGP: a pool of prompts and keys that move out of the way of old features.

After a task, what its images are to block 0 and what the frozen model says of them is looked at once more. From then
on prompts take no step along directions that old tokens, or the pool as it was, use; and keys none along
directions of old queries. It is a heuristic: both conditions leave out the projections to queries and keys,
the norms, the softmax and the values; prompts reach all later blocks; and a key's length may change.

The released code finds directions among images, not among channels: its basis has a row for each of exactly 768
images, and fits because the width is 768, too. Here they are directions of features, from any number of images,
and the step that Adam made is projected, not the gradient. The shares are theirs, but theirs are of fourth
powers of another spectrum, so that the same number need not hold back as much.

Shared parts, in reading order:
    prompts              lamina.prompts.pool.PromptPool
    projected steps      lamina.protections.subspace.Subspace, one of prompts and one of keys
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan of training     lamina.methods.l2p.L2P

References:
    Qiao et al., Prompt Gradient Projection for Continual Learning, ICLR 2024; the authors' repository
    JingyangQiao/prompt-gradient-projection at c566b81.
"""

from __future__ import annotations

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.learner import Learner
from lamina.methods.l2p import L2P
from lamina.prompts.pool import PromptPool
from lamina.protections.subspace import Apply, Subspace


class L2PPGP(L2P):
    """Settings beside those of L2P; the shares are those of the released code."""

    prompt_share: float = Field(
        0.5, ge=0, le=1, description="share of old tokens and prompts that prompts must leave alone; 0 lets them move"
    )
    key_share: float = Field(
        0.97, ge=0, le=1, description="share of old queries that keys must leave alone; 0 lets them move"
    )
    apply: Apply = Field(
        "step", description="what is projected: the step that Adam made; or the gradient, as the released code does"
    )

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when prompts are to get the position of a class token that the tower has not.
        """
        learner = super().build(tower)
        pool = learner.model.prompts
        assert isinstance(pool, PromptPool)
        prompts = Subspace(
            [0],
            lambda maps: {pool.values: maps[0]},
            features="tokens",
            width=tower.width,
            share=self.prompt_share,
            apply=self.apply,
            own=lambda: {0: pool.values if pool.position is None else pool.values + pool.position},
        )
        keys = Subspace(
            [0],  # where the prompts enter that they choose
            lambda maps: {pool.keys: maps[0]},
            features="frozen",
            width=tower.features,
            share=self.key_share,
            apply=self.apply,
            what="keys",
        )
        learner.protections = [prompts, keys]
        return learner
