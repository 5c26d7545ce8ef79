"""A kept model that reads names: what it reads is told, can be said otherwise, and further names can be asked."""

import json
import math

import pytest
import torch

from lamina.continual import ContinualModel
from lamina.modelfile import ModelFile
from tests.backbones.clips import clip_folder
from tests.commands import BACKBONE, EPOCH, called, pictures


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("backbones") / "clip")


@pytest.fixture
def command(monkeypatch, capfd):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", EPOCH)
    return lambda *words: called(monkeypatch, capfd, *words)


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path / "a", ["red_fox", "emu", "n0144"], count=5)


def test_learning_tells_what_is_read_of_each_class(tiny, folder, tmp_path, command):
    words = ["--method", "zero-shot", "--backbone", tiny]
    code, out, _ = command("learn", tmp_path / "m.lamina", folder, *words)
    assert code == 0
    assert "reads emu as 'a photo of a emu.'; n0144 as 'a photo of a n0144.'; red_fox as 'a photo of a red fox.'" in out
    (tmp_path / "names.toml").write_text('n0144 = "gold_fish"\n')
    said = ["--template", "a {} at night", "--names", tmp_path / "names.toml", "--json"]
    found = json.loads(command("learn", tmp_path / "n.lamina", folder, *words, *said)[1])
    assert found["texts"] == {"emu": "a emu at night", "n0144": "a gold fish at night", "red_fox": "a red fox at night"}


def test_descriptions_of_old_classes_stay_when_new_ones_come(tiny, folder, tmp_path, command):
    path, names = tmp_path / "m.lamina", tmp_path / "names.toml"
    names.write_text('n0144 = "gold_fish"\n')
    first = ["--method", "zero-shot", "--backbone", tiny, "--names", names]
    assert command("learn", path, folder, *first)[0] == 0
    names.write_text('n0145 = "tench"\n')
    other = pictures(tmp_path / "b", ["n0145", "yak"], count=5)
    found = json.loads(command("learn", path, other, "--names", names, "--json")[1])
    assert found["texts"]["n0145"] == "a photo of a tench."
    assert ModelFile.read(path).settings["names"] == {"n0144": "gold_fish", "n0145": "tench"}


@pytest.mark.parametrize("method", ["zero-shot", "coop"])
def test_words_that_learned_on_are_told_though_no_image_moved(method, tiny, folder, tmp_path, command):
    path, quick = tmp_path / "m.lamina", ["--set", "epochs=1"] if method == "coop" else []
    assert command("learn", path, folder, "--method", method, "--backbone", tiny, *quick)[0] == 0
    code, out, _ = command("learn", path, pictures(tmp_path / "b", ["tench", "yak"], count=5))
    assert code == 0 and "this lesson left all features as they were" in out
    assert ("may have been forgotten: `lamina evaluate`" in out) == (method == "coop")
    assert ("old classes have not moved" in out) == (method == "zero-shot")
    assert ("may have been forgotten" in command("inspect", path)[1]) == (method == "coop")


@pytest.mark.parametrize("method", ["zero-shot", "coop"])
def test_further_names_are_scored_beside_the_learned_ones(method, tiny, folder, tmp_path, command):
    path = tmp_path / "m.lamina"
    quick = ["--set", "epochs=1"] if method == "coop" else []
    assert command("learn", path, folder, "--method", method, "--backbone", tiny, *quick)[0] == 0
    asked = ["predict", path, folder / "emu", "--format", "jsonl", "--top", "5", "--also", "a blue car, emu,a red car"]
    rows = [json.loads(line) for line in command(*asked)[1].splitlines()]
    plain = [json.loads(line) for line in command(*asked[:-2])[1].splitlines()]
    assert len(rows) == 5
    for row, without in zip(rows, plain, strict=True):
        shares = {entry["class"]: entry["probability"] for entry in row["top"]}
        assert set(shares) == {"emu", "n0144", "red_fox", "a blue car", "a red car"}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        left = {entry["class"]: entry["probability"] for entry in without["top"]}
        kept = sum(shares[name] for name in left)
        assert {name: shares[name] / kept for name in left} == pytest.approx(left, abs=1e-4)
        assert row["novelty"] == without["novelty"]


def test_a_method_that_needs_images_cannot_be_asked_for_names(folder, tmp_path, command):
    path = tmp_path / "m.lamina"
    assert command("learn", path, folder, "--method", "nearest-mean", "--backbone", BACKBONE)[0] == 0
    code, out, errors = command("predict", path, folder / "emu", "--also", "a red car")
    assert (code, out) == (2, "") and errors == [
        "lamina: nearest-mean needs images of a class, so it cannot tell a red car by name; a model made with --method "
        "zero-shot, coop or another for CLIP can"
    ]


def test_names_are_refused_by_a_method_that_reads_none(folder, tmp_path, command):
    words = ["--method", "nearest-mean", "--backbone", BACKBONE, "--template", "a {}"]
    code, out, errors = command("learn", tmp_path / "m.lamina", folder, *words)
    said = "--template: nearest-mean reads no templates; `lamina show nearest-mean` has its settings"
    assert (code, out, errors) == (2, "", [f"lamina: {said}"])


def test_a_file_taken_back_says_the_same(tiny, folder, tmp_path, command):
    path = tmp_path / "m.lamina"
    assert command("learn", path, folder, "--method", "coop", "--backbone", tiny, "--set", "epochs=1")[0] == 0
    ours, theirs = (ContinualModel.load(path) for _ in range(2))
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(ours.judge(pixels).probabilities, theirs.judge(pixels).probabilities)
    fingerprint = ModelFile.read(path).backbone["fingerprint"]
    assert fingerprint == ours.backbone.fingerprint and "-" in fingerprint  # of both towers


