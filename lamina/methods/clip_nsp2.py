"""CLIP-NSP²: prompts in the first blocks of CLIP's image tower that move only where old tasks do not feel it.

It is VPT-NSP² with class weights that a frozen text tower makes of templates. After a task, two small matrices per
block keep what its images looked at, and the steps of prompts are projected to the null spaces of the two; a loss
holds the mean and deviation of prompt tokens. Then a copy of the projection to the space of texts is balanced on
features drawn from a Gaussian per class. Of that the theory does not speak, and no Gaussian knows how prompts move on.

The defaults follow the paper, but for the blocks. `parity = "official"` does as the released code does where the two
differ: where the spectrum is cut, means of batches of 100 (`eval_batch`), milestones, and passes shuffled two at a
time. A scale of cosines above 100 is brought back to it in either case; there it may grow.

Shared parts, in reading order:
    prompts              lamina.prompts.deep.DeepPrompts
    settings of steps    lamina.methods.protected.InNullSpace
    projected steps      lamina.protections.null_space.NullSpace
    loss on moments      lamina.protections.distribution.TokenMoments
    classifier           lamina.heads.projected.ProjectedTextHead, or lamina.heads.text.TextHead
    plan of training     lamina.methods.clip_seq.CLIPSeq

References:
    Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024; VPTinNSforCL at 0d9c547.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lamina.backbones.tower import Tower
from lamina.data.stream import Task
from lamina.errors import ConfigError
from lamina.learner import Learner, Phase
from lamina.methods.clip_seq import CLIPSeq
from lamina.methods.protected import InNullSpace
from lamina.prompts.deep import DeepPrompts
from lamina.protections.distribution import TokenMoments
from lamina.protections.spectrum import Cut
from lamina.schedules import steps_down


class CLIPNSP2(InNullSpace, CLIPSeq):
    """Settings beside those of CLIP-Seq; the defaults are the authors' for ten tasks of CIFAR-100."""

    called: ClassVar[str] = "clip-nsp2"

    length: int = Field(4, ge=3, description="prompt tokens in each block (M); fewer than 3 have no knee to cut at")
    refine: bool = Field(True, description="balance a copy of the image projection after each task, on draws")
    eta1: float = Field(0.98, ge=0, le=1, description="of channels: 0 lets every step through, 1 projects all of it")
    eta2: float = Field(0.98, ge=0, le=1, description="of tokens: 0 lets every step through, 1 projects all of it")
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
        if self.parity == "official" and self.epochs % 2:
            raise ConfigError(f'epochs must be even with parity="official"; got {self.epochs}')
        return self

    def cut(self) -> Cut:
        return Cut(knee="official" if self.parity == "official" else self.knee, kept=self.kept)

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when it has no text side, or a template no place for a name.
        """
        learner = super().build(tower)
        prompts = learner.model.prompts
        assert isinstance(prompts, DeepPrompts)
        null_space = self.null_space(tower, prompts, batch_means=self.parity == "official")
        learner.protections = [null_space, TokenMoments(prompts, weight=self.moments)]
        return learner

    def phases(self, task: Task) -> Sequence[Phase]:
        """Train as CLIP-Seq does; as the released code does, if asked to, with passes of a set repeated twice."""
        phases = super().phases(task)
        if self.parity == "paper":
            return phases
        schedule = steps_down(at=(0.4, 0.7), by=0.1)
        return [replace(phase, epochs=phase.epochs // 2, repeat=2, schedule=schedule) for phase in phases]
