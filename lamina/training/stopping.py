"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Let SIGTERM and SIGUSR1 end the run at the next step, after a checkpoint; yield who says so."""
    asked: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere, whoever runs us handles signals
        for number in (signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, lambda number, frame: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
