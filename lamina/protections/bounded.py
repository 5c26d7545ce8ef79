"""A null space as wide as a measured bound on the drift of old features allows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lamina.backbones.tower import Tower
from lamina.errors import ShapeError
from lamina.lookback import Reduce
from lamina.model import Batch, PromptedModel
from lamina.prompts.deep import DeepPrompts
from lamina.protections.null_space import NullSpace
from lamina.protections.projector import Blend
from lamina.protections.spectrum import Cut

#: shares of the second moments that may be given away, loosest first: 0.5, 0.2, 0.1, ... 1e-6, and nothing at all
_LOST = (*(float(f"{digit}e-{power}") for power in range(1, 7) for digit in (5, 2, 1)), 0.0)


class BoundedNullSpace(NullSpace):
    """Chooses which directions are free by trying, after each task, what the next one might do to old features.

    The tail of a spectrum says which directions matter least, not how much they matter. So the move that the
    first task made of the prompts, when nothing held it, stands for what a task wants. It is projected with looser
    and tighter cuts, and added to the prompts, to find the loosest under which the features of some images of the
    finished task drift no further than the bound. The projectors are not normalised. It is a measurement on images
    of the last task and on one move, so later drift may be larger or smaller, and images of earlier tasks
    answer for themselves through the sums alone.

    Args:
        max_drift: how far features may move, root mean square, as a share of their spread: the root mean
            squared distance from their mean.

    Attributes:
        start: what the prompts were when they were made, by block; empty once the first task is over.
        wish: the move (M, D) that the first task made, by block.
        drift: of the cut that was chosen, as measured; 0 while there is none.
    """

    measures = 100

    def __init__(self, tower: Tower, prompts: DeepPrompts, *, max_drift: float) -> None:
        blend = Blend(normalize=False)
        super().__init__(tower, prompts, cut=None, channels=blend, tokens=blend)
        self.max_drift, self.drift = max_drift, 0.0
        self.start = {i: prompts.value(i).detach().clone() for i in prompts.layers}
        self.wish: dict[int, Tensor] = {}

    @torch.no_grad()
    def measure(self, model: PromptedModel, batches: Sequence[Batch], reduce: Reduce) -> None:
        """Choose the loosest cut under which the wish moves features no further than allowed; none if there is none.

        Args:
            batches: this process's share of some images of the finished task.
        """
        here = {i: self.prompts.value(i).detach().clone() for i in self.prompts.layers}
        if self.start:
            moves = {i: here[i] - start.to(here[i]) for i, start in self.start.items()}
            # Nothing is trained on a task of a single class; then a move as long as the prompts has to stand in.
            self.wish = moves if any(bool(move.any()) for move in moves.values()) else here
            self.start = {}
        rest = _features(model, batches)
        count = reduce(torch.tensor(float(len(rest)), dtype=torch.float64)).clamp_min(1)
        mean = reduce(rest.sum(0)) / count
        spread = (reduce((rest - mean).square().sum()) / count).sqrt()
        spectra = {i: self.spectra(i) for i in self.queries}
        drifts: dict[float, float] = {}
        self.cut, self.drift = None, 0.0

        def within(lost: float) -> bool:
            cut = Cut(knee="energy", kept=1 - lost)
            for i, value in here.items():
                self.prompts.value(i).copy_(value + self.projection(i, spectra[i], cut)(self.wish[i]))
            moved = (reduce((_features(model, batches) - rest).square().sum()) / count).sqrt()
            drifts[lost] = float(moved / spread.clamp_min(torch.finfo().tiny))
            return drifts[lost] <= self.max_drift

        try:  # the loosest is often tight enough; else, as tighter cuts move less, the one sought is found by halving
            loosest = 0 if within(_LOST[0]) else bisect_left(_LOST, True, lo=1, key=within)
        finally:
            for i, value in here.items():
                self.prompts.value(i).copy_(value)
        if loosest < len(_LOST):
            lost = _LOST[loosest]
            self.cut, self.drift = Cut(knee="energy", kept=1 - lost), drifts[lost]

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "start": dict(self.start), "wish": dict(self.wish), "drift": self.drift}
        return state if self.cut is None else state | {"kept": self.cut.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if not {"start", "wish", "drift"} <= state.keys():
            raise ShapeError("what is remembered does not say how far the first task moved; let `kept` stay as it was")
        for name in ("start", "wish"):
            moves = state[name]
            if moves and sorted(moves) != sorted(self.prompts.layers):
                raise ShapeError(f"{name} must be there for blocks {list(self.prompts.layers)}; got {sorted(moves)}")
            for i, value in moves.items():
                if value.shape != self.prompts.value(i).shape:
                    wanted = tuple(self.prompts.value(i).shape)
                    raise ShapeError(f"{name} of block {i} must have shape {wanted}; got {tuple(value.shape)}")
            setattr(self, name, {i: value.to(self.prompts.value(i)) for i, value in moves.items()})
        self.cut = Cut(knee="energy", kept=state["kept"]) if "kept" in state else None
        self.drift = state["drift"]


def _features(model: PromptedModel, batches: Sequence[Batch]) -> Tensor:
    """Return the features (n, F), float64, of all batches."""
    empty = torch.zeros(0, model.width, dtype=torch.float64, device=next(model.tower.parameters()).device)
    return torch.cat([empty, *(model.features(batch)[0].double() for batch in batches)])
