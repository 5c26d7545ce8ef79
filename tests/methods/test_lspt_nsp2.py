"""LSPT beside prompts in null spaces, on towers in which exact null spaces exist, and on one in which none do.

Exact: 3 images a task of 2 classes, N 5 tokens, H 2 heads, so at most 30 rows; 71 prompts beside, M 6, D 86, L 4.
"""

import pytest
import torch

from lamina.errors import ConfigError
from lamina.methods.lspt import LSPT
from lamina.methods.lspt_nsp2 import LSPTNSP2
from lamina.prompts.beside import PromptsBeside
from lamina.prompts.deep import DeepPrompts
from lamina.prompts.long_term import LongTermPrompts
from lamina.protections.bounded import BoundedNullSpace
from lamina.protections.null_space import NullSpace
from lamina.protections.projector import Blend
from lamina.protections.spectrum import Cut
from tests.methods.states import kept, moved
from tests.methods.test_vpt_nsp2_exact import second_task
from tests.streams import blobs, trainer_of

DOZEN = {"length": 6, "epochs": 12, "batch_size": 3, "lr": 0.02, "optimizer": "adamw"}


def beside(tower, length=6, count=71, **options):
    """Prompts of both kinds, away from their start."""
    carrier = LongTermPrompts.behind(tower, length, **options)
    prompts = PromptsBeside(carrier, range(tower.depth), count, tower.width)
    for value in carrier.carriers.parameters():
        value.data.mul_(2)
    return prompts.eval()


def null_space_of(tower, prompts, images):
    """Return exact null spaces of what images look at."""
    blend = Blend(normalize=False)
    protection = NullSpace(tower, prompts, cut=Cut(knee="energy", kept=1.0), channels=blend, tokens=blend)
    protection.begin_look()
    tower(images, prompts.start(), protection.see)
    protection.end_look(lambda sums: sums)
    return protection


@torch.no_grad()
def drift(tower, prompts, images, other, projections, share=0.3):
    """Move the prompts beside by a share of their length; return how far features of both kinds of images moved."""
    before = [tower(part, prompts.start()).features for part in (images, other)]
    for layer in prompts.layers:
        value = prompts.value(layer)
        step = torch.randn_like(value)
        step = projections[value](step) if projections else step
        value.add_(step, alpha=float(share * value.norm() / step.norm()))
    after = [tower(part, prompts.start()).features for part in (images, other)]
    return [float((now - then).norm() / then.norm()) for then, now in zip(before, after, strict=True)]


@pytest.fixture
def pictures(double):
    return torch.randn(3, 3, 8, 8), torch.randn(2, 3, 8, 8)


# ── the promise ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [{}, {"carriers": 2}, {"carry": "gru"}, {"carry": "none"}], ids=str)
def test_a_long_step_in_exact_null_spaces_moves_other_images_alone(roomy, pictures, options):
    prompts = beside(roomy, **options)
    projections = null_space_of(roomy, prompts, pictures[0]).projections()
    old, other = drift(roomy, prompts, *pictures, projections)
    assert old < 1e-12 and other > 1e-4
    old, other = drift(roomy, prompts, *pictures, projections)  # and once more in the same null spaces
    assert old < 1e-12 and other > 1e-4


def test_a_step_that_is_not_projected_moves_them_all(roomy, pictures):
    assert drift(roomy, beside(roomy), *pictures, {})[0] > 1e-6


def test_where_travelling_prompts_see_those_beside_the_same_null_spaces_do_not_hold(roomy, pictures, monkeypatch):
    prompts = beside(roomy)
    start = prompts.start

    def unmasked(*arguments):
        started = start(*arguments)
        at = started.at

        def open_to_all(*where):
            splice = at(*where)
            object.__setattr__(splice, "frozen_only", False)
            return splice

        started.at = open_to_all
        return started

    monkeypatch.setattr(prompts, "start", unmasked)
    projections = null_space_of(roomy, prompts, pictures[0]).projections()
    assert drift(roomy, prompts, *pictures, projections)[0] > 1e-6


def test_a_projected_step_of_what_travels_is_no_better_than_any(roomy, pictures):
    """Why the carrier is frozen: at its input, the condition of the block that it enters says nothing."""
    moves = []
    for projected in (True, False):
        torch.manual_seed(5)
        prompts = beside(roomy)
        maps = null_space_of(roomy, prompts, pictures[0]).projections()
        with torch.no_grad():
            before = roomy(pictures[0], prompts.start()).features
            for layer in range(1, 4):
                value = prompts.carrier.value(layer)
                step = torch.randn_like(value)
                step = step @ maps[prompts.value(layer)].right if projected else step
                value.add_(step, alpha=float(0.1 * value.norm() / step.norm()))
            moves.append(float((roomy(pictures[0], prompts.start()).features - before).norm()))
    assert 0.5 < moves[0] / moves[1] < 2


