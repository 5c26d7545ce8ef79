"""Learned words in texts: where they stand, and how many texts that share them are read at little cost.

References:
    Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022, section 3.2; Khattak et al., MaPLe:
    Multi-modal Prompt Learning, CVPR 2023, section 3.2, for prompts in deeper blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lamina.backbones.clip import TextSide
from lamina.backbones.clip_text import SharedPrefix, TextTower
from lamina.backbones.splice import Splice
from lamina.errors import ConfigError, DataError
from lamina.prompts.base import Scripted
from lamina.prompts.reading import along
from lamina.text import printable

Position = Literal["end", "middle", "front"]

#: a word of one token that keeps a place
PLACEHOLDER = "X"

#: texts that go through the tower together where nothing is learned
TOGETHER = 512


class Wording(NamedTuple):
    """Texts of C classes with room for a context.

    Attributes:
        ids: (C, 77), int64, with placeholders where the context goes.
        rows: (C, n), int64. Where that is, n at least 1.
    """

    ids: Tensor
    rows: Tensor

    def of(self, places: Sequence[int]) -> Wording:
        """Return the texts of some classes."""
        return Wording(self.ids[list(places)], self.rows[list(places)])

    def joined(self, more: Wording) -> Wording:
        """Return these texts and those of more classes."""
        return Wording(torch.cat([self.ids, more.ids]), torch.cat([self.rows, more.rows]))


def worded(
    side: TextSide, names: Sequence[str], length: int, *, position: Position = "end", words: str = "", tail: str = "."
) -> Wording:
    """Write a text for each class.

    Args:
        names: as they are to be read.
        length: n, tokens of the context.
        position: of the name: behind the context, in the midst of it, or before it.
        words: that stay as they are, between context and name.
        tail: what ends the text.

    Raises:
        DataError: when a name is no word for the tokenizer, or makes the text too long.
    """
    before = {"end": length, "middle": length // 2, "front": 0}[position]
    opening, closing = ([PLACEHOLDER] * count for count in (before, length - before))
    texts = [" ".join([*opening, *words.split(), name, *closing]) + tail for name in names]
    ids = tokenized(side, texts, names)
    spans = torch.tensor([len_of(side, f"{words} {name}".strip()) for name in names], dtype=torch.int64, device="cpu")
    first = torch.arange(1, before + 1, device="cpu").expand(len(names), -1)
    last = (before + 1 + spans)[:, None] + torch.arange(length - before, device="cpu")
    return Wording(ids, torch.cat([first, last], dim=1))


def tokenized(side: TextSide, texts: Sequence[str], names: Sequence[str]) -> Tensor:
    """Return ids (n, 77) of texts, each about the class of the same place among `names`.

    Raises:
        DataError: when a name is no word for the tokenizer, or makes a text too long.
    """
    ids = ids_of(side, texts)
    for name in dict.fromkeys(names):
        if len_of(side, name) == 0:
            raise DataError(f"the tokenizer finds no word in the class name {printable(name)!r}; rename it")
    for row, name in zip(ids, names, strict=True):
        if row.argmax() == len(row) - 1:
            raise DataError(
                f"the text about class {printable(name)!r} is too long: a text tower reads {len(row)} tokens, the two "
                "that frame it included; shorten the name, or say what it is with names={...}"
            )
    return ids


def len_of(side: TextSide, text: str) -> int:
    """Return how many tokens a text has, without those that frame it."""
    return int(ids_of(side, [text])[0].argmax()) - 1


def check_room(side: TextSide, length: int, said: str) -> None:
    """Make sure that a text has room for a context of `length` words and the shortest name.

    Args:
        said: how somebody asked for so many words.

    Raises:
        ConfigError: when it has not.
    """
    rows = ids_of(side, [PLACEHOLDER]).shape[1]
    if length > rows - 4:  # start, name, full stop, end
        raise ConfigError(
            f"a text has {rows} tokens, so that {rows - 4} of them can be learned words; got {said}: take fewer"
        )


def ids_of(side: TextSide, texts: Sequence[str]) -> Tensor:
    """Return token ids (n, 77), int64, on the CPU."""
    with torch.device("cpu"):  # they are numbers to look at, also where a model is built without memory
        return side.tokenizer(list(texts))


def encoded(
    tower: TextTower, wording: Wording, contexts: Tensor, *, deep: Sequence[Tensor] = (), share: bool = True
) -> Tensor:
    """Return features (G, C, F), float32, of C texts with each of G contexts.

    Where all texts begin alike, what they share is computed once for each context; features and gradients stay the
    same.

    Args:
        contexts: (G, n, W) for all classes, or (G, C, n, W), one for each.
        deep: (n, W) or (G, n, W) each. Take the place of the context on entry to block 1, 2 and so on.
        share: False computes every text whole.
    """
    if not torch.is_grad_enabled() and len(contexts) > 1 and len(contexts) * len(wording.ids) > TOGETHER:
        classes = len(wording.ids)
        count = max(1, TOGETHER // classes)
        parts = range(0, len(contexts), count)
        texts = [classes * min(count, len(contexts) - i) for i in parts]
        return torch.cat(
            [
                encoded(
                    tower,
                    wording,
                    contexts[i : i + count],
                    deep=[part if part.ndim == 2 else part[i : i + count] for part in deep],
                    share=share,
                )
                for i in along(parts, texts)
            ]
        )
    ids, rows = wording.ids.to(contexts.device), wording.rows
    patterns, which = rows.unique(dim=0, return_inverse=True)
    if contexts.ndim == 3 and len(patterns) == 1 and share:
        return _shared(tower, ids, patterns[0], contexts, deep)
    found: list[tuple[Tensor, Tensor]] = []
    for number, pattern in enumerate(patterns):
        members = (which == number).nonzero().flatten()
        mine = contexts[:, members] if contexts.ndim == 4 else contexts[:, None].expand(-1, len(members), -1, -1)
        found.append((members, _whole(tower, ids[members], pattern, mine, deep)))
    order = torch.cat([members for members, _ in found]).argsort()
    return torch.cat([features for _, features in found], dim=1)[:, order]


def _shared(tower: TextTower, ids: Tensor, rows: Tensor, contexts: Tensor, deep: Sequence[Tensor]) -> Tensor:
    """Encode texts that have one context in the same rows: their common opening once for each context."""
    groups, classes = len(contexts), len(ids)
    alike = (ids == ids[:1]).all(0).cumprod(0).sum()
    opening = int(torch.minimum(alike, ids.argmax(1).min()))  # a text is left with one row of its own at least
    if opening <= int(rows[-1]):
        return _whole(tower, ids, rows, contexts[:, None].expand(-1, classes, -1, -1), deep)
    slots = slice(int(rows[0]), int(rows[-1]) + 1)
    inside = _filled(tower, ids[:1], rows, slots, contexts[:, None])
    seen = SharedPrefix()
    slotted = tower.with_slots(slots)
    slotted.opening(opening)(ids[:1].expand(groups, -1), _entering(inside.flatten(0, 1), deep, 1), seen.record)
    return slotted.tail(opening)(ids.repeat(groups, 1), seen).features.unflatten(0, (groups, classes))


def _whole(tower: TextTower, ids: Tensor, rows: Tensor, contexts: Tensor, deep: Sequence[Tensor]) -> Tensor:
    """Encode texts whose contexts (G, C, n, W) stand in the same rows."""
    groups, classes = contexts.shape[:2]
    slots = slice(int(rows[0]), int(rows[-1]) + 1)
    inside = _filled(tower, ids, rows, slots, contexts)
    features = tower.with_slots(slots)(ids.repeat(groups, 1), _entering(inside.flatten(0, 1), deep, classes)).features
    return features.unflatten(0, (groups, classes))


def _filled(tower: TextTower, ids: Tensor, rows: Tensor, slots: slice, contexts: Tensor) -> Tensor:
    """Return what enters the slots: contexts (G, C, n, W), and between them the words that stand there."""
    entering = tower.words(ids[:, slots]).expand(len(contexts), -1, -1, -1)
    places = (rows - slots.start).to(entering.device)[:, None].expand(*contexts.shape[:2], -1, entering.shape[-1])
    return entering.scatter(2, places, contexts.to(entering.dtype)) + tower.position(slots)


def _entering(tokens: Tensor, deep: Sequence[Tensor], each: int) -> Scripted:
    """Return a pass whose slots hold `tokens` on entry to block 0 and `deep` ones on entry to the next blocks.

    Args:
        tokens: (B, M, W).
        each: of deep prompts that differ between groups, how many texts one group has.
    """

    def at(layer: int, frozen: Tensor, carried: Tensor | None) -> Splice | None:
        if layer == 0:
            return Splice(tokens=tokens)
        if layer <= len(deep):
            rows = deep[layer - 1]
            rows = rows.expand(len(tokens), -1, -1) if rows.ndim == 2 else rows.repeat_interleave(each, dim=0)
            return Splice(tokens=rows)
        return None

    return Scripted(at)
