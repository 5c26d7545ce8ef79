"""CLAP: what CLIP says of a class becomes a Gaussian, for each task by an encoder of its own.

Features of class names look at the image, are moved by that, and get a distribution around them, anchored to what
templates say; scores average over draws. Old encoders are frozen while a task is learned; then, from the second task
on, all learn together from a few kept images of every class. It works on templates alone, or on words that are learned.
Each image is its own context. In released code names look at the whole test batch, whose images come from one task:
a leak, which `preset="paper"` and `preset="code"` have.

Shared parts, in reading order:
    names, Gaussians    lamina.heads.guidance.Guidance, lamina.heads.encoders.Encoders
    classifier          lamina.heads.clap.ClapHead; its texts: lamina.heads.clap_texts
    plan of training    lamina.methods.by_name.ByName

References:
    Jha et al., CLAP4CLIP: Continual Learning with Probabilistic Finetuning for Vision-Language Models, NeurIPS 2024;
    the authors' repository srvCodes/clap4clip at 7ff95c2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lamina.backbones.tower import Tower
from lamina.data.stream import Task
from lamina.errors import ConfigError
from lamina.heads.clap import Anchored, Average, ClapHead, MonteCarlo
from lamina.heads.clap_texts import Text, kind_of
from lamina.heads.encoders import Encoders, Start
from lamina.heads.guidance import Context, Guidance
from lamina.heads.templates import templates_of
from lamina.heads.texts import EachText, text_side
from lamina.learner import Learner, Phase, all_but
from lamina.methods.by_name import ByName
from lamina.model import PromptedModel
from lamina.schedules import Schedule, cosine, rising

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"context": "batch", "average": "probabilities", "anchored": "past"},
    "code": {"context": "batch", "batch_size": 32, "lr": 0.0016, "warmup": 0.3, "choose": "first"},
}


class CLAP(ByName):
    """Settings; numbers are the paper's."""

    text: Text = Field("hand", description="templates alone, or words learned as in CoOp, MaPLe or AttriCLIP")
    templates: str | list[str] = Field("cifar", description="a set by name, a template with one {}, or several")
    preset: Literal["ours", "paper", "code"] = Field("ours", description="what the paper says, or its code does")
    variational: bool = Field(True, description="Gaussians; false has their means alone (CLAP w/o VI)")
    encoder: Literal["task", "shared", "none"] = Field("task", description="one for each task, one for all, or none")
    guidance: bool = Field(True, description="let names look at images, and at one another within a task")
    context: Context = Field("image", description="what names look at: each image by itself, its batch, or nothing")
    heads: int | None = Field(None, ge=1, description="of the attention; left out, the released code's")
    normed: bool | None = Field(None, description="norms before encoders; left out, with words of CoOp or MaPLe")
    samples: int = Field(20, ge=1, description="draws in a step, and for a prediction (S)")
    cosine: bool = Field(False, description="bring what is drawn to length 1, so that logits are cosines; ours")
    mc: MonteCarlo = Field("sample", description="predict by draws, or by their limit in closed form")
    average: Average = Field("logits", description="what a prediction averages over draws")
    start: Start = Field("language", description="of a new encoder: from templates, zero, or as PyTorch starts it")
    divergence: float = Field(0.001, ge=0, description="weight of the divergence from N(0, 1)")
    language: float = Field(15.0, ge=0, description="weight of the loss that anchors draws to templates")
    anchored: Anchored | None = Field(None, description="which tasks; left out, learning ones, or without a memory all")
    negatives: Literal["task", "seen"] = Field("seen", description="classes that compete in training")
    memory: int = Field(20, ge=0, description="old training images kept of each class, to be learned from again")
    balance: int = Field(2, ge=0, description="passes over the memory alone after each task, at a tenth of the rate")
    batch_size: int = Field(64, ge=1, description="images in one step, over all devices")
    lr: float = Field(0.001, gt=0, description="learning rate of SGD, falling to a thousandth by a cosine")
    momentum: float = Field(0.0, ge=0, lt=1, description="of SGD")
    warmup: float = Field(0.2, ge=0, lt=1, description="share of a task's steps in which the rate rises: 1 of 5 passes")

    @model_validator(mode="before")
    @classmethod
    def _preset_has_settings(cls, values: Any) -> Any:
        return {**PRESETS.get(str(values.get("preset")), {}), **values}

    @model_validator(mode="after")
    def _something_learns(self) -> Self:
        if self.encoder == "none" and self.text == "hand" and not self.guidance:
            raise ConfigError('nothing learns with encoder="none", guidance=false and text="hand"; change one of them')
        return self

    def idle(self) -> dict[str, str]:
        idle, coded = super().idle(), self.encoder != "none"
        idle |= dict.fromkeys(["average"] * (self.mc == "mean"), "with mc=mean")
        idle |= dict.fromkeys(["anchored"] * (not self.language), "with language=0")
        idle |= dict.fromkeys(["balance"] * (not coded and self.text == "hand"), "where the attention alone learns")
        encoded = () if coded else ("variational", "normed", "start", "language", "anchored")
        drawn = () if self.variational and coded else ("samples", "mc", "average", "divergence")
        guided = () if self.guidance else ("context", "heads")
        idle |= dict.fromkeys(encoded, "without an encoder")
        return idle | dict.fromkeys(drawn, "without draws") | dict.fromkeys(guided, "without guidance")

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower with a text side; ConfigError where a text has no room."""
        side, width = text_side(tower, "clap"), tower.features
        kind = kind_of(self.text, tower, side, self.names)
        normed = kind.normed if self.normed is None else self.normed
        encoders = Encoders(width, normed=normed, learns_spread=self.variational, shared=self.encoder == "shared")
        head = ClapHead(
            kind.texts,
            EachText(side, templates_of(self.templates), self.names),
            Guidance(width, self.heads or kind.heads, context=self.context) if self.guidance else None,
            None if self.encoder == "none" else encoders,
            **self.model_dump(include={"samples", "mc", "average", "start", "cosine"}),
            weights=(self.divergence, self.language),
            anchored=self.anchored or ("learning" if self.keeps else "all"),
        )
        return self.learner(PromptedModel(tower, kind.prompts, head), cache="off" if kind.prompts else "features")

    def schedule(self, lr: float) -> Schedule:
        return rising(self.warmup, cosine(1e-3), start=None) if lr == self.lr else cosine(1e-3)

    def refine(self, task: Task) -> Sequence[Phase]:
        """Learn from the memory alone, from the second task on, all encoders together; the attention stays."""
        tunes, held = task.index and "balance" not in self.idle(), all_but("head.guidance.")
        return [replace(phase, parameters=held) for phase in super().refine(task) if tunes]
