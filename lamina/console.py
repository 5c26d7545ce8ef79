"""What the command line shows: progress and tables, drawn by Rich."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress as Bars, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lamina.text import printable
from lamina.training.progress import Progress

#: seconds between two plain lines of progress
_EVERY = 10.0


def progress() -> Progress:
    """Return a watcher that draws bars on a terminal and writes plain lines elsewhere; both to stderr."""
    console = Console(stderr=True)
    return DrawnProgress(console) if console.is_terminal else PlainProgress()


class _Counting(Progress):
    """Keeps count of one stretch of work."""

    def begin(self, stage: str, task: int, tasks: int, images: int) -> None:
        self.label = f"evaluate after task {task + 1}" if stage == "evaluate" else f"task {task + 1}/{tasks}, {stage}"
        self.images, self.done, self.skipped = images, 0, 0
        self.loss: float | None = None
        self.began = time.perf_counter()

    def advance(self, images: int, loss: float | None = None) -> None:
        self.done, self.loss = self.done + images, loss

    def skip(self, images: int) -> None:
        self.done, self.skipped = self.done + images, images

    @property
    def speed(self) -> float:
        """Images per second in this process."""
        return (self.done - self.skipped) / max(time.perf_counter() - self.began, 1e-9)


class PlainProgress(_Counting):
    """Writes a line from time to time, and one when a stretch of work ends."""

    def begin(self, stage: str, task: int, tasks: int, images: int) -> None:
        super().begin(stage, task, tasks, images)
        self.said = self.began

    def advance(self, images: int, loss: float | None = None) -> None:
        super().advance(images, loss)
        if time.perf_counter() - self.said >= _EVERY:
            self.said = time.perf_counter()
            self._say(f", {(self.images - self.done) / max(self.speed, 1e-9):.0f} s left")

    def end(self) -> None:
        self._say("")

    def row(self, task: int, tasks: int, accuracies: list[float]) -> None:
        print(f"after task {task + 1}/{tasks}: {accuracy_line(accuracies)}", file=sys.stderr, flush=True)

    def _say(self, more: str) -> None:
        loss = "" if self.loss is None else f", loss {self.loss:.3f}"
        text = f"{self.label}: {self.done}/{self.images} images, {self.speed:.0f} images/s{more}{loss}"
        print(text, file=sys.stderr, flush=True)


class DrawnProgress(_Counting):
    """Draws one bar at a time."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def begin(self, stage: str, task: int, tasks: int, images: int) -> None:
        super().begin(stage, task, tasks, images)
        self.bars = Bars(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} images"),
            TextColumn("{task.fields[speed]:>6.0f} images/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=self.console,
            transient=True,
        )
        self.bar = self.bars.add_task(self.label, total=images, speed=0.0, loss="")
        self.bars.start()

    def advance(self, images: int, loss: float | None = None) -> None:
        super().advance(images, loss)
        said = "" if loss is None else f"loss {loss:.3f}"
        self.bars.update(self.bar, completed=self.done, speed=self.speed, loss=said)

    def end(self) -> None:
        self.bars.stop()

    def row(self, task: int, tasks: int, accuracies: list[float]) -> None:
        self.console.print(f"after task {task + 1}/{tasks}: {accuracy_line(accuracies)}", highlight=False)


def accuracy_line(accuracies: Sequence[float]) -> str:
    """Return accuracies and their mean in percent.

    >>> accuracy_line([0.5, 0.75])
    'accuracy 62.5 % (50.0 75.0)'
    """
    each = " ".join(f"{100 * value:.1f}" for value in accuracies)
    return f"accuracy {100 * sum(accuracies) / len(accuracies):.1f} % ({each})"


def table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """Return rows with equal keys as a table whose numbers are flush right."""
    out = Table(title=title, title_justify="left", header_style="bold")
    for name in rows[0] if rows else ():
        numeric = all(isinstance(row[name], int | float | None) for row in rows)
        out.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        # names of classes and files are foreign: no markup, no control characters
        out.add_row(*(Text("" if value is None else printable(str(value))) for value in row.values()))
    return out
