"""What an assessment of a kept model holds, checked when it is read.

An accuracy is a fraction in [0, 1], percent only in the rows for a terminal. What cannot be measured is None, never 0:
the accuracy of a class without images, the precision of one that was never predicted.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self, get_type_hints

from pydantic import ConfigDict, Field, ValidationError, create_model
from typing_extensions import TypedDict  # pydantic does not take the one of `typing` before Python 3.12

from lamina.errors import DataError
from lamina.results.written import Written

VERSION = 1

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class TaskScore(TypedDict):
    """A task, counted from 1: how many classes first came with it, and the share of their images named right."""

    task: Count
    name: str | None
    classes: Count
    images: Count
    accuracy: Fraction | None


class ClassScore(TypedDict):
    """A class: share of its images named right, share of images given its name that are its own.

    `mean_probability` is what its own images were given for it; `confused_images` of them were taken for
    `most_confused_with`.
    """

    name: str
    task: Count
    images: Count
    accuracy: Fraction | None
    predicted: Count
    precision: Fraction | None
    mean_probability: Fraction | None
    most_confused_with: str | None
    confused_images: Count


class Confusion(TypedDict):
    """Images of one class that were taken for another, and their share of that class's images."""

    true: str
    predicted: str
    count: Count
    share: Fraction


class Bin(TypedDict):
    """Images with a confidence from `low` to below `high` (the last holds 1), their mean confidence and accuracy."""

    low: Fraction
    high: Fraction
    images: Count
    confidence: Fraction | None
    accuracy: Fraction | None


class Calibration(TypedDict):
    """Whether the probability of the answer (the confidence) is the share of right answers."""

    ece: Fraction
    mce: Fraction
    brier: float
    nll: float
    confidence: Fraction
    bins: list[Bin]


class Histogram(TypedDict):
    """Images in equal bins from `low` to `high`."""

    low: float
    high: float
    known: list[Count]
    unknown: list[Count]


class Novelty(TypedDict):
    """How well one score tells images of unknown classes from those of known ones.

    `fpr95` is the share of known images that are flagged when 95 % of the unknown ones are. The flagged shares are
    those above `threshold`; None without one.
    """

    auroc: Fraction
    fpr95: Fraction
    threshold: float | None
    flagged_known: Fraction | None
    flagged_unknown: Fraction | None
    known: Count
    unknown: Count
    histogram: Histogram


class Doubt(TypedDict):
    """The mean of a measure of uncertainty, in nats, over images named right, named wrong, and of unknown classes."""

    right: float | None
    wrong: float | None
    unknown: float | None


class TopK(TypedDict):
    """Share of images whose class is among the k likeliest."""

    k: Count
    accuracy: Fraction


@dataclass(frozen=True, kw_only=True)
class Assessment(Written):
    """What came out of classifying labelled images with a kept model.

    Attributes:
        model: facts about the model; `lessons` may list what it learned, one flat table each.
        protocol: how it was measured.
        accuracy: share of images named right.
        accuracy_per_class_mean: mean accuracy of the classes that have images (balanced accuracy).
        top_k: k is 5, or the number of classes when there are fewer.
        tasks: in order; a class belongs to the task it first came with.
        classes: in the order of the model's columns (C).
        confusions: the pairs with most images first.
        confusion_matrix: (C, C) images, true classes in rows; None above 40 classes.
        calibration: with 15 equal bins.
        novelty: one entry for each score; None when no image of an unknown class was given.
        uncertainty: one entry for each measure, as `Prediction.uncertainty` names them; None where it was not measured.
        version: of this file format.

    Raises:
        DataError: when the matrix does not have the shape of the classes.
    """

    model: dict[str, Any]
    protocol: dict[str, Any]
    accuracy: Fraction
    accuracy_per_class_mean: Fraction
    top_k: TopK
    tasks: list[TaskScore]
    classes: list[ClassScore]
    confusions: list[Confusion]
    confusion_matrix: list[list[Count]] | None
    calibration: Calibration
    novelty: dict[str, Novelty] | None
    uncertainty: dict[str, Doubt] | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        matrix, size = self.confusion_matrix, len(self.classes)
        if matrix is not None and [len(row) for row in matrix] != [size] * size:
            raise DataError(f"confusion_matrix must have a row and a column for each of {size} classes")

    @property
    def images(self) -> int:
        """Images that were classified and belong to classes of the model."""
        return sum(each["images"] for each in self.classes)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, in the order of the file."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"version": values.pop("version"), **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the assessment that `as_dict` described.

        Raises:
            DataError: when the version is unknown, or a field is missing, unknown or misshapen.
        """
        if not isinstance(values, Mapping):
            raise DataError(f"an assessment is an object with named fields; got {type(values).__name__}")
        if values.get("version") != VERSION:
            got = repr(values["version"]) if "version" in values else "none"
            raise DataError(f"version must be {VERSION}, the one this lamina reads; got {got}")
        try:
            _form(cls).model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            if first["type"] in ("missing", "extra_forbidden"):
                kind = "missing" if first["type"] == "missing" else "unknown"
                raise DataError(f"a field is {kind}: {where}") from None
            rule = first["msg"].replace("Input should", "must", 1)
            raise DataError(f"{where} {rule}; got {reprlib.repr(first['input'])}") from None
        return cls(**values)


def _form(kind: type[Assessment]) -> Any:
    """Return the model that checks the fields; as a dataclass, a strict one takes no JSON."""
    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
    fields: Any = {name: (hint, ...) for name, hint in get_type_hints(kind, include_extras=True).items()}
    fields["uncertainty"] = (fields["uncertainty"][0], None)  # which assessments from before it was there lack
    return create_model("Assessment", __config__=config, **fields)
