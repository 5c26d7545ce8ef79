"""DualPrompt: a general prefix that all tasks share, and an expert prefix per task that is found by its key.

Prefixes join the keys and values of a few blocks. In training the task's own expert is used, and its key is pulled
to what the frozen model says of the task's images, the queries; in evaluation each image takes the expert
whose key is nearest its query. An expert starts as a copy of the one before and is frozen after its task.
Nothing protects the general prefix. There is no limit to tasks: every one brings its expert.

The defaults are those of the authors' released configuration for ten tasks of CIFAR-100, on one device, but for
two: an expert has the 20 rows that they take for ImageNet-R, and test images do not vote on an expert by batches.

Shared parts, in reading order:
    prompts              lamina.prompts.prefix.ExpertPrefixes
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan of training     lamina.methods.vpt_deep.InTurn

References:
    Wang et al., DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning, ECCV 2022;
    the authors' repository google-research/l2p at 3e102b0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from lamina.backbones.tower import Tower
from lamina.data.stream import Task
from lamina.heads.choose import head_of
from lamina.learner import Learner, Phase
from lamina.methods.vpt_deep import InTurn
from lamina.model import PromptedModel
from lamina.prompts.pool import Selection
from lamina.prompts.prefix import ExpertPrefixes, blocks_of
from lamina.schedules import constant


class DualPrompt(InTurn):
    """Settings beside those of VPT-deep; the defaults are for ten tasks of CIFAR-100 on a ViT-B/16."""

    length: int = Field(20, ge=1, description="rows of an expert prefix for keys, and as many for values (M)")
    general_length: int = Field(5, ge=1, description="rows of a general prefix for keys, and as many for values")
    expert_blocks: list[int] | None = Field(
        None, description="blocks with an expert, from 0; left out, those of 2, 3 and 4 that the backbone has"
    )
    general_blocks: list[int] = Field([0, 1], description="blocks with a general prefix, from 0")
    pull: float = Field(1.0, ge=0, description="weight of the loss that pulls a task's key to its queries")
    selection: Selection = Field(
        "image",
        description="who chooses an expert in evaluation: each image for itself; or all images of a batch by a vote, "
        "which is transductive: a prediction then depends on the other images of its batch",
    )
    epochs: int = Field(5, ge=1, description="passes over a task's images")
    batch_size: int = Field(24, ge=1, description="images in one step, over all devices")
    lr: float = Field(
        0.0028125, gt=0, description="learning rate of Adam, constant; the authors take 0.03 * batch_size / 256"
    )
    clip_norm: float = Field(1.0, ge=0, description="longest gradient a step may use, all together; 0 does not clip")
    weight_decay: float = Field(0.0, ge=0, description="of Adam; it joins the gradient")
    temperature: float = Field(1.0, gt=0, description="divides the logits in the loss")
    parity: Literal["paper", "official"] = Field(
        "paper",
        description="official has 5 rows for an expert and lets the images of a batch vote, as the released "
        "configuration does, also in evaluation",
    )

    @model_validator(mode="before")
    @classmethod
    def _official_votes(cls, values: Any) -> Any:
        return {"selection": "batch", "length": 5, **values} if values.get("parity") == "official" else values

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when the tower does not have the blocks that are to get prefixes.
        """
        prompts = ExpertPrefixes(
            blocks_of(self.general_blocks, [], tower.depth, "DualPrompt.general_blocks"),
            blocks_of(self.expert_blocks, [2, 3, 4], tower.depth, "DualPrompt.expert_blocks"),
            self.general_length,
            self.length,
            tower.width,
            tower.features,
            pull=self.pull,
            selection=self.selection,
        )
        head = head_of(self.head, self.layers * tower.features)
        return Learner(PromptedModel(tower, prompts, head, layers=self.layers), self.phases, refine=self.refine)

    def phases(self, task: Task) -> Sequence[Phase]:
        """Train once on each task, also of a single class, whose key must be found; only its own classes compete."""
        return [replace(self.phase(), schedule=constant, clip_norm=self.clip_norm or None)]
