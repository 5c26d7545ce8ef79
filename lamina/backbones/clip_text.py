"""The text tower of CLIP models, whole or in parts.

A text is a row of token ids, (B, 77) whole numbers; its features are read where it ends, and what stands behind the
last end is never computed: under the causal mask it could change nothing.

References:
    Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, section 2.4.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from open_clip import CLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from lamina.backbones.block import BlockView
from lamina.backbones.clip_blocks import (
    ClipBlock,
    check_blocks,
    check_model,
    features_of,
    fingerprint_of,
    projected,
)
from lamina.backbones.splice import Probe, PromptPass, Splice
from lamina.backbones.timm_vit import full_name, normalised
from lamina.backbones.tower import Tower
from lamina.errors import ConfigError, ShapeError, UnsupportedBackbone


class TextTower(Tower):
    """The text tower of an open_clip model, frozen; inputs are token ids (B, n), n at most `length`.

    Args:
        model: an `open_clip.CLIP` or `CustomTextCLIP` with its weights loaded; its text side is taken over, not copied.
        dtype: as for `ClipImageTower`.

    Attributes:
        length: the rows of the longest text that it can read.
        start, stop: its sequences are these rows of a text; all but in an `opening` or a `tail`.
        branches: of a `tree`: what is added to the logits of its rows, and where its texts end.

    Raises:
        UnsupportedBackbone: when its text side is not one that lamina walks through.
    """

    mask: Tensor
    branches: tuple[Tensor, Tensor] | None = None

    def __init__(self, model: nn.Module, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        check_text(model)
        side: Any = getattr(model, "text", model)
        self.table, self.positions, self.last = side.token_embedding, side.positional_embedding, side.ln_final
        self.projection = side.text_projection
        shell = nn.Module()  # CLIP keeps these parts among those of its image side
        for name in ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"):
            setattr(shell, name, getattr(side, name))
        self.fingerprint = fingerprint_of(shell, side.transformer.resblocks)
        self.stack = nn.ModuleList([ClipBlock(block) for block in side.transformer.resblocks])
        self.length, self.width = side.positional_embedding.shape
        self.depth, self.features = len(self.stack), features_of(side.text_projection, self.width)
        self.register_buffer("mask", torch.full((self.length, self.length), float("-inf")).triu_(1), persistent=False)
        self.start, self.stop, self.dtype, self.normed = 0, self.length, dtype, True
        self.to(dtype)
        self.freeze()

    def blocks(self) -> list[BlockView]:
        return list(self.stack)  # type: ignore[arg-type]

    def embed(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of ids (B, n) up to the last end of a text, (B, N, D), and the causal mask (N, N).

        Raises:
            ShapeError: when these are no ids, or a text ends before rows that prompts take or that another pass has.
        """
        if self.branches is not None:
            return inputs.to(self.dtype), self.branches[0]
        ids = inputs
        if ids.ndim != 2 or not ids.shape[0] or not 0 < ids.shape[1] <= self.length or ids.dtype != torch.int64:
            raise ShapeError(
                f"texts must be token ids (B, n), int64, one text or more, n from 1 to {self.length}; got "
                f"{str(ids.dtype).removeprefix('torch.')} {tuple(ids.shape)}"
            )
        ends = ids.argmax(dim=1)
        first, last = torch.stack([ends.min(), ends.max()]).tolist()
        needed = self._needed()
        if first < needed:
            raise ShapeError(
                f"text {int(ends.argmin())} ends in row {first}, but rows up to {needed - 1} are prompt slots or an "
                "opening that texts share; write placeholder words there, such as 'X X X name'"
            )
        stop = min(self.stop, last + 1)
        places = slice(self.start, stop)
        x = self.table(ids[:, places]) + self.positions[places]
        return x, self.mask[: stop - self.start, : stop - self.start]

    def picks(self, inputs: Tensor) -> Tensor:
        if self.branches is not None:
            return self.branches[1]
        return inputs.argmax(dim=1, keepdim=True).clamp(max=self.stop - 1) - self.start

    def final_norm(self, x: Tensor) -> Tensor:
        return normalised(self.last, x)

    def pool(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] != 1 and self.branches is None:
            raise ShapeError(
                f"a text tower pools the one row where a text ends; got {tokens.shape[1]} rows: give picks"
            )
        row = tokens[:, 0] if self.branches is None else tokens
        return projected(self.final_norm(row), self.projection) if self.normed else row

    def unnormed(self) -> TextTower:
        """Return a tower of the same weights, not copied, read before its final norm and projection: F = D."""
        out = copy.copy(self)
        out.normed, out.features, out.fingerprint = False, self.width, f"{self.fingerprint}-unnormed"
        return out

    def words(self, ids: Tensor) -> Tensor:
        """Return the embeddings of ids (...) without positions, (..., D), float32: where prompts may start."""
        return self._wide(self.table(ids))

    def position(self, rows: slice) -> Tensor:
        """Return what `embed` adds to these rows of a text, (M, D), float32; prompts at block 0 add it themselves.

        Raises:
            ConfigError: when a text has no such rows.
        """
        return self._wide(self.positions[_checked(rows, 0, self.length)])

    def with_slots(self, rows: slice) -> TextTower:
        """Return a tower of the same weights, not copied, whose prompt slots are these rows of a text.

        `Splice.tokens` takes their place on entry to a block, and travels on from there as any other row does.
        Texts hold placeholder words in these rows.

        Raises:
            ConfigError: when this tower reads no such rows.
        """
        return self._window(self.start, self.stop, _checked(rows, self.start, self.stop))

    def opening(self, stop: int) -> TextTower:
        """Return a tower of the same weights, not copied, that reads the first `stop` rows of a text alone.

        Raises:
            ConfigError: when there are not so many, or prompt slots reach across the cut.
        """
        return self._window(self.start, stop, self._slots())

    def tail(self, start: int) -> TextTower:
        """Return a tower of the same weights, not copied, that reads texts from row `start` on.

        The rows before must be shown to it at every block, by `Splice.prefix`; see `SharedPrefix`.

        Raises:
            ConfigError: when there is nothing left to read, or prompt slots reach across the cut.
        """
        return self._window(start, self.stop, self._slots())

    def tree(self, sees: Tensor, ends: Tensor) -> TextTower:
        """Return a tower of the same weights, not copied, that reads rows of several texts in one sequence.

        Its inputs are rows (B, N, D) as they enter block 0, its features (B, R, F) those of the rows `ends`.

        Args:
            sees: (B, N, N), bool. Which rows each row looks at: those before it in its text, and itself.
            ends: (B, R), where texts end.
        """
        out = copy.copy(self)
        mask = torch.zeros(sees.shape, dtype=self.dtype, device=sees.device).masked_fill_(~sees, float("-inf"))
        out.branches, out.fingerprint = (mask[:, None], ends), f"{self.fingerprint}-tree"
        return out

    def _window(self, start: int, stop: int, slots: slice | None) -> TextTower:
        if not self.start <= start < stop <= self.stop:
            raise ConfigError(
                f"a part of rows {self.start} to {self.stop - 1} of a text must hold some of them; got "
                f"{start} to {stop - 1}"
            )
        out = copy.copy(self)
        out.start, out.stop, out.slots = start, stop, None
        if slots is not None and slots.start < stop and slots.stop > start:
            if slots.start < start or slots.stop > stop:
                raise ConfigError(
                    f"prompt slots in rows {slots.start} to {slots.stop - 1} of a text must be in one part of it; got "
                    f"the part of rows {start} to {stop - 1}"
                )
            out.slots = slice(slots.start - start, slots.stop - start)
        if (start, stop) != (self.start, self.stop):
            out.fingerprint = f"{self.fingerprint}-{start}-{stop}"
        return out

    def _slots(self) -> slice | None:
        """Return the slots as rows of a whole text."""
        return None if self.slots is None else slice(self.slots.start + self.start, self.slots.stop + self.start)

    def _needed(self) -> int:
        """Return how many rows of a text it must have before it may end."""
        slots = self._slots()
        return max(self.start, 0 if self.stop == self.length else self.stop, 0 if slots is None else slots.stop)

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(self.dtype, torch.float32))


