"""Several contexts at once: what they say of a class is a distribution, and its mean classifies (ProDA).

References:
    Lu et al., Prompt Distribution Learning, CVPR 2022, section 3.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.clip import TextSide
from lamina.data.stream import places
from lamina.errors import ConfigError
from lamina.heads.base import Scores
from lamina.heads.text import TextHead
from lamina.heads.texts import ClassTexts, version_of
from lamina.prompts.alone import alone, overlap
from lamina.prompts.contexts import Position, Wording, check_room, encoded, worded


def positions(said: Position | Literal["mixed"], number: int) -> list[Position]:
    """Return where the class name stands with each of several contexts.

    All contexts start as equals, so which of them are the quarters need not be drawn.

    >>> positions("mixed", 5)
    ['front', 'middle', 'end', 'end', 'end']
    """
    if said != "mixed":
        return [said] * number
    quarter: tuple[Position, Position] = ("front", "middle")
    mixed = [place for place in quarter for _ in range(number // 4)]
    return [*mixed, *["end" for _ in range(number - len(mixed))]]  # type: ignore[list-item]


class SeveralTexts(ClassTexts):
    """Several contexts for all classes; the feature of a class is the mean of what they say, however long that is.

    Args:
        number: K, contexts.
        length: n, learned words in each.
        position: of the class name; "mixed" has it before a quarter of the contexts, amid another quarter, and behind
            the others.
        apart: weight of the loss that keeps what contexts say without a class name from being alike.
    """

    def __init__(
        self,
        side: TextSide,
        number: int = 32,
        length: int = 16,
        *,
        position: Position | Literal["mixed"] = "mixed",
        apart: float = 0.1,
        names: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(side, names)
        check_room(side, length, f"length={length}")
        self.length, self.apart = length, apart
        self.contexts = nn.Parameter(torch.empty(number, length, side.tower.width).normal_(std=0.02))
        self.positions = positions(position, number)
        self._alone = alone(side, length)
        self._wordings: dict[Position, Wording] = {}

    def write(self, names: Sequence[str]) -> None:
        new = {place: worded(self.side, names, self.length, position=place) for place in dict.fromkeys(self.positions)}
        old = self._wordings
        self._wordings = {place: old[place].joined(text) if place in old else text for place, text in new.items()}

    def version(self, column: int) -> Hashable:
        return version_of(self.contexts)

    def encode(self, columns: Sequence[int]) -> Tensor:
        return self.encode_each(columns, range(len(self.contexts))).mean(0)

    def encode_each(self, columns: Sequence[int], contexts: Sequence[int]) -> Tensor:
        """Return the features (K, C, F), of length 1, of some classes with each of some contexts."""
        parts: dict[Position, list[int]] = {}
        for place, context in enumerate(contexts):
            parts.setdefault(self.positions[context], []).append(place)
        found = [
            encoded(self.tower, self._wordings[position].of(columns), self.contexts[[contexts[p] for p in members]])
            for position, members in parts.items()
        ]
        order = torch.tensor([place for members in parts.values() for place in members]).argsort()
        return F.normalize(torch.cat(found)[order], dim=-1)

    def terms(self, images: Tensor) -> dict[str, Tensor]:
        if not self.apart or len(self.contexts) == 1:
            return {}
        return {"contexts": self.apart * overlap(encoded(self.tower, self._alone, self.contexts)[:, 0])}


def check_each_step(each_step: int, contexts: int) -> None:
    """Make sure that there are as many contexts as a step is to draw; raise ConfigError if not."""
    if each_step > contexts:
        raise ConfigError(f"each_step must be at most the number of contexts, {contexts}; got {each_step}")


class SurrogateHead(TextHead):
    """Learns from an upper bound of the loss that Gaussian class features would have; predicts by their means.

    Args:
        texts: of several contexts.
        each_step: how many of them a step of training draws and moves.
        negatives: as for `TextHead`.

    Raises:
        ConfigError: when there are not so many contexts.
    """

    texts: SeveralTexts

    def __init__(self, texts: SeveralTexts, *, each_step: int = 4, negatives: Literal["task", "seen"] = "seen") -> None:
        super().__init__(texts, negatives=negatives)
        check_each_step(each_step, len(texts.contexts))
        self.each_step = each_step

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scores:
        if not self.training or labels is None:
            return super().forward(features, labels)
        columns = self.competing
        contexts = torch.randperm(len(self.texts.contexts))[: self.each_step].tolist()
        texts = self.texts.encode_each(range(len(self.texts.classes)) if columns is None else columns, contexts)
        own = labels if columns is None else places(labels, columns)
        logits = surrogate(F.normalize(features, dim=-1), texts, own, self.scale)
        return Scores(self.spread(logits, columns), self.texts.terms(features))


def surrogate(images: Tensor, texts: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Return logits (B, C) whose cross-entropy is no less than that of Gaussian class features on average.

    Means and covariances between classes, channel by channel, are those of K texts of each class. To the logits of
    means comes half the variance of the difference to the label's logit; that is 0 for the label itself.

    Args:
        images: (B, F), of length 1.
        texts: (K, C, F), of length 1.
        labels: (B,), among the C classes.
        scale: of cosines, ().
    """
    mean = texts.mean(0)
    off, weights = (texts - mean).transpose(0, 1), images.square()
    spread = weights @ off.square().sum(1).mT
    shared = (weights[:, None] * off[labels]).flatten(1) @ off.flatten(1).mT
    variance = (spread + spread.gather(1, labels[:, None]) - 2 * shared) / (len(texts) + 1)
    return scale * images @ mean.mT + 0.5 * scale.square() * variance
