"""What is kept as JSON: read whole, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from lamina.errors import DataError
from lamina.storage import write_whole


class Written:
    """Something with fields that a file of JSON holds, one field a line."""

    def as_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        raise NotImplementedError

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read it.

        Raises:
            DataError: when the file cannot be read, is not JSON, or holds something else.
        """
        values = read_json(Path(path))
        try:
            return cls.from_dict(values)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    def write(self, path: Path) -> None:
        """Write it whole or not at all.

        Raises:
            DataError: when a field holds what JSON cannot.
            StorageError: when it could not be written; what was saved before is still there.
        """
        lines = []
        for name, value in self.as_dict().items():
            try:
                lines.append(f" {json.dumps(name)}: {json.dumps(value, allow_nan=False, ensure_ascii=False)}")
            except (TypeError, ValueError) as error:
                raise DataError(f"{type(self).__name__}.{name} cannot be written as JSON: {error}") from None
        # One field per line: short enough to read, and a change shows as the lines that changed.
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        # A name of a file that is not UTF-8 holds lone surrogates; with a backslash they are JSON.
        write_whole(Path(path), text.encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> Any:
    """Return what a file of JSON says; DataError when it cannot be read or holds a NaN."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number of JSON")