@pytest.mark.parametrize("method", ["zero-shot", "coop", "maple"])
def test_a_file_for_deployment_holds_what_was_read_and_not_the_tower_that_read_it(
    method, tiny, folder, tmp_path, command
):
    path, onnx = tmp_path / "m.lamina", tmp_path / "m.onnx"
    quick = [] if method == "zero-shot" else ["--set", "epochs=1"]
    assert command("learn", path, folder, "--method", method, "--backbone", tiny, *quick)[0] == 0
    code, out, errors = command("export", path, "--onnx", onnx)
    assert code == 0 and "ONNX Runtime gives the scores of --precision 32" in out
    assert onnx.stat().st_size < 1e6  # the table of words alone has 8 MB
    assert json.loads((tmp_path / "m.json").read_text())["classes"] == ["emu", "n0144", "red_fox"]


def test_a_model_that_draws_says_why_it_is_uncertain(tiny, folder, tmp_path, command):
    path = tmp_path / "m.lamina"
    quick = ["--set", "epochs=1", "--set", "samples=3"]
    assert command("learn", path, folder, "--method", "clap", "--backbone", tiny, *quick)[0] == 0
    asked = ["predict", path, folder, "--format", "jsonl"]
    rows = [json.loads(line)["uncertainty"] for line in command(*asked)[1].splitlines()]
    assert len(rows) == 15
    for said in rows:
        parts = said["expected_entropy"] + said["mutual_information"]
        assert said["entropy_of_draws"] == pytest.approx(parts, abs=1e-6)
        assert said["entropy"] > 0 and said["mutual_information"] > 0
    alone = [json.loads(command("predict", path, line, "--format", "jsonl")[1])["uncertainty"]
             for line in sorted(map(str, (folder / "emu").iterdir()))[:2]]  # fmt: skip
    wider = [json.loads(line)["uncertainty"] for line in command(*asked, "--also", "yak,gnu")[1].splitlines()]
    for said, before in zip(wider, rows, strict=True):  # draws tell of the names that are asked beside, too
        parts = said["expected_entropy"] + said["mutual_information"]
        assert said["entropy_of_draws"] == pytest.approx(parts, abs=1e-6)
        assert said["entropy_of_draws"] > before["entropy_of_draws"]
    # draws are the same, whoever is beside; a tower in bf16 rounds as the shape of a batch has it
    assert alone == [pytest.approx(said, rel=1e-2) for said in rows[:2]]


def test_names_that_are_asked_beside_count_in_the_entropy_and_known_ones_are_said(tiny, folder, tmp_path, command):
    path = tmp_path / "m.lamina"
    assert command("learn", path, folder, "--method", "zero-shot", "--backbone", tiny)[0] == 0
    words = ["predict", path, folder / "emu" / "0-0.png", "--format", "jsonl", "--top", "9", "--also"]
    code, out, errors = command(*words, "yak,emu,yak")
    said = json.loads(out)
    shares = [each["probability"] for each in said["top"]]
    assert (
        code == 0
        and len(shares) == 4
        and errors == ["'emu' of --also is a class that the model has learned; it is in the choice already"]
    )
    assert said["uncertainty"]["entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-4)
    assert command(*words, " ,")[::2] == (2, ["lamina: --also takes names with commas between them; got ' ,'"])


@pytest.mark.parametrize(
    "method, option, message",
    [
        ("coop", ["--template", "the {}"], "--template: coop reads no templates; `lamina show coop` has its settings"),
        ("strata", ["--names", "N"], "--names: strata reads no names; `lamina show strata` has its settings"),
        ("coop", ["--names", "M"], "M says what classes are, in words; got emu = 3"),
    ],
)
def test_what_a_method_does_not_read_is_refused_by_the_name_of_the_option(
    method, option, message, folder, tmp_path, command
):
    (tmp_path / "N").write_text('emu = "bird"\n')
    (tmp_path / "M").write_text("emu = 3\n")
    words = [tmp_path / word if word in ("N", "M") else word for word in option]
    said = message.replace("M says", f"{tmp_path / 'M'} says")
    assert command("learn", tmp_path / "m.lamina", folder, "--method", method, *words) == (2, "", [f"lamina: {said}"])


def test_a_description_of_a_class_that_is_not_there_is_said(tiny, folder, tmp_path, command):
    (tmp_path / "names.toml").write_text('n0144 = "gold_fish"\nn0145 = "tench"\n')
    words = ["--method", "zero-shot", "--backbone", tiny, "--names", tmp_path / "names.toml"]
    _, _, errors = command("learn", tmp_path / "m.lamina", folder, *words)
    assert errors[-1] == f"{tmp_path / 'names.toml'} says what 'n0145' is, and no class is called so yet"


def test_classes_that_differ_in_capitals_alone_are_called_the_same(tiny, tmp_path, command):
    folder = pictures(tmp_path / "c", ["Red_car", "red car"], count=3)
    code, _, errors = command("learn", tmp_path / "m.lamina", folder, "--method", "zero-shot", "--backbone", tiny)
    assert code == 2 and "classes 'Red_car' and 'red car' are both called 'red car'" in errors[0]
    assert not (tmp_path / "m.lamina").exists()


def test_a_file_without_one_of_its_encoders_is_refused(tiny, folder, tmp_path, command):
    path = tmp_path / "m.lamina"
    assert command("learn", path, folder, "--method", "clap", "--backbone", tiny, "--set", "epochs=1")[0] == 0
    file = ModelFile.read(path)
    del file.learned["head.encoders.tasks.0.spread.weight"]
    file.write(path)
    code, _, errors = command("predict", path, folder)
    assert code == 2 and len(errors) == 1 and "head.encoders.tasks.0.spread.weight" in errors[0]
