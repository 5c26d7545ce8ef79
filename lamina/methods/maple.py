"""MaPLe: prompts in the first blocks of both towers, those for images being linear images of those for texts.

A few learned words stand before the name of a class, and take up new contents on entry to each of the first blocks.
Each set of them has a map to the width of the image tower, so that both towers learn by one set of prompts.
`coupled = false` lets images have prompts of their own (independent vision-language prompting).

As in the released code, the learned words take the place of the first of "a photo of a", and the others stay as they
are; `word_init = "full"` learns all of them. Prompts travel on from the last block that they enter.

Shared parts, in reading order:
    prompts, images     lamina.prompts.stacked.CoupledPrompts, lamina.prompts.stacked.FreePrompts
    prompts, texts      lamina.heads.deep_texts.DeepContextTexts; where they stand: lamina.prompts.contexts
    classifier          lamina.heads.text.TextHead
    plan of training    lamina.methods.by_name.ByName

References:
    Khattak et al., MaPLe: Multi-modal Prompt Learning, CVPR 2023; the repository
    muzairkhattak/multimodal-prompt-learning.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.errors import ConfigError
from lamina.heads.deep_texts import DeepContextTexts, divided
from lamina.heads.text import TextHead
from lamina.heads.texts import text_side
from lamina.learner import Learner
from lamina.methods.by_name import ByName
from lamina.model import PromptedModel
from lamina.prompts.contexts import len_of
from lamina.prompts.stacked import CoupledPrompts, FreePrompts, StackedPrompts
from lamina.schedules import Schedule, cosine, warmed

#: what the learning rate is at first
WARM = 1e-5


class MaPLe(ByName):
    """Settings; the defaults are those of the released code for new classes of one data set."""

    depth: int | None = Field(
        None, ge=1, description="blocks that prompts enter (J); left out, 9, or as many as both towers have"
    )
    length: int = Field(2, ge=1, description="tokens in one set of prompts (n)")
    words: str = Field("a photo of a", description="to start from; empty draws them")
    word_init: Literal["first", "full"] = Field(
        "first", description="the first words, as many as length says, are learned and the others stay; or all are"
    )
    coupled: bool = Field(
        True, description="make prompts for images of those for texts; false lets them have their own"
    )
    batch_size: int = Field(4, ge=1, description="images in one step, over all devices")
    lr: float = Field(0.0035, gt=0, description="learning rate of SGD with momentum, falling to 0 by a cosine")
    warmup: float = Field(0.2, ge=0, lt=1, description="share of training before that, at a rate of 0.00001")

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        if not self.words:
            return idle | {"word_init": "without words"}
        return idle | ({"length": "with word_init=full, where words have a length"} if self.word_init == "full" else {})

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when it has no text side, a tower has fewer blocks, or no number of words has the length.
        """
        side = text_side(tower, "maple")
        blocks = min(tower.depth, side.tower.depth)
        depth = min(9, blocks) if self.depth is None else self.depth
        if depth > blocks:
            raise ConfigError(
                f"MaPLe.depth must be at most {blocks}, since the image tower has {tower.depth} blocks and the text "
                f"tower {side.tower.depth}; got {depth}"
            )
        length = len_of(side, self.words) if self.words and self.word_init == "full" else self.length
        words, fixed = divided(side, self.words, length) if self.words else ("", "")
        texts = DeepContextTexts(side, length, depth, words=words, fixed=fixed, names=self.names)
        prompts: StackedPrompts = (
            CoupledPrompts(tower, depth, side.tower.width, texts.rows)
            if self.coupled
            else FreePrompts(tower, depth, length)
        )
        return self.learner(PromptedModel(tower, prompts, TextHead(texts, negatives=self.competing)))

    def schedule(self, lr: float) -> Schedule:
        """Return the course of the learning rate `lr`."""
        return warmed(self.warmup, min(1.0, WARM / lr), cosine())
