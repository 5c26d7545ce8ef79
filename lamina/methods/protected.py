"""Settings that methods share whose prompts move where old tasks do not feel it: in null spaces, or as PGP has it.

References:
    Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024; VPTinNSforCL at 0d9c547.
    Qiao et al., Prompt Gradient Projection for Continual Learning, ICLR 2024; the authors' repository
    JingyangQiao/prompt-gradient-projection at c566b81.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from lamina.backbones.tower import Tower
from lamina.config import Settings
from lamina.protections.base import TokenPrompts
from lamina.protections.null_space import NullSpace
from lamina.protections.projector import Blend
from lamina.protections.samples import Space
from lamina.protections.spectrum import Cut
from lamina.protections.subspace import Apply


class InNullSpace(Settings):
    """Settings of prompts whose steps are projected to null spaces, by the paper's way to cut and to blend."""

    eta1: float = Field(0.97, ge=0, le=1, description="of channels: 0 lets every step through, 1 projects all of it")
    eta2: float = Field(0.97, ge=0, le=1, description="of tokens: 0 lets every step through, 1 projects all of it")
    use_b1: bool = Field(True, description="project channels, so that old images see the same keys where prompts enter")
    use_b2: bool = Field(True, description="project tokens, so that old images get the same values there")
    moments: float = Field(
        1.0, ge=0, description="weight of the loss that keeps mean and deviation of prompt tokens; 0 leaves it out"
    )
    knee: Literal["paper", "code", "energy"] = Field(
        "paper",
        description="which rule says how many directions are free: the paper's or the released code's knee, or what is "
        "beyond a share of the spectrum (kept)",
    )
    kept: float = Field(0.99, ge=0, le=1, description="share of a spectrum that the used directions hold, for energy")
    normalize: bool = Field(True, description="bring projectors to unit Frobenius norm before eta blends them")

    def idle(self) -> dict[str, str]:
        either = self.use_b1 or self.use_b2
        used = {"eta1": self.use_b1, "eta2": self.use_b2, "normalize": either, "knee": either}
        used |= {"kept": either and self.knee == "energy"}
        ours = {name: "with use_b1, use_b2 and knee as they are" for name, on in used.items() if not on}
        return super().idle() | ours

    def cut(self) -> Cut:
        """Return which directions are free."""
        return Cut(knee=self.knee, kept=self.kept)

    def null_space(self, tower: Tower, prompts: TokenPrompts, *, gain_control: bool = False, **more: Any) -> NullSpace:
        """Return the protection of prompts; `more` as `NullSpace` takes it."""
        blend = Blend(normalize=self.normalize, gain_control=gain_control)
        channels = replace(blend, eta=self.eta1) if self.use_b1 else None
        tokens = replace(blend, eta=self.eta2) if self.use_b2 else None
        return NullSpace(tower, prompts, cut=self.cut(), channels=channels, tokens=tokens, **more)


class AwayFromOld(Settings):
    """Settings of PGP: steps have no part along directions that old tokens or queries use."""

    prompt_share: float = Field(
        0.5, ge=0, le=1, description="share of old tokens and prompts that prompts must leave alone; 0 lets them move"
    )
    apply: Apply = Field(
        "step", description="what is projected: the optimizer's step; or the gradient, as the released code does"
    )


class AwayFromOldImages(AwayFromOld):
    """Settings of PGP on a pool, whose released code looks for directions among images."""

    space: Space = Field(
        "feature",
        description="where directions are found: among features; or, as the released code does, among as many images "
        "of a task as there are channels, in one process",
    )
    parity: Literal["paper", "official"] = Field(
        "paper",
        description="official lets the images of a batch vote, also in evaluation, finds directions among images and "
        "projects gradients, as the released code does",
    )

    @model_validator(mode="before")
    @classmethod
    def _official_is_the_released_code(cls, values: Any) -> Any:
        return {"space": "sample", "apply": "gradient", **values} if values.get("parity") == "official" else values
