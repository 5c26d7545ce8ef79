"""The command: one line on stderr and exit code 2 for what a user can mend, and nothing lost."""

import json
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import lamina
from lamina.cli import app
from lamina.data.streams import StreamSettings
from lamina.errors import StorageError
from lamina.registry import method_class, method_names
from lamina.results.records import Record
from lamina.runs import RECIPES, RunSettings
from lamina.training.trainer import Stopped
from tests.commands import called
from tests.streams import KNOWN_STREAMS

SMALL = ["--stream", "digits", "--set", "stream.per_class=3", "--set", "stream.test_per_class=2"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Run in an empty folder, and give signals back to pytest afterwards."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command(monkeypatch, capfd):
    """Return a function from words to (exit code, stdout, lines of stderr), through `main`."""

    return partial(called, monkeypatch, capfd)


@pytest.fixture
def photos(tmp_path):
    """train/ and test/ with classes ant, bee and cat: three and two pictures of 20 x 20 each."""
    random, root = np.random.default_rng(0), tmp_path / "photos"
    for role, count in (("train", 3), ("test", 2)):
        for label in ("ant", "bee", "cat"):
            (root / role / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / role / label / f"{number}.jpg")
    return root


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ── looking around ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "column", "some"),
    [
        ("methods", "method", {"strata", "vpt-nsp2", "joint", "nearest-mean"}),
        ("streams", "stream", {"digits", "folder:PATH", "tiny-imagenet"}),
        ("backbones", "backbone", {"lamina:vit-nano", "timm:NAME.TAG"}),
        ("recipes", "recipe", {"vpt-nsp2/cifar100"}),
    ],
)
def test_list_gives_each_a_name_and_a_line_as_json_and_as_text(kind, column, some):
    result = CliRunner().invoke(app, ["list", kind, "--json"])
    rows = json.loads(result.stdout)
    assert result.exit_code == 0
    assert some <= {row[column] for row in rows}
    assert all(row["what it is"].strip() and "\n" not in row["what it is"] for row in rows)
    text = CliRunner().invoke(app, ["list", kind]).stdout
    assert all(name in text for name in some)


def test_list_settings_gives_every_setting_of_runs_streams_and_pixels_as_set_takes_it():
    rows = json.loads(CliRunner().invoke(app, ["list", "settings", "--json"]).stdout)
    run = RunSettings.model_fields.keys() - {"method", "stream", "dense", "settings"}
    nested = {f"stream.{name}" for name in StreamSettings.model_fields} | {"dense.channels", "dense.auxiliary"}
    assert run | nested <= {row["setting"] for row in rows}
    assert len({row["setting"] for row in rows}) == len(rows)
    assert all(row["limits"] and row["meaning"] for row in rows)
    (order,) = (row for row in rows if row["setting"] == "stream.order_seed")
    assert (order["default"], order["limits"]) == (1993, "0 or more, below 4294967296")
    assert "dense.multi_scale" in CliRunner().invoke(app, ["list", "settings"]).stdout


@pytest.mark.parametrize("name", method_names())
def test_show_gives_every_setting_with_its_default_limits_and_meaning(name):
    result = CliRunner().invoke(app, ["show", name, "--json"])
    found = json.loads(result.stdout)
    fields = method_class(name).model_fields
    assert found["method"] == name and found["text"].splitlines()[0].endswith(".")
    assert {row["setting"]: row["default"] for row in found["settings"]} == {k: f.default for k, f in fields.items()}
    assert all(row["limits"] and row["meaning"] for row in found["settings"])
    assert CliRunner().invoke(app, ["show", name]).exit_code == 0


def test_show_writes_limits_as_people_do():
    rows = json.loads(CliRunner().invoke(app, ["show", "vpt-nsp2", "--json"]).stdout)["settings"]
    limits = {row["setting"]: row["limits"] for row in rows}
    assert (limits["length"], limits["eta1"], limits["lr"], limits["ln_correction"], limits["use_b1"]) == (
        "3 or more",
        "0 to 1",
        "above 0",
        "none or affine",
        "true or false",
    )


