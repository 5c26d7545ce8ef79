"""A model file: what a continual model learned, in one file that a practitioner keeps.

It is a safetensors file. Its metadata holds one text, JSON under the key "lamina": format, facts, lessons, a skeleton
of the memory in which tensors stand as names, and a checksum of all that and the tensors. It holds no frozen model,
image or pickle. Equal content means equal bytes. What a file says is checked before it is believed: a damaged or
hostile one causes one sentence at worst.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors, save as to_safetensors
from torch import Tensor

from lamina.audit import Lesson
from lamina.config import Settings
from lamina.errors import ModelFileError, StorageError
from lamina.storage import write_whole

FORMAT = 1
#: bytes of a header and values in a text of JSON: more than any model needs, and little to hold in memory
HEADER_LIMIT, VALUE_LIMIT = 16 * 2**20, 2**20
TRIANGLE_FROM = 8  # rows of a symmetric matrix that is stored as its upper triangle
_KEY = "lamina"
_FACTS = ("method", "settings", "backbone", "precision", "seed", "run", "confidence")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool)
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class Said(Settings):
    """What the metadata holds beside format and checksum: the facts of `ModelFile`, and how it is stored."""

    method: str
    settings: dict[str, Any]
    backbone: dict[str, str]
    precision: Literal["bfloat16", "float32"]
    seed: int
    run: dict[str, Any]
    confidence: dict[str, Any]
    lessons: list[dict[str, Any]] = []
    learned: list[str] = []  # names of tensors, without "learned." before them
    memory: list[dict[str, Any]] = []  # a skeleton, in which names stand for tensors
    triangles: list[str] = []  # names of tensors that are stored as their upper triangles


@dataclass(frozen=True, eq=False)
class ModelFile:
    """The content of a model file; two are equal when their checksums are.

    Raises:
        ConfigError, ModelFileError: when a fact has the wrong type or range, or lessons contradict each other.
    """

    method: str
    settings: dict[str, Any]  # of the method; JSON
    backbone: dict[str, str]  # `name` and `fingerprint` of the frozen model
    precision: str  # "bfloat16" or "float32", of the frozen model while learning
    seed: int
    run: dict[str, Any]  # other settings of learning, such as the augmentation; JSON
    confidence: dict[str, Any]  # temperature, thresholds; JSON
    lessons: tuple[Lesson, ...]  # at least one
    learned: dict[str, Tensor]  # a state dict of prompts and head
    memory: list[dict[str, Any]]  # state dicts: nested dicts with text or int keys, lists, tensors, plain values

    def __post_init__(self) -> None:
        Said(**{name: getattr(self, name) for name in _FACTS})
        _require({"name", "fingerprint"} <= set(self.backbone), "backbone must have a name and a fingerprint")
        _require(len(self.lessons) > 0, "lessons must have at least one")
        columns: dict[str, int] = {}
        for place, lesson in enumerate(self.lessons):
            for name, got in zip(lesson.classes, lesson.columns, strict=True):
                column = columns.setdefault(name, len(columns))
                _require(got == column, f"lessons.{place}: the column of class {name!r} must be {column}; got {got}")

    @property
    def classes(self) -> list[str]:
        """Names of the classes (C), by column, which is in order of arrival."""
        return list(dict.fromkeys(name for lesson in self.lessons for name in lesson.classes))

    @property
    def class_tasks(self) -> list[int]:
        """The task, from 0, in which each class (C) first arrived."""
        first = {name: task for task, lesson in reversed([*enumerate(self.lessons)]) for name in lesson.classes}
        return [first[name] for name in self.classes]

    @property
    def checksum(self) -> str:
        """A hash of the content, the one that the file states; ModelFileError when no file can hold the content."""
        return _checksum(*self._stored())

    def write(self, path: Path) -> None:
        """Write the file whole or not at all; the version before it stays beside it, as NAME.bak.

        At every moment there is a whole file at `path` if there was one before, even when the process is killed.
        Two processes must not write one file at once: each would sweep away the other's draft.

        Raises:
            ModelFileError: when a file cannot hold the content; nothing was written.
            StorageError: when it could not be written; what was saved before is still there.
        """
        path = Path(path)
        try:
            said, tensors = self._stored()
            said["checksum"] = _checksum(said, tensors)
            content = to_safetensors(tensors, metadata={_KEY: _text(said)})
            _loaded(io.BytesIO(content), len(content))  # what cannot be read must not take the place of what can
        except (ValueError, RuntimeError, SafetensorError) as error:
            raise ModelFileError(f"{path} was not written: {_line(error)}") from None
        _sweep(path)

        def fill(file: BinaryIO) -> None:
            file.write(content)
            file.flush()
            # The new version is safe on the disk before the last but one is given up.
            os.fsync(file.fileno())
            if path.is_file():
                _keep(path, path.with_name(f"{path.name}.bak"))

        write_whole(path, fill)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # some systems cannot sync a folder
            folder = os.open(path.parent, os.O_RDONLY)
            stack.callback(os.close, folder)
            os.fsync(folder)

    @classmethod
    def read(cls, path: Path) -> ModelFile:
        """Read a file into memory; nothing of it is executed, and it is not kept open.

        Raises:
            ModelFileError: when it is missing, is no model file, is damaged or contradicts itself.
        """
        path = Path(path)
        try:
            if path.is_file():  # to open a pipe would be to wait for its other end
                with path.open("rb") as file:
                    return _loaded(file, os.fstat(file.fileno()).st_size)
            reason = f"{'is not a regular file' if path.exists() else 'does not exist'}; name a model file"
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}; see to that and try again"
        except _Newer as error:
            reason = f"{_line(error)}; update lamina to read it"
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: too deep, or refused by PyTorch
            previous = path.with_name(f"{path.name}.bak")
            before = f"the version before it is {previous}" if previous.is_file() else None
            reason = f"is damaged or no model file: {_line(error)}; {before or 'take it from a copy, or learn again'}"
        raise ModelFileError(f"{path} {reason}")

    def _stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what the metadata says, without the checksum, and the tensors as the file holds them."""
        named = all(isinstance(name, str) for name in self.learned) and all(isinstance(m, dict) for m in self.memory)
        _require(named, "learned must have text as names, and memory must have dicts")
        whole = {f"learned.{name}": value for name, value in self.learned.items()}
        memory = [_packed(state, ("memory", place), whole) for place, state in enumerate(self.memory)]
        tensors, triangles = {}, []
        for name, value in whole.items():
            bits = _bits(name, value)
            rows = bits.shape[-1] if bits.ndim > 1 and bits.shape[-1] == bits.shape[-2] else 0
            if rows >= TRIANGLE_FROM and bits.numel() and torch.equal(bits, bits.mT):
                triangles.append(name)
                bits = torch.cat([bits[..., row, row:] for row in range(rows)], -1)
            tensors[name] = bits.clone().view(value.dtype)  # safetensors refuses tensors that share memory
        return {
            "format": FORMAT,
            **{name: getattr(self, name) for name in _FACTS},
            "lessons": [lesson.model_dump() for lesson in self.lessons],
            "learned": sorted(self.learned),
            "memory": memory,
            "triangles": sorted(triangles),
        }, tensors


