"""CoCoOp: learned words around the name of a class, moved by what the image shows.

A small network turns the features of an image into one vector, which is added to every learned word. So each image has
texts of its own, and every step and every prediction reads the names of all classes that compete once for each image.

The paper takes one image a step for ten passes; the defaults here are those of CoOp's continual use. In the released
code the network's last layer starts as PyTorch draws it (`start = "drawn"`), which moves words by more than there is
between them; here it starts at 0, so that training begins with the words.

Shared parts, in reading order:
    contexts            lamina.heads.image_texts.ImageContextTexts; where they stand: lamina.prompts.contexts
    classifier          lamina.heads.text.TextHead
    plan of training    lamina.methods.by_name.ByName

References:
    Zhou et al., Conditional Prompt Learning for Vision-Language Models, CVPR 2022; the repository KaiyangZhou/CoOp.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.heads.image_texts import ImageContextTexts
from lamina.heads.text import TextHead
from lamina.heads.texts import text_side
from lamina.learner import Learner
from lamina.methods.by_name import ByName
from lamina.model import PromptedModel
from lamina.prompts.contexts import Position, len_of


class CoCoOp(ByName):
    """Settings; context and rate are the paper's, passes and batches those of CoOp's continual use."""

    words: str = Field("a photo of a", description="learned words to start from; empty draws as many as length says")
    length: int = Field(4, ge=1, description="learned words in a context (n), where none are given to start from")
    position: Position = Field("end", description="of the class name: behind, amid or before the context")
    start: Literal["zero", "drawn"] = Field(
        "zero",
        description="what is added to words at first: nothing, or what a network as it is drawn makes of an image",
    )
    reduction: int = Field(16, ge=1, description="the hidden layer is so many times narrower than the features")

    def idle(self) -> dict[str, str]:
        return super().idle() | ({"length": "where words are given, which have a length"} if self.words else {})

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when it has no text side.
        """
        side = text_side(tower, "cocoop")
        texts = ImageContextTexts(
            side,
            len_of(side, self.words) if self.words else self.length,
            words=self.words,
            position=self.position,
            reduction=self.reduction,
            start=self.start,
            names=self.names,
        )
        return self.learner(PromptedModel(tower, None, TextHead(texts, negatives=self.competing)), cache="features")
