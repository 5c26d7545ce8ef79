"""A linear head that can be balanced anew after every task, on features drawn from a Gaussian per class."""

from __future__ import annotations

from lamina.heads.gaussians import GaussianHead
from lamina.heads.linear import LinearHead


class RefinedHead(GaussianHead, LinearHead):
    """A block of columns per task, and a Gaussian per class to draw features from.

    References:
        Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024, the head
        refinement of the CLIP variant.
    """

    replaceable = False

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.remember(features)
