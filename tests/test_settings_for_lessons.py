"""`lamina/lessons.toml`: what methods take for lessons, and that each of them learns from a folder with it."""

import json
from pathlib import Path

import pytest

import lamina.continual
from lamina.config import read_toml
from lamina.continual import lesson_settings
from lamina.registry import default_backbone, method_class, method_names
from lamina.runs import plan
from tests.backbones.clips import clip_folder, tower_for
from tests.commands import BACKBONE, EPOCH, called, pictures

METHODS = [name for name in method_names() if not method_class(name)().build(tower_for(name)).at_once]
#: methods that read the names of classes learn a stream's tasks and a lesson alike: their defaults are for both
ON_CLIP = {name for name in METHODS if "clip" in default_backbone(method_class(name))}
TRAINED = [name for name in METHODS if "epochs" in method_class(name).model_fields and name not in ON_CLIP]

#: one pass; strata makes none unless asked, and these two never
QUICK = {name: [] for name in ("nearest-mean", "strata", "strata-clip", "zero-shot")} | {
    "ranpac": ["--set", "width=50"]
}


def test_some_methods_train_and_some_do_not():
    assert {"l2p", "dualprompt", "coda-prompt", "vpt-nsp2"} <= set(TRAINED)
    assert {"ranpac", "nearest-mean"} == set(METHODS) - set(TRAINED) - ON_CLIP
    assert "joint" not in METHODS


@pytest.mark.parametrize("name", TRAINED)
def test_lessons_have_ten_passes_in_batches_of_32_and_else_what_the_recipe_has(name):
    """But for lengths, which a recipe has for the backbone that it names."""
    recipe = {key: value for key, value in plan(name, "tiny-odd-10")[0].settings.items() if key != "length"}
    assert recipe
    wanted = method_class(name)(**{**recipe, "epochs": 10, "batch_size": 32})
    assert method_class(name)(**lesson_settings(name)) == wanted


def test_every_entry_is_of_a_method_that_trains():
    entries = read_toml(Path(lamina.continual.__file__).with_name("lessons.toml"))
    assert entries.pop("version") == 1
    assert set(entries) - ON_CLIP == set(TRAINED)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small CLIP model in a folder."""
    return clip_folder(tmp_path_factory.mktemp("backbones") / "clip")


@pytest.mark.parametrize("name", METHODS)
def test_lamina_learn_takes_two_lessons_of_two_classes_with_any_method(name, tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", EPOCH)
    backbone = tiny if name in ON_CLIP else BACKBONE
    words = ["--method", name, "--backbone", backbone, *QUICK.get(name, ["--set", "epochs=1"])]
    for number, classes in enumerate([("ant", "bee"), ("cat", "dog")]):
        folder = pictures(tmp_path / str(number), classes)
        code, out, errors = called(monkeypatch, capfd, "learn", tmp_path / "m.lamina", folder, *words, "--json")
        assert code == 0, errors
        lesson = json.loads(out)
        assert (lesson["classes"], lesson["images"], lesson["held_out"]) == (list(classes), 10, 2)
