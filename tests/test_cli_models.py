"""`lamina predict|evaluate|inspect|export|sample` on a model of three lessons, and what people feed them."""

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from lamina.modelfile import ModelFile
from tests.commands import BACKBONE, EPOCH, Forked, called, pictures, rows, wait_for

#: in order of arrival, which is not that of the alphabet
CLASSES = ["yak", "zebra", "ant", "bee", "emu", "fox", "newt"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Folders 1 (yak, zebra), 2 (ant, bee), 3 (emu, fox, newt), and test with four new pictures of each."""
    root = tmp_path_factory.mktemp("shop")
    for name, part in {"1": CLASSES[:2], "2": CLASSES[2:4], "3": CLASSES[4:]}.items():
        pictures(root / name, part, count=8)
    pictures(root / "test", CLASSES, count=4, seed=9)
    return root


@pytest.fixture(scope="module")
def learned(shop, tmp_path_factory):
    """nearest-mean, taught three times by processes that know nothing of one another."""
    folder = tmp_path_factory.mktemp("learned")
    path = folder / "mean.lamina"
    for name in ("1", "2", "3"):
        words = ["--method", "nearest-mean", "--backbone", BACKBONE] if name == "1" else ["--name", f"round {name}"]
        code, _, errors = Forked("learn", path, shop / name, *words, folder=folder).end()
        assert code == 0, errors
    return path


@pytest.fixture
def command(monkeypatch, capfd):
    """Return a function from words to (exit code, stdout, lines of stderr)."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", EPOCH)
    return lambda *words: called(monkeypatch, capfd, *words)


@pytest.fixture
def model(learned, tmp_path):
    """A copy of the model, to be changed."""
    return shutil.copy(learned, tmp_path / "shop.lamina")


def truth(path):
    return path.split(os.sep)[-2]


# ── three rounds ─────────────────────────────────────────────────────────────────────────────────────


def test_after_three_lessons_a_fresh_process_tells_old_classes_and_new_ones(shop, learned):
    words = ["predict", learned, shop / "test", "--format", "jsonl", "--top", "7"]
    code = "from lamina.cli import main; main()"
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=120
    )
    assert (process.returncode, process.stderr) == (0, "")
    found = rows(process.stdout)
    assert len(found) == 28
    assert np.mean([row["class"] == truth(row["path"]) for row in found]) > 0.9
    assert ModelFile.read(learned).classes == CLASSES
    assert all({each["class"] for each in row["top"]} == set(CLASSES) for row in found)


def test_three_lessons_of_prompts_keep_columns_in_order_of_arrival_and_old_classes_alive(shop, tmp_path):
    path = tmp_path / "strata.lamina"
    words = ["--backbone", "lamina:vit-nano", "--set=length=16", "--set=epochs=1", "--set=batch_size=7"]
    for name in ("1", "2", "3"):
        code, _, errors = Forked("learn", path, shop / name, *words, folder=tmp_path).end()
        assert code == 0, errors
        words = []
    code, out, errors = Forked("evaluate", path, shop / "test", "--json", folder=tmp_path).end()
    found = json.loads(out)
    assert code == 0, errors
    assert [row["name"] for row in found["classes"]] == CLASSES
    assert [row["task"] for row in found["classes"]] == [1, 1, 2, 2, 3, 3, 3]
    assert found["accuracy"] > 3 / 7 and found["tasks"][0]["accuracy"] > 2 / 7
    assert [lesson["drift"] is None for lesson in found["model"]["lessons"]] == [True, False, False]


# ── predict ──────────────────────────────────────────────────────────────────────────────────────────


def predicted(command, model, *words):
    code, out, errors = command("predict", model, *words, "--format", "jsonl")
    assert (code, errors) == (0, [])
    return rows(out)


