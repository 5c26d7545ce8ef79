"""What the commands around a model file print."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lamina.cli.shared import print_table

#: so many classes are told with what is read of them
_SHOWN = 3


def lesson_lines(done: Any) -> Iterator[str]:
    """Say in a few lines what came of a lesson: a `lamina.lessons.Learned`."""
    from lamina.confidence import FEW
    from lamina.text import printable

    lesson, file = done.lesson, done.file
    named = f" ({printable(lesson.name)})" if lesson.name else ""
    skipped = f", {lesson.skipped} skipped" if lesson.skipped else ""
    yield f"lesson {len(file.lessons)}{named}: {', '.join(map(printable, lesson.classes))}"
    known = f"classes in all: {len(file.classes)}"
    yield f"learned from {images(lesson.images)}, {lesson.held_out} held out{skipped}; {known}"
    if lesson.accuracy is not None:
        yield f"accuracy on the images held out, choosing among all classes: {100 * lesson.accuracy:.1f} %"
    if lesson.held_out < FEW:
        yield f"with fewer than {FEW} images held out, probabilities and novelty are rough"
    if lesson.drift is not None:
        yield moved_line(lesson.drift)
    if done.texts:
        shown = [f"{printable(name)} as {text!r}" for name, text in list(done.texts.items())[:_SHOWN]]
        more = f" and {len(done.texts) - _SHOWN} more" if len(done.texts) > _SHOWN else ""
        yield f"reads {'; '.join(shown)}{more}"
    if done.left is not None:
        yield room_line(file.method, done.left)


def usual_line(method: str, given: Mapping[str, Any]) -> str:
    """Say which settings of a method are for lessons other than its defaults; nothing where none has an effect."""
    from lamina.continual import lesson_settings
    from lamina.registry import method_class

    usual = lesson_settings(method)
    idle = method_class(method)(**{**usual, **given}).idle()
    said = [f"{name}={json.dumps(value)}" for name, value in usual.items() if name not in {*idle, *given}]
    return f"settings for lessons: {', '.join(said)}" if said else ""


def room_line(method: str, lessons: int) -> str:
    """Say how many more lessons a model that can hold so many and no more has room for."""
    if not lessons:
        return f"room for new tasks: none is left, so {method} can take no further lesson"
    return f"room for new tasks: {lessons} more {'lesson' if lessons == 1 else 'lessons'}"


def images(count: int) -> str:
    """Return a number of images, in the plural where it must be."""
    return f"{count} image{'' if count == 1 else 's'}"


def moved_line(drift: Any) -> str:
    """Say how far old classes may have moved, and whether what they share with new ones has learned on."""
    if not drift.retrained:
        return _moved(drift)
    return (
        f"{_moved(drift, of_classes=False)}; but what the classifier has for all classes learned on, without old "
        "images, so old classes may have been forgotten: `lamina evaluate` on images of theirs tells"
    )


def _moved(drift: Any, *, of_classes: bool = True) -> str:
    if drift.old is None or drift.bound is None:
        return (
            f"how far old classes moved is not known: features of the new images moved by {percent(drift.new)} of the "
            "spread of old features, and those of old images may have moved as far"
        )
    if drift.new == 0:
        said = "this lesson left all features as they were"
        return f"old classes have not moved: {said}" if of_classes else said
    return (
        f"old features moved by an estimated {percent(drift.old)} of their spread (worst case of a step that long: "
        f"{percent(drift.bound)}), new ones by {percent(drift.new)}"
    )


def percent(value: float) -> str:
    """Return a fraction in percent."""
    return f"{100 * value:.1f} %"


def print_inspected(known: dict[str, Any], file: Any) -> None:
    """Print what `inspect` found."""
    from lamina.text import printable

    print(f"model      {known['model']}, {known['bytes'] / 1e6:.2f} MB, checksum {known['checksum']}")
    settings = ", ".join(f"{key} {value}" for key, value in file.settings.items())
    print(f"method     {printable(f'{file.method}: {settings}' if settings else file.method)}")
    backbone = f"{file.backbone['name']}, fingerprint {file.backbone['fingerprint']}, {file.precision}"
    print(f"backbone   {printable(backbone)}")
    print_table(
        [
            {
                "lesson": number,
                "name": lesson.name or "",
                "date": lesson.date,
                "classes": ", ".join(lesson.classes),
                "images": lesson.images,
                "held out": lesson.held_out,
                "accuracy (%)": None if lesson.accuracy is None else round(100 * lesson.accuracy, 1),
                "seconds": None if lesson.seconds is None else round(sum(lesson.seconds.values()), 1),
                "old features moved (%)": _drift_percent(lesson.drift, "old"),
                "worst step (%)": _drift_percent(lesson.drift, "bound"),
            }
            for number, lesson in enumerate(file.lessons, 1)
        ]
    )
    last = file.lessons[-1].drift if file.lessons else None
    if known["room"]:
        print_table(_rooms(known["room"], last), title="room for new tasks, by block")
    elif "room_unknown" in known:
        print(f"room for new tasks: unknown, {printable(known['room_unknown'])}")
    elif known["lessons_left"] is None:
        print(f"room for new tasks: {file.method} limits no step")
    if known.get("lessons_left") is not None:
        print(room_line(file.method, known["lessons_left"]))
    if last is not None:
        print(moved_line(last))


def _drift_percent(drift: Any, which: str) -> float | None:
    value = None if drift is None else getattr(drift, which)
    return None if value is None else round(100 * value, 1)


def _rooms(rooms: list[dict[str, Any]], drift: Any) -> list[dict[str, Any]]:
    """Join the rooms of one block to one row, and the last lesson's step with them."""
    steps = {block.block: block for block in drift.blocks} if drift is not None else {}
    out: dict[int, dict[str, Any]] = {}
    for room in rooms:
        row = out.setdefault(room["block"], {"block": room["block"]})
        row[f"{room['what']} used"] = f"{room['used']} of {room['of']}"
        row[f"{room['what']}: energy kept (%)"] = round(100 * room["energy_kept"], 2)
    for block, row in out.items():
        step = steps.get(block)
        row["last step"] = None if step is None else round(step.step, 2)
        row["old moved (%)"] = None if step is None else round(100 * step.old, 2)
        row["worst step (%)"] = None if step is None else round(100 * step.bound, 2)
    return list(out.values())
