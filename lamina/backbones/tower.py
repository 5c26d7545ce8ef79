"""The one forward pass: a frozen transformer, with places where prompts may enter.

The alphabet of shapes, the same letters everywhere in lamina:

    B  images (class descriptions, in a text tower)    H, d  heads, width of one: d = D / H
    N  tokens of the frozen sequence                   L     blocks
    M  prompt tokens                                   F     features after pooling
    D  width                                           C, S, T  classes met, samples drawn, tasks

A *column* is a class's place in the head, in order of arrival. An accuracy is a fraction in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.attention import attend, attention_weights
from lamina.errors import ShapeError

if TYPE_CHECKING:
    from lamina.backbones.clip import TextSide


@dataclass(frozen=True)
class Splice:
    """What a prompt module asks of one block.

    Attributes:
        tokens: (B, M, D). Contents of the prompt slots on entry to this block. They travel with the
            sequence and come back at the next block as `carried`.
        context: (M, D), one for the whole batch, or (B, M, D). Tokens that this block may look at and
            that leave no trace: they are normalised and projected to keys and values, never to
            queries. A context of the whole batch is projected once, whatever the number of images.
        context_normed: the context is already in the space after the block's first norm; leave it so.
        prefix: two (M, D) or (B, M, D). Rows appended to the keys and values after their projection.
        temperature: () or (H, 1, 1). Divides the attention logits.
        frozen_only: hide `context` and `prefix` from the prompt slots.
    """

    tokens: Tensor | None = None
    context: Tensor | None = None
    context_normed: bool = False
    prefix: tuple[Tensor, Tensor] | None = None
    temperature: Tensor | None = None
    frozen_only: bool = False


@dataclass(frozen=True)
class Probe:
    """What a tap sees of one block.

    Attributes:
        layer: index of the block, from 0.
        inputs: (B, N, D). The frozen sequence on entry, without prompts; slots inside it hold what enters.
        queries: (B, H, N, d). Queries of the frozen sequence, bias included, not yet scaled by d.
        to_prompts: (B, H, N, M). Attention weights from the frozen sequence to the prompts, first those in slots.
        key_weight: (D, D). Rows are output channels, in head order; None where keys are normalised after
            their projection, so that a key is not a product with one weight.
        chosen: (B, k), as the pass says. Where prompts of a pool travel, those that fill the slots on entry to the
            block that they enter, M rows each, in this order; None without a pool.
        keys, values: (B, H, N, d). Those of the frozen sequence, with their graph; as a `Splice.prefix` they show this
            sequence to another one.
    """

    layer: int
    inputs: Tensor
    queries: Tensor
    to_prompts: Tensor
    key_weight: Tensor | None
    chosen: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None


Tap = Callable[[Probe], None]


@dataclass(frozen=True)
class Encoded:
    """What comes out of a tower.

    Attributes:
        features: (B, F), float32; float64 if the tower computes in it.
        tokens: (B, N, D) after the last block, or None when only the features were asked for.
        prompts: (B, M, D). What became of the prompt slots, after the final norm; None without slots.
    """

    features: Tensor
    tokens: Tensor | None = None
    prompts: Tensor | None = None


class PromptPass:
    """One forward pass's worth of prompts; made by `PromptModule.start`, thrown away after use.

    Whatever belongs to one batch (the query, the chosen prompts, a recurrent state, loss terms) lives
    here and never on the module, so that a module can be used twice in one step.

    Attributes:
        terms: loss terms that this pass gave rise to, by name.
        chosen: (B, k), whole numbers. Which prompts of a pool each image took, in order of rank; None without a pool.
        copies: how many times the tower encodes each image. Shapes that say B then hold copies * B rows: all images,
            then all of them again; so one pass can show the same images with different prompts.
    """

    def __init__(self) -> None:
        self.terms: dict[str, Tensor] = {}
        self.chosen: Tensor | None = None
        self.copies = 1

    def at(self, layer: int, tokens: Tensor, carried: Tensor | None) -> Splice | None:
        """Return what to splice into block `layer`, or None.

        Args:
            layer: index of the block, from 0.
            tokens: (B, N, D). The frozen sequence on entry to the block.
            carried: (B, M, D). What the last block made of the prompt slots; None if there are none.
        """
        raise NotImplementedError

    def losses(self, labels: Tensor | None) -> dict[str, Tensor]:
        """Return the loss terms, those of known columns (B,) included; `labels` is None where they are not known."""
        return self.terms


class BlockView(Protocol):
    """The few questions that the engine asks of a frozen block; one small class per family answers.

    Sequences are (B, n, D) for any n; queries, keys and values are (B, H, n, d). `first_norm` is what `norm`
    applies, None where that is no layer norm.
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
    def finish(self, x: Tensor, mixed: Tensor) -> Tensor: ...


