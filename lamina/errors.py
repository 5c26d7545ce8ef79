"""Every error lamina raises on purpose.

LaminaError
├── ConfigError          a setting has the wrong name, type or range
├── UnsupportedBackbone  the frozen model has a block that lamina does not know how to prompt
├── ShapeError           a tensor does not have the shape that the docstring promises
├── DataError            a data set or stream is missing, broken or not what the method needs
├── ResumeError          a checkpoint does not belong to this run
├── ModelFileError       a model file is broken, too new, or does not fit its method or backbone
├── TrainingError        training cannot go on: the loss is not finite
└── StorageError         a file could not be written; what was saved before is still there

A message says what is wrong, the rule, the value got, and the next move where there is one. The
command line prints it as one line and exits with 2; a traceback is for bugs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LaminaError(Exception):
    """Base class, so that a caller can catch everything lamina raises on purpose."""


class ConfigError(LaminaError, ValueError):
    """A setting has the wrong name, type or range."""


class UnsupportedBackbone(LaminaError, TypeError):
    """The frozen model has a block that lamina does not know how to prompt."""


class ShapeError(LaminaError, ValueError):
    """A tensor does not have the shape that the docstring promises."""


class DataError(LaminaError, ValueError):
    """A data set or stream is missing, broken or not what the method needs."""


class ResumeError(LaminaError, RuntimeError):
    """A checkpoint does not belong to this run."""


class ModelFileError(LaminaError, ValueError):
    """A model file is broken, too new, or does not fit its method or backbone."""


class TrainingError(LaminaError, ArithmeticError):
    """Training cannot go on: the loss is not finite."""


class StorageError(LaminaError, OSError):
    """A file could not be written; what was saved before is still there."""


def unknown(kind: str, name: str, known: Iterable[str], shown: Iterable[str] | None = None) -> str:
    """Return the sentence for a name nobody knows, with the nearest known one.

    Args:
        shown: what is listed where there are too many to list; None lists all.

    >>> unknown("method", "vpt-nps2", ["vpt-nsp2", "vpt-deep"])
    "no method is called 'vpt-nps2'; did you mean 'vpt-nsp2'? Known: vpt-deep, vpt-nsp2"
    >>> unknown("method", "x", ["vpt-nsp2"])
    "no method is called 'x'. Known: vpt-nsp2"
    >>> unknown("setting", "epochs", [])
    "no setting is called 'epochs'; there is none at all"
    """
    known = sorted(known)
    if not known:
        return f"no {kind} is called {name!r}; there is none at all"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"no {kind} is called {name!r}{hint} Known: {', '.join(known if shown is None else sorted(shown))}"
