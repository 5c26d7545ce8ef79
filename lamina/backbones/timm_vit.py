"""Vision transformers from timm."""

from __future__ import annotations

import copy
import hashlib
import math
from typing import Any, get_args

import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.block import BlockView
from lamina.backbones.packed import FrozenLinear, linear
from lamina.backbones.tower import FinalNorm, Grid, Pooling, Tower
from lamina.errors import ConfigError, UnsupportedBackbone


class _TimmBlock:
    """Answers for a plain pre-norm block of timm."""

    def __init__(self, block: Block) -> None:
        attention: Any = block.attn
        self.block: Any = block
        self.attention = attention
        self.heads: int = attention.num_heads
        self.inner: int = attention.qkv.out_features // 3

    @property
    def key_weight(self) -> Tensor | None:
        if not isinstance(self.attention.k_norm, nn.Identity):
            return None
        return self.attention.qkv.weight.chunk(3)[1]

    @property
    def first_norm(self) -> nn.LayerNorm | None:
        return self.block.norm1 if isinstance(self.block.norm1, nn.LayerNorm) else None

    def norm(self, x: Tensor) -> Tensor:
        return normalised(self.block.norm1, x)

    def project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(self.attention.qkv(h), 3, self.heads).unbind(0)
        return self.attention.q_norm(q), self.attention.k_norm(k), v

    def queries(self, h: Tensor) -> Tensor:
        q = split_heads(some_rows(self.attention.qkv, h, slice(0, self.inner)), 1, self.heads)[0]
        return self.attention.q_norm(q)

    def keys_values(self, h: Tensor) -> tuple[Tensor, Tensor]:
        k, v = split_heads(some_rows(self.attention.qkv, h, slice(self.inner, None)), 2, self.heads).unbind(0)
        return self.attention.k_norm(k), v

    def attended(self, x: Tensor, mixed: Tensor) -> Tensor:
        a = self.attention
        return x + self.block.ls1(a.proj(a.norm(mixed.transpose(1, 2).flatten(2))))

    def branch(self, x: Tensor) -> Tensor:
        return self.block.ls2(self.block.mlp(normalised(self.block.norm2, x)))


def some_rows(layer: Any, h: Tensor, rows: slice) -> Tensor:
    """Apply some rows of a joint projection; a frozen layer's slices cost no copy."""
    bias = None if layer.bias is None else layer.bias[rows]
    product = linear if isinstance(layer, FrozenLinear) else F.linear  # the first gives weights no gradient
    return product(h.to(layer.weight.dtype), layer.weight[rows], bias)


