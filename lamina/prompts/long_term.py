"""Prompts that remember, over depth, what blocks made of them and what patches looked like (LSPT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.splice import PromptPass, Splice
from lamina.backbones.tower import Tower
from lamina.errors import UnsupportedBackbone
from lamina.prompts.deep import DropoutMode, LearnedTokens, ending
from lamina.prompts.recurrent import Carrier, Carry, Chain, carrier_of
from lamina.prompts.spatial import Coding, check_clusters, coded


class LongTermPrompts(LearnedTokens):
    """A set of prompt tokens for each block, brought together with what became of the prompts before.

    The first set enters block 0 as it is. Behind every block but the last, what the block made of the prompts, plus
    what is told of its patches, is the hidden state of a carrier, the next set its input; what comes out enters the
    next block. Without a carrier the next set enters, plus what is told of the patches; with neither these are deep
    prompts, bit for bit, under the same names. Where nobody needs what a block made of prompts, they do not travel.

    Args:
        depth: L of the tower.
        length: M.
        width: D of the tower.
        heads: H, of a transformer that carries.
        first_patch: the row of the sequence at which patches begin; those before are not told of.
        carry: what carries prompts over depth.
        carriers: layers of an LSTM.
        shared: one carrier behind all blocks; otherwise each has its own.
        spatial: what is told of patches.
        forget_bias: of an LSTM; None leaves it as it is drawn.
        hidden_norm: normalise the hidden state, without weights, before it is carried.
        tie_first: the first two blocks share a set, so there are L - 1.
        learn_cell: cell states start at learned numbers, which start at 0; otherwise at 0.
        frozen_after_first: nothing of this is learned after the first task.
        hears: the hidden state holds what the block made of the prompts; otherwise only what is told of its patches,
            and prompts do not travel. That is a control: as many numbers are learned, and nothing of prompts is kept.
        bound, dropout, dropout_mode: as of `LearnedTokens`; what a carrier hands on is not dropped.

    References:
        Mo et al., LSPT: Long-term Spatial Prompt Tuning for Visual Representation Learning, 2024, section 3. Which set
        is the first, that cells start at 0, what each part does without the other, and the control are ours.
    """

    def __init__(
        self,
        depth: int,
        length: int,
        width: int,
        *,
        heads: int = 1,
        first_patch: int = 1,
        carry: Carry = "lstm",
        carriers: int = 1,
        shared: bool = True,
        spatial: Coding = "mean",
        forget_bias: float | None = None,
        hidden_norm: bool = False,
        tie_first: bool = False,
        learn_cell: bool = False,
        frozen_after_first: bool = False,
        hears: bool = True,
        bound: float = 1.0,
        dropout: float = 0.0,
        dropout_mode: DropoutMode = "per_sample",
    ) -> None:
        tied = tie_first and depth > 1
        super().__init__(
            range(1 if tied else 0, depth), length, width, bound=bound, dropout=dropout, dropout_mode=dropout_mode
        )
        self.depth, self.first_patch, self.spatial = depth, first_patch, spatial
        self.hidden_norm, self.frozen_after_first, self.hears = hidden_norm, frozen_after_first, hears
        count = 0 if carry == "none" else 1 if shared else depth - 1
        self.carriers = nn.ModuleList(
            [carrier_of(carry, width, heads, layers=carriers, forget_bias=forget_bias) for _ in range(count)]
        )
        carrier = self.carrier(1)
        cells = carrier.cells if carrier is not None else 0
        self.first_cells = nn.Parameter(torch.zeros(cells, length, width)) if learn_cell and cells else None

    @classmethod
    def behind(cls, tower: Tower, length: int, **options: Any) -> LongTermPrompts:
        """Return prompts for a tower.

        Raises:
            UnsupportedBackbone: when they are to be told of patches, and the tower has none.
            ConfigError: when there are to be more clusters than patches.
        """
        if tower.first_patch is None and options.get("spatial", "mean") != "none":
            raise UnsupportedBackbone(
                f"prompts are told of patches, and a {type(tower).__name__} has none: take an image tower, or "
                "spatial='none'"
            )
        if options.get("spatial") == "kmeans" and tower.patch_count is not None:
            check_clusters(length, tower.patch_count)
        heads, first = tower.blocks()[0].heads, tower.first_patch or 0
        return cls(tower.depth, length, tower.width, heads=heads, first_patch=first, **options)

    @property
    def recurrent(self) -> list[nn.Parameter]:
        """What carries: parameters that may want a learning rate of their own."""
        return list(self.carriers.parameters())

    def carrier(self, layer: int) -> Carrier | None:
        """Return what carries prompts into block `layer`, which is not the first; None where nothing does."""
        if not len(self.carriers):
            return None
        found = self.carriers[0 if len(self.carriers) == 1 else layer - 1]
        assert isinstance(found, Carrier)
        return found

    def begin_task(self, index: int, columns: Sequence[int] = ()) -> None:
        if index and self.frozen_after_first:
            self.requires_grad_(False)

    def start(self, query: Tensor | None = None, task: int | None = None) -> PromptPass:
        return LongTermPass(self)


class LongTermPass(PromptPass):
    """One pass of prompts over depth.

    Attributes:
        cells: (B, M, D) each, of the last step; numbers that are the same for all images before the first.
        sets: of each block, (M, D), or (B, M, D) with a mask for each image.
        prepared: what each set but the first gives the carrier in front of its block.
    """

    def __init__(self, prompts: LongTermPrompts) -> None:
        super().__init__()
        self.prompts = prompts
        self.cells: tuple[Tensor, ...] | None = None
        self.sets: Sequence[Tensor] = ()
        self.prepared: Sequence[Tensor] = ()

    def at(self, layer: int, tokens: Tensor, carried: Tensor | None) -> Splice:
        prompts, batch = self.prompts, tokens.shape[0]
        if not self.sets:
            self.sets = [prompts.shown(max(place, prompts.layers[0]), batch) for place in range(prompts.depth)]
            self.chain = Chain(tokens.dtype)
            self.prepared = self._prepared(self.sets[1:])
        given = self.sets[layer]
        if not layer:
            travels = prompts.hears and prompts.carrier(1) is not None and prompts.depth > 1
            return Splice(tokens=given.expand(batch, -1, -1)) if travels else Splice(context=given)
        carrier = prompts.carrier(layer)
        if carrier is None:
            return Splice(context=given if prompts.spatial == "none" else given + self._told(tokens, given))
        if not prompts.hears:  # beside others prompts may travel all the same
            return Splice(context=self._step(carrier, layer, self._hidden(tokens, None, given)))
        assert carried is not None  # tokens travel wherever there is a carrier that hears of them
        entering = self._step(carrier, layer, self._hidden(tokens, carried, given))
        return Splice(tokens=entering) if layer < prompts.depth - 1 else ending(entering)

    def _told(self, tokens: Tensor, prompts: Tensor) -> Tensor:
        """Return what is told of the patches of a sequence (B, N, D), for prompts (M, D) or (B, M, D)."""
        before = self.prompts.first_patch
        patches = tokens.split([before, tokens.shape[1] - before], dim=1)[1]
        return coded(patches, prompts.expand(tokens.shape[0], -1, -1), self.prompts.spatial)

    def _hidden(self, tokens: Tensor, carried: Tensor | None, given: Tensor) -> Tensor:
        """Return the hidden state (B, M, D) behind a block, in the precision of what is learned.

        Args:
            carried: (B, M, D); None where nothing is heard of it.
            given: the set that comes next; tells clusters apart then.
        """
        heard = torch.zeros_like(given).expand(tokens.shape[0], -1, -1) if carried is None else carried
        hidden = heard.to(torch.promote_types(heard.dtype, torch.float32))
        if self.prompts.spatial != "none":
            hidden = hidden + self._told(tokens, given if carried is None else hidden)
        return F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) if self.prompts.hidden_norm else hidden

    def _prepared(self, sets: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return what sets of prompts give the carriers behind their blocks; a shared one gets all at once."""
        carriers = [self.prompts.carrier(layer) for layer in range(1, len(sets) + 1)]
        if len({*carriers}) == 1 and carriers[0] is not None:
            return carriers[0].prepared(torch.stack(list(sets)), self.chain).unbind(0)
        return [
            each if own is None else own.prepared(each, self.chain) for own, each in zip(carriers, sets, strict=True)
        ]

    def _step(self, carrier: Carrier, layer: int, hidden: Tensor) -> Tensor:
        if self.cells is None:
            first = self.prompts.first_cells
            empty = hidden.new_zeros(carrier.cells, *hidden.shape[1:])
            self.cells = tuple((empty if first is None else first).unbind(0))
        out, self.cells = carrier(self.prepared[layer - 1], hidden, self.cells, self.chain)
        return out
