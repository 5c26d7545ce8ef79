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
    projected steps      lamina.protections.null_space.NullSpace; of keys, lamina.protections.subspace.Subspace
    loss on moments      lamina.protections.distribution.TokenMoments
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan of training     lamina.methods.l2p.L2P

References:
    Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024: the comparison with PGP.
    Wang et al., Learning to Prompt for Continual Learning, CVPR 2022.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from lamina.backbones.tower import Tower
from lamina.errors import ConfigError
from lamina.learner import Learner
from lamina.methods.l2p import L2P
from lamina.prompts.pool import PromptPool
from lamina.protections.distribution import TokenMoments
from lamina.protections.null_space import NullSpace
from lamina.protections.projector import Blend
from lamina.protections.spectrum import Cut
from lamina.protections.subspace import Subspace


class L2PNSP2(L2P):
    """Settings beside those of L2P; the defaults are those of VPT-NSP², and of L2P-PGP for keys."""

    length: int = Field(5, ge=1, description="tokens in one prompt (M)")
    eta1: float = Field(0.97, ge=0, le=1, description="of channels: 0 lets every step through, 1 projects all of it")
    eta2: float = Field(0.97, ge=0, le=1, description="of tokens: 0 lets every step through, 1 projects all of it")
    use_b1: bool = Field(True, description="project channels, so that old images see the same keys where prompts enter")
    use_b2: bool = Field(True, description="project tokens of the whole pool, so that they get the same values there")
    moments: float = Field(
        1.0, ge=0, description="weight of the loss that keeps mean and deviation of prompt tokens; 0 leaves it out"
    )
    knee: Literal["paper", "code", "energy"] = Field(
        "paper",
        description="which rule says how many directions are free: the paper's or the released code's knee, or what is "
        "beyond a share of the spectrum (kept)",
    )
    kept: float = Field(0.99, ge=0, le=1, description="share of a spectrum that the used directions hold, for energy")
    normalize: bool = Field(True, description="bring projectors to unit Frobenius norm before eta blends them")
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

    def idle(self) -> dict[str, str]:
        used = {"eta1": self.use_b1, "eta2": self.use_b2, "normalize": self.use_b1 or self.use_b2}
        used |= {"knee": used["normalize"], "kept": used["normalize"] and self.knee == "energy"}
        return {name: "with use_b1, use_b2 and knee as they are" for name, on in used.items() if not on}

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when prompts are to get the position of a class token that the tower has not, or to enter a
                block that it has not.
        """
        learner = super().build(tower)
        pool = learner.model.prompts
        assert isinstance(pool, PromptPool)
        null_space = NullSpace(
            tower,
            pool,
            cut=Cut(knee=self.knee, kept=self.kept),
            channels=Blend(eta=self.eta1, normalize=self.normalize) if self.use_b1 else None,
            tokens=Blend(eta=self.eta2, normalize=self.normalize) if self.use_b2 else None,
        )
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
