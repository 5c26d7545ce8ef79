"""CPrompt: what the method promises. 27 training and 11 test images a task, M 3 prompt tokens, D 24."""

import copy

import pytest
import timm
import torch
from torch.nn import functional as F

from lamina.backbones.timm_vit import TimmTower
from lamina.data.stream import Task
from lamina.errors import ConfigError
from lamina.methods.cprompt import CPrompt
from lamina.model import Batch
from lamina.training.objective import classify
from tests.methods.states import images_of, kept, logits, moved
from tests.streams import blobs, trainer_of

SMALL = {"length": 3, "epochs": 1, "batch_size": 8}


def made(tower, **settings):
    return trainer_of(CPrompt(**SMALL | settings), tower)


def graded(trainer, task, terms):
    """Return who has a gradient after one batch, by the named ones of the losses."""
    model = trainer.learner.model
    model.zero_grad(set_to_none=True)
    (batch,) = trainer.feed.plain(task.train.some(6))
    output = model(batch, task.index)
    (phase,) = trainer.learner.phases(task)
    losses = {"classify": classify(output.logits, batch.targets, task, phase), **output.terms}
    torch.stack([losses[name] for name in terms]).sum().backward()
    return {name for name, part in model.named_parameters() if part.grad is not None and part.grad.abs().max() > 0}


# ── promises ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_task_moves_what_is_its_own_and_nothing_else(tiny_vit):
    trainer, states = made(tiny_vit), []
    for task in blobs(tasks=3, per_task=3):
        trainer._begin([task])
        before = kept(trainer)
        trainer.learn(task)
        t = task.index
        own = {f"prompts.values.{t}", f"prompts.keys.{t}", f"head.blocks.{t}.weight", f"head.blocks.{t}.bias"}
        assert moved(before, kept(trainer)) == {*own, "head.auxiliary.weight", "head.auxiliary.bias"}
        if states:
            assert torch.equal(before[f"prompts.values.{t}"], states[-1][f"prompts.values.{t - 1}"])
            assert moved(states[-1], before) == {"head.auxiliary.weight"}  # made anew; biases begin at zero, below
            assert before["head.auxiliary.bias"].abs().max() == 0
        states.append(kept(trainer) | {"head.auxiliary.bias": torch.zeros(3)})


@pytest.mark.parametrize(
    ("terms", "parts"),
    [
        (["classify"], {"prompts.values.2", "head.blocks.2.weight", "head.blocks.2.bias"}),
        (["auxiliary"], {"prompts.values.2", "head.auxiliary.weight", "head.auxiliary.bias"}),
        (["smoothing"], {"prompts.values.2"}),
        (["keys"], {"prompts.keys.2"}),
    ],
)
def test_each_loss_reaches_its_own_parts(tiny_vit, terms, parts):
    trainer, stream = made(tiny_vit, flatness=3.0), blobs(tasks=3, per_task=3)
    trainer._begin(list(stream))
    assert graded(trainer, stream.tasks[2], terms) == parts


@pytest.mark.parametrize(("drawn", "reached"), [(0, False), (1, True)])
def test_drawn_prompts_learn_where_they_are_those_of_the_task(tiny_vit, monkeypatch, drawn, reached):
    trainer, stream = made(tiny_vit), blobs(tasks=2, per_task=3)
    trainer._begin(list(stream))
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.full(size, drawn))
    head = {"head.blocks.1.weight", "head.blocks.1.bias"}
    assert graded(trainer, stream.tasks[1], ["classify"]) == head | ({"prompts.values.1"} if reached else set())


def test_answers_depend_neither_on_the_size_of_a_batch_nor_on_the_order_of_images(tiny_vit):
    trainer, stream = made(tiny_vit), blobs(tasks=3, per_task=3)
    trainer.run(stream)
    images = images_of(trainer, stream)
    with torch.no_grad():
        assert len(trainer.learner.model.look(Batch(images))[1].chosen.unique()) > 1
    order = torch.randperm(len(images))
    whole = logits(trainer, images, 16)
    for other in (
        logits(trainer, images, 7),
        logits(trainer, images, 1),
        logits(trainer, images[order])[order.argsort()],
    ):
        torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-4)
        assert torch.equal(other.argmax(-1), whole.argmax(-1))


@pytest.mark.parametrize(("tasks", "per_task"), [(3, 1), (4, 2)])
def test_tasks_of_one_class_and_of_two_are_learned(tiny_vit, tasks, per_task):
    trainer, stream = made(tiny_vit), blobs(tasks=tasks, per_task=per_task)
    trainer.run(stream)
    assert logits(trainer, images_of(trainer, stream)).shape == (11 * tasks, tasks * per_task)
    assert all(value.isfinite().all() for value in kept(trainer).values())