def test_show_gives_a_recipe_as_it_is_written_and_refuses_one_that_nobody_knows(command):
    code, out, errors = command("show", "vpt-nsp2/digits")
    assert (code, errors) == (0, []) and out.rstrip() == (RECIPES / "vpt-nsp2/digits.toml").read_text().rstrip()
    assert json.loads(command("show", "vpt-nsp2/digits", "--json")[1])["method"] == "vpt-nsp2"
    code, out, errors = command("show", "vpt-nsp2/digit")
    assert (code, out) == (2, "") and "no recipe is called 'vpt-nsp2/digit'; did you mean 'vpt-nsp2/digits'?" in errors[
        0
    ]


def test_doctor_names_versions_the_device_and_what_was_found(tmp_path):
    result = CliRunner().invoke(app, ["doctor", "--json", "--data", str(tmp_path / "nowhere")])
    found = json.loads(result.stdout)
    assert list(found) == [
        "lamina", "torch", "timm", "python", "device", "precision", "data", "cache", "data sets", "backbones",
    ]  # fmt: skip
    assert found["lamina"] == lamina.__version__ and found["data"] == str(tmp_path / "nowhere")
    assert [row["name"] for row in found["data sets"] if row["found"] == "no"] == [
        "tiny-imagenet", "cifar10", "cifar100",
    ]  # fmt: skip
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0


def test_the_version_is_said():
    assert CliRunner().invoke(app, ["--version"]).stdout == f"lamina {lamina.__version__}\n"


# ── wrong words ──────────────────────────────────────────────────────────────────────────────────────

