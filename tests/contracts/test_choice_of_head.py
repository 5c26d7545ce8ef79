"""Every head under every method that leaves the choice: two tasks of three classes, and tasks of a single one."""

import itertools
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest
import torch

from lamina.errors import ConfigError
from lamina.heads.choose import HeadName, head_of
from lamina.heads.cosine import CosineHead
from lamina.heads.linear import LinearHead
from lamina.heads.refined import RefinedHead
from lamina.heads.statistics import Discriminant
from lamina.learner import refinement
from lamina.model import Batch
from lamina.registry import method_class, method_names
from lamina.training.meter import DriftMeter
from tests.conftest import make_tiny_vit
from tests.contracts.test_methods import FOLDER, expected_positions
from tests.streams import blobs, trainer_of

CHEAP = {"length": 3, "components": 2, "epochs": 1, "batch_size": 9, "temperature": 1.0}
STREAM = blobs(tasks=2, per_task=3, train=18, test=7)
METHODS = [name for name in method_names() if "head" in method_class(name).model_fields]
LAYERED = [name for name in METHODS if "layers" in method_class(name).model_fields]

every_pair = pytest.mark.parametrize(("name", "head"), list(itertools.product(METHODS, get_args(HeadName))))
every_method = pytest.mark.parametrize("name", METHODS)
every_layered_method = pytest.mark.parametrize("name", LAYERED)


@pytest.fixture(autouse=True, scope="module")
def _brief():
    with pytest.MonkeyPatch.context() as patch:
        brief = replace(refinement(epochs=2, draws=6), batch_size=8)
        for name in METHODS:  # each has it from a module of its own, or inherits from one that has
            for kind in method_class(name).__mro__:
                patch.setattr(import_module(kind.__module__), "refinement", lambda: brief, raising=False)
        yield


@cache
def tower():
    return make_tiny_vit()


def settings(name, **values):
    """Return cheap settings of a method, with those of `values` that it has."""
    kind = method_class(name)
    return kind(**{key: value for key, value in {**CHEAP, **values}.items() if key in kind.model_fields})


def trainer(name, head, **arguments):
    return trainer_of(settings(name, head=head, layers=2), tower(), **arguments)


@cache
def finished(name, head):
    """Return a trainer that has run both tasks without a break, and a copy of what it saved before its last step."""
    out = trainer(name, head, run_dir=Path(tempfile.mkdtemp(dir=FOLDER.name)))
    *_, before_last, last = expected_positions(out, STREAM)

    def look():
        if out.position == before_last:
            out.every = 1  # saved as by a run that stops here
        if out.position == last:
            shutil.copytree(out.run_dir, out.run_dir / "stopped")
        return False

    out.should_stop = look
    out.run(STREAM)
    return out, out.run_dir / "stopped", before_last


def moved(made):
    """Return what of a model moves features, by name."""
    return {name: value for name, value in made.learner.model.learned().items() if not name.startswith("head.")}


def assert_same(ours, theirs):
    assert (ours.matrix, ours.matrix_task_aware) == (theirs.matrix, theirs.matrix_task_aware)
    mine, its = ours.learner.model.learned(), theirs.learner.model.learned()
    assert mine.keys() == its.keys() and [n for n in mine if not torch.equal(mine[n], its[n])] == []


@every_pair
def test_two_tasks_run_and_go_on_from_a_stop_as_if_there_had_been_none(name, head, tmp_path):
    whole, stopped, place = finished(name, head)
    assert len(whole.matrix[-1]) == 2
    torch.manual_seed(4711)
    again = trainer(name, head, run_dir=shutil.copytree(stopped, tmp_path / "run"))
    assert again.restore(STREAM) and again.position == place
    again.run(STREAM)
    assert_same(again, whole)


@every_pair
def test_a_prediction_does_not_depend_on_the_other_images_of_its_batch(name, head):
    model = finished(name, head)[0].learner.model.eval()
    images = torch.randn(7, 3, 32, 32)
    with torch.no_grad():
        together = model(Batch(images)).logits
        alone = torch.cat([model(Batch(image[None])).logits for image in images])
    assert together.shape == (7, 6)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * float(together.abs().max()))


@every_method
def test_the_head_is_the_one_that_was_asked_for_and_reads_what_the_layers_say(name):
    kinds = {"linear": LinearHead, "cosine": CosineHead, "statistics": Discriminant, "refined": RefinedHead}
    assert set(kinds) == set(get_args(HeadName))
    width = 48 if name in LAYERED else 24
    for head, kind in kinds.items():
        model = finished(name, head)[0].learner.model
        assert type(model.head) is kind and model.width == width
        assert model.features(Batch(torch.randn(2, 3, 32, 32)))[0].shape == (2, width)
    trained = finished(name, "statistics")[0].learner.model.head.trained
    assert type(trained) is LinearHead and [tuple(block.weight.shape) for block in trained.blocks][-1][1] == width


def test_linear_layers_of_ones_own_stand_where_linear_layers_are_asked_for():
    def mine(features):
        return LinearHead(features, start="released")

    for name in ("linear", "statistics"):
        head = head_of(name, 6, mine)
        assert getattr(head, "trained", head).start == "released"
    assert head_of("linear", 6).start == "small"


@every_method
def test_class_statistics_learn_tasks_of_a_single_class(name):
    """No prompt moves, since there is nothing to tell apart; the head tells classes apart from the second task on."""
    made = trainer(name, "statistics")
    before = {key: value.clone() for key, value in moved(made).items()}
    stream = blobs(tasks=3, per_task=1)
    made.run(stream)
    if made.learner.at_once:  # then it is one task of three
        assert len(made.matrix[0]) == 3 and made.position == (1, 0, 0)
        return
    after = moved(made)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert made.learner.model.head.seen.counts.tolist() == [27, 27, 27]
    assert sum(made.matrix[-1]) / 3 > 0.8


@every_method
def test_a_task_of_a_single_class_moves_no_prompt_whatever_the_head(name):
    """There is nothing to tell apart; weight decay alone would wear prompts down. Keys have a loss of their own."""
    task = blobs(tasks=1, per_task=1).tasks[0]
    for head in get_args(HeadName):
        made, idle = trainer(name, head), trainer(name, head)
        idle.learner.phases = idle.learner.refine = lambda task: []
        made.learn(task)
        idle.learn(task)
        before, after = (moved(each) for each in (idle, made))
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items() if "keys" not in key)


@every_method
def test_drift_of_features_of_several_layers_can_be_measured(name):
    made = trainer(name, "linear", meter=DriftMeter(STREAM))
    made.run(STREAM)
    if made.meter is not None:
        assert [len(row) for row in made.meter.drift] == [1, 2]
        assert (made.meter.drift[1][0][2] > 0) == made.learner.model.moves and made.meter.drift[1][1][2] == 0


@every_layered_method
def test_features_cannot_be_read_from_more_blocks_than_there_are(name):
    with pytest.raises(ConfigError) as error:
        settings(name, layers=4).build(tower())
    assert str(error.value) == "features can be read after each of 3 blocks; got layers=4"
