"""Transfer: settings are chosen on validation images alone, learned anew from all images, tested over seeds."""

import json
import shutil
from dataclasses import replace

import pytest

import lamina.selection
from lamina.config import write_toml
from lamina.errors import ConfigError, ResumeError, TrainingError
from lamina.methods.linear_probe import LinearProbe
from lamina.results.records import Record
from lamina.runs import resumable
from lamina.selection import SEEDS, SUMMARY, grid_of, transfer, transfer_plan, usual_grid
from tests.commands import BACKBONE, called, pictures
from tests.results.conftest import make


class World:
    """Runs that are made up: `validation` and `test` say the accuracy of settings, None where they diverge."""

    def __init__(self, validation, test=lambda settings, seed: 0.5):
        self.validation, self.test = validation, test
        self.ran = []

    def __call__(self, run, folder, **arguments):
        selecting = run.stream.test_on == "validation"
        self.ran.append((dict(run.settings), run.seed, "select" if selecting else "final"))
        if not (folder / "settings.toml").exists():
            write_toml(folder / "settings.toml", {"run": run.model_dump()})
        accuracy = self.validation(run.settings) if selecting else self.test(run.settings, run.seed)
        if accuracy is None:
            raise TrainingError("the loss is not finite")
        tested_on = "validation images" if selecting else "test images"
        classes = [["ant", "bee", "cat"]]
        return make([[accuracy]], test_sizes=[30], classes=classes, seed=run.seed, protocol={"tested_on": tested_on})

    @property
    def selected(self):
        return [settings["lr"] for settings, _, part in self.ran if part == "select"]


@pytest.fixture
def world(monkeypatch):
    """Return a function that puts a world in the place of real runs."""

    def put(*arguments):
        made = World(*arguments)
        monkeypatch.setattr(lamina.selection, "complete", made)
        return made

    return put


def planned(**overrides):
    return transfer_plan("linear-probe", "digits", recipe=False, overrides=overrides)[0]


def searched(folder, grid, run=None, seeds=2, **arguments):
    return transfer(run or planned(), folder, grid=grid, seeds=seeds, **arguments)


def test_the_best_on_validation_images_is_chosen_even_where_test_images_would_choose_otherwise(world, tmp_path):
    world(
        lambda settings: {0.1: 0.4, 1.0: 0.6, 10.0: 0.5}[settings["lr"]],
        lambda settings, seed: 1 / (1 + settings["lr"]),
    )
    summary = searched(tmp_path, {"lr": [10.0, 0.1, 1.0]})
    assert summary["chosen"] == {"lr": 1.0}
    assert summary["accuracy"] == {"mean": 0.5, "deviation": 0.0, "runs": 2}


def test_of_equal_accuracies_the_smaller_rate_is_chosen_whatever_the_order_of_the_grid(world, tmp_path):
    world(lambda settings: 0.5 if settings["lr"] < 5 else 0.4)
    for number, rates in enumerate(([1.0, 0.1, 10.0], [10.0, 1.0, 0.1])):
        assert searched(tmp_path / str(number), {"lr": rates})["chosen"] == {"lr": 0.1}


def test_every_combination_is_tried_once_with_the_first_seed_and_the_chosen_one_with_all(world, tmp_path):
    made = world(lambda settings: settings["lr"] - settings["weight_decay"], lambda settings, seed: seed / 1000)
    summary = searched(tmp_path, {"lr": [0.2, 0.1], "weight_decay": [0.0, 0.05, 0.01]}, seeds=3)
    tried = [(settings["lr"], settings["weight_decay"], seed) for settings, seed, part in made.ran if part == "select"]
    assert tried == [
        (0.1, 0.0, 42), (0.1, 0.05, 42), (0.1, 0.01, 42), (0.2, 0.0, 42), (0.2, 0.05, 42), (0.2, 0.01, 42),
    ]  # fmt: skip
    assert [(settings, seed) for settings, seed, part in made.ran if part == "final"] == [
        ({"lr": 0.2, "weight_decay": 0.0}, seed) for seed in (42, 44, 82)
    ]
    assert summary["accuracy"]["mean"] == pytest.approx(0.056) and summary["accuracy"]["runs"] == 3
    assert summary["accuracy"]["deviation"] == pytest.approx(0.022538855, abs=1e-8)
    assert SEEDS == (42, 44, 82, 100, 800)


