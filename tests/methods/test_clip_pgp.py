"""CLIP-PGP: image tokens for all tasks that are held, words for each; B 7, N 17, M 5, D 48, L 3, n 4, W 40, F 24."""

from functools import cache

import pytest
import torch
from torch.nn import functional as F

from lamina.methods.clip_pgp import CLIPPGP
from lamina.methods.coop import CoOp
from lamina.model import Batch
from tests.backbones.clips import clip, close, images, tiny_clip
from tests.methods.states import images_of, kept, logits, moved
from tests.streams import blobs, trainer_of

SMALL = {"length": 5, "context": 4, "epochs": 2, "batch_size": 9, "lr": 0.1, "first_lr": 0.1, "prompt_share": 0.8}


def trainer_after(tasks, **changes):
    trainer = trainer_of(CLIPPGP(**{**SMALL, **changes}), tiny_clip())
    for task in blobs().tasks[:tasks]:
        trainer.learn(task)
    return trainer


@cache
@torch.enable_grad()
def learned(tasks):
    """A trainer that has learned so many of two tasks; nobody changes it."""
    return trainer_after(tasks)


def old_images(trainer):
    return torch.cat([batch.images for batch in trainer.feed.plain(blobs().tasks[0].train)])


# ── the forward pass ─────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def plain_loop(values):
    """What open_clip's own blocks say where prompts stand between class token and patches, before the first norm."""
    side = clip().visual
    x = side.conv1(images()).flatten(2).transpose(1, 2)
    x = torch.cat([side.class_embedding.expand(len(x), 1, -1), x], 1) + side.positional_embedding
    x = side.ln_pre(torch.cat([x[:, :1], values.expand(len(x), -1, -1), x[:, 1:]], 1))
    for block in side.transformer.resblocks:
        x = block(x)
    return side.ln_post(x[:, 0]) @ side.proj


@torch.no_grad()
def test_scores_are_scaled_cosines_of_images_with_prompts_and_of_each_tasks_words():
    model = learned(2).learner.model.eval()
    (values,) = model.prompts.values
    first, second = model.head.texts.contexts
    assert (values.shape, first.shape, second.shape) == ((5, 48), (4, 40), (4, 40))
    expected = F.normalize(plain_loop(values), dim=-1)
    for columns, context in (([0, 1, 2], first), ([3, 4, 5], second)):
        coop = CoOp(length=4).build(tiny_clip()).model.head
        coop.begin_task(0, [f"class {c}" for c in columns], [0, 1, 2])
        coop.texts.contexts[0].copy_(context)
        close(model(Batch(images())).logits[:, columns], 20 * expected @ coop.texts().mT)


def test_prompts_start_as_the_rows_of_a_linear_layer_and_words_small():
    model = trainer_of(CLIPPGP(length=200), tiny_clip()).learner.model
    model.begin_task(blobs().tasks[0])
    values = model.prompts.values[0].detach()
    assert 0.95 * 48**-0.5 < values.abs().max() <= 48**-0.5
    assert 0.015 < model.head.texts.contexts[0].std() < 0.025


def test_all_classes_met_compete_whatever_other_images_are_asked_about():
    trainer, stream = learned(2), blobs()
    shown = images_of(trainer, stream)  # those of the first task come first
    whole = logits(trainer, shown)
    assert whole.shape == (22, 6) and torch.isfinite(whole).all()
    order = torch.randperm(22, generator=torch.Generator().manual_seed(1))
    close(logits(trainer, shown[order])[order.argsort()], whole)
    close(logits(trainer, shown[:11]), whole[:11])
    assert torch.equal(logits(trainer, shown[:11]).argmax(1), whole[:11].argmax(1))


@torch.no_grad()
def test_classes_not_met_yet_are_scored_by_the_newest_words():
    model = learned(2).learner.model.eval()
    features, _ = model.features(Batch(images()))
    seen = model.head.preview(["dog"])
    assert seen(features).logits.shape == (7, 7)
    close(seen(features).logits[:, :6], model.head(features).logits)
    close(seen(features).logits[:, 6], 20 * F.normalize(features, dim=-1) @ seen.texts([6])[0])


# ── what moves ───────────────────────────────────────────────────────────────────────────────────────


def test_a_task_trains_the_prompts_and_words_of_its_own():
    before, after = (kept(learned(tasks)) for tasks in (1, 2))
    assert moved(before, after) == {"prompts.values.0"}
    assert set(after) - set(before) == {"head.texts.contexts.1"}
    start = trainer_of(CLIPPGP(**SMALL), tiny_clip())
    start._begin(blobs().tasks[:1])
    assert moved(kept(start), before) == {"prompts.values.0", "head.texts.contexts.0"}


