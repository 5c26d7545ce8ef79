"""CoOp: the words around the name of a class are learned, both towers stay as they are.

One context serves all classes, or each task has one of its own, which stays when the task is over.

Shared parts, in reading order:
    contexts            lamina.heads.texts.ContextTexts; where they stand: lamina.prompts.contexts
    classifier          lamina.heads.text.TextHead
    plan of training    lamina.methods.by_name.ByName

References:
    Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.heads.text import TextHead
from lamina.heads.texts import ContextTexts, text_side
from lamina.learner import Learner
from lamina.methods.by_name import ByName
from lamina.model import PromptedModel
from lamina.prompts.contexts import Position


class CoOp(ByName):
    """Settings; context and rate are the paper's, passes and batches those of its continual use."""

    length: int = Field(16, ge=1, description="learned words in a context (n)")
    words: str = Field("", description="to start from, such as 'a photo of a' with length=4; empty draws them")
    position: Position = Field("end", description="of the class name: behind, amid or before the context")
    scope: Literal["shared", "task", "class"] = Field(
        "shared", description="one context for all, one per task that stays, or one per class"
    )

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when it has no text side, or as many words as learned ones are not given.
        """
        texts = ContextTexts(
            text_side(tower, "coop"),
            self.length,
            words=self.words,
            position=self.position,
            scope=self.scope,
            names=self.names,
        )
        return self.learner(PromptedModel(tower, None, TextHead(texts, negatives=self.competing)), cache="features")
