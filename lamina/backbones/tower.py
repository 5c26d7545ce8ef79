"""The one forward pass: a frozen transformer, with places where prompts may enter.

The alphabet of shapes, the same letters everywhere in lamina:

    B  images (class descriptions, in a text tower)    H, d  heads, width of one: d = D / H
    N  tokens of the frozen sequence                   L     blocks
    M  prompt tokens                                   F     features after pooling
    D  width                                           C, S, T  classes met, samples drawn, tasks

A *column* is a class's place in the head, in order of arrival. An accuracy is a fraction in [0, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lamina.backbones.block import BlockView, run_block, take
from lamina.backbones.splice import Encoded, PromptPass, Splice, Tap
from lamina.errors import ShapeError

if TYPE_CHECKING:
    from lamina.backbones.clip import TextSide


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
        return self.pool(tokens if rows is None else take(tokens, rows))

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
            x = run_block(block, x, splice, mask, tap, layer, frozen.shape[1], places, chosen, rows)
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
