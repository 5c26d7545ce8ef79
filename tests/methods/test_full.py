"""Methods that train weights of the tower itself: what moves, what is counted, kept and brought back.

D 24, L 3, 3 classes a task, 27 images to learn from.
"""

import pytest
import torch
from torch.nn import functional as F

from lamina.backbones.load import Backbone
from lamina.continual import ContinualModel
from lamina.drift import lesson_drift
from lamina.errors import ConfigError
from lamina.heads.linear import LinearHead
from lamina.learner import Learner, all_but
from lamina.methods.bitfit import BitFit
from lamina.methods.full import Full
from lamina.methods.l2p import L2P
from lamina.methods.linear_probe import LinearProbe
from lamina.model import Batch, PromptedModel
from lamina.modelfile import ModelFile
from lamina.training.meter import DriftMeter
from tests.conftest import make_tiny_vit
from tests.streams import blobs, trainer_of
from tests.test_continual import material, pixels_of

QUICK = {"epochs": 2, "batch_size": 9, "lr": 0.01}
both = pytest.mark.parametrize("kind", [Full, BitFit])


def state_of(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def biases_of(tower):
    return {name for name, _ in tower.named_parameters() if name.endswith("bias")}


# ── what moves ─────────────────────────────────────────────────────────────────────────────────────


def by_hand(features, tower, head, batch, lr, decay, tunes):
    """One step of gradient descent, written out; decay joins the gradient of matrices."""
    loss = F.cross_entropy(head(features(batch.images)).logits, batch.targets)
    named = dict(tower.named_parameters(prefix="tower")) | dict(head.named_parameters(prefix="head"))
    named = {name: p for name, p in named.items() if name.startswith("head.") or tunes(name)}
    expected = {}
    for (name, p), grad in zip(named.items(), torch.autograd.grad(loss, list(named.values())), strict=True):
        expected[name] = (p - lr * (grad + (decay * p if p.ndim > 1 else 0))).detach()
    return expected


@both
def test_one_step_is_that_of_gradient_descent_on_the_vendors_model(kind):
    settings = kind(epochs=1, batch_size=27, lr=0.5, weight_decay=0.1, warm_up=0.0, optimizer="sgd")
    task, frozen = blobs(train=27).tasks[0], make_tiny_vit(torch.float64)
    trainer = trainer_of(settings, frozen)
    trainer.feed.train_transform = trainer.feed.plain_view.transform
    trainer._begin([task])
    model = trainer.learner.model.double()
    vendor = make_tiny_vit(torch.float64).tuned(lambda name: True)
    head = LinearHead(24)
    head.begin_task(0, task.classes, task.columns)
    head.double().load_state_dict(model.head.state_dict())
    batches = list(trainer.feed.plain(task.train))
    whole = Batch(torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches]))

    def features(images):
        vit = vendor.model
        return vit.forward_head(vit.forward_features(images.double()), pre_logits=True)

    expected = by_hand(features, vendor, head, whole, 0.5, 0.1, settings.tunes)
    trainer.learn(task)
    found = model.learned()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@both
def test_every_task_moves_what_is_tuned_and_nothing_grows_but_the_classifier(kind, tiny_vit):
    stream, frozen = blobs(tasks=2), state_of(tiny_vit)
    trainer = trainer_of(kind(**QUICK), tiny_vit)
    tuned = {f"tower.{name}" for name, _ in tiny_vit.named_parameters()}
    tuned = tuned if kind is Full else {name for name in tuned if name.endswith("bias")}
    before = {f"tower.{name}": value for name, value in frozen.items()}
    for number, task in enumerate(stream, start=1):
        trainer.learn(task)
        learned = trainer.learner.model.learned()
        blocks = {f"head.blocks.{block}.{part}" for block in range(number) for part in ("weight", "bias")}
        assert learned.keys() == tuned | blocks
        now = {f"tower.{name}": value for name, value in state_of(trainer.learner.model.tower).items()}
        moved = {name for name in now if not torch.equal(now[name], before[name])}
        assert moved == tuned
        before = now
    assert all(torch.equal(value, tiny_vit.state_dict()[name]) for name, value in frozen.items())


@both
def test_two_learners_of_one_tower_do_not_share_what_they_tune(kind, tiny_vit):
    one, other = (trainer_of(kind(**QUICK), tiny_vit) for _ in range(2))
    untouched = state_of(other.learner.model.tower)
    one.learn(blobs().tasks[0])
    assert all(torch.equal(value, other.learner.model.tower.state_dict()[name]) for name, value in untouched.items())


# ── what counts ────────────────────────────────────────────────────────────────────────────────────


