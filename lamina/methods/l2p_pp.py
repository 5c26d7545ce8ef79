"""L2P++: L2P with prefixes in place of tokens, as CODA-Prompt was compared with it.

A pool of prefixes serves all tasks. What the frozen model says of an image is the query; the prefixes whose keys
are nearest to it join the keys and values of the first block, or of several, which have a pool each. The
classifier reads what the backbone says, not the prompts, and each image chooses for itself. Keys are drawn
to the queries that chose them; nothing protects prefixes that old tasks chose too.

The defaults are those of the released code of CODA-Prompt for ten tasks of CIFAR-100, but for the loss that draws
keys: there each image draws all keys that any image of its batch chose, so keys move to the mean of the batch.
`parity="official"` does so, too. The last images of an epoch that do not fill a batch are used here.

Shared parts, in reading order:
    prompts              lamina.prompts.prefix_pool.PrefixPool
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan of training     lamina.methods.vpt_deep.InTurn

References:
    Wang et al., Learning to Prompt for Continual Learning, CVPR 2022.
    Smith et al., CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual Learning,
    CVPR 2023, the comparison; the authors' repository GT-RIPL/CODA-Prompt at 6417d4f.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, model_validator

from lamina.backbones.tower import Tower
from lamina.data.stream import Task
from lamina.heads.choose import head_of
from lamina.learner import Learner, Phase
from lamina.methods.vpt_deep import InTurn
from lamina.model import PromptedModel
from lamina.prompts.pool import check_choice
from lamina.prompts.prefix import blocks_of
from lamina.prompts.prefix_pool import PrefixPool
from lamina.schedules import cosine_by_epoch


class L2PPP(InTurn):
    """Settings beside those of VPT-deep; the defaults are for ten tasks of CIFAR-100 on a ViT-B/16."""

    size: int = Field(30, ge=1, description="prefixes in the pool of one block, for all tasks together")
    top: int = Field(5, ge=0, description="how many of them an image takes; 0 trains the classifier alone")
    length: int = Field(
        10, ge=0, description="rows of a prefix for keys, and as many for values (M); 0 trains the classifier alone"
    )
    blocks: list[int] = Field(
        [0], description="blocks with a pool, from 0; the authors' deep variant has [0, 1, 2, 3, 4]"
    )
    pull: float = Field(1.0, ge=0, description="weight of the loss that draws chosen keys to the query")
    epochs: int = Field(20, ge=1, description="passes over a task's images")
    batch_size: int = Field(128, ge=1, description="images in one step, over all devices")
    lr: float = Field(0.001, gt=0, description="learning rate of Adam; falls along a cosine, to 1.6 % in the last pass")
    weight_decay: float = Field(0.0, ge=0, description="of Adam; it joins the gradient")
    temperature: float = Field(1.0, gt=0, description="divides the logits in the loss")
    parity: Literal["paper", "official"] = Field(
        "paper",
        description="official draws all keys chosen in a batch to every image of it, summed over images, as the "
        "released code does",
    )

    @model_validator(mode="after")
    def _choice_is_possible(self) -> Self:
        check_choice(self.size, self.top, self.length, readout="backbone")
        return self

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when the tower does not have the blocks that are to get prefixes.
        """
        prompts = PrefixPool(
            blocks_of(self.blocks, [], tower.depth, "L2PPP.blocks"),
            self.size,
            self.top,
            self.length,
            tower.width,
            tower.features,
            pull=self.pull,
            pull_all=self.parity == "official",
        )
        head = head_of(self.head, self.layers * tower.features)
        return Learner(PromptedModel(tower, prompts, head, layers=self.layers), self.phases, refine=self.refine)

    def phases(self, task: Task) -> Sequence[Phase]:
        """Train once on each task; only its own classes compete in the loss."""
        return [replace(phase, schedule=cosine_by_epoch(self.epochs)) for phase in super().phases(task)]