class Tower(nn.Module):
    """A frozen transformer. Subclasses say how to embed, which blocks there are and how to pool.

    Attributes:
        width: D.
        depth: L.
        features: F.
        fingerprint: a hash of the weights; in checkpoints and in keys of caches.
        readout: the rows of the frozen sequence that `pool` reads; None when it may read all of them, or when each
            input has rows of its own (`picks`).
        slots: where prompt slots sit: None = appended, a slice = inside the sequence (text towers).
        text: the text side of a CLIP model, whose features live in the same space; None for any other.
    """

    width: int
    depth: int
    features: int
    fingerprint: str
    readout: slice | None = None
    slots: slice | None = None
    text: TextSide | None = None

    def embed(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the sequence (B, N, D) that enters block 0 and an additive mask, (N, N) or (B, 1, N, N), or None."""
        raise NotImplementedError

    def blocks(self) -> list[BlockView]:
        """Return a view of each block, first to last."""
        raise NotImplementedError

    def picks(self, inputs: Tensor) -> Tensor | None:
        """Return which rows of its sequence `pool` reads of each input (B, R); None where `readout` says it for all."""
        return None

    def pool(self, tokens: Tensor) -> Tensor:
        """Reduce the final sequence, or its rows that are read, to features (B, F)."""
        raise NotImplementedError

    def read(self, tokens: Tensor, picks: Tensor | None = None) -> Tensor:
        """Reduce a sequence (B, N, D) between any two blocks to features (B, F), as if it were the final one.

        Args:
            picks: (B, R), the rows that are read of each, where the tower has `picks`.
        """
        rows = self.readout if picks is None else picks
        return self.pool(tokens if rows is None else _take(tokens, rows))

    def class_position(self) -> Tensor | None:
        """Return what block 0 finds added to the class token for its place (D,); None where there is no such thing."""
        return None

    def pre_norm(self, x: Tensor) -> Tensor:
        """Do what the tower does to tokens before block 0; for prompts that enter before it."""
        return x

    def final_norm(self, x: Tensor) -> Tensor:
        """Do what the tower does to tokens after the last block, before it pools them."""
        raise NotImplementedError

    def pre_weight(self) -> Tensor | None:
        """Return what the norm before block 0 multiplies channels by (D,); None where there is none."""
        return None

    def unnormed(self) -> Tower:
        """Return a tower of the same weights, not copied, whose features are read before the final norm."""
        raise NotImplementedError

    def unprojected(self) -> tuple[Tower, Tensor | None]:
        """Return a tower of the same weights, read before its features are projected, and what projects them (D, F)."""
        return self, None

    def freeze(self) -> None:
        """Take every parameter out of training, for good."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Tower:
        """Stay in evaluation mode: a frozen tower has no training behaviour."""
        return super().train(False)

    def forward(
        self,
        inputs: Tensor,
        prompts: PromptPass | None = None,
        tap: Tap | None = None,
        *,
        all_rows: bool = False,
        layers: int = 1,
    ) -> Encoded:
        """Encode a batch; without prompts this is the vendor's frozen model, up to rounding.

        Args:
            inputs: what `embed` takes; (B, 3, height, width) for images.
            prompts: asked before every block what to splice in.
            tap: called with a `Probe` of every block.
            all_rows: also return the final tokens. Otherwise, where the features read only a few rows, the last block
                computes those rows and prompt slots alone.
            layers: read features after each of so many last blocks, as after the last one; they come side by
                side, the last block's at the end: F is then `layers` times the tower's.
        """
        x, mask = self.embed(inputs)
        picks = self.picks(inputs)
        if prompts is not None and prompts.copies > 1:
            x = x.repeat(prompts.copies, 1, 1)
            picks = None if picks is None else picks.repeat(prompts.copies, 1)
        frozen, carried = x, None
        read: list[Tensor] = []
        for layer, block in enumerate(self.blocks()):
            splice = (prompts.at(layer, frozen, carried) if prompts is not None else None) or Splice()
            tokens = splice.tokens if splice.tokens is not None else carried
            rows = self._rows(frozen, tokens, picks) if layer == self.depth - 1 and not all_rows else None
            places = self._places(frozen, tokens, mask)
            x = self._join(frozen, tokens)
            chosen = prompts.chosen if prompts is not None else None
            x = _block(block, x, splice, mask, tap, layer, frozen.shape[1], places, chosen, rows)
            frozen, carried = self._split(x, tokens)
            if layer >= self.depth - layers:
                read.append(self.read(frozen, picks) if rows is None else self.pool(frozen))
        tail = self.final_norm(carried) if carried is not None and self.slots is None else None
        features = torch.cat(read, dim=-1)
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return Encoded(features, frozen if all_rows else None, tail)

    def _places(self, frozen: Tensor, tokens: Tensor | None, mask: Tensor | None) -> slice:
        """Return which rows of the joined sequence are prompt slots; none where there are no tokens.

        Raises:
            ShapeError: when the tokens have no place.
        """
        end, count = frozen.shape[1], 0 if tokens is None else tokens.shape[1]
        if tokens is None or self.slots is None:
            if count and mask is not None:
                raise ShapeError(
                    f"a {type(self).__name__} reads its rows in order, so {count} prompt tokens cannot be appended; "
                    "give it slots inside the sequence"
                )
            return slice(end, end + count)
        if count != self.slots.stop - self.slots.start or self.slots.stop > end:
            raise ShapeError(
                f"prompt slots are rows {self.slots.start} to {self.slots.stop - 1} of {end}; got {count} prompt tokens"
            )
        return self.slots

    def _join(self, frozen: Tensor, tokens: Tensor | None) -> Tensor:
        if tokens is None:
            return frozen
        tokens = tokens.to(frozen.dtype)
        if self.slots is None:
            return torch.cat([frozen, tokens], dim=1)
        return torch.cat([frozen[:, : self.slots.start], tokens, frozen[:, self.slots.stop :]], dim=1)

    def _rows(self, frozen: Tensor, tokens: Tensor | None, picks: Tensor | None) -> slice | Tensor | None:
        """Return which rows of the joined sequence matter after the last block; None for all.

        One set of rows for all, or (B, R). Nobody asks what became of slots inside the sequence.
        """
        read = self.readout if picks is None else picks
        if tokens is None or self.slots is not None or read is None:
            return read
        places = torch.arange(frozen.shape[1] + tokens.shape[1], device=frozen.device)
        slots = places[frozen.shape[1] :]
        if isinstance(read, slice):
            return torch.cat([places[read], slots])
        return torch.cat([read, slots.expand(len(read), -1)], dim=1)

    def _split(self, x: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if tokens is None:
            return x, None
        if self.slots is None:
            cut = x.shape[1] - tokens.shape[1]
            return x[:, :cut], x[:, cut:]
        return x, x[:, self.slots]


def _block(
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
    """Run one block with whatever is spliced into it: the only attention in lamina.

    Args:
        x: (B, n, D), of which the first `length` rows are the frozen sequence and `places` are prompt slots.

    Returns:
        The sequence after the block, (B, n, D); of its `rows` alone if they are given.
    """
    h = block.norm(x)
    if rows is not None and tap is None:
        q, (k, v) = block.queries(_take(h, rows)), block.keys_values(h)
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
        mask = _take(mask, rows) if mask.ndim == 4 else mask[rows]  # (..., R, keys), or (B, R, keys)
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
        tap(Probe(layer, x[:, :length], q[:, :, :length], prompts, block.key_weight, chosen, *own))
        mixed = (weights if rows is None else _take(weights, rows)) @ v
    return block.finish(x if rows is None else _take(x, rows), mixed)


def _take(x: Tensor, rows: slice | Tensor) -> Tensor:
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
