"""What CLAP is laid upon: templates, or words that are learned as other methods learn them.

References:
    Jha et al., CLAP4CLIP, NeurIPS 2024, and the authors' repository srvCodes/clap4clip at 7ff95c2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from lamina.backbones.clip import TextSide
from lamina.backbones.tower import Tower
from lamina.errors import ConfigError
from lamina.heads.attributes import AttributeTexts
from lamina.heads.deep_texts import DeepContextTexts, divided
from lamina.heads.texts import ClassTexts, ContextTexts
from lamina.prompts.base import PromptModule
from lamina.prompts.stacked import CoupledPrompts

Text = Literal["hand", "coop", "maple", "attriclip"]

#: blocks of both towers that MaPLe's prompts enter, where there are so many
DEPTH = 9


class Kind(NamedTuple):
    """Texts of classes, and what the released code has with them.

    Attributes:
        texts: None for templates alone.
        prompts: of the image tower, that belong to them.
        heads: of the attention.
        normed: norms before encoders.
    """

    texts: ClassTexts | None
    prompts: PromptModule | None
    heads: int
    normed: bool


def kind_of(text: Text, tower: Tower, side: TextSide, names: Mapping[str, str]) -> Kind:
    """Return texts by name, with the numbers of the released code.

    Raises:
        ConfigError: when a text has no room for the learned words.
    """
    heads = _dividing(tower.features, max(1, tower.features // 64))
    if text == "hand":
        return Kind(None, None, 1, False)
    if text == "coop":
        return Kind(ContextTexts(side, 12, names=names), None, heads, True)
    if text == "attriclip":
        # the losses of the bank are left out, as they are off in the released code
        texts: ClassTexts = AttributeTexts(side, names=names, retrieval="dot", pull=0.0, apart=0.0)
        return Kind(texts, None, _dividing(tower.features, 8), False)
    if text == "maple":
        depth = min(DEPTH, tower.depth, side.tower.depth)
        words, fixed = divided(side, "a photo of a", 2)
        texts = DeepContextTexts(side, 2, depth, words=words, fixed=fixed, names=names)
        return Kind(texts, CoupledPrompts(tower, depth, side.tower.width, texts.rows), heads, True)
    raise ConfigError(f"text must be hand, coop, maple or attriclip; got {text!r}")


def _dividing(width: int, most: int) -> int:
    """Return the largest number of heads, `most` at most, that a width can be divided by."""
    return next(heads for heads in range(most, 0, -1) if width % heads == 0)
