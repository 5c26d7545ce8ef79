"""CLIP models as open_clip builds them: the image tower, and what belongs to the text side.

References:
    Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, section 2.4.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from lamina.backbones.block import BlockView
from lamina.backbones.clip_blocks import (
    ClipBlock,
    check_blocks,
    check_model,
    fingerprint_of,
    projected,
)
from lamina.backbones.clip_text import TextTower
from lamina.backbones.timm_vit import full_name, normalised
from lamina.backbones.tower import Grid, Tower
from lamina.errors import ShapeError, UnsupportedBackbone


@dataclass(frozen=True)
class TextSide:
    """What a CLIP model has beside its image tower.

    Attributes:
        tower: frozen, in the dtype of the image tower; its features live in the same space.
        tokenizer: n texts to ids (n, 77), int64, padded; one that is too long is cut.
        logit_scale: what cosines are multiplied by, from pre-training.
        logit_bias: what is added to them then; None where the model has none.
    """

    tower: TextTower
    tokenizer: Callable[[list[str]], Tensor]
    logit_scale: float
    logit_bias: float | None = None


class ClipImageTower(Tower):
    """The image tower of an open_clip model, frozen; features are in the space that it shares with texts.

    Args:
        model: an `open_clip.CLIP` or `CustomTextCLIP` with its weights; its image side is taken over, not copied.
        dtype: of the frozen weights and of what flows between blocks. Prompts, heads and losses stay in float32
            whatever it is.

    Raises:
        UnsupportedBackbone: when its image side is not one that lamina walks through.
    """

    readout = slice(0, 1)
    first_patch = 1

    def __init__(self, model: nn.Module, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        check_image(model)
        side: Any = model.visual
        self.patches, self.first, self.last = side.conv1, side.ln_pre, side.ln_post
        self.class_token, self.positions, self.projection = side.class_embedding, side.positional_embedding, side.proj
        self.fingerprint = fingerprint_of(side, side.transformer.resblocks)
        self.stack = nn.ModuleList([ClipBlock(block) for block in side.transformer.resblocks])
        self.width, self.depth = side.class_embedding.shape[0], len(self.stack)
        self.features = self.width if side.proj is None else side.proj.shape[1]
        self.size: tuple[int, int] = side.image_size
        self.patch_count, self.patch_size = len(self.positions) - 1, self.patches.weight[0].numel()
        self.dtype, self.normed, self.joint = dtype, True, True
        self.to(dtype)
        self.freeze()

    def blocks(self) -> list[BlockView]:
        return list(self.stack)  # type: ignore[arg-type]

    def embed(self, inputs: Tensor) -> tuple[Tensor, None]:
        if inputs.ndim != 4 or tuple(inputs.shape[1:]) != (3, *self.size):
            height, width = self.size
            raise ShapeError(f"images must be (B, 3, {height}, {width}); got {tuple(inputs.shape)}")
        patches = self.patches(inputs.to(self.dtype)).flatten(2).transpose(1, 2)
        first = self.class_token.expand(patches.shape[0], 1, -1)
        return self.pre_norm(torch.cat([first, patches], dim=1) + self.positions), None

    def grid(self, inputs: Tensor) -> Grid:
        return Grid(1, *(side // step for side, step in zip(self.size, self.patches.stride, strict=True)))

    def class_position(self) -> Tensor | None:
        return self.positions[0] if isinstance(self.first, nn.Identity) else None

    def pre_norm(self, x: Tensor) -> Tensor:
        return normalised(self.first, x)

    def pre_weight(self) -> Tensor | None:
        return self.first.weight if isinstance(self.first, nn.LayerNorm) else None

    def final_norm(self, x: Tensor) -> Tensor:
        return normalised(self.last, x)

    def pool(self, tokens: Tensor) -> Tensor:
        first = tokens[:, 0]
        if not self.normed:
            return first
        return projected(self.final_norm(first), self.projection if self.joint else None)

    def unnormed(self) -> ClipImageTower:
        """Return a tower of the same weights, not copied, read before its final norm and projection: F = D."""
        out = copy.copy(self)
        out.normed, out.features, out.fingerprint = False, self.width, f"{self.fingerprint}-unnormed"
        return out

    def unprojected(self) -> tuple[ClipImageTower, Tensor | None]:
        if self.projection is None or not (self.normed and self.joint):
            return self, None
        out = copy.copy(self)
        out.joint, out.features, out.fingerprint = False, self.width, f"{self.fingerprint}-unprojected"
        return out, self.projection


def check_image(model: nn.Module) -> None:
    """Make sure that `ClipImageTower` walks through a model's image side as open_clip does.

    Raises:
        UnsupportedBackbone: when it does not.
    """
    check_model(model)
    side: Any = model.visual
    if type(side) is not VisionTransformer:
        raise UnsupportedBackbone(
            f"the image tower is a {full_name(side)}; of open_clip's image towers, lamina can prompt "
            "VisionTransformer. Those of timm are to be had as timm:NAME; to add another kind, write a Tower for it in "
            "lamina/backbones."
        )
    if side.attn_pool is not None or side.pool_type != "tok":
        pooling = "attention" if side.attn_pool is not None else side.pool_type
        raise UnsupportedBackbone(
            f"the image tower pools by {pooling!r}; lamina reads the class token ('tok'). To add another "
            "pooling, write it in ClipImageTower in lamina/backbones/clip.py."
        )
    check_blocks("image", side.transformer.resblocks)