KNOWN = f"Known: {', '.join(method_names())}"
SETTINGS = (
    "Known: batch_size, center, epochs, eta1, eta2, gain_control, head, kept, knee, layers, length, ln_correction, lr, "
    "moments, multiple, normalize, parity, temperature, use_b1, use_b2, use_ln_loss, weight_decay"
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["run", "vpt-nps2", "--stream", "digits"],
            f"no method is called 'vpt-nps2'; did you mean 'vpt-nsp2'? {KNOWN}",
        ),
        (["show", "jiont"], f"no method is called 'jiont'; did you mean 'joint'? {KNOWN}"),
        (
            ["run", "joint"],
            "a run needs a stream: --stream NAME; `lamina list streams` shows what there is",
        ),
        (
            ["run", "nearest-mean", "--stream", "digit"],
            f"no stream is called 'digit'; did you mean 'digits'? Known: {KNOWN_STREAMS}",
        ),
        (
            ["run", "nearest-mean", "--stream", "digits", "--backbone", "lamina:vit-nona"],
            "no backbone is called 'lamina:vit-nona'; did you mean 'lamina:vit-nano'? Known: lamina:clip-nano, "
            "lamina:vit-nano, lamina:vit-nano-mae",
        ),
        (
            ["run", "vpt-nsp2", "--stream", "digits", "--set", "eta=1"],
            f"VPTNSP2: no setting is called 'eta'; did you mean 'eta2'? {SETTINGS}",
        ),
        (
            ["run", "vpt-nsp2", "--stream", "digits", "--set", "eta1=1.5"],
            "VPTNSP2.eta1 must be between 0 and 1; got 1.5",
        ),
        (
            ["run", "vpt-nsp2", "--stream", "digits", "--set", "stream.per_clas=3"],
            "StreamSettings: no setting is called 'per_clas'; did you mean 'per_class'? Known: blurry, "
            "classes, domains, duplicates, holdout, name, order, order_seed, per_class, skip_broken, tasks, "
            "test_on, test_per_class",
        ),
        (
            ["run", "nearest-mean", "--stream", "digits", "--tasks", "11"],
            "stream.tasks must be at most the number of classes; digits with classes='all' has 10, got 11",
        ),
        (["run", "vpt-nsp2", "--stream", "digits", "--set", "eta"], "--set takes name=value; got 'eta'"),
        (
            ["run", "nearest-mean", "--stream", "folder:nowhere"],
            "nowhere is not a folder; a folder of images holds train/CLASS/* and test/CLASS/* or val/CLASS/*",
        ),
        (
            ["report", "nowhere"],
            "nowhere does not exist; give a run folder, a results.json, or a folder of run folders",
        ),
        (
            ["resume", "nowhere"],
            "nowhere holds no run: there is no settings.toml in it; start one with `lamina run`",
        ),
        (["run", "nowhere.toml"], "nowhere.toml cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_word_is_one_line_and_leaves_nothing(command, words, message):
    code, out, errors = command(*words, *(["--out", "new"] if words[0] == "run" else []))
    assert (code, out, errors) == (2, "", [f"lamina: {message}"])
    assert contents(Path(".")) == {}


@pytest.mark.parametrize(
    "words", [["--set", "stream=digits"], ["--set", "stream=digits", "--tasks", "2"], ["--set", "settings=3"]]
)
def test_a_plain_value_where_a_table_belongs_is_one_line(command, words):
    code, out, errors = command("run", "nearest-mean", "--out", "new", *words)
    assert (code, out, len(errors)) == (2, "", 1) and errors[0].startswith("lamina: ")
    assert contents(Path(".")) == {}


def folder_with_an_empty_class(photos):
    for path in (photos / "train" / "bee").iterdir():
        path.unlink()
    return f"stream 'folder:{photos}': class 'bee' has no training image"


def folder_with_a_class_in_test_alone(photos):
    (photos / "test" / "dog").mkdir()
    (photos / "test" / "cat" / "0.jpg").rename(photos / "test" / "dog" / "0.jpg")
    return f"stream 'folder:{photos}': class 'dog' has no training image"


def folder_with_a_broken_image(photos):
    (photos / "train" / "cat" / "1.jpg").write_bytes(b"not a picture")
    return f"{photos / 'train' / 'cat' / '1.jpg'} cannot be read: cannot identify image file"


@pytest.mark.parametrize(
    ("spoil", "rest"),
    [
        (folder_with_an_empty_class, "; every class needs images to learn from and images to test on"),
        (folder_with_a_class_in_test_alone, "; every class needs images to learn from and images to test on"),
        (folder_with_a_broken_image, "; mend it, or leave broken images out by --skip-broken"),
    ],
)
def test_a_spoiled_folder_is_one_line_and_a_mended_one_runs_under_the_same_name(command, photos, spoil, rest):
    before = contents(photos)
    message = spoil(photos)
    words = ["run", "nearest-mean", "--stream", f"folder:{photos}", "--out", "new"]
    assert command(*words) == (2, "", [f"lamina: {message}{rest}"])
    assert contents(Path(".")) == {}
    for path in photos.rglob("*.jpg"):
        path.unlink()
    (photos / "test" / "dog").rmdir() if (photos / "test" / "dog").exists() else None
    for name, data in before.items():
        (photos / name).write_bytes(data)
    assert command(*words)[0] == 0
    assert Record.read(Path("new/results.json")).finished


def test_broken_images_are_skipped_and_counted_when_asked_for(command, photos):
    folder_with_a_broken_image(photos)
    (photos / "test" / "ant" / "0.jpg").write_bytes(b"")
    code, _, _ = command("run", "nearest-mean", "--stream", f"folder:{photos}", "--skip-broken", "--out", "new")
    record = Record.read(Path("new/results.json"))
    assert code == 0 and record.protocol["skipped_images"] == 2
    assert (record.protocol["train_images"], record.test_sizes) == (8, [5])


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def finished(command):
    """Run once; return the folder, and what was printed."""
    code, out, errors = command("run", "nearest-mean", *SMALL, "--out", "done", "--json")
    assert (code, errors) == (0, [])
    return Path("done"), out


def test_a_recipe_for_another_backbone_is_left_out_and_told_of(command):
    words = ["run", "nearest-mean", *SMALL, "--out", "done"]
    recipe = RECIPES / "nearest-mean" / "digits.toml"
    assert recipe.exists() == (f"recipe nearest-mean/{recipe.name}" in "".join(command(*words)[2]))
    code, _, errors = command(
        "run", "vpt-deep", *SMALL, "--set", "epochs=1", "--backbone", "lamina:vit-nano#mean_all", "--out", "other"
    )
    assert code == 0 and errors[0] == (
        "recipe vpt-deep/digits.toml is for lamina:vit-nano and is left out; settings that are not given are the "
        "method's own"
    )
    assert "recipe" not in "".join(command("run", "nearest-mean", *SMALL, "--no-recipe", "--out", "third")[2])


def test_a_run_writes_all_documented_fields_and_json_prints_the_same(finished):
    folder, out = finished
    results = json.loads((folder / "results.json").read_text())
    assert json.loads(out) == results
    documented = Record.__doc__.partition("Attributes:")[2].partition("Raises:")[0]
    assert len(results) == 31 and all(name in documented for name in results)
    assert results["command"] == "lamina run nearest-mean " + " ".join(SMALL) + " --out done --json"
    assert (results["method"], results["stream"], results["seed"], results["order_seed"]) == (
        "nearest-mean", "digits", 0, 1993,
    )  # fmt: skip
    assert [len(row) for row in results["matrix"]] == [1, 2, 3, 4, 5] and results["test_sizes"] == [4] * 5
    assert results["protocol"] == {
        "kind": "class-incremental",
        "tasks": 5,
        "classes": 10,
        "train_images": 30,
        "test_images": 20,
        "tested_on": "test images",
        "image_size": 64,
        "augmentation": "none (cached features)",
        "precision": results["protocol"]["precision"],
        "test_batch": "independent",
        "skipped_images": 0,
    }
    assert results["trainable_parameters"] == 0 and results["stored_numbers"] == 10 * 192 + 10
    assert sorted(path.name for path in folder.iterdir()) == [
        "learned.safetensors", "results.json", "settings.toml", "state.pt",
    ]  # fmt: skip


def test_a_folder_that_holds_a_run_is_left_as_it_is(finished, command):
    folder, _ = finished
    before = contents(folder)
    code, out, errors = command("run", "joint", *SMALL, "--no-recipe", "--seed", "7", "--out", folder)
    assert (code, out) == (2, "")
    assert errors == [
        "lamina: done already holds a finished run of nearest-mean on digits with seed 0; give another --out"
    ]
    assert contents(folder) == before


def test_a_finished_run_that_is_resumed_stays_what_it_was(finished, command):
    folder, out = finished
    code, again, _ = command("resume", folder, "--json")
    then, now = json.loads(out), json.loads(again)
    assert code == 0
    for name in ("matrix", "matrix_task_aware", "metrics", "seconds", "settings", "classes", "finished"):
        assert now[name] == then[name], name


def test_changed_settings_are_not_resumed(finished, command):
    folder, _ = finished
    path = folder / "settings.toml"
    path.write_text(path.read_text().replace("seed = 0", "seed = 4"))
    before = contents(folder)
    assert command("resume", folder) == (2, "", ["lamina: done/state.pt was made with seed = 0; this run has 4"])
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vpt-deep", "--set", "epochs=1", "--set", "lr=0.5", "--no-recipe", "--tasks", "2"], r"[1-9]\d*\.\d"),
        (["nearest-mean"], r"0\.0"),
    ],
)
def test_drift_is_measured_and_said_where_it_is_asked_for(command, words, said):
    code, out, errors = command("run", *words, *SMALL, "--out", "new", "--measure-drift")
    *_, line, place = out.splitlines()
    assert (code, place) == (0, "written to new")
    assert re.fullmatch(
        rf"old features moved by {said} % of their spread \(mean over old tasks, after the last task\)", line
    )
    record = Record.read(Path("new/results.json"))
    assert line.split()[4] == f"{100 * sum(each[-1] for each in record.drift[-1][:-1]) / (record.tasks - 1):.1f}"
    assert command("resume", "new")[1].splitlines()[-2] == line
    assert ("Drift of old features" in (command("report", "new"), Path("new/report.html").read_text())[1]) is True


