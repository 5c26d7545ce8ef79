"""VPT-NSP²: deep prompts that move only where old tasks do not feel it.

Every block has prompt tokens of its own. After a task, two small matrices per block keep what the
task's images looked at; from then on every optimizer step of the prompts is projected to the null
spaces of the two. The projection takes for granted that layer normalisation goes on scaling prompts
as it did, so a loss holds the mean and deviation of each prompt token where the last task left them.

The defaults follow the paper. `parity = "official"` does as the released code does where the two differ:
where the spectrum is cut, means of batches of 100 (`eval_batch`), heads, milestones, and passes that are
shuffled ten at a time. Its half precision, whose loss scaling skips first steps, is not imitated.

Shared parts, in reading order:
    prompts              lamina.prompts.deep.DeepPrompts
    settings of steps    lamina.methods.protected.InNullSpace
    projected steps      lamina.protections.null_space.NullSpace
    loss on moments      lamina.protections.distribution.TokenMoments
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan of training     lamina.methods.vpt_deep.InTurn

References:
    Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024; VPTinNSforCL at 0d9c547.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lamina.backbones.tower import Tower
from lamina.data.stream import Task
from lamina.errors import ConfigError
from lamina.heads.choose import head_of
from lamina.heads.linear import LinearHead
from lamina.learner import Learner, Phase
from lamina.methods.protected import InNullSpace
from lamina.methods.vpt_deep import InTurn
from lamina.prompts.deep import DeepPrompts
from lamina.protections.distribution import TokenMoments
from lamina.protections.spectrum import Cut
from lamina.schedules import steps_down


class VPTNSP2(InNullSpace, InTurn):
    """Settings beside those of VPT-deep; the defaults are the paper's for ten tasks of CIFAR-100."""

    length: int = Field(4, ge=3, description="prompt tokens in each block (M); fewer than 3 have no knee to cut at")
    use_ln_loss: bool = Field(True, description="keep mean and deviation of prompt tokens by a loss")
    knee: Literal["paper", "code", "energy", "multiple"] = Field(  # type: ignore[assignment]  # one more rule
        "paper",
        description="which rule says how many directions are free: the paper's or the released code's knee, what is "
        "beyond a share of the spectrum (kept), or a multiple of its smallest value",
    )
    multiple: float = Field(10.0, ge=1, description="of the smallest value, up to which directions are free")
    gain_control: bool = Field(False, description="control: replace projectors by the gain of what they leave free")
    ln_correction: Literal["none", "affine"] = Field(
        "none", description="affine counts in the weight and deviations of the norm before the keys; the paper does not"
    )
    center: bool = Field(False, description="count in that this norm subtracts each token's mean; the paper does not")
    parity: Literal["paper", "official"] = Field(
        "paper", description="official does as the released code does where it differs from the paper"
    )

    @model_validator(mode="before")
    @classmethod
    def _official_has_the_knee_of_the_code(cls, values: Any) -> Any:
        return {"knee": "code", **values} if values.get("parity") == "official" else values

    @model_validator(mode="after")
    def _official_is_possible(self) -> Self:
        if self.parity == "official" and self.knee != "code":
            raise ConfigError(f'knee must be left out or "code" with parity="official"; got {self.knee!r}')
        if self.parity == "official" and self.epochs % 10:
            raise ConfigError(f'epochs must be a multiple of 10 with parity="official"; got {self.epochs}')
        return self

    def idle(self) -> dict[str, str]:
        either = self.use_b1 or self.use_b2
        used = {"center": self.use_b1, "ln_correction": either, "multiple": either and self.knee == "multiple"}
        ours = {name: "with use_b1, use_b2 and knee as they are" for name, on in used.items() if not on}
        return super().idle() | ours

    def cut(self) -> Cut:
        return Cut(knee="official" if self.parity == "official" else self.knee, kept=self.kept, multiple=self.multiple)

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        learner, official = super().build(tower), self.parity == "official"
        prompts = learner.model.prompts
        assert isinstance(prompts, DeepPrompts)
        if official:
            learner.model.head = head_of(self.head, learner.model.width, partial(LinearHead, start="released"))
        null_space = self.null_space(
            tower,
            prompts,
            gain_control=self.gain_control,
            ln_correction=self.ln_correction,
            center=self.center,
            batch_means=official,
        )
        learner.protections = [null_space, TokenMoments(prompts, weight=self.moments if self.use_ln_loss else 0.0)]
        return learner

    def phases(self, task: Task) -> Sequence[Phase]:
        """Train once on each task; only its own classes compete in the loss."""
        phases = super().phases(task)
        if self.parity == "paper":
            return phases
        schedule = steps_down(at=(0.4, 0.7), by=0.1)
        return [replace(phase, epochs=phase.epochs // 10, repeat=10, schedule=schedule) for phase in phases]
