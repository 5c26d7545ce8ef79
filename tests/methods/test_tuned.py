"""The plan that methods for transfer learning share, on VPT-shallow. M 4, D 24, 3 classes a task."""

import math

import pytest
import torch
from torch import nn

from lamina.errors import ConfigError
from lamina.heads.linear import LinearHead
from lamina.methods.tuned import Tuned
from lamina.methods.vpt_shallow import VPTShallow
from tests.streams import blobs, trainer_of


def factors(settings, *epochs):
    schedule = settings.phase().schedule
    return [schedule(epoch / settings.epochs) for epoch in epochs]


# ── the learning rate ────────────────────────────────────────────────────────────────────────────────


def test_the_legacy_rate_is_zero_in_the_first_pass_and_changes_once_a_pass():
    settings = Tuned(legacy_warmup=True)
    got = factors(settings, 0, 1, 9, 10, 55, 99)
    assert got == pytest.approx([0, 0.1, 0.9, 1, 0.5, 0.0003046], abs=5e-8)
    assert factors(settings, 9.99, 55.5) == got[2:3] + got[4:5]


def test_the_rate_rises_from_a_tenth_step_by_step():
    assert factors(Tuned(), 0, 5, 10, 55, 100) == pytest.approx([0.1, 0.55, 1, 0.5, 0])
    assert factors(Tuned(), 9.99)[0] > factors(Tuned(), 9.9)[0]
    assert factors(Tuned(warm_up=0.0), 0, 50) == pytest.approx([1, 0.5])


def test_the_rate_is_the_one_that_the_optimizer_gets(tiny_vit):
    trainer = trainer_of(VPTShallow(length=4, epochs=1, batch_size=9, warm_up=0.0), tiny_vit)
    rates = []
    trainer.log.step = lambda position, values, rate, images: rates.append(rate)
    trainer.learn(blobs(tasks=1).tasks[0])
    assert rates == pytest.approx([0.25 * 0.5 * (1 + math.cos(math.pi * part)) for part in (0, 1 / 3, 2 / 3)])


# ── the optimizer ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_the_optimizer_is_the_one_asked_for_whatever_the_decay(name, kind, decay):
    matrix, bias, slow, slow_bias = (nn.Parameter(torch.zeros(size)) for size in ((4, 24), (7,), (6, 5), (3,)))
    settings = Tuned(optimizer=name, weight_decay=decay, lr=0.3)
    optimizer = settings.phase([slow, slow_bias], 0.1).optimizer([bias, slow, matrix, slow_bias])
    assert type(optimizer) is kind
    got = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    want = {matrix: (0.3, decay), bias: (0.3, 0.0), slow: (0.03, decay), slow_bias: (0.03, 0.0)}
    assert {key: pytest.approx(value) for key, value in got.items()} == {id(p): pair for p, pair in want.items()}
    if name == "sgd":
        assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_groups_without_parameters_are_left_out():
    (group,) = Tuned().phase().optimizer([nn.Parameter(torch.zeros(4, 24))]).param_groups
    assert group["lr"] == 0.25


# ── the head and the plan ────────────────────────────────────────────────────────────────────────────


def test_a_head_starts_as_vpt_s_or_small():
    for start, deviation, bias in (("kaiming", (2 / 40) ** 0.5, -4.59512), ("small", 0.02, 0.0)):
        head = Tuned(head_start=start).head_for(300)
        assert type(head) is LinearHead
        for task in range(2):
            head.begin_task(task, [""] * 40, range(40 * task, 40 * task + 40))
            assert head.blocks[task].weight.std().item() == pytest.approx(deviation, rel=0.1)
            assert head.blocks[task].bias.tolist() == pytest.approx([bias] * 40, abs=1e-5)


def test_the_defaults_are_those_of_vpt_with_64_images_a_step():
    settings = Tuned()
    assert (settings.epochs, settings.warm_up, settings.batch_size) == (100, 0.1, 64)
    assert (settings.optimizer, settings.lr, settings.weight_decay) == ("sgd", 0.25, 0.001)
    phase = settings.phase()
    assert (phase.clip_norm, phase.temperature, phase.classes) == (None, 1.0, "task")
    assert Tuned(clip_norm=0.5, temperature=2.0).phase().clip_norm == 0.5


def test_a_task_of_one_class_moves_no_prompt_and_a_refined_head_is_balanced():
    single, several = blobs(tasks=1, per_task=1).tasks[0], blobs(tasks=1).tasks[0]
    settings = Tuned(head="refined")
    assert settings.phases(single) == [] and len(settings.phases(several)) == 1
    assert len(settings.refine(several)) == 1 and Tuned().refine(several) == []


def test_a_frozen_tower_and_old_columns_keep_every_bit_over_five_steps(tiny_vit):
    trainer, stream = trainer_of(VPTShallow(length=4, epochs=1, batch_size=6, lr=1.0), tiny_vit), blobs()
    before = {name: value.clone() for name, value in tiny_vit.state_dict().items()}
    trainer.learn(stream.tasks[0])
    old = trainer.learner.model.head.blocks[0].weight.clone()
    prompts = trainer.learner.model.prompts.value(0).clone()
    trainer.learn(stream.tasks[1])
    assert all(torch.equal(value, before[name]) for name, value in tiny_vit.state_dict().items())
    assert torch.equal(trainer.learner.model.head.blocks[0].weight, old)
    assert not torch.equal(trainer.learner.model.prompts.value(0), prompts)


def test_a_wrong_setting_says_what_would_be_right():
    with pytest.raises(ConfigError) as error:
        Tuned(warm_up=1.0)
    assert str(error.value) == "Tuned.warm_up must be below 1.0; got 1.0"
