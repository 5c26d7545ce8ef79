"""VPT-NSP² that keeps its promise, on towers in which exact null spaces exist, and on one in which none do.

Exact: 3 images a task of 2 classes, N 5 tokens, H 2 heads, so at most 30 rows; M 71 prompt tokens, D 86, L 4.
Elsewhere: 27 images of 3 classes, N 17, M 5, D 24, L 3.
"""

import pytest
import torch
from lightning_fabric import Fabric

from lamina.data.transforms import InputSpec
from lamina.errors import ConfigError
from lamina.methods.vpt_nsp2 import VPTNSP2
from lamina.methods.vpt_nsp2_exact import VPTNSP2Exact
from lamina.model import Batch
from lamina.prompts.deep import DeepPrompts
from lamina.protections.bounded import BoundedNullSpace
from lamina.protections.null_space import NullSpace
from lamina.protections.projector import Blend
from lamina.protections.spectrum import Cut
from lamina.training.feed import Feed
from lamina.training.trainer import Trainer
from tests.streams import blobs, trainer_of

#: twelve steps of Adam
DOZEN = {"length": 71, "epochs": 12, "batch_size": 3, "lr": 0.05, "temperature": 1.0}


def second_task(settings, tower):
    """Learn two tasks; return how far, in norm, the second moved old features, old logits and new features."""
    stream = blobs(tasks=2, per_task=2, train=3, test=3)
    feed = Feed(Fabric(accelerator="cpu", devices=1), InputSpec(8, (0.5,) * 3, (0.25,) * 3), eval_batch=2)
    torch.manual_seed(0)
    learner = settings.build(tower)
    trainer = Trainer(learner, feed, feed.fabric)
    old, new = (Batch(torch.cat([batch.images for batch in feed.plain(task.train)])) for task in stream)

    @torch.no_grad()
    def seen():
        return [learner.model.features(old)[0], learner.model(old).logits[:, :2], learner.model.features(new)[0]]

    trainer.learn(stream.tasks[0])
    before = seen()
    assert before[0].dtype == torch.float64
    trainer.learn(stream.tasks[1])
    return [float((now - then).norm() / then.norm()) for then, now in zip(before, seen(), strict=True)]


# ── the promise ──────────────────────────────────────────────────────────────────────────────────────


def test_a_whole_task_leaves_old_features_and_logits_where_they_are_and_moves_new_ones(roomy):
    features, logits, new = second_task(VPTNSP2Exact(**DOZEN, kept=1.0), roomy)
    assert features <= 1e-10 and logits <= 1e-10
    assert new > 1e-3


def test_the_published_method_moves_old_features_on_the_same_images(roomy):
    features, logits, _ = second_task(VPTNSP2(**DOZEN), roomy)
    assert features > 1e-4 and logits > 1e-4


def test_before_the_norm_the_same_projectors_do_not_keep_the_promise(roomy):
    settings = VPTNSP2(**DOZEN, knee="energy", kept=1.0, eta1=1.0, eta2=1.0, normalize=False, moments=0.0)
    features, logits, _ = second_task(settings, roomy)
    assert features > 1e-4 and logits > 1e-4


@pytest.mark.parametrize("side", ["channels", "tokens"])
def test_either_condition_alone_does_not_keep_the_promise(roomy, monkeypatch, side):
    build = VPTNSP2Exact.build

    def without(self, tower):
        learner = build(self, tower)
        learner.protections[0].blends[side] = None
        return learner

    monkeypatch.setattr(VPTNSP2Exact, "build", without)
    assert second_task(VPTNSP2Exact(**DOZEN, kept=1.0), roomy)[0] > 1e-5


def test_a_bound_of_nothing_finds_the_exact_null_spaces_by_itself(roomy):
    """Rounding moves features by some 1e-12 of their spread, and a share of 1e-6 by some 1e-4."""
    features, logits, new = second_task(VPTNSP2Exact(**DOZEN, max_drift=1e-10), roomy)
    assert features <= 1e-10 and logits <= 1e-10
    assert new > 1e-3


# ── the bound, where no null space is exact ──────────────────────────────────────────────────────────


def settings_of(**values):
    return VPTNSP2Exact(**{"length": 5, "epochs": 4, "batch_size": 8, "temperature": 1.0, "lr": 0.05} | values)


