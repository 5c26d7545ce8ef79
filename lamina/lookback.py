"""One more look at a finished task's images, shared by all who learn from it.

After a task the loop runs the model once over the task's training images, without augmentation and
without gradients, and shows what it sees to every watcher: heads that keep class statistics,
protections that keep what old images look at. One pass serves them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from lamina.backbones.splice import Probe

#: sums a tensor over all processes
Reduce = Callable[[Tensor], Tensor]


class Watcher:
    """Someone who learns from the look back; each call does nothing unless overridden.

    What is gathered during the pass must be a *sum* over images, so that it depends neither on the
    split into batches nor on the number of processes. What is remembered goes in and out by
    `state_dict`: tensors, numbers and strings, in dictionaries and lists.

    Attributes:
        looks_at: "nothing" needs no pass at all, "features" sees pooled features, "probes" sees
            blocks, "queries" sees the frozen tower's features, as prompts that are chosen by them do.
        looks_ahead: sees a task before it is trained on, and not after.
    """

    looks_at: Literal["nothing", "features", "probes", "queries"] = "nothing"
    looks_ahead: bool = False

    def begin_look(self) -> None:
        """Get ready for a pass; whatever an unfinished pass had gathered is thrown away."""

    def see(self, probe: Probe) -> None:
        """Take in one block of one batch."""

    def collect(self, features: Tensor, columns: Tensor) -> None:
        """Take in features or queries (B, F) and their columns (B,) of one batch."""

    def end_look(self, reduce: Reduce) -> None:
        """Make what was gathered part of what is remembered; called once per task in any case."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must be remembered."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            ShapeError: when a tensor in it does not fit.
        """
