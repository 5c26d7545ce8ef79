"""Seconds, added up."""

from __future__ import annotations

import time


class Stopwatch:
    """Adds the seconds inside a `with` to one entry of a list; `lap` adds what has passed so far."""

    def __init__(self, seconds: list[float], index: int) -> None:
        self.seconds, self.index = seconds, index

    def __enter__(self) -> Stopwatch:
        self.seconds += [0.0] * (self.index + 1 - len(self.seconds))
        self.began = time.perf_counter()
        return self

    def lap(self) -> None:
        now = time.perf_counter()
        self.seconds[self.index] += now - self.began
        self.began = now

    def __exit__(self, *_: object) -> None:
        self.lap()
