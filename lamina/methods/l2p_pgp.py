"""L2P-PGP: a pool of prompts and keys that move out of the way of old features.

After a task, what its images are to block 0 and what the frozen model says of them is looked at once more. From then
on prompts take no step along directions that old tokens, or the pool as it was, use; and keys none along
directions of old queries. It is a heuristic: both conditions leave out the projections to queries and keys,
the norms, the softmax and the values; prompts reach all later blocks; and a key's length may change.

The released code finds directions among images, not among channels: its basis has a row for each of exactly 768
images, and fits because the width is 768, too. Here they are directions of features, from any number of images,
and the step that Adam made is projected, not the gradient. The shares are theirs, but theirs are of fourth
powers of another spectrum, so that the same number need not hold back as much.

`space="sample"` finds them among images as that code does: patches of D images of the task, from the second task on
with the pool as it was before it, and the queries of the same images. It draws images at random, with their
augmentation; here they are spread over the task and are not augmented. It also sees patches before they get their
positions, which is the same once the mean is gone, but not on a backbone that normalises before block 0.

Shared parts, in reading order:
    prompts              lamina.prompts.pool.PromptPool
    settings of steps    lamina.methods.protected.AwayFromOldImages
    projected steps      lamina.protections.subspace.Subspace, one of prompts and one of keys; or, each,
                         lamina.protections.samples.SampleSubspace
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan of training     lamina.methods.l2p.L2P

References:
    Qiao et al., Prompt Gradient Projection for Continual Learning, ICLR 2024; the authors' repository
    JingyangQiao/prompt-gradient-projection at c566b81.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.errors import ConfigError
from lamina.learner import Learner
from lamina.methods.l2p import L2P
from lamina.methods.protected import AwayFromOldImages
from lamina.prompts.pool import PromptPool
from lamina.protections.samples import SampleSubspace
from lamina.protections.subspace import Subspace


class L2PPGP(AwayFromOldImages, L2P):
    """Settings beside those of L2P; the shares are those of the released code."""

    key_share: float = Field(
        0.97, ge=0, le=1, description="share of old queries that keys must leave alone; 0 lets them move"
    )

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when prompts are to get the position of a class token that the tower has not, or to enter a
                block that it has not; when images are to stand for channels and for features of another number.
        """
        learner = super().build(tower)
        pool = learner.model.prompts
        assert isinstance(pool, PromptPool)
        entry = pool.entry
        of_prompts: Callable[..., Subspace] = partial(
            Subspace, own=lambda: {entry: pool.values if pool.position is None else pool.values + pool.position}
        )
        of_keys: Callable[..., Subspace] = Subspace
        if self.space == "sample":
            if tower.features != tower.width:
                raise ConfigError(
                    'space="sample" needs as many features as channels, since images stand for both; this backbone '
                    f'has {tower.features} and {tower.width}: take space="feature"'
                )
            of_prompts = partial(SampleSubspace, components=9, pool=lambda: pool.values)
            of_keys = partial(SampleSubspace, components=5)
        prompts = of_prompts(
            [entry],
            lambda maps: {pool.values: maps[entry]},
            features="tokens",
            width=tower.width,
            share=self.prompt_share,
            apply=self.apply,
        )
        keys = of_keys(
            [entry],  # where the prompts enter that they choose
            lambda maps: {pool.keys: maps[entry]},
            features="frozen",
            width=tower.features,
            share=self.key_share,
            apply=self.apply,
            what="keys",
        )
        learner.protections = [prompts, keys]
        return learner
