"""One block of a frozen transformer, with whatever is spliced into it: the only attention in lamina."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.attention import attend, attention_weights
from lamina.backbones.splice import Probe, Splice, Tap


class BlockView(Protocol):
    """The few questions that the engine asks of a frozen block; one small class per family answers.

    Sequences are (B, n, D) for any n; queries, keys, values and what attention mixed of these are (B, H, n, d).
    `first_norm` is what `norm` applies, None where that is no layer norm. `attended` adds to a sequence what attention
    mixed; `branch` is what the block then adds to that: its MLP, of the second norm.
    """

    @property
    def heads(self) -> int: ...
    @property
    def key_weight(self) -> Tensor | None: ...
    @property
    def first_norm(self) -> nn.LayerNorm | None: ...
    def norm(self, x: Tensor) -> Tensor: ...
    def project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def queries(self, h: Tensor) -> Tensor: ...
    def keys_values(self, h: Tensor) -> tuple[Tensor, Tensor]: ...
    def attended(self, x: Tensor, mixed: Tensor) -> Tensor: ...
    def branch(self, x: Tensor) -> Tensor: ...


def run_block(
    block: BlockView,
    x: Tensor,
    splice: Splice,
    mask: Tensor | None,
    tap: Tap | None,
    layer: int,
    length: int,
    places: slice,
    chosen: Tensor | None,
    rows: slice | Tensor | None,
) -> Tensor:
    """Run one block with whatever is spliced into it.

    Args:
        x: (B, n, D), of which the first `length` rows are the frozen sequence and `places` are prompt slots.

    Returns:
        The sequence after the block, (B, n, D); of its `rows` alone if they are given.
    """
    h = block.norm(x)
    if rows is not None and tap is None:
        q, (k, v) = block.queries(take(h, rows)), block.keys_values(h)
    else:
        q, k, v = block.project(h)
    own = k[:, :, :length], v[:, :, :length]
    k, v = _with_extra_rows(block, k, v, splice)
    extra = k.shape[2] - x.shape[1]
    if mask is not None:
        mask = F.pad(mask, (0, extra))
    if splice.frozen_only and extra:
        mask = x.new_zeros(x.shape[1], k.shape[2]) if mask is None else mask.clone()
        mask[places, -extra:] = float("-inf")
    if mask is not None and rows is not None and tap is None:
        mask = take(mask, rows) if mask.ndim == 4 else mask[rows]  # (..., R, keys), or (B, R, keys)
        mask = mask[:, None] if mask.ndim == 3 else mask
    if splice.temperature is not None:
        q = q / splice.temperature.to(q.dtype)
    if tap is None:
        mixed = attend(q, k, v, mask)
    else:
        weights = attention_weights(q, k, mask)
        seen = weights[:, :, :length]
        inside = places.stop < x.shape[1]
        prompts = torch.cat([seen[..., places], seen[..., x.shape[1] :]], -1) if inside else seen[..., places.start :]
        entering = _entering(x, places, splice)
        normed = splice.context.shape[-2] if splice.context is not None and splice.context_normed else 0
        frozen, queries = x[:, :length], q[:, :, :length]
        tap(Probe(layer, frozen, queries, prompts, block.key_weight, chosen, *own, seen, entering, normed))
        mixed = (weights if rows is None else take(weights, rows)) @ v
    x = block.attended(x if rows is None else take(x, rows), mixed)
    added = block.branch(x)
    return x + (added if splice.branch is None else splice.branch(x, added))


def _entering(x: Tensor, places: slice, splice: Splice) -> Tensor:
    """Return the prompt tokens that a block sees of (B, n, D): those in slots, then the context."""
    tokens = x[:, places]
    if splice.context is None:
        return tokens
    return torch.cat([tokens, splice.context.to(x.dtype).expand(x.shape[0], -1, -1)], dim=1)


def take(x: Tensor, rows: slice | Tensor) -> Tensor:
    """Return some rows of x (B, ..., n, K): the same of each, or those that (B, R) names for each."""
    if isinstance(rows, slice) or rows.ndim == 1:
        return x[..., rows, :]
    index = rows.view(rows.shape[0], *[1] * (x.ndim - 3), rows.shape[1], 1)
    return x.gather(-2, index.expand(*x.shape[:-2], -1, x.shape[-1]))


def _with_extra_rows(block: BlockView, k: Tensor, v: Tensor, splice: Splice) -> tuple[Tensor, Tensor]:
    """Append the keys and values of context and prefix to k and v (B, H, N, d).

    Their number is `shape[0]`: Python's `len` is one certain number even while a graph for any is traced.
    """
    keys, values = [k], [v]
    if splice.context is not None and splice.context.shape[-2]:
        context = splice.context if splice.context.ndim == 3 else splice.context[None]
        extra = block.keys_values(context if splice.context_normed else block.norm(context))
        keys.append(extra[0].to(k.dtype).expand(k.shape[0], -1, -1, -1))
        values.append(extra[1].to(v.dtype).expand(v.shape[0], -1, -1, -1))
    if splice.prefix is not None:
        for place, prefix in zip((keys, values), splice.prefix, strict=True):
            heads = prefix.unflatten(-1, (block.heads, -1)).transpose(-3, -2)
            place.append(heads.to(k.dtype).expand(k.shape[0], -1, -1, -1))
    return (k, v) if len(keys) == 1 else (torch.cat(keys, dim=2), torch.cat(values, dim=2))
