"""Which parameters ask for a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def only(parameters: Sequence[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Inside, these parameters of a model and no others ask for a gradient; afterwards all is as before."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for parameter in asked:
            parameter.requires_grad_(True)
