"""Joint training: deep prompts that see all tasks at once.

Not continual learning, but its upper bound: the prompts and the classifier of VPT-deep, trained on the
images of every task together, all classes competing in the loss.

Shared parts, in reading order:
    prompts and plan     lamina.methods.vpt_deep.VPTDeep

References:
    Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024, table 1 (the
    upper bound).
"""

from __future__ import annotations

from lamina.backbones.tower import Tower
from lamina.learner import Learner
from lamina.methods.vpt_deep import VPTDeep


class Joint(VPTDeep):
    """The settings of VPT-deep; one task holds all classes."""

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        learner = super().build(tower)
        learner.at_once = True
        return learner
