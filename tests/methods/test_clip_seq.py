"""CLIP-Seq and its head: prompts in the first blocks of CLIP's image tower; B 7, N 17, D 48, L 3, F 24.

M 5 prompt tokens, 2 blocks with prompts, 3 classes a task, 27 images, 2 templates.
"""

from functools import cache

import pytest
import torch
from torch.nn import functional as F

from lamina.errors import ConfigError
from lamina.heads.projected import ProjectedTextHead
from lamina.heads.text import TextHead
from lamina.heads.texts import HandTexts
from lamina.learner import decaying
from lamina.methods.clip_seq import CLIPSeq
from lamina.methods.zero_shot import ZeroShot
from lamina.model import Batch
from tests.backbones.clips import clip, close, images, tiny_clip
from tests.conftest import make_tiny_vit
from tests.methods.states import kept, moved
from tests.streams import blobs, trainer_of

TEMPLATES = ["a photo of a {}.", "the {}, small"]
SMALL = {"length": 5, "blocks": 2, "epochs": 2, "batch_size": 9, "templates": TEMPLATES, "lr": 0.01}
SMALL |= {"refine_epochs": 3, "refine_draws": 7}
PROJECTION = {"head.projection.weight", "head.projection.bias"}
GAUSSIANS = {"head.counts", "head.means", "head.scatters"}


def settings(**changes):
    return CLIPSeq(**{**SMALL, **changes})


def trainer_after(tasks, tower=None, **changes):
    trainer = trainer_of(settings(**changes), tower or tiny_clip())
    for task in blobs().tasks[:tasks]:
        trainer.learn(task)
    return trainer


@cache
def learned(refine=False):
    """A trainer that has learned two tasks; nobody changes it."""
    return trainer_after(2, refine=refine)


@torch.no_grad()
def said(trainer, shown=None):
    return trainer.learner.model.eval()(Batch(images() if shown is None else shown)).logits


# ── what the image tower makes of prompts ────────────────────────────────────────────────────────────


@torch.no_grad()
def plain_loop(values):
    """What open_clip's own blocks say of images where prompts stand behind the sequence and are cut off again."""
    side = clip().visual
    x = side.conv1(images()).flatten(2).transpose(1, 2)
    x = torch.cat([side.class_embedding.expand(len(x), 1, -1), x], 1) + side.positional_embedding
    x = side.ln_pre(x)
    for number, block in enumerate(side.transformer.resblocks):
        joined = x if number not in values else torch.cat([x, values[number].expand(len(x), -1, -1)], 1)
        h = block.ln_1(joined)
        x = x + block.attn(h, h, h, need_weights=False)[0][:, :17]
        x = x + block.mlp(block.ln_2(x))
    return side.ln_post(x[:, 0]) @ side.proj


@pytest.mark.parametrize("refine", [False, True])
def test_scores_are_scaled_cosines_of_templates_and_of_what_the_blocks_make_of_prompts(refine):
    trainer = trainer_of(settings(refine=refine), tiny_clip())
    trainer.learner.model.begin_task(blobs().tasks[0])
    head, prompts = trainer.learner.model.head, trainer.learner.model.prompts
    assert list(prompts.layers) == [0, 1] and prompts.value(1).shape == (5, 48)
    expected = plain_loop({i: prompts.value(i) for i in prompts.layers})
    assert (expected - plain_loop({})).abs().max() > 0.1
    close(said(trainer), 20 * F.normalize(expected, dim=-1) @ head.texts().mT)


@pytest.mark.parametrize("refine", [False, True])
def test_without_prompts_it_is_zero_shot(refine):
    ours, theirs = settings(length=0, refine=refine), ZeroShot(templates=TEMPLATES)
    models = [trainer_of(each, tiny_clip()) for each in (ours, theirs)]
    for trainer in models:
        trainer.learner.model.begin_task(blobs().tasks[0])
    close(said(models[0]), said(models[1]))


def test_a_tower_with_fewer_blocks_has_prompts_in_all_of_them():
    assert list(settings(blocks=4).build(tiny_clip()).model.prompts.layers) == [0, 1, 2]


def test_classes_not_met_yet_are_scored_by_their_names():
    for refine in (False, True):
        model = learned(refine).learner.model.eval()
        seen = model.head.preview(["dog", "lawn_mower"])
        features, _ = model.features(Batch(images()))
        with torch.no_grad():
            logits = seen(features).logits
            close(logits[:, :6], model.head(features).logits)
            read = model.head.projection(features) if refine else features
            close(logits[:, 6:], model.head.scale * F.normalize(read, dim=-1) @ seen.texts([6, 7]).mT)


# ── what is learned ──────────────────────────────────────────────────────────────────────────────────


def test_prompts_and_the_scale_learn_and_nothing_else():
    trainer = trainer_of(settings(), tiny_clip())
    trainer.learner.model.begin_task(blobs().tasks[0])
    before = {name: value.clone() for name, value in trainer.learner.model.state_dict().items()}
    trainer.learn(blobs().tasks[0])
    after = trainer.learner.model.state_dict()
    assert moved(before, after) == {"prompts.values.0", "prompts.values.1", "head.log_scale"}
    head = trainer.learner.model.head
    assert not head.texts().requires_grad and head.scale <= 100
    assert all(p.grad is None for p in [*head.texts.parameters(), *trainer.learner.model.tower.parameters()])


def test_a_task_goes_on_from_the_prompts_of_the_last():
    first, second = (kept(trainer_after(tasks)) for tasks in (1, 2))
    assert moved(first, second) == set(first) == {"prompts.values.0", "prompts.values.1", "head.log_scale"}


