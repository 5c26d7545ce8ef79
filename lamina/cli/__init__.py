"""The `lamina` command: each function is one subcommand and ends in one call into the library."""

from __future__ import annotations

import contextlib
import sys

import lamina.cli.data
import lamina.cli.explain
import lamina.cli.lists
import lamina.cli.models
import lamina.cli.streams
import lamina.cli.transfer  # noqa: F401 - importing these is what fills the app
from lamina.cli.shared import app
from lamina.errors import LaminaError
from lamina.text import printable

__all__ = ["app", "main"]


def main() -> None:
    """Run the command; an error of ours is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # A class may have a name that the terminal cannot show.
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # not all streams can
    try:
        app()
    except LaminaError as error:
        print("lamina: " + printable(" ".join(str(error).split())), file=sys.stderr)
        sys.exit(2)
