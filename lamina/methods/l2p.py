"""L2P: a pool of prompts, from which each image takes those that fit it.

The frozen model looks at an image once without prompts. What it says is the query: the prompts whose keys are
nearest to it enter before the first block, and the classifier reads the mean of what became of them. Which task
an image belongs to is never needed. Keys are drawn to the queries that chose them; nothing protects prompts that
old tasks chose too.

The defaults are those of the authors' first release and of its ports for ten tasks of CIFAR-100, on one device. They
choose for a whole batch of test images at once; here each image chooses for itself, and the other way is a setting.

Shared parts, in reading order:
    prompts              lamina.prompts.pool.PromptPool
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of

References:
    Wang et al., Learning to Prompt for Continual Learning, CVPR 2022; the authors' repository
    google-research/l2p at 8cfb210 and 3e102b0, and a port of it to PyTorch within
    JingyangQiao/prompt-gradient-projection at c566b81.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from lamina.backbones.tower import Tower
from lamina.config import Settings
from lamina.data.stream import Task
from lamina.heads.choose import HeadName, head_of
from lamina.learner import Learner, Phase, refinement
from lamina.model import PromptedModel
from lamina.prompts.pool import PromptPool, Query, Readout, Selection, check_choice, check_query, class_position


class L2P(Settings):
    """Settings; the defaults are those of the ports for ten tasks of CIFAR-100 on a ViT-B/16."""

    size: int = Field(10, ge=1, description="prompts in the pool, for all tasks together")
    top: int = Field(5, ge=0, description="how many of them an image takes; 0 trains the classifier alone")
    length: int = Field(5, ge=0, description="tokens in one prompt (M); 0 trains the classifier alone")
    pull: float = Field(0.1, ge=0, description="weight of the loss that draws chosen keys to the query")
    selection: Selection = Field(
        "image", description="who chooses: each image for itself, or all of a batch by a vote, which is transductive"
    )
    query: Query = Field(
        "frozen", description="features that choose: the frozen model's last, or early, where prompts enter"
    )
    entry: int = Field(0, ge=0, description="block that prompts enter, from 0; above 0 where the query is early")
    position: Literal["class", "none"] = Field(
        "class", description="what is added to prompts where they enter: the position of the class token, or nothing"
    )
    readout: Readout = Field(
        "prompts", description="what the classifier reads: the mean of the final prompt tokens, or the class token"
    )
    epochs: int = Field(5, ge=1, description="passes over a task's images")
    batch_size: int = Field(16, ge=1, description="images in one step, over all devices")
    lr: float = Field(
        0.001875, gt=0, description="learning rate of Adam, constant; the authors take 0.03 * batch_size / 256"
    )
    clip_norm: float = Field(1.0, ge=0, description="longest gradient a step may use, all together; 0 does not clip")
    temperature: float = Field(1.0, gt=0, description="divides the logits in the loss")
    head: HeadName = Field(
        "linear",
        description="classifier: a layer per task, the same by cosine, class statistics, or layers balanced on draws",
    )

    parity: Literal["paper", "official"] = Field(
        "paper", description="official lets the images of a batch vote, as the released code does, also in evaluation"
    )

    @model_validator(mode="before")
    @classmethod
    def _official_votes(cls, values: Any) -> Any:
        return {"selection": "batch", **values} if values.get("parity") == "official" else values

    @model_validator(mode="after")
    def _choice_is_possible(self) -> Self:
        check_choice(self.size, self.top, self.length, self.readout)
        check_query(self.query, self.entry)
        return self

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when prompts are to get the position of a class token that the tower has not, or to enter a
                block that it has not.
        """
        check_query(self.query, self.entry, tower.depth)
        prompts = PromptPool(
            self.size,
            self.top,
            self.length,
            tower.width,
            tower.features,
            pull=self.pull,
            selection=self.selection,
            readout=self.readout,
            position=class_position(tower) if self.position == "class" else None,
            entry=self.entry,
            query=self.query,
        )
        head = head_of(self.head, tower.width if self.readout == "prompts" else tower.features)
        return Learner(PromptedModel(tower, prompts, head), self.phases, refine=self.refine)

    def refine(self, task: Task) -> Sequence[Phase]:
        """Balance the head over all classes, if it is of the kind that is balanced."""
        return [refinement()] if self.head == "refined" else []

    def phases(self, task: Task) -> Sequence[Phase]:
        """Train once on each task; only its own classes compete in the loss."""
        if self.head == "statistics" and len(task.classes) < 2:
            return []  # there is nothing to tell apart; the head learns from the look back
        adam = partial(torch.optim.Adam, lr=self.lr)
        return [Phase(self.epochs, self.batch_size, adam, "task", self.temperature, clip_norm=self.clip_norm or None)]
