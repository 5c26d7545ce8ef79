"""How good a kept model is on labelled images: measured, mostly by torchmetrics, and laid out for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from lamina.errors import DataError, ShapeError
from lamina.results.assessment_fields import (
    Assessment,
    Bin,
    Calibration,
    ClassScore,
    Confusion,
    Doubt,
    Histogram,
    Novelty,
    TaskScore,
)
from lamina.results.tables import percent
from lamina.text import printable

BINS, HISTOGRAM_BINS = 15, 20
#: the most classes whose whole confusion matrix is kept, and the most pairs
MAP_CLASSES, PAIRS = 40, 20
_TOP = 5
#: how far a sum of probabilities may be from 1, for a softmax in half precision
_SLACK = 1e-3


def assess(
    *,
    model: dict[str, Any],
    protocol: dict[str, Any],
    classes: Sequence[str],
    class_tasks: Sequence[int],
    task_names: Sequence[str | None],
    labels: np.ndarray,
    probabilities: np.ndarray,
    novelty: Mapping[str, np.ndarray] | None = None,
    thresholds: Mapping[str, float] | None = None,
    unknown_novelty: Mapping[str, np.ndarray] | None = None,
    uncertainty: Mapping[str, np.ndarray] | None = None,
    unknown_uncertainty: Mapping[str, np.ndarray] | None = None,
) -> Assessment:
    """Return how good the probabilities are.

    Args:
        model: facts about the model, for the page; anything that JSON can hold.
        protocol: how it was measured, the same.
        classes: a name for each column (C).
        class_tasks: the task that each class first came with, from 0 (C).
        task_names: a name for each task, or None (T).
        labels: (B,) the column of each image.
        probabilities: (B, C) rows that sum to 1.
        novelty: for each score (B,) values of the same images; higher is more novel.
        thresholds: for some scores, the value above which an image is flagged as novel.
        unknown_novelty: the same scores for images of classes that the model does not know.
        uncertainty: for each measure (B,) values of the same images, in nats.
        unknown_uncertainty: the same for images of classes that the model does not know.

    Raises:
        DataError: when there is no image.
        ShapeError: when lengths do not agree.
        ValueError: when probabilities or scores are not finite, rows do not sum to 1, or a label, a task or a score
            does not exist.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    classes = [_storable(name) for name in classes]
    task_names = [None if name is None else _storable(name) for name in task_names]
    _check(labels, probabilities, classes, class_tasks, task_names)
    images, size = probabilities.shape
    own = probabilities[np.arange(images), labels]
    # Of equal probabilities the first column wins, here as in argmax, so top 1 is the accuracy.
    before = (probabilities > own[:, None]) | ((probabilities == own[:, None]) & (np.arange(size) < labels[:, None]))
    rank = before.sum(axis=1)
    k = min(_TOP, size)
    pairs = labels * size + probabilities.argmax(axis=1)
    matrix = np.bincount(pairs, minlength=size**2).reshape(size, size)
    scores = _class_scores(matrix, classes, class_tasks, np.bincount(labels, own, minlength=size))
    accuracies = [each["accuracy"] for each in scores if each["accuracy"] is not None]
    return Assessment(
        model=model,
        protocol=protocol,
        accuracy=float((rank == 0).mean()),
        accuracy_per_class_mean=float(np.mean(accuracies)),
        top_k={"k": k, "accuracy": float((rank < k).mean())},
        tasks=_task_scores(matrix, class_tasks, task_names),
        classes=scores,
        confusions=_confusions(matrix, classes),
        confusion_matrix=matrix.tolist() if size <= MAP_CLASSES else None,
        calibration=_calibration(probabilities, own, rank == 0),
        novelty=_novelty(images, novelty or {}, thresholds or {}, unknown_novelty or {}),
        uncertainty=_uncertainty(rank == 0, uncertainty or {}, unknown_uncertainty or {}),
    )


