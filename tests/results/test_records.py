"""results.json: what is written is read back; what is broken is refused in one line; nothing is lost."""

import dataclasses
import errno
import json
import os

import pytest

from lamina.errors import DataError, StorageError
from lamina.results.records import Record, find_records, read_records


def test_a_record_is_read_back_as_it_was_written(record, tmp_path):
    record.write(tmp_path / "results.json")
    assert Record.read(tmp_path / "results.json") == record


def test_a_run_that_learned_all_at_once_and_one_without_task_aware_rows_are_records(make_record, tmp_path):
    joint = make_record([[0.9, 0.8, 0.7, 0.6]], aware=[], peak_memory_mb=None, commit=None, order_seed=None)
    joint.write(tmp_path / "results.json")
    assert Record.read(tmp_path / "results.json") == joint
    assert joint.at_once


def test_an_unfinished_run_may_have_fewer_rows_than_tasks(make_record):
    record = make_record([[0.9], [0.8, 0.7]], finished=False)
    assert (len(record.matrix), record.tasks, record.at_once) == (2, 4, False)


def test_the_first_task_of_four_is_not_all_at_once(make_record):
    assert not make_record([[0.9]], finished=False).at_once


def test_a_field_stands_on_a_line_of_its_own(record, tmp_path):
    record.write(tmp_path / "results.json")
    lines = (tmp_path / "results.json").read_text().splitlines()
    assert lines[1] == ' "version": 1,'
    assert len(lines) == len(dataclasses.fields(Record)) + 2


# ── drift ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_record_with_drift_is_read_back(make_record, make_drift, tmp_path):
    record = make_record(drift=make_drift())
    record.write(tmp_path / "results.json")
    assert Record.read(tmp_path / "results.json") == record and record.drift == make_drift()


def test_a_file_from_before_drift_was_measured_is_a_record_without_any(record):
    values = {name: value for name, value in record.as_dict().items() if name != "drift"}
    assert Record.from_dict(values) == record
    assert record.drift == [] and record.old_drift == []


def test_the_drift_of_old_tasks_leaves_out_the_newest_and_averages_the_others(make_record, make_drift):
    """After task t the old ones moved by 0.01 to 0.01 * t in block 0, in block l by l + 1 times that."""
    drift = [[*row[:-1], [0.9] * 5] for row in make_drift()]
    old = make_record(drift=drift).old_drift
    assert [len(blocks) for blocks in old] == [5, 5, 5]
    for blocks, first in zip(old, (0.01, 0.015, 0.02), strict=True):
        assert blocks == pytest.approx([first * (block + 1) for block in range(5)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drift": "far"}, "must be a list of rows of lists of numbers, at least 0; got 'far'"),
        ({"drift": [[0.5]]}, "must be a list of rows of lists of numbers, at least 0; got [[0.5]]"),
        ({"drift": [[[-0.5]]]}, "must be a list of rows of lists of numbers, at least 0; got [[[-0.5]]]"),
        ({"drift": [[[True]]]}, "must be a list of rows of lists of numbers, at least 0; got [[[True]]]"),
        (
            {"drift": [[[0.5]], [[0.5], [0.5]]]},
            "must have 4 rows, of 1 to 4 lists with a number for each block; got [[1], [1, 1]]",
        ),
        (
            {"drift": [[[0.5] * 2] * (1 + (t > 0)) for t in range(4)]},
            "must have 4 rows, of 1 to 4 lists with a number for each block; got [[2], [2, 2], [2, 2], [2, 2]]",
        ),
        (
            {"drift": [[[0.5] * (2 + (i == 3)) for i in range(t + 1)] for t in range(4)]},
            "must have 4 rows, of 1 to 4 lists with a number for each block; "
            "got [[2], [2, 2], [2, 2, 2], [2, 2, 2, 3]]",
        ),
        (
            {"drift": [[[] for _ in range(t + 1)] for t in range(4)]},
            "must have 4 rows, of 1 to 4 lists with a number for each block; "
            "got [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]",
        ),
        (
            {"drift": [[], [[0.5]], [[0.5]], [[0.5]]]},
            "must have 4 rows, of 1 to 4 lists with a number for each block; got [[], [1], [1], [1]]",
        ),
    ],
)
def test_drift_of_another_shape_is_refused(make_record, change, message):
    with pytest.raises(DataError) as error:
        make_record(**change)
    assert str(error.value) == f"Record.drift {message}"


