"""What happened at every step, as JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lamina.errors import StorageError

NAME = "log.jsonl"


class Log:
    """Appends a line per step to `log.jsonl` in a run folder.

    Args:
        folder: of the run; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = folder / NAME if folder is not None else None
        self._last = time.perf_counter()

    def step(self, position: Sequence[int], values: Mapping[str, float], lr: float, images: int) -> None:
        """Write the position after a step, the loss with its terms, the learning rate and the speed.

        Raises:
            StorageError: when the line cannot be written.
        """
        now = time.perf_counter()
        speed, self._last = images / max(now - self._last, 1e-9), now
        if self.path is None:
            return
        line = {"position": list(position), **values, "lr": lr, "images_per_second": round(speed, 1)}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise StorageError(f"{self.path} could not be written: {error.strerror}; make room and resume") from error

    def cut(self, position: Sequence[int]) -> None:
        """Drop lines of steps that a resumed run will take again, and a line that a crash cut short."""
        if self.path is None or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["position"] <= list(position):
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue
        self.path.write_text("".join(line + "\n" for line in kept))
