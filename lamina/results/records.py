"""What a run leaves behind for readers: one `results.json`, checked when it is made and when it is read.

Reports, tables and comparisons need nothing else of a run folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lamina.errors import DataError, unknown
from lamina.results.metrics import check, part_accuracies
from lamina.results.written import Written, read_json

VERSION = 1
METRICS = ("accuracy", "accuracy_weighted", "average_accuracy", "forgetting", "bwt", "accuracy_task_aware")
#: which only records of streams with label maps have
PIXELS = ("pixel_accuracy", "miou_multi_scale")
#: which records from before they were measured lack
LATER = ("transfer", "ece", "ece_batch_mean", "novel_auroc", "novel_aupr", "novel_fpr95", *PIXELS)
PHASES = ("train", "look_back", "evaluate")
_REQUIRED = {
    "backbone": ("name", "fingerprint"),
    "metrics": METRICS,
    "seconds": PHASES,
    "versions": ("lamina", "torch", "timm", "python"),
}


@dataclass(frozen=True, kw_only=True)
class Record(Written):
    """One run: what was asked, what came out, what it cost and where it ran.

    Attributes:
        method: as on the command line.
        settings: all settings of the run, nested as in its TOML file.
        stream: its name.
        stream_fingerprint: a hash of classes, order and images.
        backbone: `name` and `fingerprint` of the frozen model.
        seed: of training.
        order_seed: of the order of classes; None when the stream has a fixed order.
        protocol: how it was measured, in words and numbers: `kind`, `tasks`, `test_batch`, `precision` ...
        classes: names of the classes of each task of the stream (T lists).
        matrix: accuracies as `lamina.results.metrics` describes them, fractions; fewer than T rows when
            unfinished, one row of T when all tasks are learned at once.
        matrix_task_aware: the same with the task of each image given; empty when it was not measured.
        test_sizes: test images of each task (T).
        metrics: `lamina.results.metrics.summary` of the above.
        seconds: for `train`, `look_back` and `evaluate`, and for `measure_drift` where drift was measured, one
            duration per row of the matrix.
        peak_memory_mb: the most memory the run held, in units of 10**6 bytes; None when it was not measured.
        trainable_parameters: numbers that training may change.
        stored_numbers: numbers kept from task to task, without the frozen model.
        versions: of lamina, torch, timm and python.
        hardware: processor or accelerator, in words.
        commit: of the source; None outside a repository.
        finished: whether every task was learned.
        command: what to type to run it again.
        drift: entry [t][i][l] is how far test images of task i have moved after task t >= i, as block l leaves
            them and, for the last block, in the features: root mean squared distance from where they were just
            after task i, in units of their spread then. Empty when it was not measured.
        usage: entry [t][c][p] is how often test images of class c of task t chose prompt p of a pool, in the last
            evaluation. Empty where there is no pool.
        future: row t holds the accuracies on tasks t + 1 to T - 1, fractions, by the names of their classes alone, each
            task's own to choose from; T - 1 rows, fewer when unfinished. Empty for a head that needs images.
        calibration: the expected calibration error after each task, a fraction, over the test images of all tasks met.
            Empty when it was not measured.
        reliability: after the last task, for each of equal bins of confidence, the test images that fell into it, the
            sum of their confidences, and how many of them were right. Empty when it was not measured.
        detection: after each task but the last, for each score how well it tells test images of classes met from those
            of classes to come: `auroc`, `aupr` and `fpr95`, fractions. Empty when it was not measured.
        parts: for a stream of several data sets, the name of each and which tasks, from 0, are its own. Empty where
            there is one data set.
        by_class: what `protocol` calls the measure, for each class by its name; None for one that no test image shows.
            Empty where classes were not measured one by one.
        version: of this file format.

    Raises:
        DataError: when a field has the wrong type or shape.
    """

    method: str
    settings: dict[str, Any]
    stream: str
    stream_fingerprint: str
    backbone: dict[str, str]
    seed: int
    order_seed: int | None
    protocol: dict[str, str | int | float]
    classes: list[list[str]]
    matrix: list[list[float]]
    matrix_task_aware: list[list[float]]
    test_sizes: list[int]
    metrics: dict[str, float | None]
    seconds: dict[str, list[float]]
    peak_memory_mb: float | None
    trainable_parameters: int
    stored_numbers: int
    versions: dict[str, str]
    hardware: str
    commit: str | None
    finished: bool
    command: str
    drift: list[list[list[float]]] = dataclasses.field(default_factory=list)
    usage: list[list[list[int]]] = dataclasses.field(default_factory=list)
    future: list[list[float]] = dataclasses.field(default_factory=list)
    calibration: list[float] = dataclasses.field(default_factory=list)
    reliability: list[list[float]] = dataclasses.field(default_factory=list)
    detection: list[dict[str, dict[str, float]]] = dataclasses.field(default_factory=list)
    parts: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    by_class: dict[str, float | None] = dataclasses.field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        for name, (fits, rule) in _RULES.items():
            value = getattr(self, name)
            _require(fits(value), name, rule, value)
        for name, keys in _REQUIRED.items():
            lacking = [key for key in keys if key not in getattr(self, name)]
            if lacking:
                raise DataError(f"Record.{name} must name {', '.join(keys)}; it lacks {', '.join(lacking)}")
        for name in (*METRICS, *LATER):
            value = self.metrics.get(name)
            _require(value is None or _is_number(value), f"metrics.{name}", "must be a number or null", value)
        self._check_shapes()

    @property
    def tasks(self) -> int:
        """Tasks of the stream (T)."""
        return len(self.classes)

    @property
    def at_once(self) -> bool:
        """Whether all tasks were learned in one stage."""
        return len(self.matrix) == 1 and self.tasks > 1 and len(self.matrix[0]) == self.tasks

    @property
    def measure(self) -> str:
        """What the matrix holds: accuracies, unless the protocol says otherwise."""
        return str(self.protocol.get("measure", "accuracy"))

    @property
    def old_drift(self) -> list[list[float]]:
        """The mean drift over old tasks after each task but the first, (T - 1, L); empty when not measured."""
        rows = self.drift[1:]
        return [[sum(block) / t for block in zip(*row[:t], strict=True)] for t, row in enumerate(rows, start=1)]

    @property
    def part_accuracies(self) -> dict[str, float | None]:
        """The share of each part's test images that was right in the end, by the part's name."""
        return part_accuracies(self.matrix, self.test_sizes, self.parts)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, in the order of the file."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"version": values.pop("version"), **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the record that `as_dict` described.

        Raises:
            DataError: when the version is unknown, or a field is missing, unknown or misshapen.
        """
        if not isinstance(values, Mapping):
            raise DataError(f"a record is an object with named fields; got {type(values).__name__}")
        if values.get("version") != VERSION:
            got = repr(values["version"]) if "version" in values else "none"
            raise DataError(f"version must be {VERSION}, the one this lamina reads; got {got}")
        fields = dataclasses.fields(cls)
        names = [field.name for field in fields]
        optional = [field.name for field in fields if field.default_factory is not dataclasses.MISSING]
        lacking = [name for name in names if name not in values and name not in optional]
        if lacking:
            raise DataError(f"fields are missing: {', '.join(lacking)}")
        for name in values:
            if name not in names:
                raise DataError(unknown("field", name, names))
        return cls(**values)

    def _check_shapes(self) -> None:
        _require(self.version == VERSION, "version", f"must be {VERSION}", self.version)
        try:
            check(self.matrix)
        except DataError as error:
            raise DataError(f"Record.matrix: {error}") from None
        rows, tasks = len(self.matrix), self.tasks
        enough = rows == tasks or self.at_once
        most = len(self.matrix[-1])
        _require(most <= tasks, "matrix", f"has at most the {tasks} tasks of classes", most)
        _require(most in (rows, tasks), "matrix", f"must have 1 or all {tasks} tasks in a single row", most)
        rule = f"of a finished run must have {tasks} rows, or one row of {tasks}"
        _require(enough or not self.finished, "matrix", rule, rows)
        if self.matrix_task_aware:
            shape, aware = [[len(row) for row in m] for m in (self.matrix, self.matrix_task_aware)]
            _require(aware == shape, "matrix_task_aware", f"must have rows of {shape}, as matrix has", aware)
            try:
                check(self.matrix_task_aware)
            except DataError as error:
                raise DataError(f"Record.matrix_task_aware: {error}") from None
        sizes = self.test_sizes
        _require(len(sizes) == tasks, "test_sizes", f"must have {tasks} numbers, one per task", sizes)
        for phase in PHASES:
            durations = self.seconds[phase]
            fits = isinstance(durations, list) and len(durations) == rows and all(map(_is_count, durations))
            _require(fits, f"seconds.{phase}", f"must be {rows} durations, one per row of matrix", durations)
        if self.drift:
            _require(not self.at_once, "drift", "must be empty where all tasks were learned at once", len(self.drift))
            blocks = [[len(values) for values in row] for row in self.drift]
            right = [(blocks[0] or [0])[:1] * (t + 1) for t in range(rows)]
            rule = f"must have {rows} rows, of 1 to {rows} lists with a number for each block"
            _require(blocks == right and right[0] != [0], "drift", rule, blocks)
        if self.usage:
            pool = len(self.usage[0][0]) if self.usage[0] else 0
            counts = [[len(row) for row in table] for table in self.usage]
            fits = pool > 0 and counts == [[pool] * len(names) for names in self.classes[:most]]
            rule = f"must have {most} tables, with a row of as many numbers for each class of a task"
            _require(fits, "usage", rule, counts)
        wide = [len(row) for row in self.future]
        to_come = [tasks - 1 - t for t in range(len(wide))]
        _require(wide == to_come, "future", f"must have rows of {to_come}, one number for each task to come", wide)
        if self.calibration:
            rule = f"must have {rows} numbers, one per row of matrix"
            _require(len(self.calibration) == rows, "calibration", rule, len(self.calibration))
        if self.reliability:
            _require(
                {len(row) for row in self.reliability} == {3}, "reliability", "must have rows of 3", self.reliability
            )
        if self.detection:
            most = 0 if self.at_once else tasks - 1
            _require(len(self.detection) <= most, "detection", f"must have at most {most} stages", len(self.detection))
        if self.parts:
            listed = [task for own in self.parts.values() for task in own]
            fits = listed == list(range(tasks)) and all(self.parts.values())
            _require(fits, "parts", f"must share tasks 0 to {tasks - 1} out, in order", self.parts)


