"""What is written down about every lesson."""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from lamina.config import Settings


def _utc(text: str) -> str:
    with contextlib.suppress(ValueError):
        if datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").isoformat() + "Z" == text:
            return text
    raise ValueError(f"must be a time such as 2026-11-21T14:05:00Z; got {text!r}")


Amount = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
ClassName = Annotated[str, Field(min_length=1, max_length=255)]


class BlockDrift(Settings):
    """A block's part in the drift of old images; the squares of all parts add up."""

    block: Count
    step: Amount  # length of the move of the block's normalised prompts
    old: Amount
    bound: Amount


class Drift(Settings):
    """How far features moved in a lesson, relative to the spread of old features."""

    new: Amount  # of the lesson's own images, measured
    old: Amount | None  # of images of earlier lessons, estimated; None where no protection can say
    bound: Amount | None  # the same for the worst move of that length
    blocks: list[BlockDrift]
    retrained: bool = False  # what the head has for old classes, too, learned on; if not, old scores follow features


class Lesson(Settings):
    """One task that was learned: a line of the audit trail."""

    name: str | None  # what the user called it
    date: Annotated[str, AfterValidator(_utc)] | None  # in UTC, as 2026-11-21T14:05:00Z
    method: str
    classes: Annotated[list[ClassName], Field(min_length=1)]  # in column order
    columns: list[Count]  # of these classes in the head; a class met before keeps its column
    images: Count  # learned from
    held_out: Count  # kept aside to measure accuracy and to calibrate
    skipped: Count  # could not be read
    seconds: dict[str, Amount] | None  # by stage; None where they were left out
    accuracy: Annotated[float, Field(ge=0, le=1)] | None  # on the images held out, over all classes met so far
    drift: Drift | None  # what learning did to features; None for the first lesson
    data: str  # fingerprint of the images
    base: str | None  # checksum of the file that was learned upon; None for the first lesson

    @model_validator(mode="after")
    def _one_column_for_each_class(self) -> Self:
        if len(self.columns) != len(self.classes):
            raise ValueError(f"must have a column for each of its {len(self.classes)} classes; got {self.columns}")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"must name a class once; got {self.classes}")
        if self.columns != sorted(set(self.columns)):
            raise ValueError(f"must have its classes in the order of their columns; got {self.columns}")
        return self


def now() -> str:
    """Return the time in UTC; SOURCE_DATE_EPOCH, a number of seconds, stands in for the clock where it is set."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.fromtimestamp(int(fixed), UTC) if fixed and fixed.isdigit() else datetime.now(UTC)
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")
