"""The one forward pass: a frozen transformer, with places where prompts may enter.

The alphabet of shapes, the same letters everywhere in lamina:

    B  images (class descriptions, in a text tower)    H, d  heads, width of one: d = D / H
    N  tokens of the frozen sequence                   L     blocks
    M  prompt tokens                                   F     features after pooling
    D  width                                           C, S, T  classes met, samples drawn, tasks

A *column* is a class's place in the head, in order of arrival. An accuracy is a fraction in [0, 1].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lamina.backbones.block import BlockView, run_block, take
from lamina.backbones.packed import use_plain_layers
from lamina.backbones.splice import Encoded, PromptPass, Splice, Tap
from lamina.errors import ConfigError, ShapeError, UnsupportedBackbone

if TYPE_CHECKING:
    from lamina.backbones.clip import TextSide


#: what features are made of: the class token, the mean of all patches, or that of all patches and prompt tokens
Pooling = Literal["cls", "mean_patch", "mean_all"]
#: of what was pooled: the backbone's own last norm, or one with weight 1 and bias 0 that is never trained
FinalNorm = Literal["pretrained", "fresh"]


class Grid(NamedTuple):
    """Where patches stand in the frozen sequence of an image: behind `before` rows, line by line."""

    before: int
    height: int
    width: int


class Tower(nn.Module):
    """A frozen transformer. Subclasses say how to embed, which blocks there are and how to pool.

    Attributes:
        width: D.
        depth: L.
        features: F.
        dtype: of the weights and of what flows between blocks.
        fingerprint: a hash of the weights; in checkpoints and in keys of caches.
        readout: the rows of the frozen sequence that `pool` reads; None when it may read all of them, or when each
            input has rows of its own (`picks`).
        reads_prompts: `pool` also reads what became of the prompt tokens, behind the frozen sequence.
        slots: where prompt slots sit: None = appended, a slice = inside the sequence (text towers).
        text: the text side of a CLIP model, whose features live in the same space; None for any other.
        first_patch: the row of the frozen sequence where patches of an image begin; None where there are none.
        patch_count: how many patches there are of an image of the size that the tower takes; None where there are none.
        patch_size: how many numbers each of them is embedded from: 3 x height x width; None where there are none.
        learned: names of the parameters that training moves; none, unless the tower was made by `tuned`.
    """

    width: int
    depth: int
    features: int
    dtype: torch.dtype
    fingerprint: str
    readout: slice | None = None
    reads_prompts: bool = False
    slots: slice | None = None
    text: TextSide | None = None
    first_patch: int | None = None
    patch_count: int | None = None
    patch_size: int | None = None
    learned: frozenset[str] = frozenset()

    def embed(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the sequence (B, N, D) that enters block 0 and an additive mask, (N, N) or (B, 1, N, N), or None."""
        raise NotImplementedError

    def blocks(self) -> list[BlockView]:
        """Return a view of each block, first to last."""
        raise NotImplementedError

    def picks(self, inputs: Tensor) -> Tensor | None:
        """Return which rows of its sequence `pool` reads of each input (B, R); None where `readout` says it for all."""
        return None

    def grid(self, inputs: Tensor) -> Grid:
        """Return where the patches of images (B, 3, height, width) stand in the frozen sequence."""
        raise NotImplementedError

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

    def reading(self, pooling: Pooling | None = None, norm: FinalNorm = "pretrained") -> Tower:
        """Return a tower of the same weights, not copied, whose features are read in another way.

        A mean is taken first, and normed then. That of "mean_all" holds what becomes of prompt tokens that the last
        block is shown before its first norm, whether they were to travel or not; keys and values leave nothing to read.

        Args:
            pooling: None keeps the tower's own.

        Raises:
            ConfigError: when the tower has not what would be read.
            UnsupportedBackbone: when it can be read in one way only.
        """
        raise UnsupportedBackbone(f"the features of a {type(self).__name__} can be read in one way only, its own")

    def unnormed(self) -> Tower:
        """Return a tower of the same weights, not copied, whose features are read before the final norm."""
        raise NotImplementedError

    def unprojected(self) -> tuple[Tower, Tensor | None]:
        """Return a tower of the same weights, read before its features are projected, and what projects them (D, F)."""
        return self, None

    def tuned(self, select: Callable[[str], bool]) -> Tower:
        """Return a tower of a copy of the weights, of which training moves the parameters whose names `select` picks.

        The copy is in float32, since what is learned is; it begins with what rounding has left of the weights. It stays
        in evaluation mode as any tower does, and what is not picked stays frozen. A text side is shared.

        Raises:
            ConfigError: when nothing is picked.
        """
        out = copy.deepcopy(self, {id(self.text): self.text})
        use_plain_layers(out)
        out.dtype = torch.promote_types(self.dtype, torch.float32)
        out.to(out.dtype)
        out.learned = frozenset(name for name, _ in out.named_parameters() if select(name))
        if not out.learned:
            raise ConfigError(f"there is nothing to tune: no parameter of this {type(self).__name__} was picked")
        for name, parameter in out.named_parameters():
            parameter.requires_grad_(name in out.learned)
        out.fingerprint = f"{self.fingerprint}-tuned"
        return out

    def freeze(self) -> None:
        """Take every parameter out of training, for good."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Tower:
        """Stay in evaluation mode: a tower has no training behaviour, tuned or not."""
        return super().train(False)

    def forward(
        self,
        inputs: Tensor,
        prompts: PromptPass | None = None,
        tap: Tap | None = None,
        *,
        all_rows: bool = False,
        layers: int = 1,
        after: Sequence[int] = (),
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
            after: also return the frozen sequence as each of these blocks, from 0, leaves it.
        """
        x, mask = self.embed(inputs)
        picks = self.picks(inputs)
        if prompts is not None and prompts.copies > 1:
            x = x.repeat(prompts.copies, 1, 1)
            picks = None if picks is None else picks.repeat(prompts.copies, 1)
        frozen, carried = x, None
        read: list[Tensor] = []
        left: dict[int, Tensor] = {}
        last = self.depth - 1
        for layer, block in enumerate(self.blocks()):
            splice = (prompts.at(layer, frozen, carried) if prompts is not None else None) or Splice()
            tokens = splice.tokens if splice.tokens is not None else carried
            own = tokens
            if self.reads_prompts and layer >= self.depth - layers:
                splice, tokens = _with_traces(splice, tokens, frozen.shape[0])
            few = layer == last and not all_rows and last not in after
            rows = self._rows(frozen, tokens, picks) if few else None
            places = self._places(frozen, tokens, mask)
            x = self._join(frozen, tokens)
            chosen = prompts.chosen if prompts is not None else None
            x = run_block(block, x, splice, mask, tap, layer, frozen.shape[1], places, chosen, rows)
            frozen, carried = self._split(x, tokens)
            if layer in after:
                left[layer] = frozen
            if layer >= self.depth - layers:
                whole = x if self.reads_prompts else frozen
                read.append(self.read(whole, picks) if rows is None else self.pool(frozen))
            if carried is not None and tokens is not own:  # only what was to travel goes on
                carried = None if own is None else carried[:, : own.shape[1]]
        tail = self.final_norm(carried) if carried is not None and self.slots is None else None
        features = torch.cat(read, dim=-1)
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return Encoded(features, frozen if all_rows else None, tail, tuple(left[layer] for layer in after))

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
            # backward, a split writes one sequence where two slices write and add two
            before, behind = x.split([x.shape[1] - tokens.shape[1], tokens.shape[1]], dim=1)
            return before, behind
        return x, x[:, self.slots]


def _with_traces(splice: Splice, tokens: Tensor | None, images: int) -> tuple[Splice, Tensor | None]:
    """Let a context travel through a block behind the prompt tokens (B, M, D), so that what becomes of it can be read.

    The frozen sequence sees no difference. A context behind the norm has no place in the sequence, and one that is
    hidden from the prompt tokens would be seen by them there: these stay as they are.
    """
    if splice.context is None or splice.context_normed or splice.frozen_only:
        return splice, tokens
    context = splice.context.expand(images, -1, -1)
    joined = context if tokens is None else torch.cat([tokens.to(context.dtype), context], dim=1)
    return replace(splice, context=None), joined