class _Newer(ModelFileError):
    """A file of a later format: there is nothing wrong with it."""


def _loaded(file: BinaryIO, size: int) -> ModelFile:
    """Return the content of a file of `size` bytes, checked first by its checksum and then by its meaning."""
    said, tensors = _split(file, size)
    stated = said.pop("checksum", None)
    _require(_checksum(said, tensors) == stated, "its content does not fit its checksum")
    layout = Said(**{name: value for name, value in said.items() if name != "format"})
    for name in layout.triangles:
        tensors[name] = _square(name, _taken(name, tensors))
    model = ModelFile(
        **{name: getattr(layout, name) for name in _FACTS},
        lessons=tuple(Lesson(**lesson) for lesson in layout.lessons),
        learned={name: _taken(f"learned.{name}", tensors) for name in layout.learned},
        memory=[_unpacked(state, ("memory", place), tensors) for place, state in enumerate(layout.memory)],
    )
    _require(not tensors, f"nothing refers to its tensors {', '.join(tensors)}")
    # There is one way to say a thing, so what is read has the checksum that the file states.
    _require(model.checksum == stated, "lamina would write its content in another way")
    return model


def _split(file: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what the metadata says and the tensors; before it has said so, no more than the header is read."""
    length = int.from_bytes(file.read(8), "little")
    _require(size >= 8 and length <= HEADER_LIMIT, f"it has no header of safetensors of at most {HEADER_LIMIT} bytes")
    _require(length <= size - 8, f"it is cut short: its header has {length} bytes, and {size - 8} are there")
    header = _parsed("its header", file.read(length).decode(errors="replace"))
    metadata = header.pop("__metadata__", None)
    named = isinstance(metadata, dict) and list(metadata) == [_KEY] and isinstance(metadata[_KEY], str)
    _require(named, f"it is safetensors, but its metadata is not one text, {_KEY!r}")
    said = _parsed("its metadata", metadata[_KEY])
    version = said.get("format")
    if type(version) is int and version > FORMAT:
        raise _Newer(f"has format {version}, of a newer lamina; this one reads {FORMAT}")
    _require(type(version) is int and version == FORMAT, f"its format must be {FORMAT}; got {version!r}")
    file.seek(0)
    content = file.read()
    try:
        return said, from_safetensors(content)
    except (SafetensorError, KeyError, RuntimeError, TypeError) as error:  # a KeyError is a dtype, the rest a shape
        raise ModelFileError(f"its tensors are cut short or misplaced: {error}") from None


def _packed(value: Any, place: tuple[str | int, ...], tensors: dict[str, Tensor]) -> Any:
    """Return a part of the memory as JSON; its tensors go to `tensors` under the names that stand for them."""
    if isinstance(value, Tensor):
        tensors[_name(place)] = value
        return {"tensor": _name(place)}
    if isinstance(value, dict):
        _require(all(type(key) is int or isinstance(key, str) for key in value), "keys of memory must be text or ints")
        keys = sorted(value, key=lambda key: (isinstance(key, str), key))
        return {"dict": [[key, _packed(value[key], (*place, key), tensors)] for key in keys]}
    if isinstance(value, list):
        return [_packed(each, (*place, index), tensors) for index, each in enumerate(value)]
    return value


def _unpacked(value: Any, place: tuple[str | int, ...], tensors: dict[str, Tensor]) -> Any:
    """Return a part of the memory as it was before it was packed."""
    match value:
        case list():
            return [_unpacked(each, (*place, index), tensors) for index, each in enumerate(value)]
        case {"tensor": name}:
            _require(name == _name(place), f"the tensor {name!r} does not stand in its place")
            return _taken(name, tensors)
        case {"dict": list(pairs)}:
            paired = all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
            _require(paired and all(isinstance(key, int | str) for key, _ in pairs), "its memory has misshapen keys")
            return {key: _unpacked(each, (*place, key), tensors) for key, each in pairs}
    return value


def _name(place: tuple[str | int, ...]) -> str:
    """Return the name of the tensor at a place; a key that could be taken for two, or for an int, is quoted."""
    plain = [isinstance(part, int) or (part.isascii() and part.isidentifier()) for part in place]
    return ".".join(str(part) if fits else json.dumps(part) for part, fits in zip(place, plain, strict=True))


def _taken(name: str, tensors: dict[str, Tensor]) -> Tensor:
    _require(name in tensors, f"its tensor {name!r} is missing")
    return tensors.pop(name)


def _bits(name: str, value: Any) -> Tensor:
    """Return a tensor's bits as whole numbers of the same width, on the CPU."""
    fits = isinstance(value, Tensor) and value.dtype in _DTYPES and value.layout is torch.strided
    _require(fits, f"{name} must be a dense tensor of {_DTYPES}; got {getattr(value, 'dtype', type(value))}")
    value = value.detach().cpu().contiguous()
    _require(bool(value.isfinite().all()), f"{name} has values that are not finite")
    bits = value.view(_BITS[value.element_size()])
    _require(value.dtype != torch.bool or not bool((bits > 1).any()), f"{name} has booleans that are not 0 or 1")
    return bits


def _square(name: str, triangle: Tensor) -> Tensor:
    """Return symmetric matrices (..., n, n) from their upper triangles (..., n (n + 1) / 2), row by row."""
    numbers = triangle.shape[-1] if triangle.ndim and triangle.numel() else 0
    rows = (math.isqrt(8 * numbers + 1) - 1) // 2
    _require(rows > 0 and rows * (rows + 1) // 2 == numbers, f"{name!r} is the upper triangle of nothing")
    square = triangle.new_empty(*triangle.shape[:-1], rows, rows)
    for row, part in enumerate(triangle.split(list(range(rows, 0, -1)), -1)):
        square[..., row, row:] = part
        square[..., row:, row] = part
    return square


def _checksum(said: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(_text(said).encode(), digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(_text([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _text(value: Any) -> str:
    """Return JSON, of a value that JSON gives back as it was: without NaN, tuples or halves of characters."""
    try:
        text = json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
        exact = json.loads(json.dumps(value, ensure_ascii=False).encode()) == value
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelFileError(f"it has a value that JSON lacks: {error}") from None
    _require(exact, "it has a value that JSON would change: a tuple, or a key that is not text")
    return text


def _parsed(what: str, text: str) -> dict[str, Any]:
    _require(sum(map(text.count, ",[{")) <= VALUE_LIMIT, f"{what} has more than {VALUE_LIMIT} values")
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{what} is not JSON: {error}") from None
    _require(isinstance(value, dict), f"{what} is not an object of JSON")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    _require(len(values) == len(pairs), "a key stands twice in one object")
    return values


def _require(fits: bool, rule: str) -> None:
    if not fits:
        raise ModelFileError(rule)


def _line(message: object) -> str:
    """Return a message as one line, of a length that a terminal can show."""
    return "".join(character if character.isprintable() else "?" for character in str(message)[:400])


def _keep(path: Path, previous: Path) -> None:
    """Make `previous` the version that is at `path`."""
    # No other draft may have this name: to write to it would be to write to the file at `path`.
    link = path.with_name(f".{path.name}.{os.getpid()}.link.draft")
    try:
        os.link(path, link)
        os.replace(link, previous)
    except OSError:  # there are no hard links here
        try:
            write_whole(previous, path.read_bytes())
        except StorageError as error:
            raise StorageError(str(error).removesuffix("; what was saved before is still there")) from error
    finally:
        # It is still there if both were one version already, for then there was nothing to replace.
        link.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove the drafts of this file that killed processes left."""
    draft = re.compile(rf"\.{re.escape(path.name)}(\.bak)?\.[0-9]+(\.link)?\.draft")
    with contextlib.suppress(OSError):
        for name in filter(draft.fullmatch, os.listdir(path.parent)):
            os.unlink(path.parent / name)
