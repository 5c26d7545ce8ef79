"""DualPrompt-PGP: prefixes whose rows for keys move out of the way of old queries.

After a task, the queries of each block with a prefix are looked at once more, each head's apart. From then on
no step of a row for keys has a part along directions that old queries use: `q dkᵀ = 0` leaves their
attention to the prefix as it was. The general prefix is held, and so is the expert of the task at hand, which
old images meet only where they choose the wrong one. Rows for values and the keys that choose experts are free.

Prefixes are never queries, so their own directions do not count, neither here nor in the released code. That
code finds directions among exactly 768 images, not among channels, and looks with the wrong expert; here they
are directions of a head's queries, from any number of images that choose as they do in evaluation, and the
step that Adam made is projected, not the gradient. The share is theirs, but theirs is of fourth powers of
another spectrum, so that the same number need not hold back as much.

`space="sample"` finds them among D images of the task, as that code does, from queries of all heads together.
It draws images at random, with their augmentation; here they are spread over the task and are not augmented, and
choose as they do in evaluation. Nor do images get rows of each other's kind by their place in a batch, as there.

Shared parts, in reading order:
    prompts              lamina.prompts.prefix.ExpertPrefixes
    settings of steps    lamina.methods.protected.AwayFromOldImages
    projected steps      lamina.protections.subspace.Subspace or lamina.protections.samples.SampleSubspace
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan of training     lamina.methods.dualprompt.DualPrompt

References:
    Qiao et al., Prompt Gradient Projection for Continual Learning, ICLR 2024; the authors' repository
    JingyangQiao/prompt-gradient-projection at c566b81.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from lamina.backbones.tower import Tower
from lamina.learner import Learner
from lamina.methods.dualprompt import DualPrompt
from lamina.methods.protected import AwayFromOldImages
from lamina.prompts.prefix import ExpertPrefixes
from lamina.protections.samples import SampleSubspace
from lamina.protections.subspace import Subspace, keys_alone


class DualPromptPGP(AwayFromOldImages, DualPrompt):
    """Settings beside those of DualPrompt; the share is that of the released code."""

    prompt_share: float = Field(
        0.5, ge=0, le=1, description="share of old queries that rows for keys must leave alone; 0 lets them move"
    )
    parity: Literal["paper", "official"] = Field(
        "paper",
        description="official has 5 rows for an expert, lets the images of a batch vote, also in evaluation, finds "
        "directions among images and projects gradients, as the released code does",
    )

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when the tower does not have the blocks that are to get prefixes.
        """
        learner = super().build(tower)
        prompts = learner.model.prompts
        assert isinstance(prompts, ExpertPrefixes)
        general, expert = prompts.general_blocks, prompts.expert_blocks

        def hold(maps: Mapping[int, Tensor]) -> dict[nn.Parameter, Tensor]:
            return {
                prompts.general: keys_alone([maps[i] for i in general]),
                prompts.experts[-1]: keys_alone([maps[i] for i in expert]),  # another one in each task
            }

        of_queries: Callable[..., Subspace] = partial(Subspace, heads=tower.blocks()[0].heads)
        if self.space == "sample":
            of_queries = partial(SampleSubspace, components=50)
        learner.protections = [
            of_queries(
                sorted({*general, *expert}),
                hold,
                features="heads",
                width=tower.width,
                share=self.prompt_share,
                apply=self.apply,
            )
        ]
        return learner
