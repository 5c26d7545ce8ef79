"""What a model looks at: maps over the patches of one image, block by block.

Two questions to every block: how like are the prompt tokens that enter it and the patches that enter with them, and
what does the class token attend to? A tap asks for weights, so attention is computed as an explicit softmax; it is the
one that the model uses, up to rounding (tested).

References:
    The LSPT paper shows maps of both kinds; what it leaves open is decided in docs/explain.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.backbones.block import BlockView
from lamina.backbones.splice import Probe
from lamina.backbones.tower import Grid
from lamina.errors import ShapeError
from lamina.model import Batch, PromptedModel


@dataclass(frozen=True, eq=False)
class Maps:
    """What the blocks do with one image; all on the CPU, float32.

    Attributes:
        attention: (L, height, width). Attention weights to patches, averaged over heads, as they are: they do not sum
            to 1, since class token and prompts get some, too.
        on_prompts: (L,). The weights that all prompts get together; 0 in a block without any.
        cosine: (L, height, width). Cosines of patches to prompt tokens, averaged over these; NaN in a block that no
            token enters.
        each: for each block (M, height, width), the same token by token; M is 0 in a block that no token enters.
        prefixes: for each block, how many prompts are rows of keys and values, without a token.
        behind_norm: for each block, how many of its tokens enter behind its first norm, and so are compared there.
    """

    attention: Tensor
    on_prompts: Tensor
    cosine: Tensor
    each: Sequence[Tensor]
    prefixes: Sequence[int]
    behind_norm: Sequence[int]

    @property
    def tokens(self) -> list[int]:
        """How many prompt tokens enter each block."""
        return [len(own) for own in self.each]


def whose_attention(model: PromptedModel) -> str:
    """Say whose attention the maps show: of the rows that features are read from, or else of all patches."""
    return "the class token" if model.tower.readout is not None else "the patches, averaged"


def look(model: PromptedModel, images: Tensor, *, post_norm: bool = False) -> tuple[Maps, Tensor]:
    """Return maps of one image (1, 3, height, width), and the features (1, F) that the head reads of it.

    Args:
        post_norm: compare tokens behind the block's first norm, not on entry.

    Raises:
        ShapeError: when the tower's patches are not a grid of rows behind others.
    """
    tower, seen = model.tower, list[_Block]()
    grid, blocks = tower.grid(images), tower.blocks()

    def tap(probe: Probe) -> None:
        seen.append(_Block.of(probe, blocks[probe.layer], grid, tower.readout, post_norm=post_norm))

    model.eval()
    with torch.inference_mode():
        features, _ = model.features(Batch(images), tap=tap)
    found = Maps(
        attention=torch.stack([block.attention for block in seen]),
        on_prompts=torch.stack([block.on_prompts for block in seen]),
        cosine=torch.stack([block.each.mean(0) for block in seen]),  # the mean of nothing is NaN
        each=[block.each for block in seen],
        prefixes=[block.prefixes for block in seen],
        behind_norm=[block.behind_norm for block in seen],
    )
    return found, features


@dataclass(frozen=True, eq=False)
class _Block:
    """The part of `Maps` that one block has: (height, width), (), (M, height, width)."""

    attention: Tensor
    on_prompts: Tensor
    each: Tensor
    prefixes: int
    behind_norm: int

    @classmethod
    def of(cls, probe: Probe, block: BlockView, grid: Grid, rows: slice | None, *, post_norm: bool) -> _Block:
        """Reduce what a probe tells of the only image in it."""
        assert probe.attention is not None and probe.entering is not None
        own, end = probe.inputs.shape[1], grid.before + grid.height * grid.width
        if own != end:
            raise ShapeError(
                f"{grid.height} x {grid.width} patches behind {grid.before} rows are a sequence of {end}; got {own}"
            )
        patches, shape = slice(grid.before, end), (grid.height, grid.width)
        weights = probe.attention[0].double().mean(0)[patches if rows is None else rows].mean(0)  # (K,)
        each = _cosines(probe, block, patches, post_norm)
        return cls(
            attention=weights[patches].view(shape).float().cpu(),
            on_prompts=weights[own:].sum().float().cpu(),
            each=each.unflatten(1, shape).float().cpu(),
            prefixes=weights.shape[0] - own - len(each),
            behind_norm=probe.normed,
        )


def _cosines(probe: Probe, block: BlockView, patches: slice, post_norm: bool) -> Tensor:
    """Return the cosines (M, patches) of the prompt tokens that enter a block and the patches that enter it.

    Those that live in the space behind the first norm can be compared there alone.
    """
    assert probe.entering is not None
    tokens, inputs = probe.entering[0], probe.inputs[0, patches]
    cut = len(tokens) - probe.normed
    first, behind = tokens[:cut], block.norm(inputs)
    own = cosines(block.norm(first), behind) if post_norm else cosines(first, inputs)
    return torch.cat([own, cosines(tokens[cut:], behind)])


def cosines(tokens: Tensor, patches: Tensor) -> Tensor:
    """Return the cosines (M, N) of tokens (M, D) and patches (N, D), float64, in [-1, 1].

    >>> cosines(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])).tolist()
    [[1.0, 0.0, -1.0]]
    """
    return (F.normalize(tokens.double(), dim=-1) @ F.normalize(patches.double(), dim=-1).mT).clamp(-1, 1)