def test_a_rate_that_diverges_takes_all_larger_ones_with_it_and_no_smaller_one(world, tmp_path):
    made = world(lambda settings: None if settings["lr"] >= 1 and settings["weight_decay"] else 0.3)
    summary = searched(tmp_path, {"lr": [100.0, 0.1, 1.0, 10.0], "weight_decay": [0.1, 0.0]})
    assert made.selected == [0.1, 0.1, 1.0, 1.0]
    told = {(t["settings"]["lr"], t["settings"]["weight_decay"]): t for t in summary["trials"]}
    assert told[1.0, 0.1]["diverged"] == "the loss is not finite" and told[1.0, 0.0]["accuracy"] == 0.3
    for rate in (10.0, 100.0):
        for decay in (0.0, 0.1):
            assert told[rate, decay]["left_out"] == "a run with lr=1.0 diverged"
            assert told[rate, decay]["accuracy"] is None
    assert summary["chosen"]["lr"] == 0.1


def test_settings_that_diverge_when_learned_anew_make_room_for_the_next_best_with_all_seeds(world, tmp_path):
    made = world(
        lambda settings: settings["lr"], lambda settings, seed: None if (settings["lr"], seed) == (0.3, 44) else 0.7
    )
    summary = searched(tmp_path, {"lr": [0.1, 0.2, 0.3]})
    assert summary["chosen"] == {"lr": 0.2} and summary["accuracy"]["runs"] == 2
    assert [(s["lr"], seed) for s, seed, part in made.ran if part == "final"] == [
        (0.3, 42),
        (0.3, 44),
        (0.2, 42),
        (0.2, 44),
    ]


def test_where_everything_diverges_the_next_move_is_said(world, tmp_path):
    world(lambda settings: None)
    with pytest.raises(TrainingError) as error:
        searched(tmp_path, {"lr": [0.1, 0.2]})
    assert str(error.value) == (
        "linear-probe diverged with all 2 settings that were tried; try smaller ones, as in --grid lr=0.001"
    )


def test_what_diverged_is_not_run_again(world, tmp_path):
    world(lambda settings: None if settings["lr"] > 0.1 else 0.3)
    searched(tmp_path, {"lr": [0.1, 0.2]})
    again = world(lambda settings: 0.3)
    assert searched(tmp_path, {"lr": [0.1, 0.2]})["chosen"] == {"lr": 0.1}
    assert again.selected == [0.1]  # which `complete` answers from its folder


def test_a_method_with_nothing_to_choose_is_tested_as_it_is(world, tmp_path):
    made = world(lambda settings: 0.3)
    summary = searched(tmp_path, {}, transfer_plan("nearest-mean", "digits")[0])
    assert usual_grid(transfer_plan("nearest-mean", "digits")[0]) == {}
    assert [part for _, _, part in made.ran] == ["final", "final"]
    assert (summary["trials"], summary["chosen"]) == ([], {})


def test_selection_has_validation_images_and_final_runs_no_holdout(world, tmp_path):
    world(lambda settings: 0.3)
    searched(tmp_path, {"lr": [0.1, 0.2]}, planned(stream={"holdout": 0.25, "per_class": 8}))
    select = resumable(tmp_path / "select" / "lr=0.1").stream
    final = resumable(tmp_path / "final" / "lr=0.1" / "seed-42").stream
    assert (select.test_on, select.holdout, select.per_class, select.tasks) == ("validation", 0.25, 8, 1)
    assert (final.test_on, final.holdout, final.per_class, final.tasks) == (None, None, 8, 1)


