"""Prompt steps in the null space of what old tasks' images look at (NSP²)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lamina.backbones.splice import Probe
from lamina.backbones.tower import Tower
from lamina.errors import ConfigError, ShapeError, UnsupportedBackbone
from lamina.lookback import Reduce
from lamina.prompts.base import PromptModule
from lamina.protections.base import Felt, Protection, Room, TokenPrompts, rows_of
from lamina.protections.projection import Projection, projected_steps
from lamina.protections.projector import Blend, Spectrum
from lamina.protections.spectrum import Cut


class NullSpace(Protection):
    """Keeps a prompt's influence on old images: through the keys it offers and the values it adds.

    For old images with queries Q and attention S to the prompts, a step dP of the prompts changes
    nothing to first order when `Q Wk dPᵀ = 0` (keys) and `S dP = 0` (values). Two sums over images per
    block hold all that is needed of them:

    - `queries` (H, d, d), the Gram of each head's queries. With the frozen key weights it expands to
      the second moment (D, D) of the rows of `Q Wk`, which gives the projection on the right;
    - `attention` (R, R), the second moment of the rows of S: gives the projection on the left.

    `rows` counts them: images x heads x tokens. R are all prompt tokens of the block, M unless they are a pool's;
    to prompts of a pool that an image did not take, its attention is 0.

    Prompts that enter before a layer norm are divided by their deviation s and multiplied by its weight a, so
    the conditions are really `Q Wk diag(a) dPᵀ = 0` and `S diag(1 / s) dP = 0`. The published method leaves both
    out; `ln_correction="affine"` puts them in. The deviations are those of the prompts when the projection is
    made, at the end of the last task: the norm is linearised where the steps begin, and nothing has to be
    scaled while sums are gathered. Of prompts that enter after the norm the conditions are exact as they stand.

    Args:
        tower: whose key weights expand the Grams.
        prompts: the prompts to protect. Of those that travel, the conditions hold at the block that they enter.
        cut: which directions are free; None frees none.
        channels: how steps are projected on the right; None lets all channels through.
        tokens: how steps are projected on the left; None lets all tokens through.
        ln_correction: "affine" counts in what the block's first norm does to the prompts.
        center: count in that the norm subtracts each token's mean, so that a shift of all channels is free.
        batch_means: keep sums of the means of batches, as the released code does, instead of sums over rows;
            `rows` then counts batches. They depend on the batches of the look back and on the number of processes.
        right_alone: where no combination of tokens is free, let them all through, so that keys alone are
            protected, instead of stopping all steps.

    Raises:
        ConfigError: when a correction is asked for and the prompts enter after the norm.

    References:
        Lu et al., Visual Prompt Tuning in Null Space for Continual Learning, NeurIPS 2024, section 4
        and algorithm 2.
    """

    looks_at = "probes"

    def __init__(
        self,
        tower: Tower,
        prompts: TokenPrompts,
        *,
        cut: Cut | None,
        channels: Blend | None,
        tokens: Blend | None,
        ln_correction: Literal["none", "affine"] = "none",
        center: bool = False,
        batch_means: bool = False,
        right_alone: bool = False,
    ) -> None:
        self.normed = getattr(prompts, "normed", False)
        if self.normed and (ln_correction != "none" or center):
            raise ConfigError(
                "ln_correction and center are for prompts that a norm changes; these enter after it, so leave both out"
            )
        self.tower, self.prompts = tower, prompts
        self.cut = cut
        self.blends = {"channels": channels, "tokens": tokens}
        self.affine, self.center = ln_correction == "affine", center
        self.batch_means, self.right_alone = batch_means, right_alone
        self.queries: dict[int, Tensor] = {}
        self.attention: dict[int, Tensor] = {}
        self.deviations: dict[int, Tensor] = {}
        self.rows = 0

    def guard(self, optimizer: Optimizer) -> AbstractContextManager[Any]:
        return projected_steps(optimizer, self.projections())

    def projections(self) -> dict[nn.Parameter, Projection]:
        """Return the projection of each protected prompt; empty before the first task is over."""
        return {self.prompts.value(i): self.projection(i, self.spectra(i), self.cut) for i in self.queries}

    def projection(self, layer: int, spectra: Mapping[str, Spectrum], cut: Cut | None) -> Projection:
        """Return the projection of one block's prompts under a cut of its spectra."""
        free = {side: spectrum.free(cut) for side, spectrum in spectra.items()}
        blends = dict(self.blends)
        if self.right_alone and cut is not None and not free["tokens"].shape[1]:
            blends["tokens"] = None
        maps = {
            side: blend(free[side]).to(self.prompts.value(layer)) if blend is not None else None
            for side, blend in blends.items()
        }
        return Projection(left=maps["tokens"], right=maps["channels"])

    def spectra(self, layer: int) -> dict[str, Spectrum]:
        """Return what limits a step at one block, by "channels" and "tokens", decomposed."""
        channels, tokens = self.channels(layer), self.attention[layer].double()
        if self.affine:
            weight = _norm(self.tower, layer).weight
            if weight is not None:
                scale = weight.detach().double().to(channels.device)
                channels = scale[:, None] * channels * scale
            tokens = tokens / self.deviations[layer].outer(self.deviations[layer])
        if self.center:
            channels = channels - channels.mean(0)
            channels = channels - channels.mean(1, keepdim=True)
        return {"channels": Spectrum.of(channels), "tokens": Spectrum.of(tokens)}

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

    def room(self) -> list[Room]:
        return [
            Room(
                layer=i,
                what=what,
                used=len(spectrum.values) - free,
                size=len(spectrum.values),
                kept=float(values[free:].sum() / values.sum().clamp_min(torch.finfo().tiny)),
            )
            for i in self.queries
            for what, spectrum in self.spectra(i).items()
            for free, values in [(spectrum.free(self.cut).shape[1], spectrum.values.clamp_min(0))]
        ]

    def felt(self, before: PromptModule, images: Mapping[str, Any]) -> list[Felt]:
        if self.prompts.pool_size:
            return []  # no sum says what a move does to the choice, nor to prompts that travel and are read themselves
        out, rows = [], max(images["rows"], 1)
        for i in images["queries"]:
            old, new = (self._as_attended(prompts, i) for prompts in (cast(TokenPrompts, before), self.prompts))
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
        count = probe.to_prompts.shape[:3].numel()  # B * H * N
        sums = _grams(probe.queries), self._looked(probe)
        if self.batch_means:
            sums = sums[0] / count, sums[1] / count
        if probe.layer == self.prompts.layers[0]:
            self._seen += 1 if self.batch_means else count
        if probe.layer in self._draft:
            sums = self._draft[probe.layer][0] + sums[0], self._draft[probe.layer][1] + sums[1]
        self._draft[probe.layer] = sums

    def _looked(self, probe: Probe) -> Tensor:
        """Return the second moment (R, R), float64, of the attention of a batch to all prompt tokens of a block."""
        s = probe.to_prompts.to(torch.promote_types(probe.to_prompts.dtype, torch.float32))
        if not self.prompts.pool_size:
            length = self.prompts.value(probe.layer).shape[-2]
            s = s.flatten(0, 2)[:, s.shape[-1] - length :]  # (B * H * N, M); those of others stand before
            return (s.mT @ s).double()
        assert probe.chosen is not None  # a pass with a pool says so
        # An image's attention to all of a pool is its attention to the slots, and zeros; so are the products of its
        # columns. Their sums are small, the columns themselves are not.
        s = s.flatten(1, 2)  # (B, H * N, k * M)
        length, size = self.prompts.value(probe.layer).shape[-2], len(rows_of(self.prompts, probe.layer))
        rows = (probe.chosen[..., None] * length + torch.arange(length, device=s.device)).flatten(1)  # (B, k * M)
        moment = torch.zeros(size, size, dtype=torch.float64, device=s.device)
        return moment.index_put_((rows[:, :, None], rows[:, None]), (s.mT @ s).double(), accumulate=True)

    def end_look(self, reduce: Reduce) -> None:
        for i, (queries, attention) in self._draft.items():
            # Both are symmetric but for rounding; made exactly so, half of them is all that a file must hold.
            self.queries[i] = self.queries.get(i, 0) + _symmetric(reduce(queries))
            self.attention[i] = self.attention.get(i, 0) + _symmetric(reduce(attention))
        self.rows += int(reduce(torch.tensor(float(self._seen), dtype=torch.float64)))
        self._draft, self._seen = {}, 0
        self._linearise()

    def _linearise(self) -> None:
        """Remember the deviations of the prompts as they are now, where they are asked for."""
        if self.affine:
            self.deviations = {i: _deviations(rows_of(self.prompts, i), _norm(self.tower, i).eps) for i in self.queries}

    def _as_attended(self, prompts: TokenPrompts, layer: int) -> Tensor:
        """Return prompts (R, D) in float64; those that a norm awaits with mean 0 and deviation 1 a token."""
        rows = rows_of(prompts, layer).detach().double()
        return rows if self.normed else F.layer_norm(rows, rows.shape[-1:])

    def state_dict(self) -> dict[str, Any]:
        state = {"queries": dict(self.queries), "attention": dict(self.attention), "rows": self.rows}
        # Not read off the prompts: a run that resumes in the middle of a task finds them moved.
        return state | {"deviations": dict(self.deviations)} if self.affine else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        prompt = rows_of(self.prompts, self.prompts.layers[0])
        head = self.tower.width // self.tower.blocks()[0].heads
        shapes = {
            "queries": (self.tower.blocks()[0].heads, head, head),
            "attention": (len(prompt), len(prompt)),
            **({"deviations": (len(prompt),)} if self.affine and "deviations" in state else {}),
        }
        for name, shape in shapes.items():
            sums = state[name]
            if sums and sorted(sums) != sorted(self.prompts.layers):
                raise ShapeError(f"{name} must be there for blocks {list(self.prompts.layers)}; got {sorted(sums)}")
            for i, value in sums.items():
                if value.shape != shape:
                    raise ShapeError(f"{name} of block {i} must have shape {shape}; got {tuple(value.shape)}")
            if name == "deviations" and any(bool((value <= 0).any()) for value in sums.values()):
                raise ShapeError("deviations must be above 0")
            setattr(self, name, {i: value.to(prompt.device) for i, value in sums.items()})
        self.rows = state["rows"]
        if "deviations" not in shapes:
            self._linearise()


def _norm(tower: Tower, layer: int) -> nn.LayerNorm:
    norm = tower.blocks()[layer].first_norm
    if norm is None:
        raise UnsupportedBackbone(
            f"the first norm of block {layer} is no layer norm, so lamina cannot correct for it; leave "
            'ln_correction at "none"'
        )
    return norm


def _deviations(prompt: Tensor, eps: float) -> Tensor:
    """Return what a layer norm divides each prompt token (R, D) by: (R,), float64."""
    return (prompt.detach().double().var(-1, unbiased=False) + eps).sqrt()


def _symmetric(sums: Tensor) -> Tensor:
    return (sums + sums.mT) / 2


def _grams(queries: Tensor) -> Tensor:
    """Return the Gram of each head's queries (B, H, N, d), summed over images: (H, d, d), float64."""
    if queries.dtype in (torch.float32, torch.float64):
        rows = queries.transpose(0, 1).flatten(1, 2)  # one product a head is faster than one an image
        return (rows.mT @ rows).double()
    # The tower has rounded the queries already; an image's Gram in its precision adds a tenth of that error.
    return (queries.mT @ queries).float().sum(0).double()