def test_drift_that_nobody_asked_for_is_not_measured(finished):
    folder, out = finished
    assert json.loads(out)["drift"] == [] and "measure_drift" not in json.loads(out)["seconds"]


def test_a_report_is_one_page_about_all_runs_it_is_given(finished, command):
    folder, _ = finished
    code, out, errors = command("report", folder, "--out", "page.html")
    page = Path("page.html").read_text()
    assert (code, errors) == (0, []) and out.splitlines()[-1] == "written to page.html"
    assert page.startswith("<!doctype html>") and "nearest-mean" in page
    assert "://" not in page.replace("http://www.w3.org/", "")
    code, out, _ = command("report", ".", "--json")
    assert json.loads(out)["method"] == "nearest-mean" and Path("report.html").exists()


def test_a_report_says_which_runs_are_not_finished(finished, command):
    shutil.copytree(finished[0], "runs/whole")
    shutil.copytree(finished[0], "runs/half")
    Path("runs/half/results.json").unlink()
    code, out, errors = command("report", "runs")
    assert (code, errors) == (0, ["left out, not finished: runs/half; go on with `lamina resume runs/half`"])
    assert "nearest-mean" in out


def test_a_report_prints_a_table_for_each_stream(finished, command):
    shutil.copytree(finished[0], "runs/a")
    other = json.loads(Path("runs/a/results.json").read_text())
    Path("runs/b").mkdir()
    Path("runs/b/results.json").write_text(json.dumps(other | {"stream": "elsewhere"}))
    out = command("report", "runs")[1]
    assert out.index("digits") < out.index("elsewhere") and out.count("nearest-mean") == 2
    assert command("report", "runs/a")[1].startswith("┏")  # one stream needs no title