def test_what_is_measured_has_its_name_in_the_summary(monkeypatch, world, tmp_path):
    made = world(lambda settings: settings["lr"])
    pixels = {"measure": "mIoU", "tested_on": "test images"}
    monkeypatch.setattr(
        lamina.selection, "complete", lambda *given, **named: replace(made(*given, **named), protocol=pixels)
    )
    summary = searched(tmp_path, {"lr": [0.1, 0.2]})
    assert (summary["measure"], summary["chosen"]) == ("mIoU", {"lr": 0.2})
    assert summary["rule"].startswith("mIoU after the last epoch")


def test_a_folder_with_other_runs_is_refused(world, tmp_path):
    world(lambda settings: 0.3)
    searched(tmp_path, {"lr": [0.1, 0.2]})
    with pytest.raises(ResumeError) as error:
        searched(tmp_path, {"lr": [0.1, 0.2]}, planned(stream={"per_class": 5}))
    place = tmp_path / "select" / "lr=0.1"
    assert str(error.value) == (f"{place} holds a run with stream.per_class = None, this one has 5; give another --out")
    (tmp_path / SUMMARY).write_text("[]")
    with pytest.raises(ResumeError) as error:
        searched(tmp_path, {"lr": [0.1, 0.2]})
    assert str(error.value) == f"{tmp_path / SUMMARY} is no summary of a transfer; give another --out"


def test_a_grid_is_made_around_a_methods_own_rate():
    run = planned(lr=0.02, weight_decay=0.5)
    assert usual_grid(run) == {"lr": [0.002, 0.006, 0.02, 0.06, 0.2], "weight_decay": [0.0, 0.5]}
    assert usual_grid(planned(lr=0.02, weight_decay=0.0))["weight_decay"] == [0.0, 1e-4]
    assert usual_grid(transfer_plan("strata", "digits")[0]) == {}, "its rate changes nothing where nothing is trained"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr"], "--grid takes name=value,value; got 'lr'"),
        (["lr="], "--grid takes name=value,value; got 'lr='"),
        (["lr=1,,2"], "--grid takes name=value,value; got 'lr=1,,2'"),
        (["lr=1", "lr=2"], "--grid gives lr twice; list its values in one option, as in lr=0.1,1"),
    ],
)
def test_a_wrong_grid_says_how_to_write_one(words, message):
    with pytest.raises(ConfigError) as error:
        grid_of(words)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"lr": [0.1, -1.0]}, "LinearProbe.lr must be above 0.0; got -1.0"),
        (
            {"rate": [1]},
            "--grid rate: no setting is called 'rate'. Known: " + ", ".join(sorted(LinearProbe.model_fields)),
        ),
    ],
)
def test_a_grid_is_checked_before_anything_runs(grid, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        transfer(planned(), tmp_path / "new", grid=grid)
    assert str(error.value) == message and not (tmp_path / "new").exists()


@pytest.mark.parametrize("seeds", [0, 6])
def test_seeds_are_those_of_the_protocol(seeds, tmp_path):
    with pytest.raises(
        ConfigError, match=r"^seeds must be between 1 and 5, the first of \[42, 44, 82, 100, 800\]; got "
    ):
        transfer(planned(), tmp_path, grid={}, seeds=seeds)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"seed": 3}, "seed is decided by the protocol of transfer; leave it out, got 3"),
        (
            {"stream": {"test_on": "test"}},
            "stream.test_on is decided by the protocol of transfer; leave it out, got 'test'",
        ),
        (
            {"stream": {"tasks": 5}},
            "transfer learns all classes as one task; got stream.tasks=5: leave it out, or use `lamina run`",
        ),
    ],
)
def test_what_the_protocol_decides_is_not_a_setting(overrides, message):
    with pytest.raises(ConfigError) as error:
        planned(**overrides)
    assert str(error.value) == message