class SharedPrefix(PromptPass):
    """The opening that many texts share, computed once: a first pass records it, a second one looks at it.

        prefix = SharedPrefix()
        tower.opening(5)(ids[:1], contexts, prefix.record)
        features = tower.tail(5)(ids, prefix).features

    Features and gradients are those of whole texts. A first pass over G openings serves G groups of as many texts
    each, one group after the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def record(self, probe: Probe) -> None:
        """Keep the keys and values of one block; a tap of the first pass."""
        assert probe.keys is not None and probe.values is not None
        keys, values = (rows.transpose(1, 2).flatten(2) for rows in (probe.keys, probe.values))
        self._seen[probe.layer] = keys, values

    def at(self, layer: int, tokens: Tensor, carried: Tensor | None) -> Splice:
        if layer not in self._seen:
            raise ShapeError(
                f"no opening was recorded at block {layer}; run the opening with `record` as its tap first"
            )
        groups, texts = self._seen[layer][0].shape[0], tokens.shape[0]
        if texts % groups:
            raise ShapeError(f"{groups} openings cannot be shared evenly by {texts} texts; give as many texts for each")
        keys, values = self._seen[layer]
        if groups > 1:
            keys, values = (rows.repeat_interleave(texts // groups, dim=0) for rows in (keys, values))
        return Splice(prefix=(keys, values))


def check_text(model: nn.Module) -> None:
    """Make sure that `TextTower` walks through a model's text side as open_clip does.

    Raises:
        UnsupportedBackbone: when it does not.
    """
    check_model(model)
    side: Any = getattr(model, "text", model)
    if type(side) is not TextTransformer and not isinstance(side, CLIP):
        raise UnsupportedBackbone(
            f"the text tower is a {full_name(side)}; of open_clip's text towers, lamina can prompt "
            "TextTransformer. To add another kind, write a Tower for it in lamina/backbones."
        )
    pooling = side.text_pool_type if isinstance(side, CLIP) else side.pool_type
    causal = side.attn_mask is not None
    if pooling != "argmax" or not causal or getattr(side, "cls_emb", None) is not None:
        found = f"{'one' if causal else 'no'} causal mask and pooling {pooling!r}"
        found += ", and a class token" if getattr(side, "cls_emb", None) is not None else ""
        raise UnsupportedBackbone(
            f"the text tower has {found}; lamina reads texts under a causal mask where they end ('argmax'). To add "
            "another pooling, write it in TextTower in lamina/backbones/clip_text.py."
        )
    check_blocks("text", side.transformer.resblocks)


def _checked(rows: slice, first: int, stop: int) -> slice:
    start = first if rows.start is None else rows.start
    if rows.stop is None or rows.step not in (None, 1) or not first <= start < rows.stop <= stop:
        raise ConfigError(
            f"prompts take rows of a text one after the other, from {first} to {stop - 1}; got "
            f"slice({rows.start}, {rows.stop}, {rows.step})"
        )
    return slice(start, rows.stop)
