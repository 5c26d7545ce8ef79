"""CODA-Prompt: what the method promises. 27 training and 11 test images a task, 5 components of M 4 rows, D 24, L 3."""

import math

import pytest
import torch

from lamina.errors import ConfigError
from lamina.methods.coda_prompt import CODAPrompt
from lamina.model import Batch
from lamina.schedules import cosine_by_epoch
from tests.methods.states import images_of, kept, logits
from tests.streams import blobs, trainer_of

SMALL = {"length": 4, "components": 5, "epochs": 2, "batch_size": 8, "lr": 0.02}


def made(tower, run_dir=None, **settings):
    return trainer_of(CODAPrompt(**SMALL | settings), tower, run_dir=run_dir)


# ── promises ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_task_moves_its_own_components_and_nothing_else(tiny_vit):
    trainer = made(tiny_vit)
    for task in blobs(tasks=3, per_task=3):
        trainer._begin([task])
        before = kept(trainer)
        trainer.learn(task)
        after, t = kept(trainer), task.index
        moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
        own = {f"prompts.{kind}.{t}" for kind in ("prefixes", "keys", "attentions")}
        assert moved == {*own, f"head.blocks.{t}.weight", f"head.blocks.{t}.bias"}
    assert all(parameter.grad is None for parameter in tiny_vit.parameters())


def test_all_components_there_are_take_part_in_training_and_in_evaluation(tiny_vit):
    trainer, stream = made(tiny_vit), blobs(tasks=2, per_task=3)
    trainer._begin(list(stream))
    model, images = trainer.learner.model.eval(), images_of(trainer, stream)[:5]
    with torch.no_grad():
        tested, trained = (model.features(Batch(images), task=task)[0] for task in (None, 1))
        torch.testing.assert_close(tested, trained)
        for index in (0, 1):
            model.prompts.prefixes[index].mul_(3)
            now = model.features(Batch(images), task=1)[0]
            assert (now - trained).abs().max() > 1e-4
            trained = now


def test_answers_depend_neither_on_the_size_of_a_batch_nor_on_the_order_of_images(tiny_vit):
    trainer, stream = made(tiny_vit), blobs(tasks=3, per_task=3)
    trainer.run(stream)
    images = images_of(trainer, stream)
    order = torch.randperm(len(images))
    whole = logits(trainer, images)
    for other in (
        logits(trainer, images, 1),
        logits(trainer, images, 7),
        logits(trainer, images[order])[order.argsort()],
    ):
        torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-4)
        assert torch.equal(other.argmax(-1), whole.argmax(-1))


@pytest.mark.parametrize(("tasks", "per_task", "components"), [(3, 1, 8), (5, 2, 4)])
def test_tasks_of_one_class_and_of_two_are_learned(tiny_vit, tasks, per_task, components):
    trainer = made(tiny_vit, epochs=1, components=components, orthogonality=1e-3)
    stream = blobs(tasks=tasks, per_task=per_task)
    trainer.run(stream)
    assert logits(trainer, images_of(trainer, stream)).shape == (11 * tasks, tasks * per_task)
    assert all(value.isfinite().all() for value in kept(trainer).values())


def test_a_task_that_finds_no_room_is_refused_and_the_model_stays_as_it_was(tiny_vit):
    trainer, stream = made(tiny_vit, components=12, epochs=1), blobs(tasks=3, per_task=3)
    for task in stream.tasks[:2]:
        trainer.learn(task)
    before, images = kept(trainer), images_of(trainer, stream)
    said = logits(trainer, images)
    with pytest.raises(ConfigError, match=r"^task 3 finds no room for components: there are 24, and no more "):
        trainer.learn(stream.tasks[2])
    after = kept(trainer)
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(logits(trainer, images), said)


