"""A Gaussian for each class, by a pair of linear maps for each task.

References:
    Jha et al., CLAP4CLIP, NeurIPS 2024, sections 3.1 and 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Start = Literal["language", "zero", "default"]

#: the least standard deviation
LEAST = 0.001


class Encoder(nn.Module):
    """What makes the mean and what makes the standard deviation of the Gaussians of one task's classes.

    Args:
        width: F.
        normed: normalise what goes in, for each of the two by itself.
        learns_spread: make deviations, too.
    """

    def __init__(self, width: int, *, normed: bool = False, learns_spread: bool = True) -> None:
        super().__init__()
        self.mean = nn.Linear(width, width)
        self.spread = nn.Linear(width, width) if learns_spread else None
        self.mean_norm = nn.LayerNorm(width) if normed else None
        self.spread_norm = nn.LayerNorm(width) if normed and learns_spread else None

    @torch.no_grad()
    def start(self, templates: Tensor) -> None:
        """Begin with second moments of what templates say of all classes met so far, (C, templates, F).

        The maps of means get those of the means over templates, the maps of deviations those of the variances over
        templates, both divided by F. Biases stay as they are.
        """
        width = templates.shape[-1]
        means = templates.float().mean(1)
        self.mean.weight.copy_(means.mT @ means / width)
        if self.spread is not None:
            variances = templates.float().var(1)
            self.spread.weight.copy_(variances.mT @ variances / width)

    @torch.no_grad()
    def clear(self) -> None:
        """Begin with maps that are zero; biases stay as they are."""
        for part in (self.mean, self.spread):
            if part is not None:
                part.weight.zero_()


class Encoders(nn.Module):
    """An encoder for each task, or one for all; all are applied at once.

    Args:
        width, normed, learns_spread: as for `Encoder`.
        shared: one for all tasks.
    """

    def __init__(self, width: int, *, normed: bool = False, learns_spread: bool = True, shared: bool = False) -> None:
        super().__init__()
        self.width, self.normed, self.learns_spread, self.shared = width, normed, learns_spread, shared
        self.tasks = nn.ModuleList()

    def grow(self) -> Encoder | None:
        """Add an encoder for a new task, freeze those before, and return it; None where it has one already."""
        if self.shared and len(self.tasks):
            return None
        self.tasks.requires_grad_(False)
        self.tasks.append(Encoder(self.width, normed=self.normed, learns_spread=self.learns_spread))
        return self.tasks[-1]  # type: ignore[return-value]

    @property
    def learning(self) -> list[int]:
        """Which of them ask for a gradient."""
        return [number for number, task in enumerate(self.tasks) if task.mean.weight.requires_grad]  # type: ignore[union-attr]

    def forward(self, names: Tensor, sizes: Sequence[int], which: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return means and standard deviations, (B, C, F) each, of the classes of names (B, C, F); no deviations, none.

        Args:
            sizes: how many classes each task has, one after the other.
            which: the encoder of each of these tasks.
        """
        largest = max(sizes)
        padded = torch.stack([F.pad(p, (0, 0, 0, largest - p.shape[1])) for p in names.split(list(sizes), 1)])
        means = self._applied("mean", padded, which)
        found = [means] if not self.learns_spread else [means, self._applied("spread", padded, which)]
        out = [torch.cat([part[:, :size] for part, size in zip(of, sizes, strict=True)], dim=1) for of in found]
        return out[0], (1 - LEAST) * F.softplus(out[1]) + LEAST if self.learns_spread else None

    def _applied(self, name: str, x: Tensor, which: Sequence[int]) -> Tensor:
        """Apply the maps of that name to x (tasks, B, n, F), each to the part of its task."""
        encoders = [self.tasks[number] for number in which]
        if self.normed:
            norms = [getattr(encoder, f"{name}_norm") for encoder in encoders]
            scale, shift = (
                torch.stack([getattr(n, part) for n in norms])[:, None, None] for part in ("weight", "bias")
            )
            x = F.layer_norm(x, (self.width,), eps=norms[0].eps) * scale + shift
        maps = [getattr(encoder, name) for encoder in encoders]
        weights, biases = torch.stack([m.weight for m in maps]), torch.stack([m.bias for m in maps])
        return torch.baddbmm(biases[:, None], x.flatten(1, 2), weights.mT).unflatten(1, x.shape[1:3])


def divergence(mean: Tensor, spread: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of N(mean, spread²) from N(0, 1): the sum over channels, (...).

    >>> divergence(torch.tensor([[0.0, 2.0]]), torch.ones(1, 2))
    tensor([2.])
    """
    return 0.5 * (spread.square() + mean.square() - 1 - 2 * spread.log()).sum(-1)