def test_all_formats_say_the_same(shop, learned, command):
    words = ["predict", learned, shop / "test", "--top", "2", "--flag-novel"]
    lines = rows(command(*words, "--format", "jsonl")[1])
    assert json.loads(command(*words, "--format", "json")[1]) == lines
    table = list(csv.DictReader(io.StringIO(command(*words, "--format", "csv")[1])))
    text = command(*words)[1].splitlines()
    assert len(lines) == len(table) == len(text) - 1 == 28
    for said, cells, line in zip(lines, table, text[1:], strict=True):
        best, second = said["top"]
        assert list(said) == ["path", "class", "probability", "top", "novelty", "novel", "uncertainty", "error"]
        assert (said["class"], said["probability"]) == (best["class"], best["probability"]) and said["error"] is None
        assert list(cells) == [
            "path", "class_1", "probability_1", "class_2", "probability_2", "novelty", "novel", "error",
        ]  # fmt: skip
        assert cells["path"] == said["path"] and cells["error"] == "" and cells["novel"] == str(said["novel"])
        assert (cells["class_1"], cells["class_2"]) == (best["class"], second["class"])
        assert float(cells["probability_1"]) == best["probability"] >= second["probability"]
        assert float(cells["novelty"]) == said["novelty"]
        mark = "new? " if said["novel"] else ""
        share, other = (f"{100 * each['probability']:.1f} %" for each in said["top"])
        assert line.split() == (
            f"{share} {said['novelty']:.2f} {mark}{best['class']}, {second['class']} {other} {said['path']}".split()
        )


def test_uncertainty_is_the_entropy_of_all_probabilities_and_is_printed_when_asked(shop, learned, command):
    words = ["predict", learned, shop / "test", "--top", "99"]
    for said in rows(command(*words, "--format", "jsonl")[1]):
        shares = [each["probability"] for each in said["top"]]
        entropy = -sum(share * math.log(share) for share in shares if share)
        assert said["uncertainty"] == {"entropy": pytest.approx(entropy, abs=1e-4)}
    header, first, *_ = command(*words, "--uncertainty")[1].splitlines()
    assert header.split() == ["probability", "novelty", "entropy", "agree", "disagree", "class,", "image"]
    assert first.split()[3].replace(".", "").isdigit() and first.split()[4:6] == ["–", "–"]
    table = csv.DictReader(io.StringIO(command(*words, "--uncertainty", "--format", "csv")[1]))
    assert [row["mutual_information"] for row in table] == [""] * 28


def test_top_names_as_many_classes_as_there_are_and_their_probabilities_sum_to_one(shop, learned, command):
    for row in predicted(command, learned, shop / "test" / "ant", "--top", "50"):
        shares = [each["probability"] for each in row["top"]]
        assert len(shares) == 7 and shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=1e-5)
    out = command("predict", learned, shop / "test" / "ant", "--top", "9", "--format", "csv")[1]
    assert {len(row) for row in csv.reader(io.StringIO(out))} == {1 + 2 * 9 + 3}


@pytest.mark.parametrize("words", [["--top", "0"], ["--batch", "0"], ["--format", "xml"], ["--novelty", "luck"]])
def test_an_option_out_of_range_is_an_error_of_use(shop, learned, command, words):
    assert command("predict", learned, shop / "test", *words)[:2] == (2, "")


@pytest.mark.parametrize("form", ["table", "json", "jsonl", "csv"])
def test_a_broken_image_is_one_row_and_the_rest_goes_on(shop, learned, tmp_path, command, form):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    good = shop / "test" / "ant" / "9-0.png"
    code, out, errors = command("predict", learned, good, bad, tmp_path / "gone.png", good, "--format", form)
    assert (code, errors) == (3, ["2 images could not be read"])
    reasons = ["cannot identify image file", "there is no such file"]
    if form == "table":
        lines = out.splitlines()
        assert len(lines) == 5 and lines[1] == lines[4] and lines[1].endswith(str(good))
        assert [line.strip() for line in lines[2:4]] == [
            f"{bad}: {reasons[0]}",
            f"{tmp_path / 'gone.png'}: {reasons[1]}",
        ]
        return
    parse = {"json": json.loads, "jsonl": rows, "csv": lambda text: list(csv.DictReader(io.StringIO(text)))}[form]
    found = parse(out)
    assert [row["path"] for row in found] == list(map(str, [good, bad, tmp_path / "gone.png", good]))
    assert [row["error"] or None for row in found] == [None, *reasons, None]
    assert found[0] == found[3]
    if form != "csv":
        assert found[1] == dict.fromkeys(found[1]) | {
            "path": str(bad),
            "top": [],
            "uncertainty": {},
            "error": reasons[0],
        }


