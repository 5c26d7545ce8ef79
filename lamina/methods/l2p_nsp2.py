"""L2P-NSP²: a pool of prompts and keys that move only where old images do not feel it, as far as a pool allows.

After a task, two small matrices keep what its images' tokens ask for and how much they look at each prompt of the pool
at the block that prompts enter. From then on every optimizer step of the pool is projected to the null spaces of the
two, as in VPT-NSP²; keys take no step along directions of old queries; and a loss holds each prompt token's mean and
deviation.

It is a heuristic. Deep prompts are seen in one block and thrown away; these travel through all later blocks, which no
condition speaks of, and what becomes of them there is what the classifier reads. So even where both null spaces are
exact and the norm stands still, what old images get from prompts stays as it was in the first block alone. A key's
length may change, and each of the three projections gives away a share of what old images use.

The authors report it beside VPT-NSP² and released no code for it. Their prompts are in the first three blocks; here
they enter one. Keys they treat as a linear layer; how many directions are then free is not said, so the share is that
of L2P-PGP. All else is as in VPT-NSP².

Shared parts, in reading order:
    prompts              lamina.prompts.pool.PromptPool
    settings of steps    lamina.methods.protected.InNullSpace
    projected steps      lamina.protections.null_space.NullSpace; of keys, lamina.protections.subspace.Subspace
    loss on moments      lamina.protections.distribution.TokenMoments
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan of training     lamina.methods.l2p.L2P

References:
    Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024: the comparison with PGP.
    Wang et al., Learning to Prompt for Continual Learning, CVPR 2022.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from lamina.backbones.tower import Tower
from lamina.errors import ConfigError
from lamina.learner import Learner
from lamina.methods.l2p import L2P
from lamina.methods.protected import InNullSpace
from lamina.prompts.pool import PromptPool
from lamina.protections.distribution import TokenMoments
from lamina.protections.subspace import Subspace


class L2PNSP2(InNullSpace, L2P):
    """Settings beside those of L2P; the defaults are those of VPT-NSP², and of L2P-PGP for keys."""

    length: int = Field(5, ge=1, description="tokens in one prompt (M)")
    key_share: float = Field(
        0.97, ge=0, le=1, description="share of old queries that keys must leave alone; 0 lets them move"
    )

    @model_validator(mode="after")
    def _a_knee_is_possible(self) -> Self:
        if self.size * self.length < 3:
            raise ConfigError(
                "size * length must be at least 3, as fewer prompt tokens have no knee to cut at; got "
                f"size={self.size}, length={self.length}: raise one of them"
            )
        return self

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when prompts are to get the position of a class token that the tower has not, or to enter a
                block that it has not.
        """
        learner = super().build(tower)
        pool = learner.model.prompts
        assert isinstance(pool, PromptPool)
        null_space = self.null_space(tower, pool)
        keys = Subspace(
            [pool.entry],  # where the prompts enter that they choose
            lambda maps: {pool.keys: maps[pool.entry]},
            features="frozen",
            width=tower.features,
            share=self.key_share,
            what="keys",
        )
        learner.protections = [null_space, keys, TokenMoments(pool, weight=self.moments)]
        return learner
