"""A tower, its prompts and a head, and what goes in and out of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lamina.backbones.splice import Encoded, PromptPass, Tap
from lamina.backbones.tower import Tower
from lamina.data.stream import Task
from lamina.errors import ConfigError
from lamina.heads.base import Head
from lamina.prompts.base import EarlyPass, PromptModule


class Batch(NamedTuple):
    """What a loader yields and a model takes.

    Attributes:
        images: (B, 3, height, width), float32; None when `features` stand in for them.
        labels: (B,), columns of the head, or (B, height, width), those of pixels; None when they are not known.
        query: (B, F), cached features of the frozen model, for prompts that ask for them.
        features: (B, F), cached features, for models without prompts.
    """

    images: Tensor | None
    labels: Tensor | None = None
    query: Tensor | None = None
    features: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """The labels, where they must be known."""
        if self.labels is None:
            raise ValueError("this batch has no labels")
        return self.labels


class Output(NamedTuple):
    """Logits (B, C) or (S, B, C), weighted extra losses by name, and the chosen prompts (B, k) where there is a pool.

    Of a head for pixels, logits are (B, C, height, width).

    A tuple, not a dataclass: Fabric and DDP walk what a module returns, and Fabric refuses frozen
    dataclasses.
    """

    logits: Tensor
    terms: dict[str, Tensor]
    chosen: Tensor | None = None


class PromptedModel(nn.Module):
    """A frozen tower, its prompts and a head. The only module that DDP ever wraps.

    Args:
        layers: from how many of the last blocks features are read, side by side.

    Raises:
        ConfigError: when there is none, or the tower has fewer blocks.

    Attributes:
        width: F of what the head reads.
    """

    def __init__(self, tower: Tower, prompts: PromptModule | None, head: Head, *, layers: int = 1) -> None:
        super().__init__()
        if not 1 <= layers <= tower.depth:
            raise ConfigError(f"features can be read after each of {tower.depth} blocks; got layers={layers}")
        self.tower, self.prompts, self.head, self.layers = tower, prompts, head, layers
        self.width = layers * tower.features

    @property
    def transductive(self) -> bool:
        """Whether the prediction for an image depends on the other images of its batch."""
        return self.head.transductive or (self.prompts is not None and self.prompts.transductive)

    @property
    def pool_size(self) -> int:
        """How many prompts images choose from, by the prompts or by the head; 0 where there is nothing to choose."""
        return (self.prompts.pool_size if self.prompts is not None else 0) or self.head.pool_size

    @property
    def tasks_left(self) -> int | None:
        """How many more tasks there is room for; None where nothing limits them."""
        return None if self.prompts is None else self.prompts.tasks_left

    def begin_task(self, task: Task) -> None:
        """Let prompts and head grow for a task; called once per task, in order."""
        if self.prompts is not None:
            self.prompts.begin_task(task.index, task.columns)
        self.head.begin_task(task.index, task.classes, task.columns)

    @property
    def towers(self) -> tuple[str, ...]:
        """What names of the towers' parameters begin with."""
        return tuple(self._towers())

    def _towers(self) -> dict[str, Tower]:
        parts = self.named_modules(remove_duplicate=False)  # two parts of a head may share the text tower
        return {f"{name}.": part for name, part in parts if isinstance(part, Tower)}

    def not_frozen(self, names: Iterable[str]) -> list[str]:
        """Return those names of tensors, in their order, that are in no tower or that a tower has for learning."""
        towers = self._towers()
        tuned = {begin + name for begin, tower in towers.items() for name in tower.learned}
        return [name for name in names if name in tuned or not name.startswith(tuple(towers))]

    def learned(self) -> dict[str, Tensor]:
        """Return everything that is not frozen in a tower, by name."""
        state = self.state_dict()
        return {name: state[name] for name in self.not_frozen(state)}

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained or were, those of earlier tasks included."""
        parameters = dict(self.named_parameters())
        return sum(parameters[name].numel() for name in self.not_frozen(parameters))

    @property
    def moves(self) -> bool:
        """Whether training can move features: by prompts, or by what is tuned of the tower itself."""
        return self.prompts is not None or bool(self.tower.learned)

    def query(self, batch: Batch) -> Tensor:
        """Return the features (B, F) by which prompts are chosen: the frozen tower's, in the end or early."""
        if batch.query is not None:
            return batch.query
        if self.prompts is not None and self.prompts.query == "early":
            _, started = self.look(batch)
            assert isinstance(started, EarlyPass) and started.query is not None
            return started.query
        with torch.no_grad():
            return self.tower(batch.images).features

    def look(
        self, batch: Batch, *, task: int | None = None, tap: Tap | None = None
    ) -> tuple[Encoded, PromptPass | None]:
        """Encode a batch with its prompts; return the encoding and the pass that made it."""
        if batch.images is None:
            raise ValueError("a batch without images cannot be encoded; it holds cached features")
        if self.prompts is None:
            return self.tower(batch.images, tap=tap, layers=self.layers, after=self.head.after), None
        if self.prompts.query == "early":
            started: PromptPass = EarlyPass(self.prompts, self.tower.read, task)
        else:
            started = self.prompts.start(self.query(batch) if self.prompts.query == "frozen" else None, task)
        return self.tower(batch.images, started, tap, layers=self.layers, after=self.head.after), started

    def features(
        self, batch: Batch, *, task: int | None = None, tap: Tap | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what the head reads, (B, F) float32, and the prompts' loss terms; see `Head.after` for others."""
        return self._read(batch, task, tap)[:2]

    def _read(
        self, batch: Batch, task: int | None, tap: Tap | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Return what the head reads, the prompts' loss terms, and which prompts were chosen."""
        if batch.features is not None and tap is None:
            return batch.features, {}, None
        encoded, started = self.look(batch, task=task, tap=tap)
        terms, chosen = (started.losses(batch.labels), started.chosen) if started is not None else ({}, None)
        if self.head.after:
            return self._patches(encoded, batch), terms, chosen
        if self.prompts is not None and self.prompts.readout == "prompts" and encoded.prompts is not None:
            return encoded.prompts.float().mean(1), terms, chosen
        return encoded.features, terms, chosen

    def _patches(self, encoded: Encoded, batch: Batch) -> Tensor:
        """Return the patch tokens (K, B, h * w, D) after the head's K blocks; they are found by their places alone."""
        assert batch.images is not None
        before, height, width = self.tower.grid(batch.images)
        tokens = torch.stack([x[:, before : before + height * width] for x in encoded.after])
        return tokens.to(torch.promote_types(tokens.dtype, torch.float32))

    def forward(self, batch: Batch, task: int | None = None) -> Output:
        """Score a batch; `task` is the true task in training, None in evaluation."""
        features, terms, chosen = self._read(batch, task)
        scores = self.head(features, batch.labels)
        return Output(scores.logits, {**terms, **scores.terms}, scores.chosen if chosen is None else chosen)
