"""Texts whose learned words depend on the image (CoCoOp)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.clip import TextSide
from lamina.heads.texts import ContextTexts
from lamina.prompts.contexts import Position, encoded


class ImageContextTexts(ContextTexts):
    """One learned context for all classes, moved for each image by what a small network makes of its features.

    Every word moves alike. The network has one hidden layer, of F / reduction channels, and sees features of length 1.

    Args:
        length, words, position, names: as for `ContextTexts`.
        reduction: how much narrower the hidden layer is than the features; it has 4 channels at least.
        start: "zero" moves no word at first; "drawn" leaves the last layer as PyTorch draws it, as the released code
            does, which moves words by more than there is between them.

    References:
        Zhou et al., Conditional Prompt Learning for Vision-Language Models, CVPR 2022, section 3.2.
    """

    per_image = True

    def __init__(
        self,
        side: TextSide,
        length: int = 4,
        *,
        words: str = "",
        position: Position = "end",
        reduction: int = 16,
        start: Literal["zero", "drawn"] = "zero",
        names: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(side, length, words=words, position=position, names=names)
        hidden = max(4, self.tower.features // reduction)
        last = nn.Linear(hidden, self.tower.width)
        self.shift = nn.Sequential(nn.Linear(self.tower.features, hidden), nn.ReLU(), last)
        if start == "zero":
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def of_images(self, images: Tensor, columns: Sequence[int] | None = None) -> Tensor:
        assert self._wording is not None
        columns = range(len(self.classes)) if columns is None else columns
        shifts = self.shift(F.normalize(images, dim=-1))[:, None]
        return F.normalize(encoded(self.tower, self._wording.of(columns), self.contexts[0] + shifts), dim=-1)
