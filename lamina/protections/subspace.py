"""Steps out of the subspace that old features lie in (PGP)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lamina.backbones.splice import Probe
from lamina.errors import ShapeError
from lamina.lookback import Reduce
from lamina.protections.base import Protection, Room
from lamina.protections.projection import Projection, projected_gradients, projected_steps
from lamina.protections.projector import Spectrum
from lamina.protections.spectrum import Cut

#: of what second moments are kept: a block's tokens; its queries, each head's apart; the frozen tower's features
Features = Literal["tokens", "heads", "frozen"]
#: from the map (D, D) of a step at each block to the right factor of each parameter that is held
Hold = Callable[[Mapping[int, Tensor]], Mapping[nn.Parameter, Tensor]]
Apply = Literal["step", "gradient"]


class Subspace(Protection):
    """Keeps parameters (..., D) from moving along directions that old features use.

    An old feature x has the same product with a parameter p after a step dp if `x dpᵀ = 0`. After each task two
    things are kept for each block: the sum of `xᵀx` over all old features, and a basis of used directions. The
    basis grows by the leading directions of what the task's own sum leaves outside of it, until it holds a
    share of that sum; so it holds that share of every task's sum, whatever came before or after. Later steps are
    multiplied by I - U Uᵀ.

    Rows of prompts themselves may join the features at the end of each task. Second moments are added, never
    the rows: only so is a direction that the sum does not use one that neither of the two uses.

    Args:
        layers: the blocks whose features count. Frozen features are of no block; they go by the one number given.
        hold: which parameters are held by the maps of which blocks; asked when an optimizer is to be guarded.
        features: what is seen of a block. By heads, maps are block-diagonal.
        width: D.
        heads: H; 1 unless features come by heads.
        share: of a task's sum that the used directions must hold; 0 holds nothing back.
        apply: project what the optimizer made of the gradient, or the gradient; after Adam the latter holds nothing
            exactly, and weight decay is not projected. For comparison.
        own: rows (..., D) of prompts by block, of which old prompts' sums are made.
        what: what `room` calls the directions.
        scale: (D,), what a norm between parameters and tokens multiplies channels by. Tokens are multiplied by it, and
            so are rows of `own`; then a step before the norm is what old tokens do not see, as long as the norm goes on
            dividing by what it did.

    References:
        Qiao et al., Prompt Gradient Projection for Continual Learning, ICLR 2024: the two conditions. Saha et al.,
        Gradient Projection Memory for Continual Learning, ICLR 2021: bases that grow.
    """

    def __init__(
        self,
        layers: Sequence[int],
        hold: Hold,
        *,
        features: Features,
        width: int,
        share: float,
        heads: int = 1,
        apply: Apply = "step",
        own: Callable[[], Mapping[int, Tensor]] | None = None,
        what: str = "channels",
        scale: Tensor | None = None,
    ) -> None:
        self.scale = scale
        self.layers, self.hold, self.features = list(layers), hold, features
        self.shape = (heads, width // heads, width // heads)
        self.share, self.apply, self.own, self.what = share, apply, own, what
        self.looks_at = "queries" if features == "frozen" else "probes"
        self.moments: dict[int, Tensor] = {}  # (H, d, d), float64
        self.used: dict[int, list[Tensor]] = {}  # for each head (d, r), float64, orthonormal columns
        self.begin_look()

    def guard(self, optimizer: Optimizer) -> AbstractContextManager[Any]:
        guarded = projected_steps if self.apply == "step" else projected_gradients
        return guarded(optimizer, self.projections())

    def projections(self) -> dict[nn.Parameter, Projection]:
        """Return the projection of each parameter held; empty while no direction is used."""
        if not any(basis.shape[1] for bases in self.used.values() for basis in bases):
            return {}
        maps = {i: torch.block_diag(*(_outside(basis) for basis in bases)) for i, bases in self.used.items()}
        return {p: Projection(right=right.to(p)) for p, right in self.hold(maps).items()}

    def room(self) -> list[Room]:
        out = []
        for i, moment in self.moments.items():
            inside = sum(((U.mT @ part) * U.mT).sum() for U, part in zip(self.used[i], moment, strict=True))
            total = moment.diagonal(dim1=-2, dim2=-1).sum().clamp_min(torch.finfo().tiny)
            used, size = sum(U.shape[1] for U in self.used[i]), self.shape[0] * self.shape[1]
            out.append(Room(layer=i, what=self.what, used=used, size=size, kept=float((inside / total).clamp(0, 1))))
        return out

    def begin_look(self) -> None:
        self._draft: dict[int, Tensor] = {}

    def see(self, probe: Probe) -> None:
        if self.features != "frozen" and probe.layer in self.layers:
            rows = probe.inputs[:, None] if self.features == "tokens" else probe.queries  # (B, H, N, d)
            self._add(probe.layer, self._scaled(rows.transpose(0, 1).flatten(1, 2)))

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows if self.scale is None else rows * self.scale.to(rows)

    def collect(self, features: Tensor, columns: Tensor) -> None:
        if self.features == "frozen":
            self._add(self.layers[0], features[None])

    def _add(self, layer: int, rows: Tensor) -> None:
        """Add the second moments of rows (H, R, d)."""
        self._draft[layer] = self._draft.get(layer, 0) + second_moment(rows)

    @torch.no_grad()
    def end_look(self, reduce: Reduce) -> None:
        own = self.own() if self.own is not None else {}
        for i, draft in self._draft.items():
            moment = reduce(draft)
            if i in own:  # the same in every process, so it is added once they have shared theirs
                moment = moment + second_moment(self._scaled(own[i].reshape(1, -1, self.shape[-1])))
            moment = (moment + moment.mT) / 2  # exactly symmetric: half of it is all that a file must hold
            old = self.moments.get(i, torch.zeros(self.shape, dtype=moment.dtype))
            self.moments[i] = old.to(moment) + moment  # what was read from a file may be on another device
            bases = self.used.get(i) or [moment.new_empty(self.shape[1], 0)] * self.shape[0]
            self.used[i] = [grown(U.to(moment), part, self.share) for U, part in zip(bases, moment, strict=True)]
        self._draft = {}

    def state_dict(self) -> dict[str, Any]:
        return {"moments": dict(self.moments), "used": {i: list(bases) for i, bases in self.used.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        heads, size, _ = self.shape
        for name in ("moments", "used"):
            if state[name] and sorted(state[name]) != sorted(self.layers):
                raise ShapeError(f"{name} must be there for blocks {sorted(self.layers)}; got {sorted(state[name])}")
        if state["moments"].keys() != state["used"].keys():
            raise ShapeError("moments and used must be there for the same blocks; one of them is missing")
        for i, moment in state["moments"].items():
            if moment.shape != self.shape:
                raise ShapeError(f"moments of block {i} must have shape {self.shape}; got {tuple(moment.shape)}")
        for i, bases in state["used"].items():
            shapes = [tuple(basis.shape) for basis in bases]
            if len(shapes) != heads or any(len(s) != 2 or s[0] != size or s[1] > size for s in shapes):
                raise ShapeError(
                    f"used of block {i} must hold {heads} of shape ({size}, r) with r at most {size}; got {shapes}"
                )
        self.moments = dict(state["moments"])
        self.used = {i: list(bases) for i, bases in state["used"].items()}


def grown(used: Tensor, moment: Tensor, share: float) -> Tensor:
    """Add to a basis the fewest directions with which it holds a share of a second moment.

    Args:
        used: (n, r), orthonormal columns.
        moment: (n, n), symmetric, without negative eigenvalues.
        share: in [0, 1] of its trace. 1 adds all directions of the moment that are not zero up to rounding.

    Returns:
        (n, r') with r <= r' <= n, float64, the columns of `used` in front.

    >>> grown(torch.empty(3, 0), torch.diag(torch.tensor([1.0, 6.0, 3.0])), 0.8).abs().round()
    tensor([[0., 0.],
            [1., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    used, moment = used.double(), moment.double()
    size, rank = used.shape
    outside = torch.linalg.qr(used, mode="complete").Q[:, rank:]  # (n, n - r)
    rest = outside.mT @ moment @ outside
    left, total = float(rest.trace()), float(moment.trace())
    lost = max(1 - share, size * torch.finfo(torch.float64).eps) * total
    if left <= lost:
        return used
    spectrum = Spectrum.of((rest + rest.mT) / 2)
    free = spectrum.free(Cut(knee="energy", kept=1 - lost / left)).shape[1]
    return torch.cat([used, outside @ spectrum.basis[:, free:].flip(1)], dim=1)


def second_moment(rows: Tensor) -> Tensor:
    """Return the sum of the outer products of rows (..., R, d): (..., d, d), float64."""
    rows = rows.detach().double()
    return rows.mT @ rows


def keys_alone(maps: Sequence[Tensor]) -> Tensor:
    """Return the right factor (blocks, 2, D, D) of prefixes (blocks, 2, M, D): rows for values move as they like."""
    keys = torch.stack(list(maps))
    return torch.stack([keys, torch.eye(keys.shape[-1]).to(keys).expand_as(keys)], dim=1)


def _outside(basis: Tensor) -> Tensor:
    """Return the projector (n, n) out of the span of orthonormal columns (n, r)."""
    return torch.eye(len(basis)).to(basis) - basis @ basis.mT
