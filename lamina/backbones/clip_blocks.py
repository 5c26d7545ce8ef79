"""Blocks of open_clip's transformers: how the engine sees them, and which ones it can."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from open_clip import CLIP, CustomTextCLIP
from open_clip.transformer import Attention, CustomResidualAttentionBlock, ResidualAttentionBlock
from torch import Tensor, nn

from lamina.backbones.packed import FrozenLinear
from lamina.backbones.timm_vit import fingerprint, full_name, normalised, some_rows, split_heads
from lamina.errors import UnsupportedBackbone

#: what a plain block has nothing of: names of parts in a block, in its attention and in its MLP
_EXTRAS: dict[str, tuple[str, ...]] = {
    "": ("ln_1_kv", "ln_attn"),
    "attn": ("ln_q", "ln_k", "ln_inner", "logit_scale", "head_scale", "bias_k", "bias_v"),
    "mlp": ("ln",),
}


class ClipBlock(nn.Module):
    """Answers for a plain pre-norm block of open_clip, whichever of its two attentions it has.

    `nn.MultiheadAttention` keeps its projections as bare weights and uses them past their modules, so the block is
    taken apart; its weights are taken over, not copied.

    Args:
        block: one that `check_blocks` lets through.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        parts: Any = block
        attention, mlp = parts.attn, parts.mlp
        self.heads: int = attention.num_heads
        self.inner: int = attention.out_proj.in_features
        self.norms = nn.ModuleList([parts.ln_1, parts.ln_2])
        self.scales = nn.ModuleList([parts.ls_1, parts.ls_2])
        self.joint = FrozenLinear(_layer(attention.in_proj_weight, attention.in_proj_bias), keep=True)
        self.out = FrozenLinear(attention.out_proj)
        self.widen, self.activation, self.narrow = FrozenLinear(mlp.c_fc), mlp.gelu, FrozenLinear(mlp.c_proj)

    @property
    def key_weight(self) -> Tensor:
        return self.joint.weight.chunk(3)[1]

    @property
    def first_norm(self) -> nn.LayerNorm | None:
        norm = self.norms[0]
        return norm if isinstance(norm, nn.LayerNorm) else None

    def norm(self, x: Tensor) -> Tensor:
        return normalised(self.norms[0], x)

    def project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(self.joint(h), 3, self.heads).unbind(0)
        return q, k, v

    def queries(self, h: Tensor) -> Tensor:
        return split_heads(some_rows(self.joint, h, slice(0, self.inner)), 1, self.heads)[0]

    def keys_values(self, h: Tensor) -> tuple[Tensor, Tensor]:
        k, v = split_heads(some_rows(self.joint, h, slice(self.inner, None)), 2, self.heads).unbind(0)
        return k, v

    def attended(self, x: Tensor, mixed: Tensor) -> Tensor:
        return x + self.scales[0](self.out(mixed.transpose(1, 2).flatten(2)))

    def branch(self, x: Tensor) -> Tensor:
        return self.scales[1](self.narrow(self.activation(self.widen(normalised(self.norms[1], x)))))


def check_blocks(side: str, blocks: nn.ModuleList) -> None:
    """Make sure that a tower's blocks are ones that `ClipBlock` walks through.

    Args:
        side: "image" or "text", for the message.

    Raises:
        UnsupportedBackbone: when one is not.
    """
    for i, block in enumerate(blocks):
        reason = _reason(block)
        if reason is not None:
            raise UnsupportedBackbone(
                f"block {i} of the {side} tower is a {full_name(block)} with {full_name(getattr(block, 'attn', None))}"
                f"{reason}; lamina can prompt open_clip's ResidualAttentionBlock and CustomResidualAttentionBlock "
                "where they are plain. To add a block type, write a BlockView for it in "
                "lamina/backbones/clip_blocks.py."
            )


def facts(blocks: nn.ModuleList) -> str:
    """Return what of a tower's blocks weights do not tell, for its fingerprint: heads, activations, epsilons.

    >>> facts(nn.ModuleList([ResidualAttentionBlock(8, 2)]))
    "2 heads, GELU approximate='none', 1e-05 1e-05"
    """
    parts: list[Any] = list(blocks)
    said = [f"{b.attn.num_heads} heads, {_activation(b.mlp.gelu)}, {_eps(b.ln_1)} {_eps(b.ln_2)}" for b in parts]
    return "; ".join(said)


def check_model(model: nn.Module) -> None:
    """Make sure that a model is one of open_clip's whose two towers meet in features alone.

    Raises:
        UnsupportedBackbone: when it is not.
    """
    if not isinstance(model, CLIP | CustomTextCLIP):
        raise UnsupportedBackbone(
            f"the model is a {full_name(model)}; of open_clip's models, lamina can prompt CLIP and CustomTextCLIP"
        )


def fingerprint_of(side: nn.Module, blocks: nn.ModuleList) -> str:
    """Return a hash of a tower's weights and of what they do not tell: with QuickGELU they are another tower."""
    return hashlib.blake2b(f"{fingerprint(side)} {facts(blocks)}".encode(), digest_size=8).hexdigest()


def projected(x: Tensor, projection: Tensor | nn.Module | None) -> Tensor:
    """Bring x (B, D) to the space (B, F) that images and texts share."""
    if projection is None:
        return x
    return x @ projection if isinstance(projection, Tensor) else projection(x)


def features_of(projection: nn.Parameter | nn.Linear | None, width: int) -> int:
    """Return F after a projection of D = `width`."""
    if projection is None:
        return width
    return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]


def _reason(block: nn.Module) -> str | None:
    """Return what of a block is not plain: None for nothing, "" for its classes."""
    expected: dict[type, Callable[[Any], bool]] = {
        ResidualAttentionBlock: lambda a: type(a) is nn.MultiheadAttention and a.batch_first and not a.add_zero_attn,
        CustomResidualAttentionBlock: lambda a: type(a) is Attention,
    }
    fits = expected.get(type(block))
    if fits is None or not fits(block.attn):
        return ""
    for where, names in _EXTRAS.items():
        part = getattr(block, where) if where else block
        for name in names:
            extra = getattr(part, name, None)
            if extra is not None and not isinstance(extra, nn.Identity):
                return f" and {'.'.join(filter(None, (where, name)))}"
    return None


def _layer(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
    return layer


def _activation(layer: nn.Module) -> str:
    return f"{type(layer).__name__} {layer.extra_repr()}".strip()


def _eps(norm: nn.Module) -> float:
    return float(getattr(norm, "eps", 0.0))