def test_one_broken_image_is_said_in_the_singular(learned, tmp_path, command):
    assert command("predict", learned, tmp_path / "gone.png")[::2] == (3, ["1 image could not be read"])


def test_files_folders_patterns_and_lists_mean_the_same_images(shop, learned, command, monkeypatch):
    folder = shop / "test"
    whole = predicted(command, learned, folder)
    assert len(whole) == 28 and [row["path"] for row in whole] == sorted(row["path"] for row in whole)
    assert predicted(command, learned, folder / "*" / "*.png") == whole
    assert predicted(command, learned, folder / "**" / "9-?.png") == whole
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{row['path']}\n" for row in whole)))
    assert predicted(command, learned, "-") == whole
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{folder / 'ant'}\n\n"))
    assert [truth(row["path"]) for row in predicted(command, learned, folder / "fox" / "9-1.png", "-")] == [
        "fox", *["ant"] * 4,
    ]  # fmt: skip


def test_no_images_at_all_is_an_empty_list(learned, command, monkeypatch):
    for form, wanted in (("json", []), ("jsonl", []), ("csv", [])):
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        code, out, errors = command("predict", learned, "-", "--format", form)
        assert (code, errors) == (0, [])
        found = json.loads(out) if form == "json" else rows(out) if form == "jsonl" else out.splitlines()[1:]
        assert found == wanted


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_size_of_a_batch_does_not_change_a_digit_beyond_noise(shop, learned, command, precision):
    def numbers(batch):
        found = predicted(command, learned, shop / "test", "--batch", batch, "--precision", precision, "--top", "7")
        shares = [sorted((each["class"], each["probability"]) for each in row["top"]) for row in found]
        return (
            np.array([[share for _, share in row] for row in shares]),
            np.array([row["novelty"] for row in found]),
            [row["class"] for row in found],
        )

    shares, novelty, names = numbers(64)
    for batch in (1, 3):
        other = numbers(batch)
        assert np.abs(other[0] - shares).max() < 1e-5
        assert np.abs(other[1] - novelty).max() < 1e-3
        assert other[2] == names


def test_the_first_rows_come_before_the_list_of_paths_ends(shop, learned, tmp_path):
    os.mkfifo(tmp_path / "paths")
    image = shop / "test" / "ant" / "9-0.png"
    process = Forked(
        "predict", learned, "-", "--format", "jsonl", "--batch", "2", folder=tmp_path, given=tmp_path / "paths"
    )
    with open(tmp_path / "paths", "w") as pipe:
        pipe.write(f"{image}\n" * 200)
        pipe.flush()
        wait_for(lambda: process.out.exists() and len(process.out.read_text().splitlines()) >= 2)
        assert process.process.is_alive()
        pipe.write(f"{shop / 'test' / 'fox' / '9-0.png'}\n")
    code, out, errors = process.end()
    assert (code, errors) == (0, [])
    assert [truth(row["path"]) for row in rows(out)] == ["ant"] * 200 + ["fox"]


def test_a_reader_that_has_had_enough_ends_it_quietly(shop, learned, tmp_path):
    os.mkfifo(tmp_path / "rows")
    (tmp_path / "paths").write_text(f"{shop / 'test' / 'ant' / '9-0.png'}\n" * 300)
    words = ["predict", learned, "-", "--format", "jsonl", "--batch", "2"]
    process = Forked(*words, folder=tmp_path, given=tmp_path / "paths", out=tmp_path / "rows")
    with open(tmp_path / "rows") as pipe:
        assert json.loads(pipe.readline())["class"] == "ant"
    assert process.end() == (0, "", [])