def rows_overview(assessment: Assessment) -> list[dict[str, str]]:
    """Return the main numbers, one a row."""
    top, calibration = assessment.top_k, assessment.calibration
    rows = [("images", str(assessment.images)), ("accuracy (%)", percent(assessment.accuracy))]
    rows.append(("mean accuracy of classes (%)", percent(assessment.accuracy_per_class_mean)))
    if top["k"] < len(assessment.classes):  # else it is 100 whatever the model does
        rows.append((f"accuracy of the {top['k']} likeliest (%)", percent(top["accuracy"])))
    rows += [("mean confidence (%)", percent(calibration["confidence"])), ("ECE (%)", percent(calibration["ece"]))]
    rows += [("MCE (%)", percent(calibration["mce"])), ("Brier score", f"{calibration['brier']:.3f}")]
    rows.append(("negative log-likelihood", f"{calibration['nll']:.3f}"))
    for name, each in (assessment.novelty or {}).items():
        said: list[tuple[str, float | None]] = [("AUROC", each["auroc"]), ("FPR at 95 % found", each["fpr95"])]
        if each["threshold"] is not None:
            said += [("known flagged", each["flagged_known"]), ("unknown flagged", each["flagged_unknown"])]
        rows += [(f"{printable(name)}: {word} (%)", _percent(value)) for word, value in said]
    for name, doubt in (assessment.uncertainty or {}).items():
        means = [doubt["right"], doubt["wrong"], doubt["unknown"]]
        told = " / ".join("–" if mean is None else f"{mean:.2f}" for mean in means)
        rows.append((f"{printable(name).replace('_', ' ')}: right / wrong / unknown (nats)", told))
    return _aligned([{"measure": name, "value": value} for name, value in rows], ("value",))


def rows_tasks(assessment: Assessment) -> list[dict[str, Any]]:
    """Return one row for each task."""
    rows = [
        {
            "task": each["task"],
            "name": "–" if each["name"] is None else printable(each["name"]),
            "classes": each["classes"],
            "images": each["images"],
            "accuracy (%)": _percent(each["accuracy"]),
        }
        for each in assessment.tasks
    ]
    return _aligned(rows, ("accuracy (%)",))


def rows_classes(assessment: Assessment) -> list[dict[str, Any]]:
    """Return one row for each class, in the order of the model."""
    rows = [
        {
            "class": printable(each["name"]),
            "task": each["task"],
            "images": each["images"],
            "accuracy (%)": _percent(each["accuracy"]),
            "precision (%)": _percent(each["precision"]),
            "mean probability (%)": _percent(each["mean_probability"]),
            "most often taken for": "–"
            if each["most_confused_with"] is None
            else printable(each["most_confused_with"]),
        }
        for each in assessment.classes
    ]
    return _aligned(rows, ("accuracy (%)", "precision (%)", "mean probability (%)"))


def rows_confusions(assessment: Assessment) -> list[dict[str, Any]]:
    """Return one row for each of the worst pairs, most images first."""
    rows = [
        {
            "class": printable(each["true"]),
            "taken for": printable(each["predicted"]),
            "images": each["count"],
            "share of class (%)": percent(each["share"]),
        }
        for each in assessment.confusions
    ]
    return _aligned(rows, ("share of class (%)",))


def reliability_lines(assessment: Assessment) -> list[str]:
    """Return a reliability diagram in 12 lines of text: a bar for each bin's accuracy, a dash for its confidence."""
    bins = assessment.calibration["bins"]
    lines = [f"accuracy (bar) and confidence (dash) by confidence, in percent; images: {assessment.images}"]
    for row in range(9, -1, -1):
        cells = []
        for each in bins:
            accuracy, confidence = each["accuracy"], each["confidence"]
            if accuracy is None or confidence is None:
                cells.append("    ")
                continue
            fill = " ▁▂▃▄▅▆▇█"[min(max(round(80 * accuracy) - 8 * row, 0), 8)]
            third = min(int(30 * confidence), 29)
            cells.append(f"{fill}{fill}{'▁─▔'[third % 3] if third // 3 == row else ' '} ")
        label = f"{10 * row + 10}" if row % 2 else ""
        lines.append(f"{label:>3} │{''.join(cells)}".rstrip())
    width = 4 * len(bins) // 5
    return [*lines, "  0 └" + "".join(f"{mark:─>{width}}" for mark in (20, 40, 60, 80, 100))]


