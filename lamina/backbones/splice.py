"""What prompts may ask of a block, what a block shows of itself, and what comes out of a tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


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
        branch: of (x, y), both (B, n, D), what is added to the sequence x in place of y, the output of the block's
            MLP; for adapters.
    """

    tokens: Tensor | None = None
    context: Tensor | None = None
    context_normed: bool = False
    prefix: tuple[Tensor, Tensor] | None = None
    temperature: Tensor | None = None
    frozen_only: bool = False
    branch: Callable[[Tensor, Tensor], Tensor] | None = None


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
        attention: (B, H, N, K). All weights from the frozen sequence, whose own rows come first.
        entering: (B, M, D). The prompt tokens that the block sees, those in slots first, then the context.
        normed: how many of these, the last ones, live in the space behind the block's first norm.
    """

    layer: int
    inputs: Tensor
    queries: Tensor
    to_prompts: Tensor
    key_weight: Tensor | None
    chosen: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    attention: Tensor | None = None
    entering: Tensor | None = None
    normed: int = 0


Tap = Callable[[Probe], None]


@dataclass(frozen=True)
class Encoded:
    """What comes out of a tower.

    Attributes:
        features: (B, F), float32; float64 if the tower computes in it.
        tokens: (B, N, D) after the last block, or None when only the features were asked for.
        prompts: (B, M, D). What became of the prompt slots, after the final norm; None without slots.
        after: (B, N, D) each. The frozen sequence as the blocks that were asked for leave it, in the order asked.
    """

    features: Tensor
    tokens: Tensor | None = None
    prompts: Tensor | None = None
    after: tuple[Tensor, ...] = ()


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
