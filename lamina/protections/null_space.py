"""Prompt steps in the null space of what old tasks' images look at (NSP²)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lamina.backbones.tower import Probe, Tower
from lamina.errors import ShapeError, UnsupportedBackbone
from lamina.lookback import Reduce
from lamina.prompts.base import PromptModule
from lamina.prompts.deep import DeepPrompts
from lamina.protections.base import Felt, Protection, Room
from lamina.protections.projection import Projection, projected_steps
from lamina.protections.spectrum import Knee, free_directions, nullity


class NullSpace(Protection):
    """Keeps a prompt's influence on old images: through the keys it offers and the values it adds.

    For old images with queries Q and attention S to the prompts, a step dP of the prompts changes
    nothing to first order when `Q Wk dPᵀ = 0` (keys) and `S dP = 0` (values). Two sums over images per
    block hold all that is needed of them:

    - `queries` (H, d, d), the Gram of each head's queries. With the frozen key weights it expands to
      the second moment (D, D) of the rows of `Q Wk`, which gives the projection on the right;
    - `attention` (M, M), the second moment of the rows of S: gives the projection on the left.

    `rows` counts them: images x heads x tokens.

    Args:
        tower: whose key weights expand the Grams.
        prompts: the prompts to protect.
        eta: 0 lets every step through, 1 projects it fully.
        knee: which rule says how many directions are free.

    References:
        Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024, section 4
        and algorithm 2.
    """

    looks_at = "probes"

    def __init__(self, tower: Tower, prompts: DeepPrompts, *, eta: float, knee: Knee) -> None:
        self.tower, self.prompts, self.eta, self.knee = tower, prompts, eta, knee
        self.queries: dict[int, Tensor] = {}
        self.attention: dict[int, Tensor] = {}
        self.rows = 0

    def guard(self, optimizer: Optimizer) -> AbstractContextManager[Any]:
        return projected_steps(optimizer, self.projections())

    def projections(self) -> dict[nn.Parameter, Projection]:
        """Return the projection of each protected prompt; empty before the first task is over."""
        return {
            self.prompts.value(i): Projection(
                left=self._blend(self.attention[i]).to(self.prompts.value(i)),
                right=self._blend(self.channels(i)).to(self.prompts.value(i)),
            )
            for i in self.queries
        }

    def channels(self, layer: int, queries: Tensor | None = None) -> Tensor:
        """Return the second moment (D, D), float64, of `Q Wk` over all old images at one block.

        Args:
            queries: (H, d, d), Grams of other images than the old ones.

        Raises:
            UnsupportedBackbone: when the block normalises its keys.
        """
        queries = self.queries[layer] if queries is None else queries
        weight = self.tower.blocks()[layer].key_weight
        if weight is None:
            raise UnsupportedBackbone(
                f"block {layer} normalises its keys, so no weight says what queries see of a prompt; a null space "
                "cannot protect prompts of this backbone. Take a method without it; see `lamina list methods`."
            )
        keys = weight.double().unflatten(0, (len(queries), -1)).to(queries.device)  # (H, d, D)
        return (keys.mT @ queries @ keys).sum(0)

    def _blend(self, second_moment: Tensor) -> Tensor:
        """Mix the projector on the free directions, at unit Frobenius norm, with the identity."""
        free = free_directions(second_moment, self.knee)
        identity = torch.eye(len(free), dtype=free.dtype, device=free.device)
        return self.eta * (free @ free.T) / free.shape[1] ** 0.5 + (1 - self.eta) * identity

    def room(self) -> list[Room]:
        return [
            Room(layer=i, what=what, used=len(values) - free, size=len(values), kept=float(values[free:].sum() / total))
            for i in self.queries
            for what, values in self._spectra(i)
            for free, total in [(nullity(values.flip(0), self.knee), values.sum().clamp_min(torch.finfo().tiny))]
        ]

    def _spectra(self, layer: int) -> list[tuple[str, Tensor]]:
        """Return the eigenvalues, in rising order, of what limits a step at one block."""
        sides = {"channels": self.channels(layer), "tokens": self.attention[layer].double()}
        return [(what, torch.linalg.eigvalsh(moment).clamp_min(0)) for what, moment in sides.items()]

    def felt(self, before: PromptModule, images: Mapping[str, Any]) -> list[Felt]:
        assert isinstance(before, DeepPrompts)  # what this protection was built for
        out, rows = [], max(images["rows"], 1)
        for i in images["queries"]:
            old, new = (_normalised(prompts.value(i)) for prompts in (before, self.prompts))
            queries, attention = images["queries"][i], images["attention"][i].double() / rows
            channels = self.channels(i, queries) / (rows * queries.shape[-1])  # of a logit, squared
            looked = attention.diagonal() * new.square().sum(-1)  # how much an image reads of each token
            move = new - old
            out.append(
                Felt(
                    layer=i,
                    step=float(move.norm()),
                    moved=float((move * (attention @ move)).sum() + ((move @ channels) * move).sum(-1) @ looked),
                    worst=float(
                        move.square().sum()
                        * (torch.linalg.eigvalsh(attention)[-1] + torch.linalg.eigvalsh(channels)[-1] * looked.max())
                    ),
                )
            )
        return out

    def since(self, memory: Mapping[str, Any]) -> Mapping[str, Any]:
        def more(now: dict[int, Tensor], then: dict[int, Tensor]) -> dict[int, Tensor]:
            return {i: sums - then.get(i, 0) for i, sums in now.items()}

        return {
            "queries": more(self.queries, memory["queries"]),
            "attention": more(self.attention, memory["attention"]),
            "rows": self.rows - memory["rows"],
        }

    def begin_look(self) -> None:
        self._draft: dict[int, tuple[Tensor, Tensor]] = {}
        self._seen = 0

    def see(self, probe: Probe) -> None:
        if probe.layer not in self.prompts.layers:
            return
        s = probe.to_prompts.float().flatten(0, 2)  # (B * H * N, M)
        sums = _grams(probe.queries), (s.mT @ s).double()
        if probe.layer == self.prompts.layers[0]:
            self._seen += len(s)
        if probe.layer in self._draft:
            sums = self._draft[probe.layer][0] + sums[0], self._draft[probe.layer][1] + sums[1]
        self._draft[probe.layer] = sums

    def end_look(self, reduce: Reduce) -> None:
        for i, (queries, attention) in self._draft.items():
            # Both are symmetric but for rounding; made exactly so, half of them is all that a file must hold.
            self.queries[i] = self.queries.get(i, 0) + _symmetric(reduce(queries))
            self.attention[i] = self.attention.get(i, 0) + _symmetric(reduce(attention))
        self.rows += int(reduce(torch.tensor(float(self._seen), dtype=torch.float64)))
        self._draft, self._seen = {}, 0

    def state_dict(self) -> dict[str, Any]:
        return {"queries": dict(self.queries), "attention": dict(self.attention), "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        prompt = self.prompts.value(self.prompts.layers[0])
        head = self.tower.width // self.tower.blocks()[0].heads
        shapes = {"queries": (self.tower.blocks()[0].heads, head, head), "attention": (len(prompt), len(prompt))}
        for name, shape in shapes.items():
            sums = state[name]
            if sums and sorted(sums) != sorted(self.prompts.layers):
                raise ShapeError(f"{name} must be there for blocks {list(self.prompts.layers)}; got {sorted(sums)}")
            for i, value in sums.items():
                if value.shape != shape:
                    raise ShapeError(f"{name} of block {i} must have shape {shape}; got {tuple(value.shape)}")
            setattr(self, name, {i: value.to(prompt.device) for i, value in sums.items()})
        self.rows = state["rows"]


def _symmetric(sums: Tensor) -> Tensor:
    return (sums + sums.mT) / 2


def _normalised(prompt: Tensor) -> Tensor:
    """Bring each token (M, D) to mean 0 and deviation 1 over channels, in float64."""
    return F.layer_norm(prompt.detach().double(), prompt.shape[-1:])


def _grams(queries: Tensor) -> Tensor:
    """Return the Gram of each head's queries (B, H, N, d), summed over images: (H, d, d), float64."""
    if queries.dtype == torch.float32:
        rows = queries.transpose(0, 1).flatten(1, 2)  # one product a head is faster than one an image
        return (rows.mT @ rows).double()
    # The tower has rounded the queries already; an image's Gram in its precision adds a tenth of that error.
    return (queries.mT @ queries).float().sum(0).double()
