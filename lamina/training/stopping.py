"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Let SIGTERM, SIGUSR1 and Ctrl-C end the run at the next step, after a checkpoint; yield who says so.

    Pressed again, Ctrl-C ends it at once.
    """
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere, whoever runs us handles signals
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            before[number] = signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