def test_a_run_that_learned_all_at_once_has_no_drift(make_record):
    with pytest.raises(DataError) as error:
        make_record([[0.9, 0.8, 0.7, 0.6]], drift=[[[0.0]]])
    assert str(error.value) == "Record.drift must be empty where all tasks were learned at once; got 1"


# ── writing ────────────────────────────────────────────────────────────────────────────────────────


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_draft(record, tmp_path, monkeypatch, step):
    path = tmp_path / "results.json"
    record.write(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, step, no_space)
    with pytest.raises(StorageError) as error:
        dataclasses.replace(record, seed=9).write(path)
    rest = "could not be written: No space left on device; what was saved before is still there"
    assert str(error.value) == f"{path} {rest}"
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.json"]


def test_the_old_file_is_whole_until_the_new_one_is_on_the_disk(record, tmp_path, monkeypatch):
    path, seen = tmp_path / "results.json", []
    record.write(path)
    synced = os.fsync

    def look(number):
        seen.append(Record.read(path).seed)
        synced(number)

    monkeypatch.setattr(os, "fsync", look)
    dataclasses.replace(record, seed=9).write(path)
    assert (seen, Record.read(path).seed) == ([0], 9)


def test_where_nothing_was_saved_no_older_file_is_promised(record, tmp_path):
    (tmp_path / "taken").write_text("a file, so no folder can have its name")
    path = tmp_path / "taken" / "results.json"
    with pytest.raises(StorageError) as error:
        record.write(path)
    assert str(error.value) == f"{path} could not be written: File exists"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("inf"), "Out of range float values are not JSON compliant"),
        ({1, 2}, "Object of type set is not JSON serializable"),
    ],
)
def test_what_json_cannot_hold_is_refused_before_anything_is_written(record, tmp_path, value, reason):
    with pytest.raises(DataError) as error:
        dataclasses.replace(record, settings={"lr": value}).write(tmp_path / "results.json")
    assert str(error.value).startswith(f"Record.settings cannot be written as JSON: {reason}")
    assert os.listdir(tmp_path) == []


# ── reading ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version must be 1, the one this lamina reads; got 2"),
        ({"version": None}, "version must be 1, the one this lamina reads; got none"),
        ({"seed": None, "stream": None}, "fields are missing: stream, seed"),
        ({"method": 3}, "Record.method must be text; got 3"),
        ({"seed": 1.5}, "Record.seed must be a whole number; got 1.5"),
        ({"finished": 1}, "Record.finished must be true or false; got 1"),
        ({"stored_numbers": -1}, "Record.stored_numbers must be a whole number, at least 0; got -1"),
        ({"peak_memory_mb": "1"}, "Record.peak_memory_mb must be at least 0, or null; got '1'"),
        ({"protocol": {"a": [4]}}, "Record.protocol must map names to text or numbers; got {'a': [4]}"),
        (
            {"classes": ["ant"]},
            "Record.classes must be a list of lists of class names, one per task; got ['ant']",
        ),
        ({"backbone": {"name": "x"}}, "Record.backbone must name name, fingerprint; it lacks fingerprint"),
        ({"matrix": [0.5]}, "Record.matrix must be a list of rows of numbers; got [0.5]"),
        (
            {"matrix": [[0.5], [0.5]]},
            "Record.matrix: row 1 of an accuracy matrix has 2: one for each task so far; got 1",
        ),
        (
            {"matrix": [[86.25]]},
            "Record.matrix: an accuracy is a fraction between 0 and 1; got 86.25 in row 0",
        ),
        (
            {"matrix": [[0.5], [0.5, 0.5]]},
            "Record.matrix of a finished run must have 4 rows, or one row of 4; got 2",
        ),
        ({"matrix": [[0.5] * 5]}, "Record.matrix has at most the 4 tasks of classes; got 5"),
        ({"matrix": [[0.5] * 3]}, "Record.matrix must have 1 or all 4 tasks in a single row; got 3"),
        (
            {"matrix_task_aware": [[0.5]]},
            "Record.matrix_task_aware must have rows of [1, 2, 3, 4], as matrix has; got [1]",
        ),
        ({"test_sizes": [30, 20]}, "Record.test_sizes must have 4 numbers, one per task; got [30, 20]"),
        (
            {"seconds": {"train": [1.0], "look_back": [1.0] * 4, "evaluate": [1.0] * 4}},
            "Record.seconds.train must be 4 durations, one per row of matrix; got [1.0]",
        ),
    ],
)
def test_a_file_that_is_no_record_says_why(record, tmp_path, change, message):
    path = tmp_path / "results.json"
    values = {**record.as_dict(), **change}
    values = {name: value for name, value in values.items() if value is not None or name not in change}
    path.write_text(json.dumps(values))
    with pytest.raises(DataError) as error:
        Record.read(path)
    assert str(error.value) == f"{path}: {message}"