def test_runs_without_a_folder_get_one_each(command):
    for name in ("nearest-mean-digits", "nearest-mean-digits-2"):
        code, out, errors = command("run", "nearest-mean", *SMALL)
        assert code == 0 and out.splitlines()[-1] == f"written to runs/{name}"
        assert errors[-1].startswith("after task 5/5: accuracy ")
        assert Record.read(Path("runs") / name / "results.json").finished


@pytest.mark.parametrize("words", [["run", "nearest-mean", *SMALL, "--out", "new"], ["demo", "--out", "new"]])
@pytest.mark.parametrize(("error", "code"), [(Stopped(), 75), (KeyboardInterrupt(), 130)])
def test_a_command_that_is_stopped_says_how_to_go_on(command, monkeypatch, words, error, code):
    def stop(settings, folder, **named):
        folder.mkdir(parents=True)
        raise error

    monkeypatch.setattr("lamina.runs.execute", stop)
    found, _, errors = command(*words)
    assert found == code and errors[-1].startswith("stopped; go on with `lamina ")


def test_a_command_that_is_stopped_before_it_began_does_not_promise_a_resume(command, monkeypatch):
    def stop(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("lamina.runs.execute", stop)
    assert command("run", "nearest-mean", *SMALL, "--out", "new") == (130, "", ["stopped; nothing was begun yet"])


def test_a_folder_of_something_else_is_not_written_into(command):
    Path("photos").mkdir()
    Path("photos/a.jpg").write_text("mine")
    code, out, errors = command("run", "nearest-mean", *SMALL, "--out", "photos")
    assert (code, out) == (2, "")
    assert errors == ["lamina: photos is not empty and holds no run; give another --out"]
    assert [path.name for path in Path("photos").iterdir()] == ["a.jpg"]


def test_an_error_of_several_lines_is_printed_in_one(command, monkeypatch):
    def fail(*arguments, **named):
        raise StorageError("the disk\n  is full")

    monkeypatch.setattr("lamina.runs.execute", fail)
    assert command("run", "nearest-mean", *SMALL) == (2, "", ["lamina: the disk is full"])


def test_a_real_process_says_one_line_and_exits_with_two():
    """No traceback, no warning of a library beside it."""
    process = subprocess.run(
        [sys.executable, "-c", "from lamina.cli import main; main()", "run", "vpt-nsp2", "--stream", "digit"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (process.returncode, process.stdout) == (2, "")
    assert len(process.stderr.splitlines()) == 1 and process.stderr.startswith("lamina: no stream is called 'digit'")
