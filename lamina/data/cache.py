"""Arrays on disk that are computed once: decoded images, features of a frozen model.

A cache file is a `.npy` array with a checksum behind it. It is filled as a draft beside its final place and
renamed when whole, so two processes that need the same array both get it, and a crash leaves no half of one.
"""

from __future__ import annotations

import errno
import os
import re
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lamina.errors import StorageError

Fill = Callable[[np.ndarray], None]

#: a draft this old was left by a process that died
_STALE_SECONDS = 24 * 3600

_MARK = b"lamina-1"


#: where `cache_in` keeps arrays for the moment
_HERE: ContextVar[Path | None] = ContextVar("here", default=None)


@contextmanager
def cache_in(folder: Path | None) -> Iterator[None]:
    """Inside, cached arrays lie in `folder`, so that whoever owns it can throw them away; None changes nothing."""
    token = _HERE.set(folder if folder is not None else _HERE.get())
    try:
        yield
    finally:
        _HERE.reset(token)


def cache_root() -> Path:
    """Return where cached arrays lie: as `cache_in` says, or LAMINA_CACHE, or `lamina` in the user's cache folder."""
    if (here := _HERE.get()) is not None:
        return here
    if own := os.environ.get("LAMINA_CACHE"):
        return Path(own).expanduser()
    return user_cache()


def user_cache() -> Path:
    """Return lamina's part of the user's cache folder; XDG_CACHE_HOME is honoured."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache") / "lamina"


def cached_array(
    key: str,
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
    fill: Fill,
    *,
    kind: str = "decoded",
) -> np.ndarray:
    """Return the array called `key`, from disk if it is there, else filled by `fill` and kept.

    A file that is cut short, damaged or of another shape or type is made anew. Where nothing can be written,
    the array lives in memory.

    Args:
        key: names the contents: whatever `fill` depends on must be hashed into it.
        fill: writes every element of the zeroed array that it is given.
        kind: the folder inside `cache_root()`.

    Returns:
        An array of `shape` and `dtype` that cannot be written to; memory-mapped when it lies on disk.

    Raises:
        StorageError: when the disk is full.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}", key):
        raise ValueError(f"a cache key is made of letters, digits, '.', '_' and '-'; got {key!r}")
    dtype = np.dtype(dtype)
    path = cache_root() / kind / f"{key}.npy"
    # an empty array cannot be mapped and costs nothing to make
    if 0 in shape:
        return _in_memory(shape, dtype, fill)
    found = _opened(path, shape, dtype)
    return found if found is not None else _made(path, shape, dtype, fill)


def _made(path: Path, shape: tuple[int, ...], dtype: np.dtype, fill: Fill) -> np.ndarray:
    draft = path.with_name(f"{path.stem}.{os.getpid()}-{uuid.uuid4().hex[:8]}.draft")
    try:
        array = _reserved(draft, shape, dtype)
    except OSError as error:
        _remove(draft)
        _refuse_full_disk(error, path)
        return _in_memory(shape, dtype, fill)
    try:
        fill(array)
        array.flush()
        _publish(draft, path, array)
    except BaseException as error:
        _remove(draft)
        if isinstance(error, OSError):
            _refuse_full_disk(error, path)
        raise
    array.flags.writeable = False
    return array


def _reserved(draft: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """Map a new file with all blocks allocated: a full disk met later, through the map, kills the process."""
    draft.parent.mkdir(parents=True, exist_ok=True)
    for old in draft.parent.glob("*.draft"):
        if time.time() - old.stat().st_mtime > _STALE_SECONDS:
            old.unlink(missing_ok=True)
    array = np.lib.format.open_memmap(draft, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with draft.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes + len(_trailer(0)))
            file.truncate(array.offset + array.nbytes)
    return array


def _publish(draft: Path, path: Path, array: np.ndarray) -> None:
    with draft.open("ab") as file:
        file.write(_trailer(zlib.crc32(array.data)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _opened(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap | None:
    """Return the array in a file, or None when it is not there or not what it should be."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        if array.shape != shape or array.dtype != dtype:
            return None
        with path.open("rb") as file:
            file.seek(array.offset + array.nbytes)
            trailer = file.read()
    # a damaged header makes numpy raise almost anything
    except Exception:
        return None
    return array if trailer == _trailer(zlib.crc32(array.data)) else None


def _trailer(checksum: int) -> bytes:
    return _MARK + checksum.to_bytes(4, "big")


def _in_memory(shape: tuple[int, ...], dtype: np.dtype, fill: Fill) -> np.ndarray:
    array = np.zeros(shape, dtype)
    fill(array)
    array.flags.writeable = False
    return array


def _remove(draft: Path) -> None:
    with suppress(OSError):
        draft.unlink()


def _refuse_full_disk(error: OSError, path: Path) -> None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise StorageError(
            f"the disk is full: {path} could not be written; make room, or name another folder in LAMINA_CACHE"
        ) from None
