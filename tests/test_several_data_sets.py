"""Whole runs on several data sets: digits in 5 tasks, then pictures of 20 x 20 pixels of ant, bee and cat in one."""

import pytest
import torch

from lamina.errors import ResumeError
from lamina.results.records import Record
from lamina.runs import execute, plan, resumable
from lamina.training import stopping
from lamina.training.trainer import Stopped
from tests.commands import called, pictures

FEW = {"per_class": 4, "test_per_class": 3}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The part of a stream's name that stands for a folder with a plus in its path."""
    root = tmp_path_factory.mktemp("photos") / "c++"
    for seed, role in enumerate(("train", "test")):
        pictures(root / role, ("ant", "bee", "cat"), count=5 - seed, seed=seed)
    return f"folder:{str(root).replace('+', '++')}"


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _one_cache(caches, monkeypatch):
    monkeypatch.setenv("LAMINA_CACHE", str(caches))


def planned(photos, method="nearest-mean", **overrides):
    overrides = {"precision": "32", "accelerator": "cpu", "stream": FEW} | overrides
    return plan(method, f"digits+{photos}", overrides=overrides)[0]


def stopping_after(tasks, monkeypatch):
    """Ask the next run to stop when it has learned so many tasks; the method asks once after each."""
    asked = iter(range(1, 100))

    class Signals:
        def __enter__(self):
            return lambda: next(asked) == tasks

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(stopping, "stop_signals", Signals)


@pytest.fixture(scope="module")
def folder(photos, caches, tmp_path_factory):
    """Of a run that nothing disturbed."""
    found = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMINA_CACHE", str(caches))
        execute(planned(photos), found)
    return found


@pytest.fixture
def record(folder):
    return Record.read(folder / "results.json")


def test_a_run_learns_one_data_set_after_the_other_and_says_which_tasks_are_whose(record, photos):
    assert record.stream == f"digits+{photos}" and record.parts == {"digits": [0, 1, 2, 3, 4], photos: [5]}
    assert [len(row) for row in record.matrix] == [1, 2, 3, 4, 5, 6]
    assert record.test_sizes == [6, 6, 6, 6, 6, 9] and record.protocol["train_images"] == 52
    assert (record.protocol["classes"], record.protocol["tasks"], record.protocol["kind"]) == (
        13, 6, "class-incremental",
    )  # fmt: skip
    assert record.protocol["parts"] == f"digits in tasks 1 to 5, {photos} in task 6"
    assert sorted(record.classes[5]) == ["ant", "bee", "cat"]


def test_both_data_sets_are_learned_among_the_classes_of_both(record, photos):
    """Chance is one in 13."""
    assert record.part_accuracies[photos] > 0.9 and record.part_accuracies["digits"] > 0.3


def test_the_accuracy_on_a_part_is_no_new_evaluation(record, photos):
    last = record.matrix[-1]
    assert record.part_accuracies == pytest.approx({"digits": sum(last[:5]) / 5, photos: last[5]})


def test_a_run_that_was_stopped_between_data_sets_goes_on_as_if_nothing_had_happened(
    photos, record, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopping_after(5, patch)
        with pytest.raises(Stopped):
            execute(planned(photos), folder)
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state["position"][0] == 5 and not (folder / "results.json").exists()
    again = execute(resumable(folder), folder, resume=True)
    assert (again.matrix, again.parts, again.stream_fingerprint) == (
        record.matrix, record.parts, record.stream_fingerprint,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("other", "limits", "says"),
    [("/.", {}, r"stream\.name = "), ("", {"test_per_class": 2}, r"stream\.test_per_class = 3; this run has 2$")],
)
def test_a_run_on_other_parts_or_images_is_not_resumed(photos, folder, other, limits, says):
    with pytest.raises(ResumeError, match=rf"state\.pt was made with {says}"):
        execute(planned(photos + other, stream=FEW | limits), folder, resume=True)


def test_what_is_printed_names_the_accuracy_on_each_data_set_even_under_a_long_name(
    photos, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    limits = [word for name, value in FEW.items() for word in ("--set", f"stream.{name}={value}")]
    stream = f"digits+{photos}{'/.' * 120}"  # longer than file systems let a folder's name be
    code, out, _ = called(monkeypatch, capfd, "run", "nearest-mean", "--stream", stream, "--tasks", 1, *limits)
    (folder,) = (tmp_path / "runs").iterdir()
    found = Record.read(folder / "results.json")
    assert code == 0 and folder.name.startswith("nearest-mean-digits+folder-_") and len(folder.name) == 200
    told = " ".join(out[out.index("accuracy over test images, of all data sets and of each") :].split())
    values = [found.metrics["accuracy_weighted"], *found.part_accuracies.values()]
    assert f"│ {' │ '.join(f'{100 * value:.1f}' for value in values)} │ 1 │" in told
    assert "weighted accuracy (%)" in told and "digits (%)" in told


def test_the_list_of_streams_tells_how_to_join_them(monkeypatch, capfd):
    out = called(monkeypatch, capfd, "list", "streams")[1]
    assert any("A+B" in line and "a plus is written twice" in line for line in out.splitlines())


def test_the_upper_bound_learns_all_data_sets_at_once(photos, tmp_path):
    record = execute(
        planned(photos, "joint", epochs=1, length=3, batch_size=13, stream={"per_class": 1, "test_per_class": 1}),
        tmp_path / "run",
    )
    assert [len(row) for row in record.matrix] == [6] and record.protocol["kind"] == "joint"
    assert record.parts == {"digits": [0, 1, 2, 3, 4], photos: [5]} and set(record.part_accuracies) == {
        "digits",
        photos,
    }
