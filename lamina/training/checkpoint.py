"""Save, find and check the state of a run, so that a crash at any moment loses little and breaks nothing."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lamina.errors import ResumeError
from lamina.storage import write_whole

FORMAT = 2
STATE, LEARNED = "state.pt", "learned.safetensors"


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run to `folder`; until that is done, the state saved before stays whole.

    Raises:
        StorageError: when the file cannot be written.
    """
    write_whole(folder / STATE, lambda file: torch.save({"format": FORMAT, **state}, file))


def save_learned(folder: Path, learned: Mapping[str, Tensor]) -> None:
    """Write what was learned, without the frozen tower, as safetensors.

    Raises:
        StorageError: when the file cannot be written.
    """
    blob = to_safetensors({name: value.detach().cpu().contiguous().clone() for name, value in learned.items()})
    write_whole(folder / LEARNED, blob)


def load(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the state of a run, or None if none was saved yet.

    Args:
        folder: of the run.
        identity: what must be the same in the checkpoint, by name: settings, stream, backbone, seed.

    Raises:
        ResumeError: when the file is broken, of another format, or of another run; the message names
            the first setting that differs and both values.
    """
    path = folder / STATE
    for draft in folder.glob(f".{STATE}.*.draft"):  # left by a process that was killed while it saved
        draft.unlink(missing_ok=True)
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ResumeError(f"{path} cannot be read ({_line(error)}); delete it to start this run anew") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        got = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ResumeError(f"{path} has checkpoint format {got!r}; this version of lamina reads format {FORMAT}")
    for name, (then, now) in differences(state["identity"], identity).items():
        raise ResumeError(f"{path} was made with {name} = {then!r}; this run has {now!r}")
    return state


def differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return every entry in which two nested mappings differ, by dotted name, with both values.

    >>> differences({"seed": 1, "settings": {"lr": 0.1}}, {"seed": 1, "settings": {"lr": 0.2}})
    {'settings.lr': (0.1, 0.2)}
    """
    out: dict[str, tuple[Any, Any]] = {}
    for name in [*now, *(name for name in then if name not in now)]:
        a, b = then.get(name), now.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out |= differences(a, b, f"{prefix}{name}.")
        elif a != b:
            out[prefix + name] = (a, b)
    return out


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