def find_records(paths: Iterable[Path | str]) -> list[Record]:
    """Return the records under files and folders, each file once, in order of path within a folder.

    Args:
        paths: files as `results.json`, run folders, or folders that contain run folders at any depth.

    Raises:
        DataError: when a path does not exist or leads to no record.
    """
    return [record for file in record_files(paths) for record in read_records(file)]


def record_files(paths: Iterable[Path | str]) -> list[Path]:
    """Return the files of records under files and folders, as `find_records` reads them.

    Raises:
        DataError: when a path does not exist or leads to no record.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            own = path / "results.json"
            files = [own] if own.is_file() else sorted(path.rglob("results.json"))
        else:
            files = [path] if path.exists() else []
        if not files:
            what = "holds no results.json" if path.exists() else "does not exist"
            raise DataError(f"{path} {what}; give a run folder, a results.json, or a folder of run folders")
        found.update((file.resolve(), None) for file in files)
    if not found:
        raise DataError("no run was named; give a run folder, a results.json, or a folder of run folders")
    return list(found)


def read_records(path: Path) -> list[Record]:
    """Return the record of a file, or the several that it lists under the key "records".

    Raises:
        DataError: when it cannot be read, is not JSON, or holds something else.
    """
    values = read_json(Path(path))
    several = isinstance(values, dict) and "records" in values
    listed = values["records"] if several else [values]
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{path}: records must be a list with at least one record")
    records = []
    for place, each in enumerate(listed):
        try:
            records.append(Record.from_dict(each))
        except DataError as error:
            raise DataError(f"{path}{f', record {place}' if several else ''}: {error}") from None
    return records


def _require(fits: bool, name: str, rule: str, got: Any) -> None:
    if not fits:
        raise DataError(f"Record.{name} {rule}; got {got!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rows(value: Any) -> bool:
    rows = isinstance(value, list) and all(isinstance(row, list) for row in value)
    return rows and all(_is_number(each) for row in value for each in row)


def _is_fractions(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(each) and 0 <= each <= 1 for each in value)


def _is_drift(value: Any) -> bool:
    return isinstance(value, list) and all(_is_rows(row) and all(min(b, default=0) >= 0 for b in row) for row in value)


def _is_usage(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(t, list) and all(_is_sizes(row) for row in t) for t in value)


def _is_stages(value: Any) -> bool:
    stages = isinstance(value, list) and all(isinstance(stage, dict) for stage in value)
    scores = [score for stage in value for score in stage.values()] if stages else []
    return stages and all(isinstance(score, dict) and _is_fractions(list(score.values())) for score in scores)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(_is_whole(each) and each >= 0 for each in value)


def _is_parts(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_sizes(each) for each in value.values())


def _is_by_class(value: Any) -> bool:
    return isinstance(value, dict) and _is_fractions([each for each in value.values() if each is not None])


def _is_classes(value: Any) -> bool:
    rows = isinstance(value, list) and all(isinstance(row, list) for row in value)
    return rows and len(value) > 0 and all(isinstance(name, str) for row in value for name in row)


def _is_flat(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str | int | float) for each in value.values())


def _is_words(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


_TEXT = (lambda value: isinstance(value, str), "must be text")
_TABLE = (lambda value: isinstance(value, dict), "must be an object")
_WORDS = (_is_words, "must map names to text")
_COUNT = (lambda value: _is_whole(value) and value >= 0, "must be a whole number, at least 0")
_MATRIX = (_is_rows, "must be a list of rows of numbers")
_RULES = {
    **dict.fromkeys(("method", "stream", "stream_fingerprint", "hardware", "command"), _TEXT),
    **dict.fromkeys(("settings", "metrics", "seconds"), _TABLE),
    **dict.fromkeys(("backbone", "versions"), _WORDS),
    **dict.fromkeys(("trainable_parameters", "stored_numbers"), _COUNT),
    **dict.fromkeys(("matrix", "matrix_task_aware", "future", "reliability"), _MATRIX),
    "calibration": (_is_fractions, "must be a list of numbers from 0 to 1"),
    "detection": (_is_stages, "must be a list of objects that map scores to names and numbers from 0 to 1"),
    "drift": (_is_drift, "must be a list of rows of lists of numbers, at least 0"),
    "usage": (_is_usage, "must be a list of tables of whole numbers, at least 0"),
    "by_class": (_is_by_class, "must map names of classes to numbers from 0 to 1 or null"),
    "parts": (_is_parts, "must map names to lists of whole numbers, at least 0"),
    "seed": (_is_whole, "must be a whole number"),
    "order_seed": (lambda value: value is None or _is_whole(value), "must be a whole number or null"),
    "protocol": (_is_flat, "must map names to text or numbers"),
    "classes": (_is_classes, "must be a list of lists of class names, one per task"),
    "test_sizes": (_is_sizes, "must be a list of whole numbers, at least 0"),
    "peak_memory_mb": (lambda value: value is None or _is_count(value), "must be at least 0, or null"),
    "commit": (lambda value: value is None or isinstance(value, str), "must be text or null"),
    "finished": (lambda value: isinstance(value, bool), "must be true or false"),
}