def test_with_a_share_of_nothing_prompts_move_as_they_like():
    free, held = kept(trainer_after(2, prompt_share=0.0)), kept(learned(2))
    assert moved(kept(trainer_after(1, prompt_share=0.0)), kept(learned(1))) == set()
    assert moved(free, held) >= {"prompts.values.0"}


@pytest.mark.parametrize("apply", ["step", "gradient"])
def test_a_second_task_moves_nothing_along_directions_of_the_first(apply):
    """Momentum stays outside of them, too; weight decay alone does not, where gradients are projected."""
    trainer = trainer_after(1, apply=apply, weight_decay=0.5)
    (protection,) = trainer.learner.protections
    (basis,) = protection.used[0]
    before = trainer.learner.model.prompts.values[0].detach().clone()
    trainer.learn(blobs().tasks[1])
    step = (trainer.learner.model.prompts.values[0].detach() - before).double()
    assert 0 < basis.shape[1] < 48 and step.norm() > 1e-3
    inside = (step @ basis).norm() / step.norm()
    assert inside < 1e-5 if apply == "step" else inside > 1e-3


@torch.no_grad()
def test_what_is_kept_of_old_images_is_what_the_norm_before_block_0_makes_of_tokens_and_prompts():
    """Both times its weights once more: so much of a step before the norm comes through it."""
    trainer = learned(1)
    (protection,), side = trainer.learner.protections, clip().visual
    x = side.conv1(old_images(trainer)).flatten(2).transpose(1, 2)
    x = torch.cat([side.class_embedding.expand(len(x), 1, -1), x], 1) + side.positional_embedding
    rows = side.ln_pre(torch.cat([x.flatten(0, 1), trainer.learner.model.prompts.values[0]]))
    assert side.ln_pre.weight.std() > 0.05
    rows = (rows * side.ln_pre.weight).double()
    close(protection.moments[0][0], rows.mT @ rows)
    without = tiny_clip()
    without.first = torch.nn.Identity()
    assert CLIPPGP().build(without).protections[0].scale is None


@torch.no_grad()
def test_a_small_held_step_moves_old_products_far_less_than_a_free_one():
    """Products of old tokens at block 0 with prompts as they enter it, each step of the same length."""
    trainer = learned(1)
    (protection,), side = trainer.learner.protections, clip().visual
    (mapping,) = protection.projections().values()
    values = trainer.learner.model.prompts.values[0].detach()
    tokens, _ = trainer.learner.model.tower.embed(old_images(trainer))
    free = torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
    felt = []
    for step in (free, mapping(free)):
        step = 1e-3 * step / step.norm()
        felt.append(((side.ln_pre(values + step) - side.ln_pre(values)) @ tokens.flatten(0, 1).T).norm())
    assert felt[1] < 0.6 * felt[0]


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────


def test_defaults_are_those_of_the_released_code():
    settings = CLIPPGP()
    assert settings.model_dump() == {
        "negatives": "task", "memory": 0, "memory_total": 0, "choose": "random",
        "balance": 0, "epochs": 5, "batch_size": 32, "lr": 0.01, "momentum": 0.9,
        "names": {}, "length": 10, "context": 16, "prompt_share": 0.9, "apply": "step", "weight_decay": 2e-4,
        "first_lr": 0.001, "first_weight_decay": 5e-4,
    }  # fmt: skip
    learner = settings.build(tiny_clip())
    found = []
    for task in blobs().tasks:
        (phase,) = learner.phases(task)
        (group,) = phase.optimizer([torch.nn.Parameter(torch.zeros(2))]).param_groups
        found.append((group["lr"], group["weight_decay"], group["momentum"], phase.classes, phase.epochs))
    assert found == [(0.001, 5e-4, 0.9, "task", 5), (0.01, 2e-4, 0.9, "task", 5)]
    factors = [phase.schedule(progress) for progress in (0.0, 0.19, 0.2, 0.39, 0.8, 0.99)]
    assert factors == pytest.approx([1, 1, 0.904508, 0.904508, 0.095492, 0.095492], abs=1e-6)


def test_with_a_memory_old_images_and_their_classes_take_part():
    learner = CLIPPGP(memory=2).build(tiny_clip())
    (phase,) = learner.phases(blobs().tasks[1])
    assert (phase.classes, phase.data, learner.model.head.negatives) == ("seen", "task+memory", "seen")
    assert str(learner.memory) == "2 per class, random"