def test_tasks_may_differ_in_size_and_classes_come_in_any_order(tiny_vit):
    """The stream of six classes in two tasks is cut anew: two classes, then four in another order."""
    stream, trainer = blobs(tasks=1, per_task=6, train=54), made(tiny_vit, epochs=3)
    whole = stream.tasks[0]
    columns = {4: 0, 1: 1, 5: 5, 0: 2, 3: 4, 2: 3}  # of the stream's classes
    tasks = []
    for index, classes in enumerate([[4, 1], [5, 0, 3, 2]]):
        splits = []
        for split in (whole.train, whole.test):
            chosen = [place for place, column in enumerate(split.columns) if column in classes]
            relabelled = [columns[int(split.columns[place])] for place in chosen]
            splits.append(type(split)(split.images, split.indices[chosen], split.columns[chosen] * 0 + relabelled))
        tasks.append(Task(index, [str(c) for c in classes], [columns[c] for c in classes], *splits))
    for task in tasks:
        trainer.learn(task)
    trainer.evaluate(tasks)
    assert [len(key) for key in trainer.learner.model.prompts.keys] == [2, 4]
    assert trainer.matrix_task_aware[0][1] > 0.6  # of four classes


def test_a_model_that_was_kept_learns_further_tasks_as_if_it_had_never_been_away(tiny_vit):
    stream = blobs(tasks=3, per_task=2)
    whole, first, later = (made(tiny_vit, keys_in_advance=3) for _ in range(3))
    for task in stream:
        whole.learn(task)
    for task in stream.tasks[:2]:
        first.learn(task)
    torch.manual_seed(4711)
    later = made(tiny_vit, keys_in_advance=3)
    later.adopt(stream.tasks[:2], kept(first), [])
    later.learn(stream.tasks[2])
    ours, theirs = kept(later), kept(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────


def test_classifier_and_keys_read_the_class_token_before_the_final_norm(tiny_vit):
    trainer, stream = made(tiny_vit), blobs(tasks=2, per_task=3)
    trainer.run(stream)
    with torch.no_grad():
        assert_class_tokens_are_read(trainer, tiny_vit.model, stream)


def assert_class_tokens_are_read(trainer, vit, stream):
    model, images = trainer.learner.model, images_of(trainer, stream)
    x = vit.blocks(vit._pos_embed(vit.patch_embed(images)))
    query = model.query(Batch(images))
    torch.testing.assert_close(query, x[:, 0], rtol=1e-6, atol=1e-6)
    chosen = model.look(Batch(images))[1].chosen[:, 0]
    prompts = torch.stack([value[0] for value in model.prompts.values])[chosen]
    x = torch.cat([vit._pos_embed(vit.patch_embed(images)), prompts], dim=1)
    features, _ = model.features(Batch(images))
    torch.testing.assert_close(features, vit.blocks(x)[:, 0], rtol=1e-5, atol=1e-6)
    assert (features - query).abs().max() > 0.01
    brought = torch.cat([batch.query for task in stream for batch in trainer.feed.plain(task.test)])
    torch.testing.assert_close(brought, query, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_tower_without_its_final_norm_shares_all_weights_and_is_cached_apart(pool):
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, global_pool=pool
    ).eval()
    images = torch.randn(5, 3, 32, 32)
    wanted = vit.forward_head(vit.forward_features(images), pre_logits=True)
    for norm in (vit.norm, vit.fc_norm):
        if isinstance(norm, torch.nn.LayerNorm):
            norm.weight.add_(torch.rand(24))  # a norm that changes more than length and mean
            last = norm
    wanted = vit.forward_head(vit.forward_features(images), pre_logits=True)
    tower = TimmTower(copy.deepcopy(vit))
    bare = tower.unnormed()
    assert (tower.normed, bare.normed) == (True, False) and bare.fingerprint != tower.fingerprint
    assert all(ours is theirs for ours, theirs in zip(bare.parameters(), tower.parameters(), strict=True))
    features = bare(images).features
    torch.testing.assert_close(last(features), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tower(images).features, wanted, rtol=1e-5, atol=1e-5)
    assert (features - wanted).abs().max() > 0.01


@torch.no_grad()
def test_at_full_size_blocks_see_247_tokens_and_then_297():
    """197 tokens of a picture of 224 pixels, 50 prompt tokens at block 0 and 50 more at block 5."""
    tower = TimmTower.create("vit_tiny_patch16_224", embed_dim=24, num_heads=2)
    model = CPrompt().build(tower).model.eval()
    model.begin_task(blobs(tasks=1).tasks[0])
    seen = []
    model.features(
        Batch(torch.randn(1, 3, 224, 224)),
        tap=lambda probe: seen.append(probe.inputs.shape[1] + probe.to_prompts.shape[3]),
    )
    assert seen == [247] * 5 + [297] * 7


# ── the plan and the parts ───────────────────────────────────────────────────────────────────────────


def test_the_defaults_are_the_published_ones():
    settings = CPrompt()
    assert (settings.length, settings.smoothing, settings.flatness, settings.margin) == (50, 1.0, 1.2, 0.0)
    assert (settings.epochs, settings.batch_size, settings.lr) == (18, 16, 0.01)
    assert (settings.momentum, settings.weight_decay) == (0.9, 5e-4)


def test_the_plan_is_gradient_descent_along_a_cosine_and_the_tasks_own_classes():
    (phase,) = CPrompt(lr=0.25, weight_decay=0.125, momentum=0.5).phases(blobs(tasks=1).tasks[0])
    optimizer = phase.optimizer([torch.nn.Parameter(torch.zeros(2))])
    assert type(optimizer) is torch.optim.SGD and not optimizer.defaults["nesterov"]
    assert [optimizer.defaults[name] for name in ("lr", "weight_decay", "momentum")] == [0.25, 0.125, 0.5]
    assert (phase.classes, phase.clip_norm, phase.temperature) == ("task", None, 1.0)
    assert [round(phase.schedule(progress), 6) for progress in (0.0, 0.5, 1.0)] == [1.0, 0.5, 0.0]


def test_settings_reach_the_parts(tiny_vit):
    settings = CPrompt(length=4, blocks=[2, 1], keys_in_advance=7, smoothing=0.5, flatness=1.5, margin=0.25)
    model = settings.build(tiny_vit).model
    model.begin_task(blobs(tasks=1, per_task=3).tasks[0])
    assert model.prompts.layers == [1, 2] and model.prompts.values[0].shape == (2, 4, 24)
    assert model.prompts.reserve.shape == (7, 24) and model.prompts.keys[0].shape == (3, 24)
    assert (model.head.weight, model.head.flatness, model.head.margin) == (0.5, 1.5, 0.25)
    assert CPrompt().build(tiny_vit).model.prompts.layers == [0]


def test_a_smoothing_of_weight_zero_weighs_nothing(tiny_vit):
    trainer, stream = made(tiny_vit, smoothing=0.0), blobs(tasks=2, per_task=3)
    trainer._begin(list(stream))
    assert graded(trainer, stream.tasks[1], ["smoothing"]) == set()


def test_a_block_that_the_backbone_has_not_is_refused_before_any_training(tiny_vit):
    with pytest.raises(ConfigError) as error:
        CPrompt(blocks=[1, 3]).build(tiny_vit)
    assert str(error.value) == "CPrompt.blocks must name different blocks of the backbone, from 0 to 2; got [1, 3]"


def test_the_loss_in_training_is_the_sum_of_four_cross_entropies(tiny_vit):
    """Against two passes by hand, with the same draws."""
    trainer, stream = made(tiny_vit, flatness=2.0), blobs(tasks=2, per_task=3)
    for task in stream:
        trainer.learn(task)
    with torch.no_grad():
        assert_losses_are_those_by_hand(trainer, stream.tasks[1])


def assert_losses_are_those_by_hand(trainer, task):
    model = trainer.learner.model
    (batch,) = trainer.feed.plain(task.train.some(6))
    torch.manual_seed(5)
    output = model(batch, 1)
    torch.manual_seed(5)
    drawn = torch.randint(2, (6,))
    assert set(drawn.tolist()) == {0, 1}

    def features(tasks):
        started = model.prompts.start(torch.stack([model.prompts.keys[int(t)][0] for t in tasks]))
        return model.tower(batch.images, started).features

    own, other, local = features([1] * 6), features(drawn), batch.targets - 3
    keys = F.normalize(torch.cat(list(model.prompts.keys)), dim=-1)
    old, new = model.head.blocks[0](own), model.head.blocks[1](own)
    tau = torch.where(new.amax(-1) > old.amax(-1), 1.0, 2.0)[:, None]
    expected = {
        "keys": F.cross_entropy(F.normalize(model.query(batch), dim=-1) @ keys.T, batch.targets),
        "auxiliary": F.cross_entropy(model.head.auxiliary(own), local),
        "smoothing": F.cross_entropy(old, (old / tau).softmax(-1)),
    }
    torch.testing.assert_close(dict(output.terms), expected, rtol=1e-4, atol=1e-5)
    (phase,) = trainer.learner.phases(task)
    by_hand = F.cross_entropy(model.head.blocks[1](other), local)
    torch.testing.assert_close(classify(output.logits, batch.targets, task, phase), by_hand, rtol=1e-4, atol=1e-5)