def test_a_metric_that_is_missing_or_text_is_refused(record):
    with pytest.raises(DataError) as error:
        dataclasses.replace(record, metrics={**record.metrics, "bwt": "low"})
    assert str(error.value) == "Record.metrics.bwt must be a number or null; got 'low'"


def test_an_unknown_field_is_named_with_the_nearest_known_one(record):
    with pytest.raises(DataError) as error:
        Record.from_dict({**record.as_dict(), "sede": 1})
    assert str(error.value).startswith("no field is called 'sede'; did you mean 'seed'? Known: backbone, ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"version": 1, "met',
            "is not valid JSON: Unterminated string starting at: line 1 column 16 (char 15)",
        ),
        ('{"version": NaN}', "is not valid JSON: NaN is not a number of JSON"),
    ],
)
def test_broken_json_is_refused(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        Record.read(path)
    assert str(error.value) == f"{path} {message}"


def test_a_file_that_is_json_but_no_object_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("[1]")
    with pytest.raises(DataError) as error:
        Record.read(path)
    assert str(error.value) == f"{path}: a record is an object with named fields; got list"


# ── finding ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def runs(seeds, tmp_path):
    """A folder of three run folders, one of them two levels down."""
    for record, folder in zip(seeds, ("a", "b", "suite/c"), strict=True):
        (tmp_path / folder).mkdir(parents=True)
        record.write(tmp_path / folder / "results.json")
    return tmp_path


def found(*paths):
    return [record.seed for record in find_records(paths)]


def test_runs_are_found_by_folder_by_file_and_by_folder_of_folders(runs):
    assert found(runs / "b") == [1]
    assert found(str(runs / "suite" / "c" / "results.json"), runs / "a") == [2, 0]
    assert found(runs) == [0, 1, 2]


def test_a_run_named_twice_counts_once(runs):
    assert found(runs / "b", runs, runs / "b" / "results.json") == [1, 0, 2]
    (runs / "link").symlink_to(runs / "b")
    assert found(runs / "link", runs / "b") == [1]


def test_a_run_folder_is_one_run_whatever_lies_inside_it(seeds, runs):
    (runs / "a" / "backup").mkdir()
    seeds[2].write(runs / "a" / "backup" / "results.json")
    assert found(runs / "a") == [0]


@pytest.mark.parametrize(("name", "what"), [("", "holds no results.json"), ("gone", "does not exist")])
def test_a_path_without_runs_is_named(runs, tmp_path, name, what):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError) as error:
        find_records([runs / "a", empty / name])
    rule = "give a run folder, a results.json, or a folder of run folders"
    assert str(error.value) == f"{empty / name} {what}; {rule}"


def test_a_file_may_hold_several_records_and_names_the_broken_one(seeds, tmp_path):
    path = tmp_path / "demo.json"
    path.write_text(json.dumps({"records": [record.as_dict() for record in seeds]}))
    assert read_records(path) == seeds
    path.write_text(json.dumps({"records": [seeds[0].as_dict(), {}]}))
    with pytest.raises(DataError) as error:
        read_records(path)
    assert str(error.value) == f"{path}, record 1: version must be 1, the one this lamina reads; got none"
