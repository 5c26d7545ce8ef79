"""Learned words in texts that are replaced in the first blocks of the text tower (MaPLe's text side)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.clip import TextSide
from lamina.errors import ConfigError
from lamina.heads.texts import ContextTexts, version_of
from lamina.prompts.contexts import encoded, len_of


class DeepContextTexts(ContextTexts):
    """One context for all classes before their names, and one more set of as many tokens for each of the next blocks.

    Args:
        length, words, fixed, names: as for `ContextTexts`.
        depth: J, sets of tokens, that of the texts themselves included.

    References:
        Khattak et al., MaPLe: Multi-modal Prompt Learning, CVPR 2023, section 3.2.
    """

    def __init__(
        self,
        side: TextSide,
        length: int,
        depth: int,
        *,
        words: str = "",
        fixed: str = "",
        names: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(side, length, words=words, fixed=fixed, names=names)
        width = self.tower.width
        self.deep = nn.ParameterList(
            [nn.Parameter(torch.empty(length, width).normal_(std=0.02)) for _ in range(depth - 1)]
        )

    def rows(self) -> Sequence[Tensor]:
        """Return the sets (n, W), the context first; once a task has begun."""
        return [self.contexts[0], *self.deep]

    def version(self, column: int) -> Hashable:
        return version_of(*self.rows())

    def encode(self, columns: Sequence[int]) -> Tensor:
        assert self._wording is not None
        context, *deep = self.rows()
        features = encoded(self.tower, self._wording.of(columns), context[None], deep=deep)
        return F.normalize(features[0], dim=-1)


def divided(side: TextSide, words: str, length: int) -> tuple[str, str]:
    """Return the first words, of `length` tokens together, and the others.

    Raises:
        ConfigError: when no number of whole words has so many.
    """
    parts = words.split()
    sizes = [len_of(side, " ".join(parts[:count])) for count in range(len(parts) + 1)]
    if length not in sizes:
        raise ConfigError(
            f"the learned words start from whole words of {words!r}, the first of which have "
            f"{', '.join(map(str, sizes[1:]))} tokens; got length={length}: take one of these, or other words"
        )
    count = sizes.index(length)
    return " ".join(parts[:count]), " ".join(parts[count:])