def test_what_is_tuned_counts_as_trained(tiny_vit):
    sizes = {name: p.numel() for name, p in tiny_vit.named_parameters()}
    head = 24 * 3 + 3
    for kind, tower in ((Full, sum(sizes.values())), (BitFit, sum(sizes[name] for name in biases_of(tiny_vit)))):
        trainer = trainer_of(kind(), tiny_vit)
        trainer._begin([blobs().tasks[0]])
        assert trainer.learner.model.trainable_parameters == tower + head
        trainer._begin([blobs().tasks[1]])
        assert trainer.learner.model.trainable_parameters == tower + 2 * head


def test_all_but_the_head_is_what_is_tuned_of_the_tower(tiny_vit):
    model = trainer_of(BitFit(), tiny_vit).learner.model
    model.begin_task(blobs().tasks[0])
    found = {id(p) for p in all_but("head.")(model)}
    assert found == {id(p) for name, p in model.tower.named_parameters() if name.endswith("bias")}
    assert all_but("head.")(trainer_of(LinearProbe(), tiny_vit).learner.model) == []


# ── what is seen to move ───────────────────────────────────────────────────────────────────────────


@both
def test_the_meter_sees_every_block_move(kind, tiny_vit):
    stream = blobs(tasks=2)
    trainer = trainer_of(kind(**QUICK), tiny_vit, meter=DriftMeter(stream))
    trainer.run(stream)
    (first,), (old, new) = trainer.meter.drift
    assert first == new == [0.0] * 3 and min(old) > 1e-3


@both
def test_a_lesson_says_how_far_its_images_moved(kind, tiny_vit):
    stream = blobs(tasks=2)
    trainer = trainer_of(kind(**QUICK), tiny_vit)
    trainer.learn(stream.tasks[0])
    before = kind(**QUICK).build(tiny_vit).model
    before.begin_task(stream.tasks[0])
    before.load_state_dict(trainer.learner.model.learned(), strict=False)
    batches = list(trainer.feed.plain(stream.tasks[1].test))
    after = trainer.learner.model
    assert lesson_drift(before, after, batches, [], [], 1.0).new == 0.0
    trainer.learn(stream.tasks[1])
    drift = lesson_drift(before, after, batches, [], [], 2.0)
    with torch.no_grad():
        moves = torch.cat([after.features(batch)[0] - before.features(batch)[0] for batch in batches])
    assert drift.new == pytest.approx(moves.square().sum(1).mean().sqrt().item() / 2, rel=1e-5)
    assert drift.new > 1e-3 and (drift.old, drift.bound) == (None, None)


# ── what cannot be kept ────────────────────────────────────────────────────────────────────────────


def test_features_of_a_tower_that_is_tuned_are_not_kept(tiny_vit):
    said = (
        "features are kept, in a cache or as queries of prompts, where a frozen tower gives them; the tower of this "
        "model is tuned: take cache='off' and prompts that ask for no frozen query"
    )
    tuned = tiny_vit.tuned(lambda name: True)
    with pytest.raises(ConfigError) as error:
        Learner(PromptedModel(tuned, None, LinearHead(24)), lambda task: [], cache="features")
    assert str(error.value) == said
    with pytest.raises(ConfigError) as error:
        L2P(size=5, top=2, length=3).build(tuned)
    assert str(error.value) == said
    learner = Learner(PromptedModel(tuned, None, LinearHead(24)), lambda task: [])
    assert learner.cache == Full().build(tiny_vit).cache == "off"


def test_the_feed_of_a_tuned_tower_shows_images(tiny_vit):
    trainer = trainer_of(Full(**QUICK), tiny_vit)
    assert (trainer.feed.features, trainer.feed.queries) == (None, None)
    assert next(iter(trainer.feed.plain(blobs().tasks[0].test))).images is not None


# ── files ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small(monkeypatch):
    pixels = {"size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

    def load(name, dtype):
        with torch.random.fork_rng():
            return Backbone(name, make_tiny_vit(dtype), pixels)

    monkeypatch.setattr("lamina.continual.load_backbone", load)


@both
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_model_file_holds_what_is_tuned_and_nothing_else_of_the_tower(kind, precision, small, tmp_path):
    name = {Full: "full", BitFit: "bitfit"}[kind]
    model = ContinualModel(name, settings=QUICK, precision=precision)
    model.learn(material(0, 1, 2))
    model.learn(material(3, 4))
    path = tmp_path / "m.lamina"
    model.file().write(path)
    file = ModelFile.read(path)
    kept = {key.removeprefix("tower.") for key in file.learned if key.startswith("tower.")}
    names = {key for key, _ in make_tiny_vit().named_parameters()}
    assert kept == (names if kind is Full else {key for key in names if key.endswith("bias")})
    assert all(file.learned[f"tower.{key}"].dtype == torch.float32 for key in kept)
    pixels, again = pixels_of(model, material(0, 3, 6)), ContinualModel.load(path)
    assert torch.equal(model.judge(pixels).probabilities, again.judge(pixels).probabilities)
    for each in (model, again):
        each.learn(material(5, 6))
    ours, theirs = model.model.learned(), again.model.learned()
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())
