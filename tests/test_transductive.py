"""Prompts that images choose together: a run says so, a kept model refuses to."""

from dataclasses import replace

import numpy as np
import pytest

from lamina.continual import ContinualModel
from lamina.errors import ConfigError
from lamina.estimator import ContinualClassifier
from lamina.lessons import learn_folder
from lamina.registry import method_class
from lamina.results.records import Record
from lamina.results.report import report
from lamina.runs import execute, plan
from tests.commands import BACKBONE, called, pictures
from tests.conftest import make_tiny_vit

SMALL = {
    "stream": {"per_class": 2, "test_per_class": 3, "tasks": [4, 6]},
    "backbone": BACKBONE,
    "precision": "32",
    "accelerator": "cpu",
    "size": 7,
    "top": 2,
    "length": 1,
    "epochs": 1,
}


def refusal(method, value="batch"):
    return (
        f"what a kept model says of an image must not depend on the other images of a batch; with selection={value} "
        f"what {method} says does: take selection=image, or measure it by `lamina run`"
    )


@pytest.mark.parametrize("method", ["l2p-pgp", "dualprompt-pgp"])
def test_a_kept_model_holds_nothing_of_single_images(method):
    message = f"a model file holds nothing of single images; with space=sample {method} would: take space=feature"
    with pytest.raises(ConfigError) as caught:
        ContinualModel(method, BACKBONE, settings={"space": "sample"})
    assert str(caught.value) == message


@pytest.mark.parametrize("method", ["l2p", "dualprompt"])
@pytest.mark.parametrize("selection", ["image", "batch"])
def test_a_model_says_whether_images_choose_together(method, selection):
    learner = method_class(method)(selection=selection, length=1).build(tower := make_tiny_vit())
    assert learner.model.transductive is (selection == "batch")
    assert not method_class("nearest-mean")().build(tower).model.transductive  # it has no prompts


@pytest.mark.parametrize("selection", ["image", "batch"])
def test_the_record_of_a_run_says_how_test_images_were_batched_and_which_prompts_they_chose(tmp_path, selection):
    overrides = {**SMALL, "selection": selection, "eval_batch": 9}
    record = execute(plan("l2p", "digits", recipe=False, overrides=overrides)[0], tmp_path / "run")
    said = {name: value for name, value in record.protocol.items() if name.startswith("test_batch")}
    independent = {"test_batch": "independent"}
    assert said == (independent if selection == "image" else {"test_batch": "transductive", "test_batch_size": 9})
    assert [len(table) for table in record.usage] == [4, 6]
    assert [[sum(row) for row in table] for table in record.usage] == [[6] * 4, [6] * 6]
    assert {len(row) for table in record.usage for row in table} == {7}
    if selection == "batch":  # 12 and 18 images are 9 and 3, 9 and 9: each batch takes two prompts
        assert all(count in (0, 3, 9, 12, 18) for table in record.usage for count in map(sum, zip(*table, strict=True)))
    assert Record.read(tmp_path / "run" / "results.json") == record
    page = report([record])
    assert "Prompts that images choose" in page
    assert ("protocol transductive. A prediction depends on" in page) == (selection == "batch")


def test_a_run_without_a_pool_has_no_usage(tmp_path):
    overrides = {**SMALL, "settings": {}}
    overrides = {name: value for name, value in overrides.items() if name not in ("size", "top", "length", "epochs")}
    assert execute(plan("nearest-mean", "digits", overrides=overrides)[0], tmp_path / "run").usage == []


# ── kept models ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["l2p", "dualprompt"])
def test_a_kept_model_never_lets_images_choose_together(method):
    with pytest.raises(ConfigError) as error:
        ContinualModel(method, BACKBONE, settings={"selection": "batch"}, precision="32")
    assert str(error.value) == refusal(method)


def test_the_command_line_says_so_in_one_line_and_makes_no_file(tmp_path, monkeypatch, capfd):
    folder = pictures(tmp_path / "shop", ["ant", "bee"])
    words = ["learn", tmp_path / "shop.lamina", folder, "--method", "l2p", "--backbone", BACKBONE]
    code, out, errors = called(monkeypatch, capfd, *words, "--set", "selection=batch")
    assert (code, out, errors) == (2, "", [f"lamina: {refusal('l2p')}"])
    assert not [path for path in tmp_path.iterdir() if path.name not in ("shop", ".shop.lamina.lock")]


def test_the_estimator_does_not_let_them_either():
    images = np.random.default_rng(0).integers(0, 255, (4, 20, 20, 3), dtype=np.uint8)
    classifier = ContinualClassifier("l2p", backbone=BACKBONE, settings={"selection": "batch"})
    with pytest.raises(ConfigError) as error:
        classifier.fit(images, ["ant", "bee", "ant", "bee"])
    assert str(error.value) == refusal("l2p")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder of pictures, and the file of an L2P that chose for each image."""
    root = tmp_path_factory.mktemp("kept")
    settings = {"size": 7, "top": 2, "length": 1, "epochs": 1}
    folder = pictures(root / "shop", ["ant", "bee"])
    return folder, learn_folder(root / "shop.lamina", folder, method="l2p", backbone=BACKBONE, settings=settings).file


def test_a_file_cannot_be_made_to_choose_together_later(kept):
    _, file = kept
    assert file.settings["selection"] == "image"
    for forged, settings in (
        (file, {"selection": "batch"}),
        (replace(file, settings={**file.settings, "selection": "batch"}), {}),
    ):
        with pytest.raises(ConfigError) as error:
            ContinualModel.load(forged, settings=settings)
        assert str(error.value) == refusal("l2p")