def test_a_run_of_more_tasks_than_there_is_room_for_is_refused_before_any_training(tiny_vit, tmp_path):
    """Two tasks of 12 fill the 24 features; without the check, the third would find none left."""
    made(tiny_vit, components=12, epochs=1).run(blobs(tasks=2, per_task=3))
    trainer = made(tiny_vit, run_dir=tmp_path / "run", components=12, epochs=1)
    with pytest.raises(ConfigError, match=r"^components .* got 3 tasks of 12, 36 in all: set components=8 or fewer$"):
        trainer.run(blobs(tasks=3, per_task=3))
    assert not kept(trainer) and not list(tmp_path.glob("run/*"))


def test_a_model_that_was_kept_learns_further_tasks_as_if_it_had_never_been_away(tiny_vit):
    stream, whole, first, later = blobs(tasks=3, per_task=2), made(tiny_vit), made(tiny_vit), made(tiny_vit)
    for task in stream:
        whole.learn(task)
    for task in stream.tasks[:2]:
        first.learn(task)
    later.adopt(stream.tasks[:2], kept(first), [])
    later.learn(stream.tasks[2])
    ours, theirs = kept(later), kept(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


# ── the plan and the parts ───────────────────────────────────────────────────────────────────────────


def test_the_defaults_are_the_published_ones():
    settings = CODAPrompt()
    assert (settings.length, settings.components, settings.orthogonality) == (4, 10, 0.0)
    assert (settings.epochs, settings.batch_size, settings.lr, settings.weight_decay) == (20, 128, 1e-3, 0.0)
    assert settings.temperature == 1.0


def test_the_plan_is_adam_along_a_cosine_with_the_tasks_own_classes():
    (phase,) = CODAPrompt(lr=0.25, epochs=20).phases(blobs(tasks=1).tasks[0])
    optimizer = phase.optimizer([torch.nn.Parameter(torch.zeros(2))])
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults["betas"] == (0.9, 0.999)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.25, 0.0)
    assert (phase.classes, phase.clip_norm, phase.temperature) == ("task", None, 1.0)
    assert phase.schedule(0.999) == pytest.approx(0.015707, abs=1e-6)


@pytest.mark.parametrize("epochs", [2, 5, 20, 50])
@pytest.mark.parametrize("steps", [1, 3, 39])
def test_the_rate_changes_with_the_epoch_alone_and_ends_above_zero(epochs, steps):
    schedule, total = cosine_by_epoch(epochs), epochs * steps
    for step in range(total):
        expected = math.cos(99 * math.pi * (step // steps) / (200 * (epochs - 1)))
        assert schedule(step / total) == pytest.approx(expected, abs=1e-9)
    assert schedule(0.0) == 1 and schedule((total - 1) / total) == pytest.approx(0.015707, abs=1e-6)


def test_the_rates_of_twenty_epochs():
    rates = [cosine_by_epoch(20)(epoch / 20) for epoch in range(20)]
    assert [round(rates[epoch], 4) for epoch in (0, 1, 18, 19)] == [1.0, 0.9967, 0.0974, 0.0157]
    assert [cosine_by_epoch(1)(progress) for progress in (0.0, 0.5, 0.99)] == [1.0, 1.0, 1.0]


def test_settings_reach_the_prompts(tiny_vit):
    settings = CODAPrompt(length=3, components=7, blocks=[2, 0], orthogonality=0.5)
    prompts = settings.build(tiny_vit).model.prompts
    prompts.begin_task(0)
    assert prompts.layers == [0, 2] and prompts.orthogonality == 0.5
    assert prompts.prefixes[0].shape == (2, 7, 2, 3, 24)
    assert prompts.keys[0].shape == prompts.attentions[0].shape == (2, 7, 24)
    assert CODAPrompt().build(tiny_vit).model.prompts.layers == [0, 1, 2]


def test_a_block_that_the_backbone_has_not_is_refused_before_any_training(tiny_vit):
    with pytest.raises(ConfigError) as error:
        CODAPrompt(blocks=[0, 3]).build(tiny_vit)
    assert str(error.value) == "CODAPrompt.blocks must name different blocks of the backbone, from 0 to 2; got [0, 3]"
