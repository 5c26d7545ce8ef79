"""PROOF: each task adds a linear layer for images and one for names; one attention fuses them with mean images.

The towers stay as they are, so features are computed once. A class is scored by its name, by its name beside the image
that is asked about, and by the mean of its images. Layers of old tasks stay, the attention goes on learning, and a few
old images of each class keep it from forgetting; they are chosen so that their mean is near that of all.

Each image is fused by itself. The released code averages fused names and means over a batch, so that a prediction
depends on the other images of its batch: `fusion_reduce = "batch_mean"`. `parity = "official"` also lets old layers for
names learn on, and scores images at the length that they are projected to.

Shared parts, in reading order:
    classifier           lamina.heads.proof.ProofHead
    old images           lamina.data.memory.Memory
    plan of training     lamina.methods.by_name.ByName

References:
    Zhou et al., Learning without Forgetting for Vision-Language Models, 2023; the authors' repository
    zhoudw-zdw/PROOF at 58c097a.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.optim import Optimizer

from lamina.backbones.tower import Tower
from lamina.data.memory import Choice
from lamina.heads.proof import ProofHead, Reduced
from lamina.heads.templates import templates_of
from lamina.heads.texts import text_side
from lamina.learner import Learner
from lamina.methods.by_name import ByName
from lamina.model import PromptedModel
from lamina.schedules import Schedule, by_epoch, cosine


class PROOF(ByName):
    """Settings; the defaults are those of the released code for CIFAR-100, with the memory of its other data sets."""

    templates: str | list[str] = Field(
        "cifar",
        description="what is said of a class: a set by name, a template with one {}, or several; training "
        "reads the first",
    )
    contexts: int = Field(3, ge=0, description="learned rows that a task adds to the sequence that is fused")
    fusion_reduce: Reduced = Field(
        "image",
        description="what fused images are compared with: names and means fused beside them, or those averaged over a "
        "batch, which is transductive: a prediction then depends on the other images of its batch",
    )
    freeze_texts: bool = Field(True, description="leave layers for names of old tasks as they are, as those for images")
    memory: int = Field(20, ge=0, description="old training images kept of each class, to be learned from again")
    choose: Choice = Field("herding", description="which images are kept")
    batch_size: int = Field(64, ge=1, description="images in one step, over all devices")
    lr: float = Field(0.001, gt=0, description="learning rate of SGD with momentum, falling by a cosine once an epoch")
    weight_decay: float = Field(0.05, ge=0, description="of SGD")
    parity: Literal["paper", "official"] = Field(
        "paper",
        description="official fuses over batches, lets old layers for names learn, and scores images at "
        "the length that they are projected to, as the released code does",
    )

    @model_validator(mode="before")
    @classmethod
    def _official_is_the_released_code(cls, values: Any) -> Any:
        official = values.get("parity") == "official"
        return {"fusion_reduce": "batch_mean", "freeze_texts": False, **values} if official else values

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when it has no text side, or a template no place for a name.
        """
        head = ProofHead(
            text_side(tower, "proof"),
            templates_of(self.templates),
            self.names,
            contexts=self.contexts,
            reduce=self.fusion_reduce,
            freeze_texts=self.freeze_texts,
            plain=self.parity == "official",
            negatives=self.competing,
        )
        return self.learner(PromptedModel(tower, None, head), cache="features")

    def descent(self, lr: float) -> Callable[[list[nn.Parameter]], Optimizer]:
        return partial(torch.optim.SGD, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def schedule(self, lr: float) -> Schedule:
        return by_epoch(cosine(), self.epochs)
