"""Prompt-based continual learning of frozen vision transformers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.estimator import ContinualClassifier as ContinualClassifier

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # not before it is asked for: the command line starts without torch
    if name == "ContinualClassifier":
        from lamina.estimator import ContinualClassifier

        return ContinualClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