ODD_FILES = ["line\nbreak.png", "\x1b[2Jclear.png", "\u202ereversed.png", "a,b\"c'd.png", "=cmd|' C calc'!A0.png"]
ODD_FILES += ["[red]bold.png", "🐜.png", "-n.png", " space.png", os.fsdecode(b"latin-\xe9.png")]


def test_odd_names_of_files_survive_json_and_steer_no_terminal(shop, learned, tmp_path, command):
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in ODD_FILES:
        shutil.copy(shop / "test" / "ant" / "9-0.png", folder / name)
    (folder / "broken\x1b[31m.png").write_text("")
    for form in ("json", "jsonl", "csv", "table"):
        code, out, errors = command("predict", learned, folder, "--format", form)
        assert (code, errors) == (3, ["1 image could not be read"])
        assert not set(out) & {"\x1b", "\u202e", "\udce9"}
        if form in ("json", "jsonl"):
            found = json.loads(out) if form == "json" else rows(out)
            assert {os.path.basename(row["path"]) for row in found} == {*ODD_FILES, "broken\x1b[31m.png"}
        elif form == "csv":
            table = list(csv.DictReader(io.StringIO(out)))
            assert len(table) == 11 and {row["class_1"] for row in table} == {"ant", ""}
        else:
            assert len(out.splitlines()) == 12 and "🐜.png" in out and "[red]bold.png" in out


def test_a_list_of_names_that_are_not_utf_8_is_read(shop, learned, tmp_path):
    image = tmp_path / os.fsdecode(b"latin-\xe9.png")
    shutil.copy(shop / "test" / "ant" / "9-0.png", image)
    (tmp_path / "list").write_bytes(os.fsencode(image) + b"\n")
    process = Forked("predict", learned, "-", "--format", "jsonl", folder=tmp_path, given=tmp_path / "list")
    code, out, errors = process.end()
    assert (code, errors) == (0, [])
    assert [(row["class"], row["path"]) for row in rows(out)] == [("ant", str(image))]


ODD_CLASSES = ["=cmd", "[red]", 'a,b"c', "%2e%2e%2fx", "🐜 ant", "back\\slash"]


def test_odd_names_of_classes_come_back_from_every_command(tmp_path, command):
    folder, path = pictures(tmp_path / "odd", ODD_CLASSES, count=3), tmp_path / "odd.lamina"
    words = ["--method", "nearest-mean", "--backbone", BACKBONE, "--name", "[bold]\x1b[2J\nx"]
    code, out, errors = command("learn", path, folder, *words)
    assert (
        code == 0
        and "\x1b" not in out
        and out.splitlines()[0].startswith("lesson 1 ([bold]\\x1b[2J\\nx): %2e%2e%2fx, =cmd")
    )
    found = predicted(command, path, folder)
    assert [row["class"] for row in found] == [truth(row["path"]) for row in found]
    table = list(csv.DictReader(io.StringIO(command("predict", path, folder, "--format", "csv")[1])))
    assert [row["class_1"] for row in table] == [row["class"] for row in found]
    for verb in (["inspect", path], ["evaluate", path, folder], ["predict", path, folder]):
        code, out, _ = command(*verb)
        assert code == 0 and "\x1b" not in out and "[red]" in out and "=cmd" in out
    assert json.loads(command("inspect", path, "--json")[1])["classes"] == sorted(ODD_CLASSES)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".odd.lamina.lock", "odd", "odd.lamina"]


@pytest.mark.parametrize("name", ["line\nbreak", "\x1b[2J", "\u202ereversed"])
def test_a_class_whose_name_steers_a_terminal_is_refused(learned, model, tmp_path, command, name):
    code, out, errors = command("learn", model, pictures(tmp_path / "odd", [name, "cow"]))
    assert (code, out, len(errors)) == (2, "", 1) and repr(name) in errors[0]
    assert model.read_bytes() == learned.read_bytes()