def after_two(tower, **values):
    """Learn two tasks; return the cut that the second was learned under, and the drift of old features."""
    trainer, stream = trainer_of(settings_of(**values), tower), blobs(tasks=2, per_task=3)
    trainer.learn(stream.tasks[0])
    null_space, model = trainer.learner.protections[0], trainer.learner.model
    old = [Batch(batch.images) for batch in trainer.feed.plain(stream.tasks[0].train)]

    @torch.no_grad()
    def seen():
        return torch.cat([model.features(batch)[0] for batch in old])

    before, cut = seen(), null_space.cut
    trainer.learn(stream.tasks[1])
    move = seen() - before
    spread = (before - before.mean(0)).square().sum(1).mean().sqrt()
    return cut, float(move.square().sum(1).mean().sqrt() / spread)


def test_a_tighter_bound_cuts_earlier_and_old_features_drift_less(tiny_vit):
    found = [after_two(tiny_vit, max_drift=bound) for bound in (0.1, 0.01, 0.002)]
    cuts, drifts = zip(*found, strict=True)
    assert cuts[0].kept < cuts[1].kept < cuts[2].kept
    assert drifts[0] > drifts[1] > drifts[2]


def test_the_bound_is_about_kept_for_a_task_that_wants_as_much_as_the_first(tiny_vit):
    for bound in (0.02, 0.01, 0.002):
        assert after_two(tiny_vit, max_drift=bound)[1] < 1.5 * bound


def test_what_was_chosen_survives_a_checkpoint(tiny_vit, tmp_path):
    stream = blobs(tasks=2, per_task=3)
    trainer = trainer_of(settings_of(), tiny_vit, run_dir=tmp_path)
    trainer.run(stream)
    again = trainer_of(settings_of(), tiny_vit, seed=0, run_dir=tmp_path)
    assert again.restore(stream)
    ours, theirs = trainer.learner.protections[0], again.learner.protections[0]
    assert (ours.cut, ours.drift) == (theirs.cut, theirs.drift) and ours.drift > 0
    assert all(torch.equal(ours.wish[i], theirs.wish[i]) for i in range(3))


# ── what it is made of ───────────────────────────────────────────────────────────────────────────────


def test_prompts_enter_after_the_norm(tiny_vit):
    """Prompts that a norm awaits, normalised by hand, give the same features."""
    before, after = DeepPrompts(range(3), 5, 24), DeepPrompts(range(3), 5, 24, normed=True)
    images = torch.randn(7, 3, 32, 32)
    with torch.no_grad():
        for i, block in enumerate(tiny_vit.model.blocks):
            block.norm1.weight.copy_(torch.rand(24) + 0.5)
            after.value(i).copy_(block.norm1(before.value(i)))
        want, got, plain = (
            tiny_vit(images, prompts.start() if prompts else None).features for prompts in (before, after, None)
        )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, want, atol=1e-2)


def test_defaults_and_what_is_built_from_them(tiny_vit):
    settings = VPTNSP2Exact()
    assert (settings.length, settings.max_drift, settings.kept) == (16, 0.05, None)
    learner = settings.build(tiny_vit)
    (null_space,) = learner.protections
    assert type(null_space) is BoundedNullSpace and null_space.max_drift == 0.05 and not null_space.right_alone
    assert learner.model.prompts is null_space.prompts and null_space.prompts.normed
    assert [tuple(value.shape) for value in learner.model.prompts.parameters()] == [(16, 24)] * 3


def test_a_share_that_is_given_is_not_measured(tiny_vit):
    assert VPTNSP2Exact().idle() == {} and list(VPTNSP2Exact(kept=0.75).idle()) == ["max_drift"]
    (null_space,) = VPTNSP2Exact(kept=0.75).build(tiny_vit).protections
    assert type(null_space) is NullSpace and not null_space.measures and null_space.right_alone
    assert null_space.cut == Cut(knee="energy", kept=0.75)
    assert null_space.blends == dict.fromkeys(("channels", "tokens"), Blend(eta=1.0, normalize=False))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": 0}, "VPTNSP2Exact.length must be at least 1; got 0"),
        ({"max_drift": -0.1}, "VPTNSP2Exact.max_drift must be at least 0.0; got -0.1"),
        ({"kept": 1.5}, "VPTNSP2Exact.kept must be between 0 and 1; got 1.5"),
    ],
)
def test_a_wrong_setting_says_what_would_be_right(values, message):
    with pytest.raises(ConfigError) as error:
        VPTNSP2Exact(**values)
    assert str(error.value) == message
