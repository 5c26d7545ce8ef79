"""From a second moment to the projector on what it leaves free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lamina.protections.spectrum import Cut, nullity


class Spectrum(NamedTuple):
    """A second moment (n, n), decomposed.

    Attributes:
        values: (n,), float64, eigenvalues in rising order.
        basis: (n, n), float64, their directions as columns.
    """

    values: Tensor
    basis: Tensor

    @classmethod
    def of(cls, second_moment: Tensor) -> Spectrum:
        """Decompose a symmetric (n, n)."""
        return cls(*torch.linalg.eigh(second_moment.double()))

    def free(self, cut: Cut | None) -> Tensor:
        """Return an orthonormal basis (n, R) of the directions that a cut leaves free; without a cut none is."""
        return self.basis[:, : nullity(self.values.flip(0), cut) if cut is not None else 0]


@dataclass(frozen=True, kw_only=True)
class Blend:
    """What becomes of the projector on the free directions before it is applied to steps.

    The projector U Uᵀ of R free directions is brought to unit Frobenius norm, which divides it by sqrt(R), and
    is mixed with the identity afterwards. Without a free direction it is zero.

    Attributes:
        eta: 0 lets every step through, 1 projects it fully.
        normalize: bring the projector to unit norm; False keeps it a projector.
        gain_control: replace all by the identity times the gain that free directions have: as short a step,
            in no direction of choice. For comparison alone.

    References:
        Lu et al., NeurIPS 2024, algorithm 2.
    """

    eta: float = 1.0
    normalize: bool = True
    gain_control: bool = False

    def __call__(self, free: Tensor) -> Tensor:
        """Turn free directions (n, R) into the map (n, n) of a step."""
        size, count = free.shape
        identity = torch.eye(size, dtype=free.dtype, device=free.device)
        gain = 0.0 if not count else count**-0.5 if self.normalize else 1.0
        projector = identity if self.gain_control else free @ free.mT
        return self.eta * gain * projector + (1 - self.eta) * identity
