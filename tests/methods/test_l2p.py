"""L2P: an image takes its own prompts, the head reads them, keys follow the queries. 27 images, N 17, D 24, L 3."""

from functools import cache

import pytest
import torch
from torch.nn import functional as F

from lamina.backbones.timm_vit import TimmTower
from lamina.data.stream import Task
from lamina.errors import ConfigError
from lamina.heads.linear import LinearHead
from lamina.heads.statistics import Discriminant
from lamina.methods.l2p import L2P
from lamina.model import Batch
from lamina.prompts.pool import PromptPool
from lamina.schedules import constant
from lamina.training.objective import classify
from tests.conftest import make_tiny_vit
from tests.streams import blobs, trainer_of

SMALL = {"size": 6, "top": 2, "length": 3, "epochs": 2, "batch_size": 5}
TASK = Task(0, ["a", "b"], [0, 1], None, None)
#: of six classes that look different
IMAGES = torch.stack([task.test.images.image(int(i)) for task in blobs() for i in task.test.indices])[::2] / 64 - 2


@cache
def learned(**changes):
    trainer = trainer_of(L2P(**{**SMALL, **changes}), make_tiny_vit())
    trainer.run(blobs())
    return trainer.learner.model.eval()


def built(tower, **changes):
    model = L2P(**{**SMALL, **changes}).build(tower).model
    model.begin_task(TASK)
    return model


@torch.no_grad()
def logits_of(model, images):
    return model(Batch(images)).logits


# ── pins ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_defaults_are_those_of_the_ports():
    """A pool of 10, 5 of 5 tokens each; weight 0.1; Adam at 0.03 * 16 / 256, constant; norm 1; no temperature."""
    settings = L2P()
    assert (settings.size, settings.top, settings.length, settings.pull) == (10, 5, 5, 0.1)
    assert (settings.selection, settings.position, settings.readout) == ("image", "class", "prompts")
    (phase,) = settings.phases(TASK)
    assert (phase.epochs, phase.batch_size, phase.classes, phase.temperature) == (5, 16, "task", 1.0)
    assert (phase.clip_norm, phase.schedule, phase.repeat, phase.draws) == (1.0, constant, 1, 0)
    optimizer = phase.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.Adam
    assert {"lr": 0.03 * 16 / 256, "betas": (0.9, 0.999), "weight_decay": 0}.items() <= optimizer.defaults.items()


def test_as_many_numbers_are_learned_as_in_the_ports():
    """M * L * D + M * D + (D + 1) * C, at the width of a ViT-B/16 and 200 classes."""
    tower = TimmTower.create("vit_base_patch16_224", img_size=32, depth=1)
    model = L2P().build(tower).model
    model.begin_task(Task(0, [str(c) for c in range(200)], list(range(200)), None, None))
    assert sum(value.numel() for value in model.learned().values()) == 199_880


