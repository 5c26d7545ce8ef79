"""LSPT-NSP²: prompts of LSPT from the first task, and beside them prompts that move where old images feel nothing.

What LSPT's prompts do to an image goes through an LSTM and on through the prompts themselves, so no projection of their
steps protects old images. So they learn from the first task, which adapts the backbone to the stream, and are then left
alone. Beside them each block has prompts after its norm, of which the frozen sequence sees keys and values and the
travelling prompts see nothing. From the second task on these alone move, in the null spaces of what old images look at:
with exact null spaces old features stay where they are, block by block, however long a step is.

Real images leave no exact null space; `max_drift` or `kept` says how much is given away, as in VPT-NSP²-exact.

`carrier = "gapt"` lets gated prompts travel in their place. Gates and temperatures learn from the first task, too. A
temperature divides all logits of a block, those of the prompts beside included. While it rests it scales what old
images ask of keys, which leaves their null spaces as they are, and it is counted in where attention is summed.

Shared parts, in reading order:
    travelling prompts   lamina.prompts.long_term.LongTermPrompts or lamina.prompts.gated.GatedPrompts
    prompts beside       lamina.prompts.beside.PromptsBeside
    temperatures         lamina.protections.limits.Limits, of gated prompts
    projected steps      lamina.protections.bounded.BoundedNullSpace, or with `kept` given
                         lamina.protections.null_space.NullSpace
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan of training     lamina.methods.lspt.LSPT

References:
    Mo et al., LSPT: Long-term Spatial Prompt Tuning for Visual Representation Learning, 2024.
    Yoo et al., Improving Visual Prompt Tuning for Self-supervised Vision Transformers, ICML 2023.
    Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024, section 4: the two
    conditions. That both go together like this is ours.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import nn

from lamina.backbones.tower import Tower
from lamina.errors import ConfigError
from lamina.learner import Learner
from lamina.methods.gapt import GaPT
from lamina.methods.lspt import LSPT
from lamina.model import PromptedModel
from lamina.prompts.base import PromptModule
from lamina.prompts.beside import PromptsBeside
from lamina.protections.base import Protection
from lamina.protections.bounded import BoundedNullSpace
from lamina.protections.null_space import NullSpace
from lamina.protections.projector import Blend
from lamina.protections.spectrum import Cut

#: settings that say nothing of GaPT's prompts
_OF_LSPT = sorted(LSPT.model_fields.keys() - GaPT.model_fields.keys() - {"freeze_after_first"})


class LSPTNSP2(LSPT):
    """Settings beside those of LSPT; the plan of training is LSPT's with either kind of travelling prompts."""

    carrier: Literal["lspt", "gapt"] = Field(
        "lspt", description="which prompts travel: LSPT's, a set for each block, or GaPT's, one set with its gates"
    )
    gate_init: float = Field(5.0, description="gates of GaPT's prompts start at the sigmoid of minus this")
    plastic: int = Field(
        16, ge=1, description="prompt tokens after the norm in each block (M), which go on learning; fewer leave less"
    )
    max_drift: float = Field(
        0.05, ge=0, description="how far one task may move old features, as a share of their spread; chooses the cut"
    )
    kept: float | None = Field(
        None, ge=0, le=1, description="share of each spectrum that steps leave alone, instead of max_drift; 1 is exact"
    )
    freeze_after_first: bool = Field(True, description="learn travelling prompts from the first task alone; must be so")

    @model_validator(mode="after")
    def _what_travels_stays(self) -> Self:
        if not self.freeze_after_first:
            raise ConfigError(
                "LSPTNSP2.freeze_after_first must be true, since no null space protects what travels; got False: "
                "take lspt to train all of it"
            )
        return self

    def idle(self) -> dict[str, str]:
        measured = {} if self.kept is None else {"max_drift": "where kept is given, since nothing is measured"}
        other = ["gate_init"] if self.carrier == "lspt" else _OF_LSPT
        return super().idle() | measured | dict.fromkeys(other, f"with carrier={self.carrier}")

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        carrier, slow, held = self.travelling(tower)
        prompts = PromptsBeside(carrier, range(tower.depth), self.plastic, tower.width)
        if self.kept is None:
            null_space: NullSpace = BoundedNullSpace(tower, prompts, max_drift=self.max_drift)
        else:
            cut, blend = Cut(knee="energy", kept=self.kept), Blend(normalize=False)
            null_space = NullSpace(tower, prompts, cut=cut, channels=blend, tokens=blend, right_alone=True)
        model = PromptedModel(tower, prompts, self.head_for(tower.features))
        learner = self.learner(model, protections=[null_space, *held])
        learner.phases = partial(self.phases, slow=slow)
        return learner

    def travelling(self, tower: Tower) -> tuple[PromptModule, list[nn.Parameter], list[Protection]]:
        """Return new prompts that travel, which of them learn slowly, and what holds them while they learn."""
        if self.carrier == "lspt":
            long_term = self.prompts_for(tower)
            return long_term, long_term.recurrent, []
        gapt = GaPT(**{name: getattr(self, name) for name in ("length", "gate_init", "dropout", "dropout_mode")})
        gated = gapt.prompts_for(tower)
        return gated, [], [gapt.limits(gated)]
