"""What the command line shows: progress and tables, drawn by Rich."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress as Bars, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lamina.prompts.reading import watched
from lamina.text import printable
from lamina.training.progress import Progress

#: seconds between two plain lines of progress
_EVERY = 10.0
#: seconds that texts may take to be read before a bar is drawn for them
_PATIENCE = 1.5
#: what is said of texts that are being read
_READING = "reading names of classes"


def progress() -> Progress:
    """Return a watcher that draws bars on a terminal and writes plain lines elsewhere; both to stderr."""
    console = Console(stderr=True)
    return DrawnProgress(console) if console.is_terminal else PlainProgress()


@contextmanager
def reading_shown() -> Iterator[None]:
    """Draw a bar on a terminal whenever many texts are read; elsewhere, say nothing."""
    watch = progress()
    if not isinstance(watch, DrawnProgress):
        yield
        return
    try:
        with watched(watch.read):
            yield
    finally:
        watch.end()


class _Counting(Progress):
    """Keeps count of one stretch of work, and of texts that are read meanwhile."""

    def begin(self, stage: str, task: int, tasks: int, images: int) -> None:
        self.label = f"evaluate after task {task + 1}" if stage == "evaluate" else f"task {task + 1}/{tasks}, {stage}"
        self.images, self.done, self.skipped = images, 0, 0
        self.loss: float | None = None
        self.began = time.perf_counter()

    def advance(self, images: int, loss: float | None = None) -> None:
        self.done, self.loss = self.done + images, loss

    def skip(self, images: int) -> None:
        self.done, self.skipped = self.done + images, images

    def read(self, done: int, texts: int) -> None:
        if not done:
            self.read_since = self.read_said = time.perf_counter()
        self.read_speed = done / max(time.perf_counter() - self.read_since, 1e-9)

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

    def read(self, done: int, texts: int) -> None:
        super().read(done, texts)
        if done < texts and time.perf_counter() - self.read_said >= _EVERY:
            self.read_said = time.perf_counter()
            left = (texts - done) / max(self.read_speed, 1e-9)
            text = f"{_READING}: {done}/{texts} texts, {self.read_speed:.0f} texts/s, {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)

    def row(self, task: int, tasks: int, accuracies: list[float]) -> None:
        line = accuracy_line(accuracies, self.measure)
        print(f"after task {task + 1}/{tasks}: {line}", file=sys.stderr, flush=True)

    def _say(self, more: str) -> None:
        loss = "" if self.loss is None else f", loss {self.loss:.3f}"
        text = f"{self.label}: {self.done}/{self.images} images, {self.speed:.0f} images/s{more}{loss}"
        print(text, file=sys.stderr, flush=True)


class DrawnProgress(_Counting):
    """Draws a bar for a stretch of work, and one below it while many texts are read."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars: Bars | None = None
        self.reading: TaskID | None = None

    def begin(self, stage: str, task: int, tasks: int, images: int) -> None:
        super().begin(stage, task, tasks, images)
        self.bars, self.bar = self._add(self.label, images, "images")

    def advance(self, images: int, loss: float | None = None) -> None:
        super().advance(images, loss)
        said = "" if loss is None else f"loss {loss:.3f}"
        if self.bars is not None:
            self.bars.update(self.bar, completed=self.done, speed=self.speed, loss=said)

    def end(self) -> None:
        if self.bars is not None:
            self.bars.stop()
        self.bars = self.reading = None

    def read(self, done: int, texts: int) -> None:
        super().read(done, texts)
        late = time.perf_counter() - self.read_since > _PATIENCE
        if self.reading is None and late and done < texts:
            self.bars, self.reading = self._add(_READING, texts, "texts")
        if self.bars is not None and self.reading is not None:
            self.bars.update(self.reading, completed=done, speed=self.read_speed)
            if done == texts:
                self.bars.remove_task(self.reading)
                self.reading = None

    def _add(self, label: str, total: int, things: str) -> tuple[Bars, TaskID]:
        """Draw one more bar; return the bars and which of them it is."""
        bars = self.bars
        if bars is None:
            bars = Bars(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[things]}"),
                TextColumn("{task.fields[speed]:>6.0f} {task.fields[things]}/s"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"),
                console=self.console,
                transient=True,
            )
            bars.start()
        return bars, bars.add_task(label, total=total, speed=0.0, loss="", things=things)

    def row(self, task: int, tasks: int, accuracies: list[float]) -> None:
        line = accuracy_line(accuracies, self.measure)
        self.console.print(f"after task {task + 1}/{tasks}: {line}", highlight=False)


def accuracy_line(accuracies: Sequence[float], measure: str = "accuracy") -> str:
    """Return accuracies and their mean in percent.

    >>> accuracy_line([0.5, 0.75])
    'accuracy 62.5 % (50.0 75.0)'
    """
    each = " ".join(f"{100 * value:.1f}" for value in accuracies)
    return f"{measure} {100 * sum(accuracies) / len(accuracies):.1f} % ({each})"


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
