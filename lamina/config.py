"""Settings: pydantic models whose fields carry their limits; TOML in and out; `--set name=value`.

A setting is written once, in the model of the thing it sets. From that one field come the Python
argument, the TOML key, the `--set` option, the check, the help text and the row in the docs.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from lamina.errors import ConfigError, unknown
from lamina.storage import write_whole


class Settings(BaseModel):
    """Base of every model of settings: frozen, strict about types, closed to unknown names.

    Raises:
        ConfigError: when a value has the wrong name, type or range.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_sentence(type(self), error)) from None

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """Read settings from a TOML file."""
        return cls(**read_toml(path))

    def idle(self) -> dict[str, str]:
        """Return the settings that change nothing as the others stand, each with what makes it so."""
        return {}

    def heed(self, given: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
        """Make sure that what somebody asked for has an effect.

        Args:
            given: settings that were given by hand; those that are as usual are let be.
            usual: what settings would be otherwise; those that are not in it have their defaults.

        Raises:
            ConfigError: when one of them changes nothing.
        """
        idle = self.idle()
        for name, value in given.items():
            if name in idle and value != usual.get(name, type(self).model_fields[name].default):
                raise ConfigError(f"{name} changes nothing {idle[name]}; leave it out, or change that")

    def changed(self) -> dict[str, Any]:
        """Return only what differs from the defaults."""
        return self.model_dump(exclude_defaults=True)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: when the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def write_toml(path: Path, values: Mapping[str, Any]) -> None:
    """Write a TOML file, whole or not at all; values of None, which TOML lacks, are left out.

    Raises:
        StorageError: when it cannot be written.
    """
    write_whole(path, tomli_w.dumps(_without_none(values)))


def assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """Turn `a.b=c` options into nested settings; a value is read as TOML, or else as text.

    >>> assignments(["lr=3e-3", "stream.classes=odd", "sizes=[5, 5]"])
    {'lr': 0.003, 'stream': {'classes': 'odd'}, 'sizes': [5, 5]}

    Raises:
        ConfigError: when an option has no `=` or no name.
    """
    out: dict[str, Any] = {}
    for pair in pairs:
        path, equals, text = pair.partition("=")
        *outer, last = path.strip().split(".")
        if not equals or not all([*outer, last]):
            raise ConfigError(f"--set takes name=value; got {pair!r}")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        place = out
        for name in outer:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {pair!r}: {name!r} was already given a plain value")
        place[last] = value
    return out


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _without_none(v) if isinstance(v, Mapping) else v for k, v in values.items() if v is not None}


#: pydantic's kinds of error, in our words; {name} comes from the error's own context
_RULES = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "literal_error": "must be {expected}",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
}


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    """Return what is wrong with the first field at fault, the rule and the value got."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{model.__name__}: " + unknown("setting", path, model.model_fields)
    if first["type"] == "missing":
        return f"{model.__name__}.{path} has no default and was not given"
    got = first["input"]
    if first["type"] == "value_error":
        inner = first["ctx"]["error"]
        return str(inner) if isinstance(inner, ConfigError) else f"{model.__name__}{'.' + path if path else ''} {inner}"
    rule = _limits(model, path) if first["type"].startswith(("greater", "less")) else None
    rule = rule or _RULES.get(first["type"], first["msg"].lower()).format(**first.get("ctx", {}))
    kind = f" ({type(got).__name__})" if first["type"].endswith("_type") else ""
    return f"{model.__name__}.{path} {rule}; got {got!r}{kind}"


def _limits(model: type[BaseModel], path: str) -> str | None:
    """Return "must be between a and b" for a field that is bounded on both sides."""
    field = model.model_fields.get(path)
    bounds = {
        name: getattr(mark, name)
        for mark in (field.metadata if field else [])
        for name in ("ge", "le")
        if hasattr(mark, name)
    }
    return f"must be between {bounds['ge']} and {bounds['le']}" if len(bounds) == 2 else None
