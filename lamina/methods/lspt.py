"""LSPT: prompts that remember what earlier blocks made of them, and what the image's patches looked like.

Each block has a set of prompts of its own. Between two blocks an LSTM brings together the next set, what the block
before made of the last one, and the mean of the patches: prompts of early blocks are not lost in late ones, and every
prompt hears of every patch. Each part can be exchanged or left out; without both this is VPT-deep with the plan of
transfer learning.

The paper names no settings of training; these follow its baselines. The part that carries learns at a tenth of the
rate, since rates that prompts take destroy an LSTM, and no step uses a gradient longer than 1. On several tasks all is
trained on, unless `freeze_after_first` leaves prompts as the first task made them.

Shared parts, in reading order:
    prompts              lamina.prompts.long_term.LongTermPrompts
    what carries         lamina.prompts.recurrent.LSTM, lamina.prompts.recurrent.GRU,
                         lamina.prompts.recurrent.TransformerLayer
    what patches say     lamina.prompts.spatial.coded
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of
    plan of training     lamina.methods.tuned.Tuned

References:
    Mo et al., LSPT: Long-term Spatial Prompt Tuning for Visual Representation Learning, 2024.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from pydantic import Field
from torch import nn

from lamina.backbones.tower import Tower
from lamina.data.stream import Task
from lamina.learner import Learner, Phase
from lamina.methods.tuned import Tuned
from lamina.model import PromptedModel
from lamina.prompts.deep import DropoutMode, patch_bound
from lamina.prompts.long_term import LongTermPrompts
from lamina.prompts.recurrent import Carry
from lamina.prompts.spatial import Coding


class LSPT(Tuned):
    """Settings beside those of the plan."""

    length: int = Field(10, ge=1, description="prompt tokens in each block (M)")
    carry: Carry = Field("lstm", description="what carries prompts from block to block; none gives each its own set")
    carriers: int = Field(1, ge=1, description="layers of an LSTM")
    shared: bool = Field(True, description="one carrier behind all blocks, not one behind each")
    forget_bias: float | None = Field(
        None, description="of an LSTM's forget gates at the start; left out, as PyTorch draws it"
    )
    spatial: Coding = Field("mean", description="what prompts are told of patches: their mean, or means of clusters")
    hidden_norm: bool = Field(False, description="normalise what a block made of prompts before it is carried")
    tie_first: bool = Field(False, description="the first two blocks share a set of prompts")
    learn_cell: bool = Field(False, description="learn where an LSTM's memory starts, not 0")
    hears: bool = Field(
        True, description="carry what a block made of prompts; false carries what patches say alone, an equal control"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="share of the numbers of prompts that are 0 in training")
    dropout_mode: DropoutMode = Field("per_sample", description="who has a mask of its own: each image, or each batch")
    recurrent_rate: float = Field(0.1, gt=0, description="times the learning rate: the rate of what carries")
    clip_norm: float = Field(1.0, ge=0, description="longest gradient a step may use, all together; 0 does not clip")
    freeze_after_first: bool = Field(False, description="learn prompts from the first task alone")

    def idle(self) -> dict[str, str]:
        carried = () if self.carry == "lstm" else ("carriers", "forget_bias", "learn_cell")
        if self.carry == "none":
            carried += ("shared", "recurrent_rate", "hidden_norm", *(() if self.hears else ("hears",)))
        idle = dict.fromkeys(carried, f"with carry={self.carry}")
        return idle if self.dropout else idle | {"dropout_mode": "with dropout=0"}

    def prompts_for(self, tower: Tower) -> LongTermPrompts:
        """Return new prompts for a tower.

        Raises:
            UnsupportedBackbone: when the tower has no patches.
        """
        return LongTermPrompts.behind(
            tower,
            self.length,
            carry=self.carry,
            carriers=self.carriers,
            shared=self.shared,
            spatial=self.spatial,
            forget_bias=self.forget_bias,
            hidden_norm=self.hidden_norm,
            tie_first=self.tie_first,
            learn_cell=self.learn_cell,
            frozen_after_first=self.freeze_after_first,
            hears=self.hears,
            bound=patch_bound(tower, tower.width),
            dropout=self.dropout,
            dropout_mode=self.dropout_mode,
        )

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower."""
        prompts = self.prompts_for(tower)
        learner = self.learner(PromptedModel(tower, prompts, self.head_for(tower.features)))
        learner.phases = partial(self.phases, slow=prompts.recurrent)
        return learner

    def phases(self, task: Task, slow: Iterable[nn.Parameter] = ()) -> Sequence[Phase]:
        """Train once on each task; only its own classes compete in the loss."""
        return [self.phase(slow, self.recurrent_rate)] if super().phases(task) else []
