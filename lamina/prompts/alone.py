"""What contexts say when no class is named, and how much of that they have in common."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.backbones.clip import TextSide
from lamina.prompts.contexts import PLACEHOLDER, Wording, ids_of


def alone(side: TextSide, length: int, *, fillers: int = 0) -> Wording:
    """Write the one text that holds a context and a full stop, but no name.

    Args:
        length: n, tokens of the context.
        fillers: placeholder words that stay behind the context.
    """
    ids = ids_of(side, [" ".join([PLACEHOLDER] * (length + fillers)) + "."])
    return Wording(ids, torch.arange(1, length + 1, device="cpu")[None])


def overlap(features: Tensor) -> Tensor:
    """Return the mean absolute cosine of pairs of rows of features (n, F), n at least 1; zero where there is no pair.

    >>> float(overlap(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])))
    0.3333333432674408
    """
    units = F.normalize(features, dim=-1)
    pairs = ~torch.eye(len(units), dtype=torch.bool, device=units.device)
    return (units @ units.mT)[pairs].abs().sum() / max(1, len(units) * (len(units) - 1))
