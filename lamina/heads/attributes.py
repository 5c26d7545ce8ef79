"""Texts that each image puts together from a bank of learned words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.clip import TextSide
from lamina.errors import ConfigError
from lamina.heads.texts import ClassTexts, version_of
from lamina.prompts.alone import alone, overlap
from lamina.prompts.contexts import Wording, check_room, encoded, worded
from lamina.prompts.trees import branched

Retrieval = Literal["cosine", "dot"]
Order = Literal["rank", "index"]

#: rows of features that are kept while nothing is learned; beyond that, the oldest go
KEPT = 2**17


def check_top(top: int, size: int) -> None:
    """Make sure that a bank of so many prompts has so many to take; raise ConfigError if not."""
    if top > size:
        raise ConfigError(f"top must be at most size, the prompts that there are; got top={top} with size={size}")


class AttributeTexts(ClassTexts):
    """A bank of keys and prompts: an image takes those whose keys are nearest, and they stand before the class name.

    Images that take the same prompts in the same order share their texts, which are computed once; those that take the
    same ones first share that beginning. Bank and texts stay as large as they are whatever the number of tasks.

    Args:
        size: entries of the bank.
        top: how many of them an image takes.
        length: n, learned words in one prompt.
        retrieval: what says how near a key is. "dot" lets long keys win.
        order: of the prompts in a text: the nearest key's first, or as they stand in the bank.
        pull: weight of the loss that draws chosen keys to the image.
        apart: weight of the loss that keeps what prompts say without a class name from being alike.
        fillers: leave placeholder words behind a prompt there, as many as the others of a text would take.

    Raises:
        ConfigError: when an image is to take more prompts than there are, or than a text has room for.

    References:
        Wang et al., AttriCLIP: A Non-Incremental Learner for Incremental Knowledge Learning, CVPR 2023, section 3.
    """

    per_image = True

    def __init__(
        self,
        side: TextSide,
        size: int = 10,
        top: int = 3,
        length: int = 12,
        *,
        retrieval: Retrieval = "cosine",
        order: Order = "rank",
        pull: float = 0.7,
        apart: float = 0.3,
        fillers: bool = False,
        names: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(side, names)
        check_top(top, size)
        check_room(side, top * length, f"top={top} prompts of length={length}")
        self.top, self.retrieval, self.order, self.pull, self.apart = top, retrieval, order, pull, apart
        self.length, self.pool_size = length, size
        self.keys = nn.Parameter(torch.empty(size, side.tower.features).normal_(std=0.02))
        self.prompts = nn.Parameter(torch.empty(size, length, side.tower.width).normal_(std=0.02))
        self._alone = alone(side, length, fillers=(top - 1) * length if fillers else 0)
        self._wording: Wording | None = None

    def write(self, names: Sequence[str]) -> None:
        new = worded(self.side, names, self.top * self.length)
        self._wording = new if self._wording is None else self._wording.joined(new)

    def choose(self, images: Tensor) -> Tensor:
        """Return which prompts images (B, F) take, (B, top), in the order in which a text has them."""
        keys = F.normalize(self.keys, dim=-1) if self.retrieval == "cosine" else self.keys
        chosen = (F.normalize(images, dim=-1) @ keys.mT).topk(self.top, dim=-1).indices
        return chosen.sort(dim=-1).values if self.order == "index" else chosen

    def of_images(self, images: Tensor, columns: Sequence[int] | None = None) -> Tensor:
        columns = range(len(self.classes)) if columns is None else columns
        chosen, group = self.choose(images).unique(dim=0, return_inverse=True)
        if torch.is_grad_enabled() and self.prompts.requires_grad:
            return self.encode_with(chosen, columns)[group]
        return self._told(chosen)[:, list(columns)][group]

    def encode_with(self, chosen: Tensor, columns: Sequence[int]) -> Tensor:
        """Return the features (G, C, F) of some classes with each of G choices (G, top) of prompts."""
        assert self._wording is not None
        return F.normalize(branched(self.tower, self._wording.of(columns), self.prompts, chosen), dim=-1)

    def _told(self, chosen: Tensor) -> Tensor:
        """Return the features (G, C, F) of all classes with each of G choices, each choice encoded once."""
        state, choices = (version_of(self.prompts), len(self.classes)), chosen.tolist()
        self._kept = {choice: (then, told) for choice, (then, told) in self._kept.items() if then == state}
        new = [place for place, choice in enumerate(choices) if tuple(choice) not in self._kept]
        if new:
            with torch.inference_mode(False), torch.no_grad():
                fresh = self.encode_with(chosen[new], range(len(self.classes)))
            self.encoded_classes += len(new) * len(self.classes)
            self._kept |= {tuple(choices[place]): (state, told) for place, told in zip(new, fresh, strict=True)}
        out = torch.stack([self._kept[tuple(choice)][1] for choice in choices])
        while len(self._kept) * len(self.classes) > KEPT:
            del self._kept[next(iter(self._kept))]
        return out

    def terms(self, images: Tensor) -> dict[str, Tensor]:
        """Return what draws chosen keys to their images (B, F), and what keeps prompts apart."""
        near = F.cosine_similarity(images[:, None], self.keys[self.choose(images)], dim=-1)
        terms = {"keys": self.pull * (1 - near.mean())}
        if self.apart and len(self.prompts) > 1:
            terms["prompts"] = self.apart * overlap(encoded(self.tower, self._alone, self.prompts)[:, 0])
        return terms