@pytest.mark.parametrize("memory", [0, 2])
def test_classes_of_the_task_compete_alone_but_with_old_images(memory):
    trainer = trainer_of(settings(memory=memory), tiny_clip())
    (phase,) = trainer.learner.phases(blobs().tasks[1])
    assert (phase.classes, phase.data) == (("seen", "task+memory") if memory else ("task", "task"))
    assert str(trainer.learner.memory) == ("2 per class, random" if memory else "None")


def test_a_task_of_a_single_class_moves_nothing():
    plan = settings(refine=True).build(tiny_clip())
    first, second = blobs(tasks=2, per_task=1).tasks
    assert [len(plan.phases(task)) for task in (first, second)] == [0, 0]
    assert [len(plan.refine(task)) for task in (first, second)] == [0, 1]


def test_decay_wears_matrices_down_and_spares_rows_and_numbers():
    matrix, row, number = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (4,), ()))
    optimizer = decaying(torch.optim.SGD, 0.5, lr=0.1)([matrix, row, number])
    (matrix.sum() * 0 + row.sum() * 0 + number * 0).backward()
    optimizer.step()
    assert matrix.detach().unique().tolist() == [pytest.approx(0.95)] and row.sum() == 4 and number == 1


# ── the projection that is balanced ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tasks", [1, 2])
def test_balancing_moves_the_projection_alone(tasks):
    """It starts from the backbone's; the prompts of the first task are those without it."""
    trainer = trainer_of(settings(refine=True), tiny_clip())
    trainer.learner.model.begin_task(blobs().tasks[0])
    projection = trainer.learner.model.head.projection
    assert torch.equal(projection.weight, clip().visual.proj.T) and not projection.bias.any()
    assert not projection.weight.requires_grad
    for task in blobs().tasks[:tasks]:
        trainer.learn(task)
    bare = trainer_of(settings(refine=True), tiny_clip())
    bare.learner.refine = lambda task: []
    for task in blobs().tasks[:tasks]:
        bare.learn(task)
    found = moved(kept(bare), kept(trainer))
    assert found >= PROJECTION and (found == PROJECTION) == (tasks == 1)
    assert not projection.weight.requires_grad and trainer.learner.model.head.log_scale.requires_grad


def test_draws_stand_for_features_before_the_projection_of_all_classes_met():
    trainer = learned(refine=True)
    model = trainer.learner.model
    assert {name for name in kept(trainer) if "prompts" not in name} == PROJECTION | GAUSSIANS | {"head.log_scale"}
    assert model.width == 48 and model.head.counts.tolist() == [9] * 6
    features, columns = model.head.draws(4, 0, "here")
    assert features.shape == (24, 48) and columns.tolist() == [c for c in range(6) for _ in range(4)]
    task = blobs().tasks[1]
    shown = torch.cat([batch.images for batch in trainer.feed.plain(task.train)])
    with torch.no_grad():
        read = model.features(Batch(shown))[0][torch.from_numpy(task.train.columns) == 4]
    close(model.head.means[4].float(), read.mean(0))  # of the newest classes: old ones are as they were


def test_it_draws_over_all_classes_by_the_authors_numbers():
    (phase,) = CLIPSeq(refine=True).build(tiny_clip()).refine(blobs().tasks[1])
    assert (phase.epochs, phase.draws, phase.batch_size, phase.classes, phase.data) == (50, 256, 256, "seen", "task")
    weight, bias = torch.nn.Linear(3, 2).parameters()
    groups = phase.optimizer([weight, bias]).param_groups
    assert [(group["weight_decay"], group["lr"], group["momentum"], group["nesterov"]) for group in groups] == [
        (1e-4, 1e-3, 0.9, True), (0.0, 1e-3, 0.9, True),
    ]  # fmt: skip


def test_a_projection_starts_as_the_identity_where_the_tower_has_none():
    tower = make_tiny_vit()
    bare, projection = tower.unprojected()
    assert bare is tower and projection is None
    head = ProjectedTextHead(HandTexts(tiny_clip().text, TEMPLATES), 24, None)
    assert torch.equal(head.projection.weight, torch.eye(24)) and not head.projection.bias.any()


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────


def test_defaults_are_the_authors():
    assert CLIPSeq().model_dump() == {
        "length": 4, "blocks": 4, "templates": "cifar", "names": {}, "memory": 0, "epochs": 20, "batch_size": 220,
        "lr": 0.001, "weight_decay": 5e-5, "refine": False, "refine_epochs": 50, "refine_draws": 256,
    }  # fmt: skip
    learner = CLIPSeq().build(tiny_clip())
    (phase,) = learner.phases(blobs().tasks[0])
    factors = [phase.schedule(epoch / 10) for epoch in range(10)]
    assert factors == pytest.approx([1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])
    assert isinstance(phase.optimizer([torch.nn.Parameter(torch.zeros(2, 2))]), torch.optim.Adam)
    assert type(learner.model.head) is TextHead and len(learner.model.head.texts.templates) == 18
    bound = max(float(p.detach().abs().max()) for p in learner.model.prompts.parameters())
    assert 0.9 < bound <= 1


def test_settings_that_change_nothing_are_known():
    assert CLIPSeq().idle() == dict.fromkeys(("refine_epochs", "refine_draws"), "with refine=false")
    assert CLIPSeq(refine=True).idle() == {}


def test_a_tower_without_texts_is_refused():
    with pytest.raises(ConfigError) as error:
        CLIPSeq().build(make_tiny_vit())
    assert str(error.value) == (
        "clip-seq reads the names of classes, and this backbone has no text tower; take one of CLIP: lamina:clip-nano, "
        "or open_clip:MODEL:TAG"
    )
