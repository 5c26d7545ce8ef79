"""What the loop tells whoever watches it."""

from __future__ import annotations


class Progress:
    """Watches a run; each call does nothing unless overridden. The command line draws bars with it.

    Attributes:
        measure: what the results of tasks are.
    """

    measure: str = "accuracy"

    def begin(self, stage: str, task: int, tasks: int, images: int) -> None:
        """A stretch of work over `images` images begins: stage is "train", "look back" or "evaluate"."""

    def advance(self, images: int, loss: float | None = None) -> None:
        """So many images more are done."""

    def skip(self, images: int) -> None:
        """So many images were done by an earlier process, before this one resumed."""

    def end(self) -> None:
        """The stretch is over."""

    def read(self, done: int, texts: int) -> None:
        """So many texts about classes are read: 0 at first, all at the end; within a stretch or apart from any."""

    def row(self, task: int, tasks: int, accuracies: list[float]) -> None:
        """A task is over; these are the results on all tasks so far, in [0, 1]."""