def test_whole_tasks_leave_old_features_and_logits_where_they_are_and_move_new_ones(roomy):
    features, logits, new = second_task(LSPTNSP2(**DOZEN, plastic=71, kept=1.0), roomy)
    assert features <= 1e-10 and logits <= 1e-10
    assert new > 1e-4


def test_a_bound_of_nothing_finds_the_exact_null_spaces_by_itself(roomy):
    features, _, new = second_task(LSPTNSP2(**DOZEN, plastic=71, max_drift=1e-10), roomy)
    assert features <= 1e-10 and new > 1e-4


def test_lspt_on_two_tasks_keeps_no_promise_unless_frozen(roomy):
    assert second_task(LSPT(**DOZEN), roomy)[0] > 1e-3
    assert second_task(LSPT(**DOZEN, freeze_after_first=True), roomy) == [0.0, 0.0, 0.0]


# ── who sees whom ────────────────────────────────────────────────────────────────────────────────────


def test_what_travels_does_not_see_what_stands_beside_and_the_images_see_both(tiny_vit):
    """In the last step: those beside the last block change features, those before change travelling prompts, too."""
    prompts = beside(tiny_vit, length=4, count=7)
    images, seen = torch.randn(5, 3, 32, 32), []

    def look():
        seen.clear()
        out = tiny_vit(images, prompts.start(), lambda probe: seen.append(probe), all_rows=True)
        return out.features, out.prompts

    features, travelled = look()
    assert [probe.entering.shape[1] for probe in seen] == [11] * 3
    assert all(probe.to_prompts.min() > 0 and probe.to_prompts.shape[-1] == 11 for probe in seen)
    prompts.value(2).data.add_(1.0)
    after, unmoved = look()
    assert (after - features).abs().max() > 1e-3 and torch.equal(unmoved, travelled)
    prompts.value(0).data.add_(1.0)
    assert not torch.equal(look()[1], travelled)


def test_null_spaces_know_the_attention_to_prompts_beside_alone(tiny_vit):
    prompts, seen = beside(tiny_vit, length=4, count=7), []
    images = torch.randn(5, 3, 32, 32)
    protection = null_space_of(tiny_vit, prompts, images)
    tiny_vit(images, prompts.start(), seen.append)
    assert protection.rows == 5 * 2 * 17
    for probe in seen:
        rows = probe.to_prompts[..., 4:].flatten(0, 2)
        torch.testing.assert_close(protection.attention[probe.layer].float(), rows.T @ rows)


def test_without_those_beside_it_is_lspt(tiny_vit):
    prompts, images = beside(tiny_vit, length=4, count=0), torch.randn(5, 3, 32, 32)
    ours, theirs = (tiny_vit(images, part.start()).features for part in (prompts, prompts.carrier))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_beside_nothing_that_travels_they_are_deep_prompts_after_the_norm(tiny_vit):
    prompts, images = beside(tiny_vit, length=0, count=7), torch.randn(5, 3, 32, 32)
    deep = DeepPrompts(range(3), 7, 24, normed=True)
    deep.load_state_dict({name: value for name, value in prompts.state_dict().items() if "carrier" not in name})
    ours, theirs = (tiny_vit(images, part.start()).features for part in (prompts, deep))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ── the method ───────────────────────────────────────────────────────────────────────────────────────


def test_the_first_task_trains_all_and_later_ones_those_beside_alone(tiny_vit):
    settings = LSPTNSP2(length=4, plastic=9, epochs=2, batch_size=9, head_start="small")
    trainer, stream = trainer_of(settings, tiny_vit), blobs()
    trainer.learner.model.begin_task(stream.tasks[0])
    start = kept(trainer)
    trainer = trainer_of(settings, tiny_vit)
    trainer.learn(stream.tasks[0])
    first = kept(trainer)
    names = {name for name in first if name.startswith("prompts")}
    assert names <= moved(start, first)
    trainer.learn(stream.tasks[1])
    assert moved(first, kept(trainer)) & names == {f"prompts.values.{i}" for i in range(3)}


def test_defaults_and_what_is_built_from_them(tiny_vit):
    settings = LSPTNSP2()
    assert (settings.length, settings.plastic, settings.max_drift, settings.kept) == (10, 16, 0.05, None)
    assert settings.freeze_after_first and settings.recurrent_rate == 0.1
    learner = settings.build(tiny_vit)
    (null_space,), prompts = learner.protections, learner.model.prompts
    assert type(null_space) is BoundedNullSpace and null_space.prompts is prompts and null_space.normed
    assert prompts.value(1).shape == (16, 24) and prompts.carrier.value(1).shape == (10, 24)
    (plain,) = LSPTNSP2(kept=0.75).build(tiny_vit).protections
    assert type(plain) is NullSpace and plain.cut == Cut(knee="energy", kept=0.75) and plain.right_alone


def test_a_carrier_that_goes_on_learning_is_refused():
    with pytest.raises(ConfigError) as error:
        LSPTNSP2(freeze_after_first=False)
    assert str(error.value) == (
        "LSPTNSP2.freeze_after_first must be true, since no null space protects what travels; got False: take lspt to "
        "train all of it"
    )
