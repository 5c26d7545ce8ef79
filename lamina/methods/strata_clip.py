"""Strata for CLIP: what images and names say of a class, mixed as far as each has proved right.

Class statistics are those of `strata`: sums over all images of what the last blocks say, from which the classifier is
remade after every task. To them comes what the frozen text tower says of the names. How much each counts is found on a
task's own images, each left out of the statistics while it is judged; so the scores are calibrated, too. Nothing is
trained, nothing disturbed, no image is kept, an image is read once, and a class that is to come is known by its name.

Shared parts, in reading order:
    classifier      lamina.heads.mixed.NamedDiscriminant
    texts           lamina.heads.texts.HandTexts; templates by name: lamina.heads.templates

References:
    Ours, from parts of others: see lamina.methods.strata, lamina.methods.zero_shot and the head.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.config import Settings
from lamina.heads.mixed import NamedDiscriminant
from lamina.heads.templates import templates_of
from lamina.heads.texts import HandTexts, text_side
from lamina.learner import Learner
from lamina.model import PromptedModel


class StrataCLIP(Settings):
    """Settings; layers are those of `strata`, templates those of CLIP's authors."""

    backbone: ClassVar[str] = "lamina:clip-nano"

    layers: int = Field(2, ge=1, description="from how many of the last blocks class statistics are, side by side")
    templates: str | list[str] = Field(
        "imagenet-7", description="what is said of a class: a set by name, a template with one {}, or several"
    )
    names: dict[str, str] = Field({}, description="what to read instead of a class's own name")

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when it has no text side, or a template no place for a name.
        """
        texts = HandTexts(text_side(tower, "strata-clip"), templates_of(self.templates), self.names)
        head = NamedDiscriminant(self.layers * tower.features, texts)
        return Learner(PromptedModel(tower, None, head, layers=self.layers), lambda task: [], cache="features")
