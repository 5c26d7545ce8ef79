"""RanPAC: frozen features, lifted by a random projection, and a ridge regression in closed form.

Nothing is trained by gradients. The tower looks at each image once; class sums and one second moment of
the lifted features are all that is kept, so no order of tasks is better than another. This is the
method on frozen features, without its optional adaptation to the first task.

Shared parts, in reading order:
    classifier           lamina.heads.statistics.Ridge

References:
    McDonnell et al., RanPAC: Random Projections and Pre-trained Models for Continual Learning, NeurIPS
    2023.
"""

from __future__ import annotations

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.config import Settings
from lamina.heads.statistics import Ridge
from lamina.learner import Learner
from lamina.model import PromptedModel


class RanPAC(Settings):
    """Settings."""

    width: int = Field(
        2_000,
        ge=0,
        description="features after the random projection, 10,000 in the paper; memory grows with the square and time "
        "with the cube; 0 projects nothing",
    )
    ridge: float | None = Field(
        None, gt=0, description="added to the diagonal of the second moment; none lets cross-validation choose"
    )

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        head = Ridge(tower.features, width=self.width, ridge=self.ridge)
        return Learner(PromptedModel(tower, None, head), lambda task: [], cache="features")
