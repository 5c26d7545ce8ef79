"""Images to predict on: found by name, decoded ahead by threads, handed over in order.

Whatever cannot be read keeps its place, with a reason instead of pixels, so that one bad file among many never
costs the others their answer.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatchcase
from glob import has_magic
from itertools import dropwhile, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamina.data.decode import MOST_BYTES, SUFFIXES, decode_image, reason
from lamina.data.transforms import Transform
from lamina.errors import ConfigError

#: images in flight for each worker: enough that the next batch is decoded while the model looks at this one
_AHEAD = 16

_WORKERS = min(8, os.cpu_count() or 1)


class Incoming(NamedTuple):
    """An image to predict on, or why there is none.

    Attributes:
        path: as it was found, not made safe to print; see `lamina.text.printable`.
        pixels: (3, size, size), uint8, ready for normalisation. None for an image that cannot be read.
        error: why it cannot be read, in one line that is safe to print, without the path. None for one that can.
    """

    path: str
    pixels: Tensor | None
    error: str | None


def expand(arguments: Sequence[str], stdin: Iterable[str] | None) -> Iterator[Path | Incoming]:
    """Yield the images that the words of a command line mean, in order.

    A file is taken as given, whatever its suffix; so is a name that nothing has, to be refused where it is
    opened. Of a folder come all images below it, sorted; hidden names and links to folders are passed over.

    A name that nothing has and that holds `*`, `?` or `[` is a pattern: `**` stands for folders at any depth,
    and unless it ends in a suffix, it means images only. `-` means one path per line of `stdin`, read only as
    far as images are asked for. Every `Incoming` here holds an error: a folder or pattern without images.
    """
    for argument in arguments:
        if argument == "-":
            yield from _listed(stdin)
        elif not argument:
            # as a path it would be the folder one is in; more likely it was to be something else
            yield Incoming("", None, "the name is empty")
        elif os.path.lexists(argument) or not has_magic(argument):
            yield from _found(Path(argument))
        else:
            yield from _matching(argument)


def incoming(
    paths: Iterable[Path | Incoming], transform: Transform, max_side: int, workers: int = _WORKERS
) -> Iterator[Incoming]:
    """Yield every image, decoded and transformed, in the order of `paths`.

    Pixels are those that a model learns from: of `DecodedImages`, through the same transform. A bounded number
    of images is in work or waiting, however many there are and however slow the caller is. Whoever stops early
    waits for the few images that are being decoded, and leaves no thread at work.

    Args:
        paths: as from `expand`; an `Incoming` among them is handed on in its place.
        transform: one that draws no random numbers, as "plain".
        max_side: as of the images that the model learned from; see `lamina.data.decode.Encoded`.
    """
    waiting: deque[Future[Incoming] | Incoming] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for path in paths:
            waiting.append(path if isinstance(path, Incoming) else pool.submit(_read, path, transform, max_side))
            if len(waiting) >= _AHEAD * workers:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def batches(incoming: Iterator[Incoming], size: int) -> Iterator[list[Incoming]]:
    """Yield images in groups of `size`, the last one smaller; order is kept, and broken ones keep their place.

    Raises:
        ConfigError: when the size is below 1.
    """
    if size < 1:
        raise ConfigError(f"a batch holds at least 1 image; got {size}")
    try:
        while batch := list(islice(incoming, size)):
            yield batch
    finally:
        # a caller that fails holds on to both; its threads should end now
        if isinstance(incoming, Generator):
            incoming.close()


def _result(waited: Future[Incoming] | Incoming) -> Incoming:
    return waited if isinstance(waited, Incoming) else waited.result()


def _read(path: Path, transform: Transform, max_side: int) -> Incoming:
    try:
        # a copy: torch wants memory that it may write to, and other strides could be resized by another kernel
        image = torch.from_numpy(np.array(decode_image(_contents(path), max_side), order="C"))
        # a crop would keep the whole of what it was cut from
        return Incoming(str(path), transform(image).contiguous(), None)
    # the decoders raise almost anything for a file that is not an image
    except Exception as error:
        return Incoming(str(path), None, reason(error))


def _contents(path: Path) -> bytes:
    """Return a file's bytes; ValueError, with the reason, for what is not a file that should be read."""
    try:
        # before it is opened: opening a pipe waits until somebody writes to it
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ValueError("it is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a file but a device, pipe or socket")
        if status.st_size > MOST_BYTES:
            raise ValueError(f"it has {status.st_size / 1e6:.0f} MB; at most {MOST_BYTES / 1e6:.0f} MB are read")
        if not status.st_size:
            raise ValueError("it is empty")
        with path.open("rb") as file:
            return file.read(MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError("it is a link to nothing" if path.is_symlink() else "there is no such file") from None
    except OSError as error:
        raise ValueError(f"it cannot be opened: {error.strerror or error}") from None


def _listed(stdin: Iterable[str] | None) -> Iterator[Path | Incoming]:
    if stdin is None:
        yield Incoming("-", None, "there is no standard input to read paths from")
        return
    try:
        for line in stdin:
            # other space belongs to the name
            if name := line.rstrip("\r\n"):
                yield from _found(Path(name))
    except UnicodeDecodeError:
        yield Incoming("-", None, "standard input is not UTF-8; not all of its paths were read")


def _found(path: Path) -> Iterator[Path | Incoming]:
    """Yield the images of a folder, or whatever else the path is, as given."""
    if not os.path.isdir(path):
        yield path
        return
    empty = True
    for image in _below(path):
        empty = False
        yield image
    if empty:
        yield Incoming(str(path), None, f"it is a folder without images ({', '.join(sorted(SUFFIXES))})")


def _below(root: Path) -> Iterator[Path | Incoming]:
    """Yield all images below a folder, sorted by path, and an error for each folder that cannot be read."""
    # a stack, because folders can be nested deeper than functions
    waiting = [(root, True)]
    while waiting:
        path, is_folder = waiting.pop()
        if not is_folder:
            yield path
            continue
        try:
            entries = _entries(path)
        except OSError as error:
            yield Incoming(str(path), None, f"the folder cannot be read: {error.strerror or error}")
            continue
        for entry in reversed(entries):
            if not entry.name.startswith("."):
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((path / entry.name, True))
                elif _is_image(entry.name) and not os.path.isdir(entry):
                    waiting.append((path / entry.name, False))


def _matching(pattern: str) -> Iterator[Path | Incoming]:
    parts = Path(pattern).parts
    absolute = parts[:1] == (Path(pattern).anchor,)
    found = set(_matches(Path(parts[0]) if absolute else Path(), parts[1:] if absolute else parts))
    # what lies in a folder that `**` meets is met as well
    folders = [] if "**" in parts else [path for path in found if os.path.isdir(path)]
    files = [path for path in found if not os.path.isdir(path) and (Path(pattern).suffix or _is_image(path.name))]
    for path in sorted(folders + files):
        yield from _found(path)
    if not folders and not files:
        yield Incoming(pattern, None, "there is no file of this name, and no image matches it as a pattern")


def _matches(root: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield what matches a pattern's parts below a folder, some of it twice.

    glob's own `**` follows links to folders, and two that lead back keep it busy for ever.
    """
    if not parts:
        yield root
    elif parts[0] == "**":
        rest = list(dropwhile(lambda part: part == "**", parts)) or ["*"]
        for folder in _folders_below(root):
            yield from _matches(folder, rest)
    elif not has_magic(parts[0]):
        if os.path.lexists(root / parts[0]):
            yield from _matches(root / parts[0], parts[1:])
    else:
        for entry in _entries_or_none(root):
            hidden = entry.name.startswith(".") and not parts[0].startswith(".")
            if not hidden and fnmatchcase(entry.name, parts[0]):
                yield from _matches(root / entry.name, parts[1:])


def _folders_below(root: Path) -> Iterator[Path]:
    waiting = [root]
    while waiting:
        yield (path := waiting.pop())
        for entry in _entries_or_none(path):
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                waiting.append(path / entry.name)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _entries_or_none(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return _entries(folder)
    except OSError:
        return []


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES
