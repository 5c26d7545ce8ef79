"""`lamina explain` on model files and runs, and what people feed it."""

import io
import json
import shutil
from base64 import b64encode

import numpy as np
import pytest
from PIL import Image

from tests.backbones.clips import clip_folder
from tests.commands import BACKBONE, EPOCH, Forked, called, pictures

CLASSES = ["yak", "zebra", "ant"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Folders train and test, with six and three pictures of each of three classes."""
    root = tmp_path_factory.mktemp("shop")
    pictures(root / "train", CLASSES, count=6)
    pictures(root / "test", CLASSES, count=3, seed=9)
    return root


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Return a function from words to (exit code, stdout, lines of stderr), run in an empty folder."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", EPOCH)
    monkeypatch.chdir(tmp_path)
    return lambda *words: called(monkeypatch, capfd, *words)


@pytest.fixture(scope="module")
def trained(shop, tmp_path_factory):
    """A model file with four prompts in each block, and a finished run of the same method."""
    root = tmp_path_factory.mktemp("trained")
    settings = ["--set", "length=4", "--set", "epochs=1", "--set", "batch_size=6", "--backbone", BACKBONE]
    words = ["learn", root / "shop.lamina", shop / "train", "--method", "vpt-deep"]
    code, _, errors = Forked(*words, *settings, folder=root).end()
    assert code == 0, errors
    words = ["run", "vpt-deep", "--stream", f"folder:{shop}", "--out", root / "run"]
    code, _, errors = Forked(*words, *settings, folder=root).end()
    assert code == 0, errors
    return root


def test_a_model_file_is_explained_into_a_new_folder_each_time(trained, shop, command, tmp_path):
    model, before = trained / "shop.lamina", (trained / "shop.lamina").read_bytes()
    image = shop / "test" / "yak"
    code, out, errors = command("explain", model, image)
    assert (code, errors) == (0, [])
    lines = out.splitlines()
    assert lines[0] == "Prompt tokens enter 6 of 6 blocks; they are compared with patches as both enter a block."
    assert len(lines) == 1 + 3 + 1 and lines[1].startswith(f"{image}/9-0.png: ") and lines[1].endswith(" %")
    assert lines[-1] == "written to " + ", ".join(f"shop-explained/maps.{kind}" for kind in ("html", "png", "npz"))
    assert command("explain", model, image)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shop-explained", "shop-explained-2"]
    for name in ("maps.html", "maps.png", "maps.npz"):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("shop-explained", "shop-explained-2"))
        assert first == second
    assert model.read_bytes() == before


def test_a_run_is_explained_where_one_wants_it_and_json_says_the_same(trained, shop, command):
    images = [shop / "test" / "zebra" / "9-1.png", shop / "test" / "ant" / "9-2.png"]
    code, out, errors = command("explain", trained / "run", *images, "--out", "there", "--json")
    said = json.loads(out)
    assert (code, errors) == (0, [])
    assert said["files"] == ["there/maps.html", "there/maps.png", "there/maps.npz"]
    assert (said["method"], said["model"], said["prompt_tokens"]) == ("vpt-deep", "run", 6 * [4])
    assert said["attention_of"] == "the class token"
    arrays = np.load("there/maps.npz")
    assert [row["path"] for row in said["images"]] == list(map(str, images)) == arrays["path"].tolist()
    for place, row in enumerate(said["images"]):
        assert row["class"] == arrays["class"][place] and row["probability"] == arrays["probability"][place]
        np.testing.assert_allclose(row["on_prompts"], arrays["on_prompts"][place], atol=1e-7)
    assert Image.open("there/maps.png").size[0] == 24 + 7 * 112 + 6 * 6


def test_behind_the_norm_is_another_comparison(trained, shop, command):
    image = shop / "test" / "ant"
    assert command("explain", trained / "run", image, "--out", "a")[0] == 0
    code, out, _ = command("explain", trained / "run", image, "--out", "b", "--post-norm")
    assert code == 0 and "compared with patches behind the first norm of a block." in out
    a, b = np.load("a/maps.npz"), np.load("b/maps.npz")
    assert np.abs(a["cosine"] - b["cosine"]).max() > 1e-3
    np.testing.assert_array_equal(a["attention"], b["attention"])


def test_paths_can_come_from_standard_input(trained, shop, command, monkeypatch):
    paths = sorted(map(str, (shop / "test" / "ant").iterdir()))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(paths)))
    said = json.loads(command("explain", trained / "run", "-", "--out", "a", "--json")[1])
    assert [row["path"] for row in said["images"]] == paths


def test_a_method_that_reads_names_shows_its_image_towers_attention(shop, command, tmp_path):
    tiny = clip_folder(tmp_path / "clip")
    words = ["learn", "m.lamina", shop / "train", "--method", "zero-shot", "--backbone", tiny]
    assert command(*words)[0] == 0
    code, out, errors = command("explain", "m.lamina", shop / "test" / "yak", "--out", "a")
    assert (code, errors) == (0, []) and out.startswith("No prompt enters a block: there is attention alone.\n")
    arrays = np.load("a/maps.npz")
    assert arrays["attention"].shape == (3, 3, 4, 4) and not any(name.startswith("cosine_") for name in arrays)
    assert np.isnan(arrays["cosine"]).all() and (arrays["on_prompts"] == 0).all()


def test_prompts_of_a_clip_tower_are_compared_as_well(shop, command, tmp_path):
    tiny = clip_folder(tmp_path / "clip")
    words = ["learn", "m.lamina", shop / "train", "--method", "vpt-deep", "--backbone", tiny]
    assert command(*words, "--set", "epochs=1", "--set", "length=4")[0] == 0
    assert command("explain", "m.lamina", shop / "test" / "yak", "--out", "a")[0] == 0
    arrays = np.load("a/maps.npz")
    assert arrays["cosine"].shape == (3, 3, 4, 4) and np.abs(arrays["cosine"]).max() <= 1
    assert arrays["cosine_2"].shape == (3, 4, 4, 4)


def refused(command, says, *words):
    code, out, errors = command("explain", *words)
    assert (code, out, len(errors)) == (2, "", 1) and errors[0].startswith("lamina: ") and says in errors[0], errors


def test_what_cannot_be_explained_is_one_line_and_leaves_nothing(trained, shop, command, tmp_path):
    image = shop / "test" / "yak" / "9-0.png"
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    refused(command, "no.lamina does not exist; name a model file, or the folder", "no.lamina", image)
    refused(command, "is damaged or no model file", image, image)
    refused(command, "empty holds no run", "empty", image)
    refused(command, "text.png cannot be read: cannot identify image file", trained / "run", image, "text.png")
    refused(command, "nowhere.png cannot be read: there is no such file", trained / "run", "nowhere.png")
    refused(command, "empty cannot be read: it is a folder without images", trained / "run", "empty")
    refused(command, "no precision is called '16'", trained / "run", image, "--precision", "16")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_run_that_was_begun_and_not_finished_is_refused(trained, shop, command, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "half")
    (tmp_path / "half" / "results.json").unlink()
    refused(command, "the run in half is not finished; go on with `lamina resume half`", "half", shop / "test")


def test_a_folder_that_cannot_be_written_is_told(trained, shop, command, tmp_path):
    (tmp_path / "taken").write_text("a file")
    refused(command, "could not be written", trained / "run", shop / "test" / "yak" / "9-0.png", "--out", "taken")
    assert (tmp_path / "taken").read_text() == "a file"


def test_a_run_keeps_its_maps_in_its_folder_and_its_report_shows_them(trained, shop, command, tmp_path):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    assert command("report", run)[0] == 0
    assert "data:image/png" not in (run / "report.html").read_text()
    for name in ("yak", "ant"):
        code, out, _ = command("explain", run, shop / "test" / name / "9-0.png")
        assert code == 0
    assert out.splitlines()[-1].startswith(f"written to {run}/explained-2/maps.html")
    assert command("report", run)[0] == 0
    page = (run / "report.html").read_text()
    for folder in ("explained", "explained-2"):
        assert b64encode((run / folder / "maps.png").read_bytes()).decode() in page
        assert f"<h3>run/{folder}</h3>" in page
    assert "img-src data:" in page and "http:" not in page and "<script" not in page


def test_a_report_of_several_runs_takes_maps_of_those_that_have_some(trained, shop, command, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(trained / "run", tmp_path / "runs" / name)
    assert command("explain", "runs/b", shop / "test" / "yak" / "9-0.png")[0] == 0
    assert command("report", "runs")[0] == 0
    page = (tmp_path / "runs" / "report.html").read_text()
    assert page.count("data:image/png") == 1 and "<h3>b/explained</h3>" in page
    assert command("report", "runs/a/results.json", "--out", "a.html")[0] == 0
    assert "data:image/png" not in (tmp_path / "a.html").read_text()