# ── with real runs ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def photos(tmp_path):
    """Three classes, seven training and four test pictures of each."""
    for role, count, seed in (("train", 7, 0), ("test", 4, 1)):
        pictures(tmp_path / "photos" / role, ["ant", "bee", "cat"], count=count, seed=seed)
    return tmp_path / "photos"


WORDS = ("--grid", "lr=0.0001,0.05", "--set", "epochs=3", "--set", "batch_size=5", "--backbone", BACKBONE)


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    return lambda *words: called(monkeypatch, capfd, *words)


def test_transfer_on_the_command_line_chooses_learns_anew_and_says_under_which_protocol(command, photos, tmp_path):
    words = ["transfer", "linear-probe", f"folder:{photos}", *WORDS, "--seeds", "2", "--out", "found"]
    code, out, _ = command(*words)
    assert code == 0 and "written to found/transfer.json" in out and "chosen by accuracy after the last epoch" in out
    assert "validation accuracy (%)" in out and f"linear-probe on folder:{photos}: accuracy " in out
    summary = json.loads((tmp_path / "found" / SUMMARY).read_text())
    assert summary["finished"] and summary["seeds"] == [42, 44] and len(summary["trials"]) == 2
    select = Record.read(tmp_path / "found" / summary["trials"][0]["folder"] / "results.json")
    final = Record.read(tmp_path / "found" / summary["finals"][0]["folder"] / "results.json")
    counts = ("train_images", "test_images", "tested_on")
    assert [select.protocol[name] for name in counts] == [18, 3, "held-out training images"]
    assert [final.protocol[name] for name in counts] == [21, 12, "test images"]
    assert final.protocol["kind"] == "one task" and summary["measure"] == "accuracy"
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "found").rglob("results.json")}
    assert len(times) == 4
    assert command(*words, "--json")[0] == 0
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "found").rglob("results.json")}
    again = json.loads((tmp_path / "found" / SUMMARY).read_text())
    assert {**again, "command": ""} == {**summary, "command": ""}


def test_what_is_chosen_does_not_depend_on_test_images(command, photos, tmp_path):
    """The labels of test images are exchanged; one class is not tested at all by its own images."""
    chosen = []
    for number in range(2):
        words = ["transfer", "linear-probe", f"folder:{photos}", *WORDS, "--seeds", "1", "--out", f"found-{number}"]
        code, out, _ = command(*words, "--json")
        assert code == 0
        summary = json.loads(out)
        chosen.append(([trial["accuracy"] for trial in summary["trials"]], summary["chosen"]))
        shutil.move(photos / "test" / "ant", photos / "test" / "aside")
        shutil.move(photos / "test" / "bee", photos / "test" / "ant")
        shutil.move(photos / "test" / "aside", photos / "test" / "bee")
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0][0])) == 2, "the settings must differ, or the choice says nothing"


def test_a_loss_that_is_not_finite_counts_as_diverged_in_a_real_run(command, photos, tmp_path):
    words = ["transfer", "linear-probe", f"folder:{photos}", "--backbone", BACKBONE, "--set", "epochs=2"]
    code, out, errors = command(*words, "--grid", "lr=0.01,1e37,1e38", "--seeds", "1", "--out", "found", "--json")
    assert code == 0, errors
    trials = json.loads(out)["trials"]
    assert [("diverged" in trial, "left_out" in trial) for trial in trials] == [
        (False, False),
        (True, False),
        (False, True),
    ]


def test_wrong_words_are_one_line_and_exit_code_2(command):
    code, out, errors = command("transfer", "linear-probe", "digits", "--seeds", "9")
    assert (code, out) == (2, "")
    assert errors[-1] == "lamina: seeds must be between 1 and 5, the first of [42, 44, 82, 100, 800]; got 9"
