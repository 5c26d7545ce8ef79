"""Nearest class mean on frozen features: no training, no forgetting.

After a task the features of its images are averaged class by class; an image gets the class whose mean
is nearest by cosine. What prompts are worth must be seen beside it.

Shared parts, in reading order:
    class means          lamina.heads.statistics.NearestMean

References:
    Janson et al., A Simple Baseline that Questions the Use of Pretrained Models in Continual Learning,
    2022.
"""

from __future__ import annotations

from lamina.backbones.tower import Tower
from lamina.config import Settings
from lamina.heads.statistics import NearestMean as NearestMeanHead
from lamina.learner import Learner
from lamina.model import PromptedModel


class NearestMean(Settings):
    """No settings: there is nothing to choose."""

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        return Learner(PromptedModel(tower, None, NearestMeanHead(tower.features)), lambda task: [], cache="features")