MEASURED = """
import re
import lamina.predictions as predictions

def memory():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])

def watched(*parts, **named):
    most = first = 0
    for number, each in enumerate(before(*parts, **named)):
        if number == 300:
            first = memory()
        if number > 300 and number % 50 == 0:
            most = max(most, memory())
        yield each
    print((most - first) / 1024, file=sys.stderr)

before = predictions.predict
predictions.predict = watched
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux to tell the memory of a process")
@pytest.mark.parametrize("count", [1500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_stays_flat_over_many_images(learned, tmp_path, count):
    """Decoded for the backbone, 1,200 images would take 92 MB; beside other processes memory goes up and down by 45."""
    folder = pictures(tmp_path / "many", ["ant"], count=1, size=(8, 8))
    for number in range(1, count):
        os.link(folder / "ant" / "0-0.png", folder / "ant" / f"{number}.png")
    process = Forked("predict", learned, folder, "--format", "jsonl", folder=tmp_path, first=MEASURED)
    code, out, errors = process.end()
    assert code == 0 and len(rows(out)) == count
    assert float(errors[-1]) < 60  # MB


def test_new_looking_images_can_be_flagged_and_the_score_chosen(shop, learned, tmp_path, command):
    noise = np.random.default_rng(3).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    words = ["predict", learned, tmp_path / "noise.png", shop / "test" / "ant" / "9-0.png"]
    plain, flagged = command(*words)[1], command(*words, "--flag-novel")[1]
    assert "new? " not in plain
    assert ["new? " in line for line in flagged.splitlines()] == [False, True, False]
    scores = [rows(command(*words, "--format", "jsonl", "--novelty", name)[1]) for name in ("mahalanobis", "energy")]
    assert scores[0][0]["novelty"] > 1 and scores[0][0]["novel"] is True
    assert scores[0][0]["novelty"] != scores[1][0]["novelty"]


def test_without_held_out_images_nothing_is_called_new(shop, tmp_path, command):
    path = tmp_path / "new.lamina"
    words = ["--method", "nearest-mean", "--backbone", BACKBONE, "--holdout", "0"]
    code, out, _ = command("learn", path, shop / "1", *words)
    assert code == 0 and "16 images, 0 held out" in out and "accuracy" not in out
    assert {row["novel"] for row in predicted(command, path, shop / "1")} == {None}
    assert command("predict", path, shop / "1", "--flag-novel") == (
        2, "",
        [f"lamina: {path} never had images held out, so nothing says what is new; learn with --holdout 0.1"],
    )  # fmt: skip


# ── evaluate ─────────────────────────────────────────────────────────────────────────────────────────


def test_evaluate_counts_what_predict_says(shop, learned, command):
    code, out, errors = command("evaluate", learned, shop / "test", "--json")
    found = json.loads(out)
    assert (code, errors) == (0, [])
    said = predicted(command, learned, shop / "test", "--top", "7")
    right = [row["class"] == truth(row["path"]) for row in said]
    assert found["accuracy"] == pytest.approx(np.mean(right))
    for column, each in enumerate(found["classes"]):
        own = [row for row in said if truth(row["path"]) == each["name"]]
        assert (each["name"], each["images"]) == (CLASSES[column], 4)
        assert each["accuracy"] == pytest.approx(np.mean([row["class"] == each["name"] for row in own]))
        assert each["predicted"] == sum(row["class"] == each["name"] for row in said)
    assert found["calibration"]["confidence"] == pytest.approx(np.mean([row["probability"] for row in said]), abs=1e-5)
    assert [(row["task"], row["name"], row["images"]) for row in found["tasks"]] == [
        (1, None, 8), (2, "round 2", 8), (3, "round 3", 12),
    ]  # fmt: skip
    assert found["novelty"] is None


def test_evaluate_counts_unknown_classes_as_new(shop, learned, tmp_path, command):
    folder = pictures(shutil.copytree(shop / "test", tmp_path / "photos"), ["dodo", "moa"], count=5)
    shutil.rmtree(folder / "yak")
    code, out, _ = command("evaluate", learned, folder, "--json", "--out", tmp_path / "page.html")
    found = json.loads(out)
    assert code == 0 and (found["protocol"]["images"], found["protocol"]["unknown_images"]) == (24, 10)
    assert "dodo" not in [row["name"] for row in found["classes"]]
    novelty = [row["novelty"] for row in predicted(command, learned, folder)]
    names = [truth(row["path"]) in CLASSES for row in predicted(command, learned, folder)]
    old = [value for value, known in zip(novelty, names, strict=True) if known]
    new = [value for value, known in zip(novelty, names, strict=True) if not known]
    pairs = [(a, b) for a in old for b in new]
    wins = np.mean([(b > a) + (b == a) / 2 for a, b in pairs])
    score = found["novelty"]["mahalanobis"]
    assert score["auroc"] == pytest.approx(wins, abs=1e-6) and score["auroc"] > 0.5
    assert (score["known"], score["unknown"], score["threshold"]) == (24, 10, 1)
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>") and "zebra" in page


def test_evaluate_prints_tables_and_where_the_page_is(shop, learned, tmp_path, command):
    code, out, errors = command("evaluate", learned, shop / "test", "--out", tmp_path / "page.html")
    assert (code, errors) == (0, []) and out.splitlines()[-1] == f"written to {tmp_path / 'page.html'}"
    assert all(word in out for word in ("by task", "by class", "ECE (%)", "round 2", "zebra"))


def test_evaluate_refuses_what_it_cannot_measure(shop, learned, tmp_path, command):
    strange = pictures(tmp_path / "strange", ["dodo"])
    assert command("evaluate", learned, strange) == (
        2, "", [f"lamina: {strange} has no class that the model knows; it knows {', '.join(CLASSES)}"],
    )  # fmt: skip
    folder = pictures(tmp_path / "photos", ["ant", "bee"])
    (folder / "ant" / "0-1.png").write_bytes(b"nothing")
    code, out, errors = command("evaluate", learned, folder)
    assert (code, out, len(errors)) == (2, "", 1) and "0-1.png cannot be read: " in errors[0]
    found = json.loads(command("evaluate", learned, folder, "--skip-broken", "--json")[1])
    assert (found["protocol"]["skipped_images"], found["protocol"]["images"]) == (1, 11)


@pytest.mark.parametrize("verb", ["evaluate", "export"])
def test_a_page_or_an_export_does_not_take_the_place_of_the_model(shop, learned, model, command, verb):
    words = [shop / "test", "--out", model] if verb == "evaluate" else ["--onnx", model]
    assert command(verb, model, *words) == (
        2, "", [f"lamina: {model} is the model; choose another file to write to"],
    )  # fmt: skip
    assert model.read_bytes() == learned.read_bytes()


# ── inspect ──────────────────────────────────────────────────────────────────────────────────────────


def test_inspect_tells_lessons_classes_sizes_and_drift(learned, command):
    code, out, errors = command("inspect", learned, "--json")
    found = json.loads(out)
    assert (code, errors) == (0, [])
    assert (found["model"], found["bytes"], found["classes"]) == (str(learned), learned.stat().st_size, CLASSES)
    assert [(row["name"], row["classes"], row["images"], row["held_out"]) for row in found["lessons"]] == [
        (None, CLASSES[:2], 14, 2), ("round 2", CLASSES[2:4], 14, 2), ("round 3", CLASSES[4:], 21, 3),
    ]  # fmt: skip
    assert found["room"] == [] and found["lessons_left"] is None and "room_unknown" not in found
    assert found["lessons"][2]["drift"]["old"] == 0
    text = command("inspect", learned)[1]
    assert all(word in text for word in ("round 3", "zebra", "nearest-mean limits no step", found["checksum"]))


def test_a_model_that_has_room_for_so_many_lessons_says_how_many_are_left(shop, tmp_path, command):
    path = tmp_path / "coda.lamina"  # 64 features have room for components of 3 lessons, the last with fewer
    words = ["--method", "coda-prompt", "--backbone", BACKBONE, "--set=components=30", "--set=epochs=1"]
    code, out, errors = command("learn", path, shop / "1", *words)
    assert code == 0 and "room for new tasks: 2 more lessons" in out.splitlines()
    assert "settings for lessons: batch_size=32, lr=0.005" in out.splitlines()  # and epochs, which were given
    for left, name in ((1, "2"), (0, "3")):
        assert json.loads(command("learn", path, shop / name, "--json")[1])["lessons_left"] == left
    assert "room for new tasks: none is left, so coda-prompt can take no further lesson" in command("inspect", path)[1]
    assert json.loads(command("inspect", path, "--json")[1])["lessons_left"] == 0


def test_inspect_tells_the_room_in_every_block(shop, tmp_path, command):
    path = tmp_path / "strata.lamina"
    for name in ("1", "2"):
        words = ["--backbone", BACKBONE, "--set=length=16", "--set=epochs=1"] if name == "1" else []
        assert command("learn", path, shop / name, *words)[0] == 0
    found = json.loads(command("inspect", path, "--json")[1])
    assert {(row["block"], row["what"]) for row in found["room"]} == {
        (block, what) for block in range(6) for what in ("channels", "tokens")
    }
    for row in found["room"]:
        assert row["of"] == (64 if row["what"] == "channels" else 16)
        assert 0 < row["used"] <= row["of"] and 0 < row["energy_kept"] <= 1
    drift = found["lessons"][1]["drift"]
    assert 0 < drift["old"] <= drift["bound"] and len(drift["blocks"]) == 6
    text = command("inspect", path)[1]
    assert "room for new tasks, by block" in text and text.splitlines()[-1].startswith(
        "old features moved by an estimated"
    )


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [
        ({"name": "lamina:vit-nona"}, "no backbone is called 'lamina:vit-nona'"),
        ({"fingerprint": "0" * 16}, f"with fingerprint {'0' * 16}; the one found here has "),
        ({"name": "lamina:\x1b[2J"}, "no backbone is called "),
    ],
)
def test_inspect_does_without_the_backbone_and_says_so(model, command, backbone, reason):
    file = ModelFile.read(model)
    replace(file, backbone={**file.backbone, **backbone}).write(model)
    code, out, errors = command("inspect", model, "--json")
    found = json.loads(out)
    assert (code, errors, found["room"]) == (0, [], []) and reason in found["room_unknown"]
    assert found["classes"] == CLASSES
    code, out, errors = command("inspect", model)
    assert (code, errors) == (0, []) and "room for new tasks: unknown, " in out and "\x1b" not in out
    code, out, errors = command("predict", model, "x.png")
    assert (code, out, len(errors)) == (2, "", 1) and reason in errors[0] and "\x1b" not in errors[0]


# ── export, sample ───────────────────────────────────────────────────────────────────────────────────


def test_an_exported_model_gives_the_same_classes_without_lamina(shop, learned, tmp_path, command):
    code, out, errors = command("export", learned, "--onnx", tmp_path / "out.onnx")
    assert (code, errors) == (0, [])
    checked = "ONNX Runtime gives the scores of --precision 32"
    assert out == f"written to {tmp_path / 'out.onnx'} ({checked}) and {tmp_path / 'out.json'}\n"
    page = json.loads((tmp_path / "out.json").read_text())
    assert page["classes"] == CLASSES and page["tasks"] == [CLASSES[:2], CLASSES[2:4], CLASSES[4:]]
    assert page["file"] == "out.onnx"
    side = page["input"]["shape"][-1]
    folder = tmp_path / "large"
    folder.mkdir()
    images = sorted((shop / "test").rglob("*.png"))
    for number, image in enumerate(images):  # of the size that the file takes, so that no resizing is in between
        Image.open(image).resize((side, side), Image.Resampling.NEAREST).save(folder / f"{number:02d}.png")
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]).transpose(0, 3, 1, 2) / 255
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    (shares,) = session.run(["probabilities"], {"images": pixels.astype(np.float32)})
    said = predicted(command, learned, folder, "--precision", "32", "--batch", "5")
    assert [CLASSES[column] for column in shares.argmax(1)] == [row["class"] for row in said]
    assert shares.max(1) == pytest.approx([row["probability"] for row in said], abs=1e-3)


def test_an_export_needs_a_name_that_leaves_room_for_its_page(learned, tmp_path, command):
    assert command("export", learned, "--onnx", tmp_path / "out.json") == (
        2, "",
        [f"lamina: class names go to {tmp_path / 'out.json'}, so the model needs another suffix: --onnx out.onnx"],
    )  # fmt: skip


def test_sample_writes_digits_as_lessons_and_a_test_and_no_second_time(tmp_path, command):
    out = tmp_path / "digits"
    assert command("sample", "digits", out) == (0, "".join(f"{out / part}\n" for part in ("1", "2", "3", "test")), [])
    layout = {part.name: sorted(entry.name for entry in part.iterdir()) for part in out.iterdir()}
    assert layout == {
        "1": ["one", "three", "two", "zero"],
        "2": ["five", "four", "six"],
        "3": ["eight", "nine", "seven"],
        "test": sorted(layout["1"] + layout["2"] + layout["3"]),
    }
    assert sum(1 for _ in out.rglob("*.png")) == 1797
    code, printed, errors = command("sample", "digits", out)
    assert (code, printed) == (2, "")
    assert errors == [f"lamina: {out} is not an empty folder; a sample is written to a new or empty one"]
    assert command("sample", "digit", tmp_path / "new")[2] == [
        "lamina: no sample is called 'digit'; did you mean 'digits'? Known: digits"
    ]


@pytest.mark.parametrize(
    "verb", [["predict", "x.png"], ["evaluate", "folder"], ["inspect"], ["export", "--onnx=x.onnx"]]
)
def test_a_model_that_is_not_there_is_one_line(tmp_path, command, verb):
    path = tmp_path / "nowhere.lamina"
    assert command(verb[0], path, *verb[1:]) == (2, "", [f"lamina: {path} does not exist; name a model file"])


def test_a_terminal_that_cannot_show_a_name_gets_an_escape(tmp_path):
    pictures(tmp_path / "odd", ["🐜", "bee"])
    mean = ["--method", "nearest-mean", "--backbone", BACKBONE]
    with Forked("learn", tmp_path / "m.lamina", tmp_path / "odd", *mean, folder=tmp_path, first=ASCII) as process:
        code, out, _ = process.end()
    assert code == 0 and "lesson 1: bee, \\U0001f41c" in out


ASCII = "import io; sys.stdout = io.TextIOWrapper(open(1, 'wb', closefd=False), encoding='ascii', write_through=True)"


def test_a_precision_that_nobody_knows_is_refused(shop, learned, command):
    code, _, errors = command("predict", learned, shop / "test", "--precision", "16")
    assert (code, errors) == (2, ["lamina: no precision is called '16'; did you mean 'bf16'? Known: 32, auto, bf16"])


def test_a_folder_in_which_nothing_can_be_read_is_refused(shop, learned, tmp_path, command):
    (tmp_path / "bad" / "ant").mkdir(parents=True)
    (tmp_path / "bad" / "ant" / "1.png").write_bytes(b"x")
    code, _, errors = command("evaluate", learned, tmp_path / "bad", "--skip-broken")
    assert (code, errors) == (2, [f"lamina: no image in {tmp_path / 'bad'} can be read"])
