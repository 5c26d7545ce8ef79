"""How many directions of a spectrum count as free."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

Knee = Literal["paper", "code"]

#: the released code smooths spectra of at least this length before it looks for the knee
_LONG = 128


def nullity(values: Tensor, knee: Knee) -> int:
    """Return R, how many of the smallest directions count as free: those beyond the spectrum's knee.

    The knee is where the second difference is largest. "paper" takes it from the spectrum as it is and
    counts the directions after it. "code" is the released code's rule: a spectrum of 128 values or
    more is smoothed by a Gaussian of deviation 10 and loses 1.5 % of its second differences at each
    end, and the direction at the knee counts as free too. Unlike there, the cut is made at the knee's
    index, so equal values do no harm.

    Args:
        values: (n,), n >= 3, eigenvalues in falling order.
        knee: which rule.

    References:
        Lu et al., NeurIPS 2024, section 4.4; the authors' repository VPTinNSforCL at 0d9c547.

    >>> nullity(torch.tensor([10.0, 9.0, 1.0, 0.9]), "code")
    2
    >>> nullity(torch.tensor([10.0, 9.0, 1.0, 0.9]), "paper")
    1
    """
    if values.ndim != 1 or len(values) < 3:
        raise ValueError(f"a knee needs at least 3 eigenvalues in one row; got shape {tuple(values.shape)}")
    spectrum, count, margin = values.double().cpu().numpy(), len(values), 0
    if knee == "code" and count >= _LONG:
        spectrum, margin = gaussian_filter1d(spectrum, sigma=10), int(count * 0.03 / 2)
    bend = np.diff(spectrum, 2)[margin : count - 2 - margin]
    centre = int(bend.argmax()) + margin + 1
    return count - centre if knee == "code" else count - centre - 1


def free_directions(second_moment: Tensor, knee: Knee) -> Tensor:
    """Return an orthonormal basis (n, R), float64, of what a second moment (n, n) leaves free."""
    values, basis = torch.linalg.eigh(second_moment.double())
    return basis[:, : nullity(values.flip(0), knee)]
