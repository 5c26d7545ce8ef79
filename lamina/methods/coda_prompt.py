"""CODA-Prompt: prefixes that are sums of components, weighted for each image by what the frozen model says of it.

A component has a key and an attention vector; all three learn by the classification loss alone. Every task brings
components of its own and freezes those before; all there are take part in training and in evaluation, so no
task has to be guessed. Components of later tasks change the prefixes of earlier images: forgetting is
limited, not excluded.

The defaults are those of the authors' released code for ten tasks of CIFAR-100. Where it starts new components
nearly orthogonal to trained ones, they are exactly so here; where it drops the last images of an epoch that
do not fill a batch, they are used.

Shared parts, in reading order:
    prompts              lamina.prompts.components.ComponentPrefixes
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan of training     lamina.methods.vpt_deep.InTurn

References:
    Smith et al., CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual Learning,
    CVPR 2023; the authors' repository GT-RIPL/CODA-Prompt at 6417d4f.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.data.stream import Task
from lamina.heads.choose import head_of
from lamina.learner import Learner, Phase
from lamina.methods.vpt_deep import InTurn
from lamina.model import PromptedModel
from lamina.prompts.components import ComponentPrefixes
from lamina.prompts.prefix import blocks_of
from lamina.schedules import cosine_by_epoch


class CODAPrompt(InTurn):
    """Settings beside those of VPT-deep; the defaults are for ten tasks of CIFAR-100 on a ViT-B/16."""

    length: int = Field(4, ge=1, description="rows of a component for keys, and as many for values (M)")
    components: int = Field(
        10, ge=1, description="how many a task adds; all tasks together have room for as many as there are features (F)"
    )
    blocks: list[int] | None = Field(
        None, description="blocks with prefixes, from 0; left out, those of 0 to 4 that the backbone has"
    )
    orthogonality: float = Field(
        0.0,
        ge=0,
        description="weight of the loss that keeps components, keys and attention vectors orthonormal, without hidden "
        "factors; the code released first has 1e-7",
    )
    epochs: int = Field(20, ge=1, description="passes over a task's images")
    batch_size: int = Field(128, ge=1, description="images in one step, over all devices")
    lr: float = Field(0.001, gt=0, description="learning rate of Adam; falls along a cosine, to 1.6 % in the last pass")
    weight_decay: float = Field(0.0, ge=0, description="of Adam; it joins the gradient")
    temperature: float = Field(1.0, gt=0, description="divides the logits in the loss")

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when the tower does not have the blocks that are to get prefixes.
        """
        prompts = ComponentPrefixes(
            blocks_of(self.blocks, range(5), tower.depth, "CODAPrompt.blocks"),
            self.components,
            self.length,
            tower.width,
            tower.features,
            orthogonality=self.orthogonality,
        )
        head = head_of(self.head, self.layers * tower.features)
        return Learner(PromptedModel(tower, prompts, head, layers=self.layers), self.phases, refine=self.refine)

    def phases(self, task: Task) -> Sequence[Phase]:
        """Train once on each task; only its own classes compete in the loss."""
        return [replace(phase, schedule=cosine_by_epoch(self.epochs)) for phase in super().phases(task)]
