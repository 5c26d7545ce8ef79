"""How many directions of a spectrum count as free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from lamina.errors import ConfigError

#: "official" is "code" with its flaw, for parity alone
Knee = Literal["paper", "code", "official", "energy", "multiple"]

#: the released code smooths spectra of at least this length before it looks for the knee
_LONG = 128


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where a spectrum is cut into used and free directions.

    - "paper": at the knee, where the second difference of the spectrum is largest; free are those after it.
    - "code": the released code's rule. A spectrum of 128 values or more is smoothed by a Gaussian of deviation
      10 and loses 1.5 % of its second differences at each end; the direction at the knee is free, too.
    - "official": the same, but as there the cut is found by value: free are the last value that is not below
      the one at the knee and all after it. Of equal values one alone is free.
    - "energy": free are as many of the smallest as together hold at most a share 1 - kept of the sum.
    - "multiple": free are those of at most `multiple` times the smallest; a real number, which the released
      code rounds down.

    Values that are zero up to rounding are free in the last two, so `kept=1` leaves exactly the null space.

    Attributes:
        knee: which rule.
        kept: share in [0, 1] of the sum that used directions must hold; for "energy".
        multiple: at least 1; for "multiple".

    Raises:
        ConfigError: when a number is out of range.

    References:
        Lu et al., NeurIPS 2024, section 4.4; the authors' repository VPTinNSforCL at 0d9c547.
    """

    knee: Knee = "paper"
    kept: float = 0.99
    multiple: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.kept <= 1 or not self.multiple >= 1:
            raise ConfigError(
                f"kept must be between 0 and 1 and multiple at least 1; got {self.kept} and {self.multiple}"
            )


def nullity(values: Tensor, cut: Cut) -> int:
    """Return R, how many of the smallest directions count as free.

    Args:
        values: (n,), eigenvalues in falling order; n >= 3 for the rules that look for a knee.

    Raises:
        ValueError: when there are too few values, or they are not in one row.

    >>> spectrum = Tensor([10.0, 9.0, 1.0, 0.9])
    >>> nullity(spectrum, Cut(knee="code")), nullity(spectrum, Cut(knee="paper"))
    (2, 1)
    >>> nullity(spectrum, Cut(knee="energy", kept=0.9)), nullity(spectrum, Cut(knee="multiple", multiple=9.9))
    (2, 2)
    """
    if values.ndim != 1 or not len(values):
        raise ValueError(f"a spectrum is one row of eigenvalues; got shape {tuple(values.shape)}")
    spectrum = values.detach().double().cpu().numpy()
    if cut.knee not in ("energy", "multiple"):
        return _beyond_the_knee(spectrum, cut.knee)
    rising = spectrum[::-1].clip(min=0)
    rounding = len(rising) * np.finfo(np.float64).eps * rising.sum()
    if cut.knee == "multiple":
        return int((rising <= max(cut.multiple * rising[0], rounding)).sum())
    return int((rising.cumsum() <= max((1 - cut.kept) * rising.sum(), rounding)).sum())


def _beyond_the_knee(spectrum: np.ndarray, knee: Knee) -> int:
    """Return how many of the eigenvalues (n,), in falling order, lie beyond the knee."""
    count, margin = len(spectrum), 0
    if count < 3:
        raise ValueError(f"a knee needs at least 3 eigenvalues; got {count}")
    smooth = spectrum
    if knee != "paper" and count >= _LONG:
        smooth, margin = gaussian_filter1d(spectrum, sigma=10), int(count * 0.03 / 2)
    bend = np.diff(smooth, 2)[margin : count - 2 - margin]
    centre = int(bend.argmax()) + margin + 1
    if knee == "paper":
        return count - centre - 1
    if knee == "code":
        return count - centre
    return count - int(np.flatnonzero(spectrum >= spectrum[centre])[-1])
