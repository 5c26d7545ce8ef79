"""Write a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from lamina.errors import StorageError


def write_whole(path: Path, content: str | bytes | Callable[[BinaryIO], Any]) -> None:
    """Write a file by way of a draft beside it, so that a reader never sees half of it.

    Args:
        content: what to write, or a function that writes it to an open file.

    Raises:
        StorageError: when it cannot be written; an older file of that name is untouched.
    """
    # The process's number keeps two writers from sharing one draft.
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            # Without it, a power cut after the rename can leave an empty file under the final name.
            os.fsync(file.fileno())
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
        kept = "; what was saved before is still there" if path.exists() else ""
        raise StorageError(f"{path} could not be written: {reason}{kept}") from error