def split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """(B, n, parts * D) to (parts, B, H, n, d)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


class TimmTower(Tower):
    """A timm `VisionTransformer` with plain pre-norm blocks, frozen.

    Args:
        model: with its weights loaded; taken over, not copied.
        dtype: of the frozen weights and of what flows between blocks. Prompts, heads and losses stay
            in float32 whatever it is.

    Raises:
        UnsupportedBackbone: when a block is not of a type that `BlockView`s exist for.
    """

    def __init__(self, model: VisionTransformer, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        _check(model)
        self.width, self.depth, self.features = model.embed_dim, len(model.blocks), model.num_features
        self.fingerprint = fingerprint(model)
        if type(model).forward_head is VisionTransformer.forward_head and model.global_pool == "token":
            self.readout = slice(0, 1)
        self.first_patch, self.patch_count = model.num_prefix_tokens, model.patch_embed.num_patches
        self.patch_size = 3 * math.prod(model.patch_embed.patch_size)
        self.dtype, self.normed, self.fresh = dtype, True, False
        self.pooling: Pooling | None = None  # as timm pools
        self.model = model.to(dtype)
        blocks: Any = model.blocks
        for block in blocks:
            _use_frozen_layers(block)
        self._views: list[BlockView] = [_TimmBlock(block) for block in blocks]
        self.freeze()

    @classmethod
    def create(cls, name: str, *, dtype: torch.dtype = torch.float32, **arguments: Any) -> TimmTower:
        """Make a tower from a timm name and `timm.create_model`'s arguments."""
        model: Any = timm.create_model(name, **{"num_classes": 0, **arguments})
        return cls(model, dtype=dtype)

    def blocks(self) -> list[BlockView]:
        return self._views

    def embed(self, inputs: Tensor) -> tuple[Tensor, None]:
        m = self.model
        return m.norm_pre(m.patch_drop(m._pos_embed(m.patch_embed(inputs.to(self.dtype))))), None

    def grid(self, inputs: Tensor) -> Grid:
        return Grid(self.model.num_prefix_tokens, *self.model.patch_embed.dynamic_feat_size(inputs.shape[-2:]))

    def class_position(self) -> Tensor | None:
        m = self.model
        if m.cls_token is None or m.pos_embed is None or m.no_embed_class or not isinstance(m.norm_pre, nn.Identity):
            return None
        return m.pos_embed[0, 0]

    def pre_norm(self, x: Tensor) -> Tensor:
        return normalised(self.model.norm_pre, x)

    def pre_weight(self) -> Tensor | None:
        return self.model.norm_pre.weight if isinstance(self.model.norm_pre, nn.LayerNorm) else None

    def final_norm(self, x: Tensor) -> Tensor:
        if self.fresh:
            return F.layer_norm(x, x.shape[-1:], eps=self._last_norm().eps)
        return normalised(self.model.norm, x)

    def _last_norm(self) -> Any:
        """Return the norm behind the last block; models that average have it behind the mean."""
        return self.model.fc_norm if isinstance(self.model.norm, nn.Identity) else self.model.norm

    def pool(self, tokens: Tensor) -> Tensor:
        if self.pooling is None:
            if not self.normed:
                return self.model.pool(tokens)
            return self.model.forward_head(self.final_norm(tokens), pre_logits=True)
        if self.pooling == "cls":
            x = tokens[:, 0]
        else:
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            x = tokens[:, self.first_patch :].mean(1, dtype=dtype)
        if not self.normed:
            return x
        return self.final_norm(x) if self.fresh else normalised(self.model.fc_norm, self.final_norm(x))

    def reading(self, pooling: Pooling | None = None, norm: FinalNorm = "pretrained") -> TimmTower:
        own = self._own_pooling()
        if self.text is not None:
            raise UnsupportedBackbone("the text side lives beside the features of the image tower, so these stay")
        if pooling == "cls" and self.model.cls_token is None:
            raise ConfigError("there is no class token to read; take mean_patch or mean_all")
        if norm == "fresh" and not isinstance(self._last_norm(), nn.LayerNorm):
            raise ConfigError(f"the last norm is a {full_name(self._last_norm())}, not a layer norm; leave out fresh")
        if pooling is None and own is None:
            raise ConfigError(
                f"it pools by {self.model.global_pool!r}, which is none of {', '.join(get_args(Pooling))}; "
                f"name one of these beside {norm}"
            )
        if pooling in (None, own) and (norm == "fresh") == self.fresh:
            return self
        out = copy.copy(self)
        out.pooling, out.fresh = pooling or own, norm == "fresh"
        out.readout = slice(0, 1) if out.pooling == "cls" else None
        out.reads_prompts = out.pooling == "mean_all"
        out.features = self.width
        out.fingerprint = f"{self.fingerprint}-{out.pooling}{'-fresh' if out.fresh else ''}"
        return out

    def _own_pooling(self) -> Pooling | None:
        """Return the name of what features are made of; None where it has none."""
        if self.pooling is not None:
            return self.pooling
        if self.readout == slice(0, 1):
            return "cls" if self.model.cls_token is not None else None
        m = self.model
        plain = type(m).forward_head is VisionTransformer.forward_head and m.attn_pool is None
        return "mean_patch" if plain and m.global_pool == "avg" and isinstance(m.norm, nn.Identity) else None

    def unnormed(self) -> TimmTower:
        out = copy.copy(self)
        out.normed, out.fingerprint = False, f"{self.fingerprint}-unnormed"
        return out


def _use_frozen_layers(block: Block) -> None:
    """Replace a block's linear layers; of the joint projection, single rows stay in use."""
    for module in list(block.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, FrozenLinear(child, keep=name == "qkv"))


def fingerprint(model: nn.Module) -> str:
    """Return a hash of every parameter and buffer of a model: 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def normalised(layer: nn.Module, x: Tensor) -> Tensor:
    """Normalise in the dtype of `x`: prompts that come in float32 are normalised in float32."""
    if isinstance(layer, nn.LayerNorm) and layer.weight is not None and layer.weight.dtype != x.dtype:
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.layer_norm(x, layer.normalized_shape, layer.weight.to(x.dtype), bias, layer.eps)
    return layer(x)


def _check(model: nn.Module) -> None:
    """Refuse a model whose forward pass is not the one that `TimmTower` and `_TimmBlock` walk through."""
    for i, block in enumerate(getattr(model, "blocks", ())):
        attention = getattr(block, "attn", None)
        if type(block) is not Block or type(attention) is not Attention or attention.gate is not None:
            raise UnsupportedBackbone(
                f"block {i} of {type(model).__name__} is a {full_name(block)} with {full_name(attention)}; lamina can "
                "prompt timm.models.vision_transformer.Block with timm.layers.attention.Attention. To add a block "
                "type, write a BlockView for it in lamina/backbones/timm_vit.py."
            )
    if not isinstance(model, VisionTransformer):
        raise UnsupportedBackbone(
            f"the model is a {full_name(model)}; of timm's models, lamina can prompt VisionTransformer and what "
            "inherits from it. To add a kind of model, write a Tower for it in lamina/backbones."
        )


def full_name(thing: object) -> str:
    """Return the module and the name of a thing's class.

    >>> full_name(nn.Linear(1, 1))
    'torch.nn.modules.linear.Linear'
    """
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