def _check(
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    class_tasks: Sequence[int],
    task_names: Sequence[str | None],
) -> None:
    if not len(labels):
        raise DataError("an assessment needs at least one image of a class that the model knows; got none")
    wanted = (len(labels), len(classes))
    if labels.ndim != 1 or probabilities.shape != wanted:
        raise ShapeError(
            f"probabilities must be (B, C) = {wanted} for {wanted[0]} labels and {wanted[1]} classes; "
            f"got {probabilities.shape}"
        )
    if len(class_tasks) != len(classes):
        raise ShapeError(f"class_tasks must have a task for each of {len(classes)} classes; got {len(class_tasks)}")
    for name, values, limit in (("labels", labels, len(classes)), ("class_tasks", class_tasks, len(task_names))):
        wrong = [int(each) for each in values if not 0 <= each < limit]
        if wrong:
            raise ValueError(f"{name} must be from 0 to {limit - 1}; got {wrong[0]}")
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities must be finite; got nan or infinity")
    sums = probabilities.sum(axis=1, dtype=np.float64)
    off = sums[np.abs(sums - 1).argmax()]
    if probabilities.min() < 0 or abs(off - 1) > _SLACK:
        least = float(probabilities.min())
        raise ValueError(f"probabilities must be at least 0 and sum to 1; got {least:g} and a sum of {off:g}")


def _class_scores(
    matrix: np.ndarray, classes: Sequence[str], class_tasks: Sequence[int], given: np.ndarray
) -> list[ClassScore]:
    wrong = matrix - np.diag(np.diag(matrix))
    rows = []
    for column, name in enumerate(classes):
        images, predicted, right = matrix[column].sum(), matrix[:, column].sum(), matrix[column, column]
        other = int(wrong[column].argmax())
        confused = int(wrong[column, other])
        rows.append(
            ClassScore(
                name=name,
                task=int(class_tasks[column]) + 1,
                images=int(images),
                accuracy=_ratio(right, images),
                predicted=int(predicted),
                # Without images of its own, a class has none that could be found: 0 would be no fault of the model.
                precision=_ratio(right, predicted) if images else None,
                mean_probability=_ratio(given[column], images),
                most_confused_with=classes[other] if confused else None,
                confused_images=confused,
            )
        )
    return rows


def _task_scores(matrix: np.ndarray, class_tasks: Sequence[int], task_names: Sequence[str | None]) -> list[TaskScore]:
    rows = []
    for task, name in enumerate(task_names):
        columns = np.flatnonzero(np.asarray(class_tasks) == task)
        images, right = int(matrix[columns].sum()), matrix[columns, columns].sum()
        rows.append(
            TaskScore(task=task + 1, name=name, classes=len(columns), images=images, accuracy=_ratio(right, images))
        )
    return rows


def _confusions(matrix: np.ndarray, classes: Sequence[str]) -> list[Confusion]:
    images = matrix.sum(axis=1)
    pairs = [(int(true), int(taken)) for true, taken in np.argwhere(matrix) if true != taken]
    pairs.sort(key=lambda pair: (-matrix[pair], -matrix[pair] / images[pair[0]], pair))
    return [
        Confusion(
            true=classes[true],
            predicted=classes[taken],
            count=int(matrix[true, taken]),
            share=float(matrix[true, taken] / images[true]),
        )
        for true, taken in pairs[:PAIRS]
    ]


def _calibration(probabilities: np.ndarray, own: np.ndarray, right: np.ndarray) -> Calibration:
    # torchmetrics gives a confidence of exactly 1, which a saturated softmax has, a sixteenth bin of its own.
    confidence = np.minimum(probabilities.max(axis=1).astype(np.float64), np.nextafter(1, 0))
    pair = torch.from_numpy(confidence), torch.from_numpy(right.astype(np.int64))
    # The multiclass form sums in float32, which is not exact enough for many images, and refuses a single class.
    ece, mce = (float(binary_calibration_error(*pair, n_bins=BINS, norm=norm)) for norm in ("l1", "max"))
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64).numpy()
    place = np.searchsorted(edges, confidence, side="right") - 1
    counts = np.bincount(place, minlength=BINS)
    sums = np.bincount(place, confidence, minlength=BINS), np.bincount(place, right, minlength=BINS)
    bins = [
        Bin(
            low=float(edges[b]),
            high=float(edges[b + 1]),
            images=int(counts[b]),
            confidence=_ratio(sums[0][b], counts[b]),
            accuracy=_ratio(sums[1][b], counts[b]),
        )
        for b in range(BINS)
    ]
    # float32 cannot tell a probability below its smallest from 0, whose logarithm would end all means.
    likelihood = np.maximum(own.astype(np.float64), np.finfo(np.float32).tiny)
    squares = np.einsum("bc,bc->b", probabilities, probabilities, dtype=np.float64)
    brier = float((squares - 2 * own.astype(np.float64) + 1).mean())
    nll = float(-np.log(likelihood).mean())
    return Calibration(ece=ece, mce=mce, brier=brier, nll=nll, confidence=float(confidence.mean()), bins=bins)


