"""L2P++: an image takes its own prefixes, keys follow their own queries. 27 images, 3 classes a task, D 24, L 3."""

from functools import cache

import pytest
import torch
from torch.nn import functional as F

from lamina.backbones.timm_vit import TimmTower
from lamina.data.stream import Task
from lamina.errors import ConfigError
from lamina.methods.l2p_pp import L2PPP
from lamina.model import Batch
from lamina.prompts.prefix_pool import PrefixPool
from lamina.training.objective import classify
from tests.conftest import make_tiny_vit
from tests.methods.states import images_of, kept, logits, moved
from tests.streams import blobs, trainer_of

SMALL = {"size": 6, "top": 2, "length": 4, "blocks": [0, 2], "epochs": 2, "batch_size": 8, "lr": 0.02}
TASK = Task(0, ["a", "b"], [0, 1], None, None)


def made(tower=None, **settings):
    return trainer_of(L2PPP(**SMALL | settings), tower or make_tiny_vit())


@cache
def learned(**settings):
    """A trainer that ran two tasks, and the test images of both; nobody changes them."""
    trainer, stream = made(**settings), blobs()
    trainer.run(stream)
    return trainer, images_of(trainer, stream)


# ── pins ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_defaults_are_those_of_the_released_comparison():
    """A pool of 30 at block 0, 5 of 10 rows each; Adam at 0.001 along a cosine, 20 passes in batches of 128."""
    settings = L2PPP()
    assert (settings.size, settings.top, settings.length, settings.blocks) == (30, 5, 10, [0])
    assert (settings.pull, settings.parity, settings.head, settings.layers) == (1.0, "paper", "linear", 1)
    (phase,) = settings.phases(TASK)
    assert (phase.epochs, phase.batch_size, phase.classes, phase.temperature) == (20, 128, "task", 1.0)
    assert (phase.clip_norm, phase.repeat, phase.draws) == (None, 1, 0)
    optimizer = phase.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.Adam
    assert {"lr": 0.001, "betas": (0.9, 0.999), "weight_decay": 0}.items() <= optimizer.defaults.items()
    rates = [round(phase.schedule(epoch / 20), 4) for epoch in (0, 1, 18, 19)]
    assert rates == [1.0, 0.9967, 0.0974, 0.0157]


@pytest.mark.parametrize(("blocks", "numbers"), [([0], 637_640), ([0, 1, 2, 3, 4], 2_573_000)])
def test_as_many_numbers_are_learned_as_in_the_released_comparison(blocks, numbers):
    """(20 rows + a key) x 30 x 768 at each block, and 769 x 200 in the classifier."""
    model = L2PPP(blocks=blocks).build(TimmTower.create("vit_base_patch16_224", img_size=32, depth=5)).model
    model.begin_task(Task(0, [str(c) for c in range(200)], list(range(200)), None, None))
    assert sum(value.numel() for value in model.learned().values()) == numbers


