"""DualPrompt: what the method promises. 27 training and 11 test images a task, M 5 and 4 rows in prefixes, D 24."""

import pytest
import torch

from lamina.errors import ConfigError
from lamina.methods.dualprompt import DualPrompt
from lamina.model import Batch
from lamina.schedules import constant
from lamina.training.objective import classify
from tests.methods.states import images_of, kept, logits, moved
from tests.streams import blobs, trainer_of

SMALL = {"length": 4, "epochs": 2, "batch_size": 8, "lr": 0.02}


def made(tower, **settings):
    return trainer_of(DualPrompt(**SMALL | settings), tower)


# ── promises ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_task_moves_the_general_prefix_and_what_is_its_own_and_nothing_else(tiny_vit):
    trainer, states = made(tiny_vit), []
    for task in blobs(tasks=3, per_task=3):
        trainer._begin([task])
        before = kept(trainer)
        trainer.learn(task)
        t = task.index
        own = {f"prompts.experts.{t}", f"prompts.keys.{t}", f"head.blocks.{t}.weight", f"head.blocks.{t}.bias"}
        assert moved(before, kept(trainer)) == {"prompts.general", *own}
        if states:
            assert torch.equal(before[f"prompts.experts.{t}"], states[-1][f"prompts.experts.{t - 1}"])
            assert moved(states[-1], before) == set()
        states.append(kept(trainer))


def test_only_the_general_prefix_and_what_belongs_to_the_task_get_a_gradient(tiny_vit):
    trainer, stream = made(tiny_vit), blobs(tasks=3, per_task=3)
    trainer._begin(list(stream))
    model, task = trainer.learner.model, stream.tasks[2]
    (batch,) = trainer.feed.plain(task.train.some(6))
    output = model(batch, 2)
    (phase,) = trainer.learner.phases(task)
    (classify(output.logits, batch.targets, task, phase) + output.terms["pull"]).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert set(grads) == {
        "prompts.general",
        "prompts.experts.2",
        "prompts.keys.2",
        "head.blocks.2.weight",
        "head.blocks.2.bias",
    }
    assert all(grad.abs().max() > 0 for grad in grads.values())
    assert all(grads["prompts.general"].abs().amax((2, 3)).flatten() > 0)  # keys and values, at both blocks


def test_images_find_the_experts_of_their_tasks(tiny_vit):
    """Tasks of one kind of picture each, as different as these, are told apart by their keys."""
    trainer, stream = made(tiny_vit, epochs=12, batch_size=9, lr=0.1), blobs(tasks=2, per_task=1)
    trainer.run(stream)
    model, found = trainer.learner.model, []
    for task in stream:
        for batch in trainer.feed.plain(task.test):
            with torch.no_grad():
                _, started = model.look(batch)
            assert started.chosen.shape == (len(batch.targets), 1)
            found.append((started.chosen[:, 0] == task.index).double())
    assert torch.cat(found).mean() > 0.8


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


def test_a_vote_makes_all_images_of_a_batch_take_one_expert(tiny_vit):
    trainer, stream = made(tiny_vit, selection="batch"), blobs(tasks=3, per_task=3)
    trainer.run(stream)
    model, batch = trainer.learner.model, Batch(images_of(trainer, stream))
    with torch.no_grad():
        query = model.tower(batch.images).features
        _, started = model.look(batch)
        model.prompts.selection = "image"
        own = model.prompts.nearest(query)
    assert len(own.unique()) > 1
    assert started.chosen.tolist() == [[own.bincount().argmax().item()]] * len(own)


@pytest.mark.parametrize(("tasks", "per_task"), [(3, 1), (5, 2)])
def test_tasks_of_one_class_and_of_two_are_learned(tiny_vit, tasks, per_task):
    trainer, stream = made(tiny_vit, epochs=1), blobs(tasks=tasks, per_task=per_task)
    trainer.run(stream)
    assert logits(trainer, images_of(trainer, stream)).shape == (11 * tasks, tasks * per_task)
    assert all(value.isfinite().all() for value in kept(trainer).values())


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
    settings = DualPrompt()
    assert (settings.length, settings.general_length, settings.general_blocks) == (20, 5, [0, 1])
    assert (settings.pull, settings.selection, settings.temperature, settings.weight_decay) == (1.0, "image", 1.0, 0.0)
    assert (settings.epochs, settings.batch_size, settings.lr) == (5, 24, 0.03 * 24 / 256)


@pytest.mark.parametrize(("clip", "norm"), [(1.0, 1.0), (0.5, 0.5), (0.0, None)])
def test_the_plan_is_adam_at_a_constant_rate_with_short_gradients_and_the_tasks_own_classes(clip, norm):
    (phase,) = DualPrompt(lr=0.25, weight_decay=0.125, clip_norm=clip).phases(blobs(tasks=1).tasks[0])
    optimizer = phase.optimizer([torch.nn.Parameter(torch.zeros(2))])
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults["betas"] == (0.9, 0.999)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.25, 0.125)
    assert (phase.classes, phase.clip_norm, phase.schedule, phase.temperature) == ("task", norm, constant, 1.0)


def test_settings_reach_the_prompts(tiny_vit):
    settings = DualPrompt(
        length=4, general_length=6, general_blocks=[2], expert_blocks=[1, 0], pull=0.5, selection="batch"
    )
    prompts = settings.build(tiny_vit).model.prompts
    prompts.begin_task(0)
    assert (prompts.general_blocks, prompts.expert_blocks) == ([2], [0, 1])
    assert prompts.general.shape == (1, 2, 6, 24) and prompts.experts[0].shape == (2, 2, 4, 24)
    assert prompts.keys[0].shape == (24,)
    assert (prompts.pull, prompts.selection) == (0.5, "batch")
    assert DualPrompt().build(tiny_vit).model.prompts.expert_blocks == [2]


@pytest.mark.parametrize("setting", ["general_blocks", "expert_blocks"])
def test_a_block_that_the_backbone_has_not_is_refused_before_any_training(tiny_vit, setting):
    with pytest.raises(ConfigError) as error:
        DualPrompt(**{setting: [1, 3]}).build(tiny_vit)
    assert str(error.value) == (
        f"DualPrompt.{setting} must name different blocks of the backbone, from 0 to 2; got [1, 3]"
    )
