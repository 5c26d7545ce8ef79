"""CLIP as it is: new classes join by their names (Continual-CLIP).

Nothing is learned and nothing forgotten: an image is of the class whose name it is nearest to, among those met so far.
What a method for CLIP has to beat.

Shared parts:
    texts           lamina.heads.texts.HandTexts; templates by name: lamina.heads.templates
    classifier      lamina.heads.text.TextHead

References:
    Thengane et al., CLIP model is an Efficient Continual Learner, 2022; Radford et al., ICML 2021, section 3.1.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.config import Settings
from lamina.heads.templates import templates_of
from lamina.heads.text import TextHead
from lamina.heads.texts import HandTexts, text_side
from lamina.learner import Learner
from lamina.model import PromptedModel


class ZeroShot(Settings):
    """Settings; one template by default, as the paper has it."""

    backbone: ClassVar[str] = "lamina:clip-nano"

    templates: str | list[str] = Field(
        "photo", description="what is said of a class: a set by name, a template with one {}, or several"
    )
    names: dict[str, str] = Field({}, description="what to read instead of a class's own name")

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when it has no text side, or a template no place for a name.
        """
        texts = HandTexts(text_side(tower, "zero-shot"), templates_of(self.templates), self.names)
        return Learner(PromptedModel(tower, None, TextHead(texts)), lambda task: [], cache="features")