def test_a_picture_of_224_pixels_is_197_tokens_at_every_block_and_sees_50_rows_more_where_there_is_a_pool():
    tower = TimmTower.create("vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=2)
    model, seen = L2PPP().build(tower).model, []
    model.look(Batch(torch.randn(1, 3, 224, 224)), tap=lambda probe: seen.append(tuple(probe.to_prompts.shape)))
    assert seen == [(1, 2, 197, 50), (1, 2, 197, 0)]


# ── promises ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("parity", ["paper", "official"])
def test_a_step_is_adam_on_the_classification_loss_and_the_pull(parity):
    """Three epochs of one batch: the loop by hand, from the definition, on the batches of the feed."""
    changes = {"epochs": 3, "batch_size": 27, "pull": 0.7, "parity": parity}
    settings, task = L2PPP(**SMALL | changes), blobs().tasks[0]
    trainer, again = made(**changes), made(**changes)
    again._begin([task])
    model = again.learner.model
    pool, layer, tower = model.prompts, model.head.blocks[0], model.tower
    optimizer = torch.optim.Adam([pool.values, pool.keys, layer.weight, layer.bias])
    (phase,) = settings.phases(task)
    for epoch, fed in enumerate(again.feed.train(task, 0, phase, 0)):
        optimizer.param_groups[0]["lr"] = 0.02 * phase.schedule(epoch / 3)
        with torch.no_grad():
            query = tower(fed.batch.images).features
        x, pulled = tower.embed(fed.batch.images)[0], 0.0
        for number, block in enumerate(tower.model.blocks):
            keys = values = x.new_zeros(27, 0, 24)
            if number in (0, 2):
                cosines = F.cosine_similarity(query[:, None], pool.keys[number // 2][None], dim=-1)
                chosen = cosines.topk(2).indices
                keys, values = (pool.values[number // 2, chosen, half].flatten(1, 2) for half in (0, 1))
                if parity == "paper":
                    pulled = pulled + cosines.gather(1, chosen).sum() / 27
                else:
                    pulled = pulled + cosines[:, chosen].sum()
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
            k, v = (
                torch.cat([own, more.unflatten(-1, (2, 12)).transpose(1, 2)], 2)
                for own, more in ((k, keys), (v, values))
            )
            x = x + block.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        loss = F.cross_entropy(layer(tower.model.norm(x)[:, 0]), fed.batch.labels) - 0.7 * pulled
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trainer.learn(task)
    assert torch.unique(trainer.learner.model.prompts.start(query).chosen, dim=0).shape[0] > 1
    for name, value in trainer.learner.model.learned().items():
        torch.testing.assert_close(value, model.learned()[name], rtol=1e-3, atol=1e-4)


def test_the_released_pull_changes_what_keys_learn_in_a_step_and_nothing_else():
    ways = [made(parity=parity, epochs=1, batch_size=27) for parity in ("paper", "official")]
    for trainer in ways:
        trainer.learn(blobs().tasks[0])
    ours, theirs = map(kept, ways)
    assert moved(ours, theirs) == {"prompts.keys"}


@pytest.mark.parametrize("parity", ["paper", "official"])
def test_answers_depend_neither_on_the_size_of_a_batch_nor_on_the_order_of_images(parity):
    trainer, images = learned(parity=parity)
    model = trainer.learner.model
    assert not model.transductive and len(model.look(Batch(images))[1].chosen.sort().values.unique(dim=0)) > 1
    order, whole = torch.randperm(len(images)), logits(trainer, images)
    for other in (
        logits(trainer, images, 1),
        logits(trainer, images, 7),
        logits(trainer, images[order])[order.argsort()],
    ):
        assert (other - whole).abs().max() <= 1e-4 and torch.equal(other.argmax(-1), whole.argmax(-1))


def test_the_classification_loss_moves_no_key_and_no_prefix_that_was_not_taken(tiny_vit):
    model = L2PPP(**SMALL).build(tiny_vit).model
    model.begin_task(TASK)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    F.cross_entropy(model(Batch(images, labels), task=0).logits, labels).backward()
    taken = model.look(Batch(images))[1].chosen.unique().tolist()
    assert model.prompts.keys.grad is None and len(taken) < 12
    assert model.prompts.values.grad.flatten(2).abs().sum(-1).flatten().nonzero().flatten().tolist() == taken


def test_a_later_task_moves_the_shared_pool_and_no_column_of_an_earlier_one():
    trainer, stream, settings = made(), blobs(), L2PPP(**SMALL)
    trainer.learn(stream.tasks[0])
    before = kept(trainer)
    trainer.learn(stream.tasks[1])
    assert moved(before, kept(trainer)) == {"prompts.values", "prompts.keys"}
    assert all(parameter.grad is None for parameter in trainer.learner.model.tower.parameters())
    scores, labels = torch.randn(7, 6, requires_grad=True), torch.tensor([3, 4, 5, 5, 4, 3, 3])
    loss = classify(scores, labels, stream.tasks[1], settings.phases(stream.tasks[1])[0])
    masked = scores.detach().clone()
    masked[:, :3] = float("-inf")
    assert (loss - F.cross_entropy(masked, labels)).abs() <= 1e-6
    loss.backward()
    assert scores.grad[:, :3].abs().max() == 0 < scores.grad[:, 3:].abs().min()


@pytest.mark.parametrize("none", [{"top": 0}, {"length": 0}])
def test_without_prefixes_the_classifier_alone_learns_on_the_plain_tower(none):
    trainer, stream = made(**none), blobs(tasks=1)
    trainer.run(stream)
    model, images = trainer.learner.model, images_of(trainer, stream)
    with torch.no_grad():
        read = model.features(Batch(images))[0]
    torch.testing.assert_close(read, make_tiny_vit()(images).features, rtol=1e-5, atol=1e-5)
    assert trainer.matrix[0][0] > 1 / 3


def test_a_model_that_was_kept_learns_further_tasks_as_if_it_had_never_been_away():
    stream, whole, first, later = blobs(tasks=3, per_task=2), made(), made(), made()
    for task in stream:
        whole.learn(task)
    for task in stream.tasks[:2]:
        first.learn(task)
    later.adopt(stream.tasks[:2], kept(first), [])
    later.learn(stream.tasks[2])
    assert kept(later).keys() == kept(whole).keys() and moved(kept(later), kept(whole)) == set()


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────


def test_settings_reach_the_prompts_and_the_plan(tiny_vit):
    settings = L2PPP(size=7, top=3, length=2, blocks=[2, 0], pull=0.5, epochs=3, batch_size=9, lr=0.25, temperature=2.0)
    pool = settings.build(tiny_vit).model.prompts
    assert type(pool) is PrefixPool and (pool.layers, pool.top, pool.pull, pool.pull_all) == ([0, 2], 3, 0.5, False)
    assert (pool.values.shape, pool.keys.shape) == ((2, 7, 2, 2, 24), (2, 7, 24))
    assert L2PPP(parity="official").build(tiny_vit).model.prompts.pull_all
    (phase,) = settings.phases(TASK)
    assert (phase.epochs, phase.batch_size, phase.temperature) == (3, 9, 2.0)
    assert phase.optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"] == 0.25
    assert phase.schedule(0.4) == pytest.approx(0.712639, abs=1e-6)  # the second of three epochs


def test_more_prefixes_than_there_are_cannot_be_taken():
    with pytest.raises(ConfigError) as error:
        L2PPP(size=4)
    assert str(error.value) == "top must be at most size, the prompts in the pool; got top=5, size=4: lower top"


@pytest.mark.parametrize("blocks", [[0, 3], [1, 1], []])
def test_blocks_that_the_backbone_has_not_are_refused_before_any_training(tiny_vit, blocks):
    with pytest.raises(ConfigError) as error:
        L2PPP(blocks=blocks).build(tiny_vit)
    assert str(error.value) == f"L2PPP.blocks must name different blocks of the backbone, from 0 to 2; got {blocks}"