def test_a_picture_of_224_pixels_enters_as_197_tokens_and_25_of_prompts():
    tower = TimmTower.create("vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=2)
    model, seen = built(tower, size=10, top=5, length=5), []
    model.look(Batch(torch.randn(1, 3, 224, 224)), tap=lambda probe: seen.append(tuple(probe.to_prompts.shape)))
    assert seen == [(1, 2, 197, 25)] * 2


def test_settings_reach_the_plan():
    (phase,) = L2P(epochs=3, batch_size=7, lr=0.5, clip_norm=0.0, temperature=2.0).phases(TASK)
    assert (phase.epochs, phase.batch_size, phase.clip_norm, phase.temperature) == (3, 7, None, 2.0)
    assert phase.optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"] == 0.5


# ── promises ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_step_is_adam_on_the_clipped_gradient_of_loss_and_pull():
    """Three epochs of one batch: the loop by hand, from the definition, on the batches of the feed."""
    settings = L2P(**{**SMALL, "epochs": 3, "batch_size": 27, "pull": 0.7, "clip_norm": 0.2, "lr": 0.02})
    trainer, task = trainer_of(settings, make_tiny_vit()), blobs().tasks[0]
    again = trainer_of(settings, make_tiny_vit())
    again._begin([task])
    model = again.learner.model
    pool, layer, tower = model.prompts, model.head.blocks[0], model.tower
    trained = [pool.values, pool.keys, layer.weight, layer.bias]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    for fed in again.feed.train(task, 0, settings.phases(task)[0], 0):
        with torch.no_grad():
            query = tower(fed.batch.images).features
        cosines = F.cosine_similarity(query[:, None], pool.keys[None], dim=-1)
        chosen = cosines.topk(2).indices
        tokens = pool.values[chosen].flatten(1, 2) + tower.model.pos_embed[0, 0]
        x = torch.cat([tower.embed(fed.batch.images)[0], tokens], 1)
        for block in tower.model.blocks:
            x = block(x)
        logits = layer(tower.model.norm(x)[:, -6:].mean(1))
        loss = F.cross_entropy(logits, fed.batch.labels) - 0.7 * cosines.gather(1, chosen).sum() / 27
        optimizer.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(trained, 0.2) > 0.2
        optimizer.step()
    trainer.learn(task)
    for name, value in trainer.learner.model.learned().items():
        torch.testing.assert_close(value, model.learned()[name], rtol=1e-3, atol=1e-4)


def test_a_prediction_is_the_same_alone_and_in_any_batch():
    model = learned()
    whole = logits_of(model, IMAGES)
    assert len(model.look(Batch(IMAGES))[1].chosen.sort().values.unique(dim=0)) > 1
    for parts in ([image[None] for image in IMAGES], IMAGES.split(4)):
        logits = torch.cat([logits_of(model, part) for part in parts])
        assert (logits - whole).abs().max() <= 1e-4 and torch.equal(logits.argmax(-1), whole.argmax(-1))


def test_with_a_vote_a_prediction_depends_on_its_batch_as_the_setting_says():
    model = learned(selection="batch", size=40)
    together, alone = logits_of(model, IMAGES), torch.cat([logits_of(model, image[None]) for image in IMAGES])
    assert (together - alone).abs().max() > 1e-2
    assert model.look(Batch(IMAGES))[1].chosen.unique(dim=0).shape == (1, 2)
    assert "transductive" in L2P.model_fields["selection"].description


def test_the_classification_loss_moves_no_key_and_no_prompt_that_was_not_taken(tiny_vit):
    model, labels = built(tiny_vit), torch.tensor([0, 1])
    output = model(Batch(IMAGES[:2], labels))
    F.cross_entropy(output.logits, labels).backward()
    taken = model.look(Batch(IMAGES[:2]))[1].chosen.unique().tolist()
    assert model.prompts.keys.grad is None and len(taken) < 6
    assert model.prompts.values.grad.abs().sum((1, 2)).nonzero().flatten().tolist() == taken


def test_columns_of_other_tasks_are_not_in_the_loss_and_do_not_move():
    settings, stream = L2P(**SMALL), blobs()
    trainer = trainer_of(settings, make_tiny_vit())
    trainer.learn(stream.tasks[0])
    old = trainer.learner.model.head.blocks[0]
    before = {name: value.clone() for name, value in old.state_dict().items()}
    trainer.learn(stream.tasks[1])
    assert all(torch.equal(value, before[name]) for name, value in old.state_dict().items())
    logits, labels = torch.randn(7, 6, requires_grad=True), torch.tensor([3, 4, 5, 5, 4, 3, 3])
    loss = classify(logits, labels, stream.tasks[1], settings.phases(stream.tasks[1])[0])
    masked = logits.detach().clone()
    masked[:, :3] = float("-inf")
    assert (loss - F.cross_entropy(masked, labels)).abs() <= 1e-6
    loss.backward()
    assert logits.grad[:, :3].abs().max() == 0 < logits.grad[:, 3:].abs().min()


def test_the_head_reads_the_mean_of_the_prompts_or_the_class_token(tiny_vit):
    images = Batch(IMAGES)
    for readout in ("prompts", "backbone"):
        model = built(tiny_vit, readout=readout)
        encoded, _ = model.look(images)
        read = encoded.prompts.mean(1) if readout == "prompts" else encoded.features
        torch.testing.assert_close(model.features(images)[0], read)


@pytest.mark.parametrize("none", [{"top": 0}, {"length": 0}])
def test_without_prompts_the_class_token_is_that_of_the_plain_tower(tiny_vit, none):
    model = built(tiny_vit, readout="backbone", **none)
    with torch.no_grad():
        read = model.features(Batch(IMAGES))[0]
    torch.testing.assert_close(read, tiny_vit(IMAGES).features, rtol=1e-5, atol=1e-5)


def test_class_statistics_work_under_it():
    head = learned(head="statistics").head
    assert type(head) is Discriminant and type(head.trained) is LinearHead and head.seen.counts.tolist() == [9] * 6
    assert L2P(head="statistics").phases(Task(0, ["a"], [0], None, None)) == []


# ── the place of prompts ─────────────────────────────────────────────────────────────────────────────


def test_prompts_get_the_position_of_the_class_token_and_keep_no_copy_in_what_is_learned(tiny_vit):
    model = built(tiny_vit)
    entered = tiny_vit.embed(IMAGES)[0][:, 0]
    assert torch.allclose(entered - tiny_vit.model.cls_token[0, 0], model.prompts.position.expand(11, -1), atol=1e-6)
    assert {name for name in model.learned() if name.startswith("prompts.")} == {"prompts.values", "prompts.keys"}
    assert built(tiny_vit, position="none").prompts.position is None


@pytest.mark.parametrize(
    "kind", [{"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}, {"pre_norm": True}]
)
def test_a_backbone_whose_class_token_has_no_position_is_refused_until_prompts_get_none(kind):
    tower = TimmTower.create(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, **kind
    )
    with pytest.raises(ConfigError) as error:
        L2P(**SMALL).build(tower)
    assert str(error.value) == (
        'position="class" needs a backbone whose class token enters block 0 with a learned position added to it; this '
        'TimmTower has none: set position="none"'
    )
    assert logits_of(built(tower, position="none"), IMAGES).shape == (11, 2)


def test_more_prompts_than_there_are_cannot_be_taken():
    with pytest.raises(ConfigError) as error:
        L2P(size=4, top=5)
    assert str(error.value) == "top must be at most size, the prompts in the pool; got top=5, size=4: lower top"
    assert isinstance(L2P(size=5, top=5).build(make_tiny_vit()).model.prompts, PromptPool)
