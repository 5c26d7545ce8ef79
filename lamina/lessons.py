"""Learning from a folder into a model file, safe against crashes and against a second hand.

Beside MODEL there may be: MODEL.bak, the version before; `.MODEL.learning`, the work on a lesson that is
not finished; `.MODEL.lock`, held while one is learned. MODEL itself is replaced as a whole, at the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from lamina.audit import Lesson
from lamina.continual import ContinualModel, Material
from lamina.data.cache import cache_in
from lamina.data.folder import held_out, labelled_folder
from lamina.errors import ConfigError, DataError, LaminaError, ResumeError, StorageError, TrainingError
from lamina.modelfile import ModelFile
from lamina.storage import write_whole
from lamina.text import printable
from lamina.training.launch import Precision
from lamina.training.progress import Progress

_NOTES = "lesson.json"


class Learned(NamedTuple):
    """What came of a lesson.

    Attributes:
        lesson: its line of the audit trail.
        file: the model file as it is now.
        texts: what is read of each class of the lesson, by name; empty for a method that reads no names.
        left: how many more lessons there is room for; None where nothing limits them.
        before: the lesson had been finished by an earlier call that could not clean up after itself.
    """

    lesson: Lesson
    file: ModelFile
    texts: dict[str, str]
    left: int | None
    before: bool = False


def learn_folder(
    path: Path,
    folder: Path,
    *,
    method: str | None = None,
    backbone: str | None = None,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
    existing: Literal["refuse", "extend"] = "refuse",
    holdout: float = 0.1,
    seed: int | None = None,
    precision: Precision | None = None,
    augmentation: str | None = None,
    accelerator: str = "auto",
    skip_broken: bool = False,
    discard: bool = False,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Learned:
    """Learn the classes of FOLDER/CLASS/* and keep them in a model file, which is made if it is not there.

    Called again after a crash it goes on where it stood. What was chosen when the file was made (method,
    backbone, seed, precision, augmentation) stays; None takes it, or the default.

    Args:
        settings: of the method; those that shape what was learned cannot change any more.
        name: what to call the lesson.
        existing: what to do about classes that the file knows already.
        holdout: share of the images of each class that is kept aside to measure and calibrate.
        skip_broken: leave out images that cannot be read; otherwise one of them is an error.
        discard: drop an unfinished lesson from another folder.

    Raises:
        LaminaError: for everything that a user can mend; the file is as it was.
        Stopped: when `should_stop` says so; the same call goes on.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; a model is kept in a file, for example {path / 'shop.lamina'}")
    if path.is_symlink():
        path = path.resolve()  # else the new file would take the place of the link, and two names have two locks
    with _alone(path):
        file = ModelFile.read(path) if path.exists() else None
        work = path.with_name(f".{path.name}.learning")
        notes = {"folder": str(folder.expanduser().absolute()), "base": file.checksum if file is not None else None}
        waiting = _notes(work)
        again = waiting is not None and waiting["folder"] == notes["folder"]
        done = file is not None and waiting is not None and _is_in(file, waiting)
        if done or discard:
            _remove(work)  # when done, whoever learned it was killed after the file was written
        elif waiting is not None and waiting != notes:
            raise ResumeError(_in_the_way(path, waiting["folder"], again))
        with _workplace(work, notes):
            model = _opened(file, path, method, backbone, settings, seed, precision, augmentation, accelerator)
            with cache_in(work):
                material = _material(folder, model, holdout, skip_broken)
                if file is not None and done and again and file.lessons[-1].data == material.fingerprint:
                    return _learned(file.lessons[-1], file, model, before=True)
                lesson = model.learn(
                    material,
                    name=name,
                    existing=existing,
                    base=notes["base"],
                    work=work,
                    progress=progress,
                    should_stop=should_stop,
                )
            written = model.file()
            written.write(path)
        return _learned(lesson, written, model)


def _learned(lesson: Lesson, file: ModelFile, model: ContinualModel, before: bool = False) -> Learned:
    said = {name: model.model.head.says(c) for name, c in zip(lesson.classes, lesson.columns, strict=True)}
    texts = {name: text for name, text in said.items() if text is not None}
    return Learned(lesson, file, texts, model.model.tasks_left, before)


def _opened(
    file: ModelFile | None,
    path: Path,
    method: str | None,
    backbone: str | None,
    settings: Mapping[str, Any] | None,
    seed: int | None,
    precision: Precision | None,
    augmentation: str | None,
    accelerator: str,
) -> ContinualModel:
    if file is None:
        given = {"method": method, "backbone": backbone, "seed": seed, "augmentation": augmentation}
        values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        return ContinualModel(**values, settings=settings, precision=precision or "auto", accelerator=accelerator)
    kept = {
        "method": (method, file.method),
        "backbone": (backbone, file.backbone["name"]),
        "seed": (seed, file.seed),
        "augmentation": (augmentation, file.run.get("augmentation")),
    }
    for what, (asked, had) in kept.items():
        if asked is not None and asked != had:
            raise ConfigError(
                f"{path} was begun with {what} {had!r} and keeps it; got {asked!r}. Make another model for it"
            )
    if settings and "names" in settings:  # descriptions of old classes stay, those of new ones join them
        settings = {**settings, "names": {**file.settings.get("names", {}), **settings["names"]}}
    return ContinualModel.load(file, settings=settings, precision=precision, accelerator=accelerator)


def _material(folder: Path, model: ContinualModel, holdout: float, skip_broken: bool) -> Material:
    names, files = labelled_folder(folder, model.spec.max_side)
    wanted = np.arange(len(files.labels))
    images = files.opened(wanted, skip_broken)
    good = np.setdiff1d(wanted, images.broken)
    lost = sorted(set(range(len(names))) - set(files.labels[good].tolist()))
    if lost:
        raise DataError(
            f"class {names[lost[0]]!r} in {folder} has no image that can be read; mend or remove its folder"
        )
    aside = held_out(files.labels[good], holdout, model.seed, [files.paths[index].name for index in good])
    return Material(images, names, train=good[~aside], held=good[aside], skipped=len(images.broken))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of a model file; it goes with the process, however that ends."""
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ResumeError(
            f"{path} is being taught by another process; wait until it is done, then run this again"
        ) from None
    except OSError as error:
        raise StorageError(f"{path} could not be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _workplace(work: Path, notes: dict[str, Any]) -> Iterator[None]:
    """Make the folder of a lesson; it goes when the lesson is done, or when nothing in it is worth keeping."""
    write_whole(work / _NOTES, json.dumps(notes))
    try:
        yield
    except ResumeError as error:
        raise ResumeError(f"{error}. Give what was given before, or --discard to begin the lesson anew") from None
    except TrainingError:
        _remove(work)  # going on from the same state would end the same way
        raise
    except LaminaError:
        if not any(work.glob("state.pt")):
            _remove(work)
        raise
    _remove(work)


def _notes(work: Path) -> dict[str, Any] | None:
    """Return which lesson a work folder belongs to, or None if there is none to go on with."""
    try:
        notes = json.loads((work / _NOTES).read_text())
        return {"folder": str(notes["folder"]), "base": notes["base"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_in(file: ModelFile, notes: Mapping[str, Any]) -> bool:
    """Say whether the lesson of a work folder is the file's last one."""
    return bool(file.lessons) and file.lessons[-1].base == notes["base"] != file.checksum


def _in_the_way(path: Path, folder: str, again: bool) -> str:
    if again:
        return (
            f"a lesson from {printable(folder)} is not finished, and {path} is another than it was begun with: put "
            "that one back, or give --discard to begin the lesson anew"
        )
    return (
        f"a lesson from {printable(folder)} is not finished: run `lamina learn` on that folder again, or give "
        "--discard to drop it"
    )


def _remove(work: Path) -> None:
    """Remove a work folder; its notes go last, so that what a crash leaves of it is not taken for nobody's."""
    with suppress(OSError):
        for place in work.iterdir():
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place, ignore_errors=True)
            elif place.name != _NOTES:
                place.unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
