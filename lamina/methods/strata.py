"""Strata: what each lesson brings is laid upon the lessons before, and nothing below is disturbed.

The method we recommend. The classifier is remade after every task, in closed form, from sums over all images
so far of what the last blocks say. Nothing has to be balanced, no order of tasks is better than another, and
a task of a single class is as good as any.

Prompts are there for the asking: with `length` above 0 they learn from each task in what the tasks before
leave free, so that the sums stay true within a bound, while a linear layer stands in for the classifier. By
default there are none, and an image is read once: on every stream that we chose settings on, with our small
backbone, prompts cost more than they gave (docs/null-space.md).

Shared parts, in reading order:
    classifier           lamina.heads.statistics.Discriminant; where prompts train lamina.heads.linear.LinearHead
    prompts              lamina.prompts.deep.DeepPrompts, after the norm
    projected steps      lamina.protections.bounded.BoundedNullSpace
    plan of training     lamina.methods.vpt_deep.InTurn

References:
    Ours, from parts of others: Goswami et al., FeCAM, NeurIPS 2023, and McDonnell et al., RanPAC,
    NeurIPS 2023 (class statistics under a pre-trained model); Ahrens et al., Read Between the Layers,
    TMLR 2024 (features of several layers); Lu et al., Visual Prompt Tuning in Null Space for Continual
    Learning, NeurIPS 2024 (the null space).
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from lamina.backbones.tower import Tower
from lamina.errors import ConfigError
from lamina.heads.choose import HeadName
from lamina.heads.statistics import Discriminant
from lamina.learner import Learner
from lamina.methods.vpt_nsp2_exact import VPTNSP2Exact
from lamina.model import PromptedModel


class Strata(VPTNSP2Exact):
    """Settings of the exact null space, with a tighter bound: class statistics are sharper than a layer per task."""

    length: int = Field(0, ge=0, description="prompt tokens in each block (M); 16 leave a null space, 0 trains nothing")
    lr: float = Field(
        0.001, gt=0, description="learning rate of Adam, divided by 10 after 0.5 and again after 0.8 of a task"
    )
    max_drift: float = Field(
        0.02, ge=0, description="how far one task may move old features, as a share of their spread; chooses the cut"
    )
    head: HeadName = Field(
        "statistics",
        description="classifier: class statistics, or where there are prompts, as in the other methods, a layer per "
        "task, the same by cosine, or layers balanced on draws",
    )
    layers: int = Field(2, ge=1, description="from how many of the last blocks the classifier reads, side by side")

    @model_validator(mode="after")
    def _every_head_learns(self) -> Self:
        if not self.length and self.head != "statistics":
            raise ConfigError(
                f'head must be "statistics" where length is 0, since nothing trains it; got {self.head!r}'
            )
        return self

    def idle(self) -> dict[str, str]:
        if self.length:
            return super().idle()
        trained = ("epochs", "batch_size", "lr", "weight_decay", "temperature", "max_drift", "kept")
        return dict.fromkeys(trained, "where length is 0, since nothing is trained")

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        if self.length:
            return super().build(tower)
        head = Discriminant(self.layers * tower.features)
        return Learner(PromptedModel(tower, None, head, layers=self.layers), lambda task: [], cache="features")
