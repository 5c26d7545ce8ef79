"""Foreign text, such as names of files and classes, made fit to be shown."""

from __future__ import annotations

import re

#: control characters, line separators, marks that turn the direction of writing; lone surrogates are the last
_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return a text in which nothing can steer a terminal; accents, scripts and emoji stay as they are.

    >>> print(printable("caf\u00e9\n\x1b[2J \u732b"))
    café\n\x1b[2J 猫
    """
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
