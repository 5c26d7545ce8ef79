"""Texts that begin alike, written as trees: a beginning that several share is a branch that each of them grows from.

Under a causal mask a row depends on those before it in its text alone. So texts may stand in one sequence, each
beginning once, if every row sees the rows that it grows from and no others: features and gradients stay the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lamina.backbones.clip_text import TextTower
from lamina.prompts.contexts import TOGETHER, Wording

#: rows that a sequence takes up: in long ones each row has more to pass over, in short ones beginnings come again
ROWS = 192


class Forest(NamedTuple):
    """Trees of texts in K sequences of N rows, on the CPU; R is the largest number of texts in one of them.

    Attributes:
        symbols: (K, N), what stands in a row. 0 behind the last one.
        places: (K, N), which row of a text that is.
        sees: (K, N, N), what each row looks at.
        ends: (K, R), where texts end.
        texts: (n,) and (n,), in which sequence and which of its `ends` each text ends.
    """

    symbols: Tensor
    places: Tensor
    sees: Tensor
    ends: Tensor
    texts: tuple[Tensor, Tensor]


def grown(texts: Tensor, rows: int) -> Forest:
    """Write different texts (n, T), whole numbers and -1 behind their end, sorted, as trees.

    Args:
        rows: how many a sequence takes up, if it is more than one text.

    >>> forest = grown(torch.tensor([[7, 1, 2], [7, 1, 3], [7, 4, -1]]), 9)
    >>> forest.symbols.tolist(), forest.places.tolist(), forest.ends.tolist()
    ([[7, 1, 2, 3, 4]], [[0, 1, 2, 2, 1]], [[2, 3, 4]])
    >>> forest.sees[0, 3].tolist()
    [True, True, False, True, False]
    """
    lengths = (texts >= 0).sum(1)
    alike = torch.cat([lengths.new_zeros(1), (texts[1:] == texts[:-1]).cumprod(1).sum(1)])
    first = _firsts(lengths.tolist(), alike.tolist(), rows)
    alike[first] = 0
    row = torch.arange(texts.shape[1], device="cpu")
    own = (row >= alike[:, None]) & (row < lengths[:, None])  # rows that no text before has written
    number = own.flatten().cumsum(0).view_as(own) - 1
    sequence = torch.zeros_like(lengths).index_fill_(0, first, 1).cumsum(0) - 1  # of each text
    start = number[first, 0]
    path = torch.where(own, number, -1).cummax(0).values - start[sequence][:, None]  # (n, T), rows of each text
    text, place = own.nonzero(as_tuple=True)
    at = sequence[text], path[text, place]
    size = int(at[1].max()) + 1
    symbols, places = torch.zeros(2, len(first), size, dtype=torch.int64, device="cpu")
    symbols[at], places[at] = texts[text, place], place
    sees = torch.eye(size, dtype=torch.bool, device="cpu").repeat(len(first), 1, 1)
    below, above = (row <= place[:, None]).nonzero(as_tuple=True)
    sees[at[0][below], at[1][below], path[text[below], above]] = True
    which = torch.arange(len(texts), device="cpu") - first[sequence]
    ends = torch.zeros(len(first), int(which.max()) + 1, dtype=torch.int64, device="cpu")
    ends[sequence, which] = path.gather(1, lengths[:, None] - 1)[:, 0]
    return Forest(symbols, places, sees, ends, (sequence, which))


def _firsts(lengths: list[int], alike: list[int], rows: int) -> Tensor:
    """Return which texts begin a new sequence."""
    first, taken = [], rows
    for text, (length, shared) in enumerate(zip(lengths, alike, strict=True)):
        taken += length - shared
        if taken > rows:
            first.append(text)
            taken = length
    return torch.tensor(first, device="cpu")


def branched(tower: TextTower, wording: Wording, prompts: Tensor, chosen: Tensor) -> Tensor:
    """Return features (G, C, F), float32, of C texts with each of G choices of prompts, one after the other.

    What `encoded` says of the contexts `prompts[chosen]`; choices that begin with the same prompts share them.

    Args:
        prompts: (P, n, W).
        chosen: (G, k), whole numbers; k * n are the words that the texts have room for.
    """
    ids, rows, words = wording.ids, wording.rows, tower.table.num_embeddings  # from there on symbols are learned
    own = words + (chosen.cpu()[..., None] * prompts.shape[1] + torch.arange(prompts.shape[1], device="cpu")).flatten(1)
    groups, classes = len(chosen), len(ids)
    said = ids.masked_fill(torch.arange(ids.shape[1], device="cpu") > ids.argmax(1)[:, None], -1)
    said = said.expand(groups, -1, -1).scatter(2, rows.expand(groups, -1, -1), own[:, None].expand(-1, classes, -1))
    texts, which = said.flatten(0, 1).unique(dim=0, return_inverse=True)
    forest = grown(texts, ROWS)
    few = len(forest.symbols) if torch.is_grad_enabled() else max(1, TOGETHER // forest.ends.shape[1])
    parts = [
        _read(tower, prompts, words, *part)
        for part in zip(*(x.split(few) for x in (forest.symbols, forest.places, forest.sees, forest.ends)), strict=True)
    ]
    return torch.cat(parts)[forest.texts][which.to(prompts.device)].unflatten(0, (groups, classes))


def _read(
    tower: TextTower, prompts: Tensor, words: int, symbols: Tensor, places: Tensor, sees: Tensor, ends: Tensor
) -> Tensor:
    """Return the features (K, R, F) of the texts of some sequences; see `Forest`."""
    symbols, places, sees, ends = (x.to(prompts.device) for x in (symbols, places, sees, ends))
    fixed = tower.words(symbols.clamp(max=words - 1))
    learned = prompts.flatten(0, 1)[(symbols - words).clamp(min=0)].to(fixed.dtype)
    rows = torch.where((symbols < words)[..., None], fixed, learned)
    rows = rows + tower.position(slice(0, tower.length))[places]
    return tower.tree(sees, ends)(rows).features
