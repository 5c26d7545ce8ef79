"""Who is told how far the reading of many texts is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Part = TypeVar("Part")
#: called with how many texts are read and how many there are: 0 at first, all at the end
Tell = Callable[[int, int], None]

#: a context, and no argument: texts are read deep within whatever asks for scores
_told: ContextVar[Tell | None] = ContextVar("told", default=None)


@contextmanager
def watched(tell: Tell) -> Iterator[None]:
    """Let somebody be told, while this lasts, how far every reading of many texts is."""
    before = _told.set(tell)
    try:
        yield
    finally:
        _told.reset(before)


def along(parts: Sequence[Part], sizes: Sequence[int]) -> Iterator[Part]:
    """Yield parts of so many texts, one after the other, and tell whoever watches; a single part is not worth it."""
    tell = _told.get()
    if tell is None or len(parts) < 2:
        yield from parts
        return
    tell(0, sum(sizes))
    for number, part in enumerate(parts, start=1):
        yield part
        tell(sum(sizes[:number]), sum(sizes))