def _novelty(
    images: int,
    known: Mapping[str, np.ndarray],
    thresholds: Mapping[str, float],
    unknown: Mapping[str, np.ndarray],
) -> dict[str, Novelty] | None:
    if not unknown or not all(np.size(values) for values in unknown.values()):
        return None
    for name in {**known, **unknown}:
        if name not in known or name not in unknown:
            kind = "known" if name not in known else "unknown"
            raise ValueError(f"novelty {name!r} was not measured on images of {kind} classes")
    stray = [name for name in thresholds if name not in known]
    if stray:
        raise ValueError(f"there is a threshold for {stray[0]!r}, which was not measured")
    scores = {}
    for name in known:
        mine, other = (np.asarray(values, dtype=np.float64) for values in (known[name], unknown[name]))
        if mine.shape != (images,) or other.ndim != 1:
            raise ShapeError(f"novelty {name!r} must be flat, with {images} known; got {mine.shape} and {other.shape}")
        if not (np.isfinite(mine).all() and np.isfinite(other).all()):
            raise ValueError(f"novelty {name!r} must be finite; got nan or infinity")
        scores[name] = _novelty_of(mine, other, thresholds.get(name))
    return scores


def _novelty_of(known: np.ndarray, unknown: np.ndarray, threshold: float | None) -> Novelty:
    both = np.concatenate([known, unknown])
    # torchmetrics squeezes scores outside [0, 1] through a sigmoid, where large ones become equal; ranks do not.
    ranks = torch.from_numpy(rankdata(both) / len(both))
    novel = torch.arange(len(both)) >= len(known)
    enough = -(-95 * len(unknown) // 100)  # in whole numbers, where 0.95 * 20 cannot be more than 19
    found = np.sort(unknown)[len(unknown) - enough]
    edges = np.histogram_bin_edges(both, bins=HISTOGRAM_BINS)
    return Novelty(
        auroc=float(binary_auroc(ranks, novel.long())),
        fpr95=float((known >= found).mean()),
        threshold=None if threshold is None else float(threshold),
        flagged_known=None if threshold is None else float((known > threshold).mean()),
        flagged_unknown=None if threshold is None else float((unknown > threshold).mean()),
        known=len(known),
        unknown=len(unknown),
        histogram=Histogram(
            low=float(edges[0]),
            high=float(edges[-1]),
            known=np.histogram(known, edges)[0].tolist(),
            unknown=np.histogram(unknown, edges)[0].tolist(),
        ),
    )


def _uncertainty(
    right: np.ndarray, known: Mapping[str, np.ndarray], unknown: Mapping[str, np.ndarray]
) -> dict[str, Doubt] | None:
    """Return the mean of each measure over images that were named right, named wrong, and of unknown classes."""

    def mean(values: np.ndarray) -> float | None:
        return float(values.mean(dtype=np.float64)) if len(values) else None

    found = {}
    for name, values in known.items():
        if values.shape != right.shape:
            raise ShapeError(f"uncertainty {name!r} must be flat, with {len(right)} images; got {values.shape}")
        strange = unknown.get(name, np.empty(0))
        found[name] = Doubt(right=mean(values[right]), wrong=mean(values[~right]), unknown=mean(strange))
    return found or None


def _storable(name: str) -> str:
    """Return the name of a folder whose bytes are not UTF-8 with escapes in their place; any other as it is."""
    return name.encode("utf-8", "backslashreplace").decode()


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else percent(fraction)


def _aligned(rows: list[dict[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows with the texts of some columns flush right, as numbers are."""
    for column in columns:
        width = max((len(row[column]) for row in rows), default=0)
        for row in rows:
            row[column] = row[column].rjust(width)
    return rows
