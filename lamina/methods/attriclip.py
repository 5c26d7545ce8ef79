"""AttriCLIP: each image chooses the words around the names of classes, from one bank for all tasks.

The bank has pairs of a key and a prompt. An image takes the prompts whose keys are nearest to its frozen features; one
after the other they stand before the name of every class. Chosen keys are drawn to their images, and prompts are kept
from saying the same. Nothing grows from task to task, and no image is kept unless asked.

The defaults are the paper's. In the released code a key counts as near by its dot product (`retrieval`), placeholder
words are left behind a prompt that is read alone (`fillers`), batches have 16 images (`lr=0.0008`), and the text tower
is trained along with the bank and thrown away after each task; that is not imitated, both towers stay as they are.

Shared parts, in reading order:
    bank and texts      lamina.heads.attributes.AttributeTexts
    classifier          lamina.heads.text.TextHead
    plan of training    lamina.methods.by_name.ByName

References:
    Wang et al., AttriCLIP: A Non-Incremental Learner for Incremental Knowledge Learning, CVPR 2023; the authors'
    repository bhrqw/AttriCLIP.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from lamina.backbones.tower import Tower
from lamina.heads.attributes import AttributeTexts, Order, Retrieval, check_top
from lamina.heads.text import TextHead
from lamina.heads.texts import text_side
from lamina.learner import Learner
from lamina.methods.by_name import ByName
from lamina.model import PromptedModel
from lamina.schedules import Schedule, cosine


class AttriCLIP(ByName):
    """Settings; the defaults are the paper's for ten tasks of CIFAR-100."""

    size: int = Field(10, ge=1, description="pairs of a key and a prompt in the bank, for all tasks together")
    top: int = Field(3, ge=1, description="how many of them an image takes")
    length: int = Field(12, ge=1, description="learned words in one prompt")
    pull: float = Field(0.7, ge=0, description="weight of the loss that draws chosen keys to the image")
    apart: float = Field(0.3, ge=0, description="weight of the loss that keeps prompts from saying the same")
    retrieval: Retrieval = Field("cosine", description="what says how near a key is; dot lets long keys win")
    order: Order = Field("rank", description="of prompts in a text: the nearest key's first, or as in the bank")
    fillers: bool = Field(False, description="leave placeholder words behind a prompt that is read without a name")
    epochs: int = Field(10, ge=1, description="passes over a task's images")
    lr: float = Field(
        0.0016, gt=0, description="learning rate of SGD, falling to a thousandth by a cosine; 0.001 * batch_size / 20"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="of SGD")

    @model_validator(mode="after")
    def _choice_is_possible(self) -> Self:
        check_top(self.top, self.size)
        return self

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        if self.top == 1:
            idle |= dict.fromkeys(("order", "fillers"), "with top=1, one prompt in a text")
        if not self.apart or self.size == 1:
            idle["fillers"] = "where apart is 0 or the bank has one prompt, since no prompt is read without a name"
        if self.size == 1:
            idle["apart"] = "with size=1, where there is no pair of prompts"
        return idle

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when it has no text side, or its texts no room for so many learned words.
        """
        texts = AttributeTexts(
            text_side(tower, "attriclip"),
            self.size,
            self.top,
            self.length,
            retrieval=self.retrieval,
            order=self.order,
            pull=self.pull,
            apart=self.apart,
            fillers=self.fillers,
            names=self.names,
        )
        head = TextHead(texts, negatives=self.competing)
        return self.learner(PromptedModel(tower, None, head), cache="features")

    def schedule(self, lr: float) -> Schedule:
        return cosine(1e-3)
