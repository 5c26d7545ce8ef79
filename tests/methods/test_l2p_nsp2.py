"""L2P-NSP²: a pool that moves only where old images do not feel it, and what that leaves open.

27 images a task, N 17 tokens, D 24 channels, H 2 heads, L 3 blocks; 6 prompts of 3 tokens, of which an image takes 2.
"""

from contextlib import ExitStack
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.backbones.load import Backbone
from lamina.backbones.splice import Splice
from lamina.backbones.timm_vit import TimmTower
from lamina.continual import ContinualModel
from lamina.data.stream import Task
from lamina.errors import ConfigError
from lamina.methods.l2p import L2P
from lamina.methods.l2p_nsp2 import L2PNSP2
from lamina.methods.l2p_pgp import L2PPGP
from lamina.methods.vpt_nsp2 import VPTNSP2
from lamina.model import Batch
from lamina.predictions import room
from lamina.prompts.base import Scripted
from lamina.protections.projector import Blend
from lamina.protections.spectrum import Cut
from tests.conftest import make_tiny_vit
from tests.streams import blobs, trainer_of
from tests.test_continual import material

SMALL = {"size": 6, "top": 2, "length": 3, "epochs": 1, "batch_size": 9, "lr": 0.02}
#: nothing is held
OFF = {"use_b1": False, "use_b2": False, "moments": 0.0, "key_share": 0.0}
#: exactly what old images use is held
EXACT = {"eta1": 1.0, "eta2": 1.0, "knee": "energy", "kept": 1.0, "normalize": False, "key_share": 1.0, "moments": 0.0}


def trainer_after(tasks, **changes):
    trainer = trainer_of(L2PNSP2(**{**SMALL, **changes}), make_tiny_vit())
    for task in blobs().tasks[:tasks]:
        trainer.learn(task)
    return trainer


@cache
def learned(tasks):
    """A trainer that has learned so many of two tasks; nobody changes it."""
    return trainer_after(tasks)


def images_of(trainer):
    return torch.cat([batch.images for batch in trainer.feed.plain(blobs().tasks[0].train)])


def gram(rows):
    rows = rows.detach().double().flatten(0, -2)
    return rows.T @ rows


def close(found, expected):
    assert found.shape == expected.shape and (found - expected).norm() <= 1e-5 * expected.norm()


# ── next to L2P ──────────────────────────────────────────────────────────────────────────────────────


@cache
def plain(tasks):
    trainer = trainer_of(L2P(**SMALL), make_tiny_vit())
    for task in blobs().tasks[:tasks]:
        trainer.learn(task)
    return trainer.learner.model.learned()


def test_the_first_task_is_learned_to_the_bit_as_by_l2p():
    found, expected = learned(1).learner.model.learned(), plain(1)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_with_nothing_held_the_second_task_is_that_of_l2p_and_else_it_is_not():
    expected = plain(2)
    for trainer, same in ((trainer_after(2, **OFF), True), (learned(2), False)):
        found = trainer.learner.model.learned()
        assert all(
            torch.allclose(found[f"prompts.{key}"], expected[f"prompts.{key}"]) == same for key in ("values", "keys")
        )


def test_the_pool_alone_is_projected_and_its_keys_by_a_protection_of_their_own():
    prompts = learned(1).learner.model.prompts
    null_space, keys, _ = learned(1).learner.protections
    assert set(null_space.projections()) == {prompts.values} and set(keys.projections()) == {prompts.keys}
    projection = null_space.projections()[prompts.values]
    assert projection.left.shape == (18, 18) and projection.right.shape == (24, 24)


# ── what is kept of old images ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("changes", [{}, {"position": "none"}, {"query": "early", "entry": 1}], ids=str)
def test_what_is_kept_are_the_queries_and_the_attention_of_the_block_that_prompts_enter(changes):
    """Against timm's own weights, image by image; the features that choose are those of the block or of the end."""
    trainer = trainer_after(1, **changes)
    pool, tower, entry = trainer.learner.model.prompts, trainer.learner.model.tower, changes.get("entry", 0)
    vit = tower.model
    block = vit.blocks[entry]
    query_weight, key_weight, _ = block.attn.qkv.weight.split(24)
    query_bias, key_bias, _ = block.attn.qkv.bias.split(24)
    channels, tokens, queries = torch.zeros(24, 24), torch.zeros(18, 18), []
    taken = set()
    with torch.no_grad():
        for image in images_of(trainer):
            x = vit.blocks[:entry](vit._pos_embed(vit.patch_embed(image[None])))
            query = vit.norm(x)[:, 0] if entry else tower(image[None]).features
            queries.append(query)
            chosen = F.cosine_similarity(query, pool.keys, dim=-1).topk(2).indices.tolist()
            taken |= set(chosen)
            entering = pool.values[chosen].flatten(0, 1) + (0 if pool.position is None else vit.pos_embed[0, 0])
            frozen = block.norm1(x)[0]  # (17, 24)
            everything = torch.cat([frozen, block.norm1(entering)])  # (23, 24)
            for head in (slice(0, 12), slice(12, 24)):
                q = frozen @ query_weight[head].T + query_bias[head]
                k = everything @ key_weight[head].T + key_bias[head]
                looks = torch.zeros(17, 6, 3)
                looks[:, chosen] = (q @ k.T / 12**0.5).softmax(-1)[:, 17:].unflatten(1, (2, 3))
                channels += (q @ key_weight[head]).T @ (q @ key_weight[head])
                tokens += looks.flatten(1).T @ looks.flatten(1)
    assert len(taken) > 2 and trainer.learner.protections[0].rows == 27 * 2 * 17
    null_space, keys, _ = trainer.learner.protections
    assert list(null_space.queries) == list(keys.moments) == [entry]
    torch.testing.assert_close(null_space.channels(entry).float(), channels, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(null_space.attention[entry].float(), tokens, rtol=1e-4, atol=1e-4)
    close(keys.moments[entry][0], gram(torch.cat(queries)))


def test_mean_and_deviation_are_those_of_all_tokens_of_the_pool_as_they_enter():
    trainer = trainer_after(1, moments=0.5)
    pool, moments = trainer.learner.model.prompts, trainer.learner.protections[2]
    entered = (pool.values + pool.position).detach().flatten(0, 1)
    expected = torch.stack([entered.mean(-1), entered.std(-1, unbiased=False)])
    torch.testing.assert_close(moments.last[0], expected)
    with torch.no_grad():
        pool.values[4, 1] += torch.linspace(0, 1, 24)
    entered = (pool.values + pool.position).detach().flatten(0, 1)
    gap = (torch.stack([entered.mean(-1), entered.std(-1, unbiased=False)]) - expected).abs().sum()
    assert moments.terms(model=None)["moments"].item() == pytest.approx(0.5 * float(gap) / 18, rel=1e-5)


@pytest.mark.parametrize("query", ["frozen", "early"])
def test_a_tap_is_told_at_every_block_which_prompts_each_image_took(query):
    model = trainer_after(1, query=query, entry=1).learner.model
    images, seen = images_of(learned(1))[:7], []
    with torch.no_grad():
        model.look(Batch(images), tap=seen.append)
        asked = model.query(Batch(images))
    expected = F.cosine_similarity(asked[:, None], model.prompts.keys, dim=-1).topk(2).indices
    told = [probe.chosen for probe in seen]
    assert told[0] is None if query == "early" else torch.equal(told[0], expected)  # early, block 0 knows of none
    assert torch.equal(told[1], expected) and torch.equal(told[2], expected)
    assert [probe.to_prompts.shape[-1] for probe in seen] == [0, 6, 6]


# ── steps of a second task ───────────────────────────────────────────────────────────────────────────


def test_a_second_task_takes_no_step_that_old_images_use():
    """Rows stand one below another on the left, across prompts; keys keep off directions of old queries."""
    trainer = trainer_after(1, eta1=1.0, eta2=1.0, knee="energy", kept=0.9, key_share=0.9)
    prompts, (null_space, keys, _) = trainer.learner.model.prompts, trainer.learner.protections
    used = {
        side: spectrum.basis[:, spectrum.free(null_space.cut).shape[1] :]
        for side, spectrum in null_space.spectra(0).items()
    }
    directions = keys.used[0][0]
    before = prompts.values.detach().clone(), prompts.keys.detach().clone()
    trainer.learn(blobs().tasks[1])
    step = (prompts.values.detach() - before[0]).double().flatten(0, 1)
    turned = (prompts.keys.detach() - before[1]).double()
    assert 0 < used["channels"].shape[1] < 24 and 0 < used["tokens"].shape[1] < 18 and 0 < directions.shape[1] < 24
    assert step.norm() > 1e-3 and turned.norm() > 1e-3
    assert (step @ used["channels"]).norm() < 1e-4 * step.norm()
    assert (used["tokens"].T @ step).norm() < 1e-4 * step.norm()
    assert (turned @ directions).norm() < 1e-4 * turned.norm()


class Toy(NamedTuple):
    """A method and an image, whose 40 rows of queries are fewer than 96 channels and than 60 tokens that it takes.

    Two blocks in float64, of which the first has no norm, so that its keys and values are linear in the prompts.
    """

    learner: object
    image: Tensor
    chosen: Tensor
    query: Tensor

    @property
    def pool(self):
        return self.learner.model.prompts


def toy(**changes):
    torch.manual_seed(0)
    tower = TimmTower.create(
        "vit_tiny_patch16_224", img_size=12, patch_size=4, embed_dim=96, depth=2, num_heads=4, dtype=torch.float64
    )
    tower.model.blocks[0].norm1 = torch.nn.Identity()
    for value in tower.parameters():
        if value.ndim > 1:
            value.data.copy_(value[0].numel() ** -0.5 * torch.randn_like(value))
    learner = L2PNSP2(**{"size": 16, "top": 15, "length": 4, **EXACT, **changes}).build(tower)
    model, image = learner.model, torch.randn(1, 3, 12, 12, dtype=torch.float64)
    model.prompts.values.data = model.prompts.values.data.double()
    model.begin_task(Task(0, ["a", "b"], [0, 1], None, None))
    with torch.no_grad():
        query = model.query(Batch(image))
        for watcher in learner.protections:
            watcher.begin_look()
        _, started = model.look(Batch(image), tap=learner.protections[0].see)
        learner.protections[1].collect(query, torch.zeros(1))
        for watcher in learner.protections:
            watcher.end_look(lambda total: total)
    return Toy(learner, image, started.chosen, query)


@torch.no_grad()
def felt(toy):
    """What the image has of the pool, with the prompts that it took at first.

    Returns:
        Logits of its tokens to all rows of the pool; what it sums up of values, as the tokens that the first block
        hands on; what the keys say of its query; what the classifier reads.
    """
    pool, tower, probes = toy.pool, toy.learner.model.tower, []
    tokens = (pool.values + pool.position).flatten(0, 1)
    slots = tokens.unflatten(0, (16, 4))[toy.chosen].flatten(1, 2)
    script = Scripted(lambda layer, _, carried: Splice(tokens=slots) if layer == 0 else None)
    script.chosen = toy.chosen
    read = tower(toy.image, script, probes.append).prompts.mean(1)
    keys, _ = tower.blocks()[0].keys_values(tokens[None])
    return {
        "logits": probes[0].queries @ keys.mT,
        "values": probes[1].inputs,
        "keys": toy.query.double() @ pool.keys.double().T,
        "read": read,
    }


def moves(toy):
    """How far three steps on other images move what the image has of the pool, relative to its norm."""
    before, model = felt(toy), toy.learner.model
    optimizer = torch.optim.Adam([toy.pool.values, toy.pool.keys], lr=0.05)
    start = toy.pool.values.detach().clone()
    with ExitStack() as stack:
        for protection in toy.learner.protections:
            stack.enter_context(protection.guard(optimizer))
        for seed in range(3):
            images = torch.randn(5, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
            out = model(Batch(images), 0)
            optimizer.zero_grad()
            (F.cross_entropy(out.logits, torch.tensor([0, 1, 1, 0, 1])) + sum(out.terms.values())).backward()
            optimizer.step()
    assert (toy.pool.values - start).norm() > 0.02 * start.norm()
    return {name: float((now - before[name]).norm() / before[name].norm()) for name, now in felt(toy).items()}


def test_with_exact_null_spaces_old_tokens_get_the_same_from_the_pool_at_the_block_it_enters():
    held, free = moves(toy()), moves(toy(**OFF))
    assert held["logits"] <= 1e-8 and held["values"] <= 1e-8 and held["keys"] <= 1e-5  # keys are in float32
    assert min(free[name] for name in ("logits", "values", "keys")) > 1e-2


def test_yet_what_becomes_of_prompts_on_their_way_and_is_read_moves_for_old_images_too():
    assert moves(toy())["read"] > 1e-3


@pytest.mark.parametrize(
    ("off", "still"), [("use_b1", set()), ("use_b2", {"logits", "keys"}), ("key_share", {"logits", "values"})]
)
def test_each_condition_keeps_its_own(off, still):
    """Without the first, attention to the prompts moves, and the sum of values with it."""
    held = moves(toy(**{off: 0.0 if off == "key_share" else False}))
    assert {name for name in ("logits", "values", "keys") if held[name] <= 1e-5} == still | (
        {"keys"} if off == "use_b1" else set()
    )


def test_room_is_that_of_the_pool_and_of_its_keys():
    rooms = [room for protection in learned(2).learner.protections for room in protection.room()]
    assert [(r.layer, r.what, r.size) for r in rooms] == [(0, "channels", 24), (0, "tokens", 18), (0, "keys", 24)]
    assert all(0 < r.used < r.size for r in rooms)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lesson_learned_on_a_file_is_the_lesson_learned_in_memory(monkeypatch):
    pixels = {"size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    monkeypatch.setattr("lamina.continual.load_backbone", lambda n, dtype: Backbone(n, make_tiny_vit(dtype), pixels))
    ours = ContinualModel("l2p-nsp2", settings={"epochs": 1, "batch_size": 8, "length": 3}, precision="32")
    ours.learn(material(0, 1))
    theirs = ContinualModel.load(ours.file())
    assert room(ours) == room(theirs) and len(room(ours)) == 3
    lessons = [model.learn(material(2, 3)) for model in (ours, theirs)]
    assert lessons[0].drift == lessons[1].drift and lessons[0].drift.new > 0 and lessons[0].drift.old is None
    one, two = ours.file(), theirs.file()
    assert all(torch.equal(value, two.learned[key]) for key, value in one.learned.items())
    kept = (
        [found for found in one.memory if "attention" in found],
        [found for found in two.memory if "attention" in found],
    )
    assert len(kept[0]) == 1 and torch.equal(kept[0][0]["attention"][0], kept[1][0]["attention"][0])


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────


def test_defaults_are_those_of_l2p_and_of_vpt_nsp2_and_for_keys_of_l2p_pgp():
    own = {"eta1", "eta2", "use_b1", "use_b2", "moments", "knee", "kept", "normalize"}
    published = {name: value for name, value in VPTNSP2().model_dump().items() if name in own}
    assert len(published) == 8
    assert L2PNSP2().model_dump() == {**L2P().model_dump(), **published, "key_share": L2PPGP().key_share}


def test_settings_reach_the_protections(tiny_vit):
    given = {"knee": "energy", "kept": 0.875, "eta1": 0.25, "eta2": 0.75, "moments": 0.5, "key_share": 0.625}
    null_space, keys, moments = L2PNSP2(**given, normalize=False).build(tiny_vit).protections
    assert null_space.cut == Cut(knee="energy", kept=0.875)
    assert null_space.blends == {
        "channels": Blend(eta=0.25, normalize=False),
        "tokens": Blend(eta=0.75, normalize=False),
    }
    assert (keys.share, keys.features, keys.apply, moments.weight) == (0.625, "frozen", "step", 0.5)
    for name, side in (("use_b1", "channels"), ("use_b2", "tokens")):
        blends = L2PNSP2(**{name: False}).build(tiny_vit).protections[0].blends
        assert blends[side] is None and blends.pop(side) is None and blends.popitem()[1] == Blend(eta=0.97)


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({}, {"kept"}),
        ({"knee": "energy"}, set()),
        ({"use_b1": False}, {"eta1", "kept"}),
        ({"use_b2": False, "knee": "energy"}, {"eta2"}),
        ({"use_b1": False, "use_b2": False, "knee": "energy"}, {"eta1", "eta2", "normalize", "knee", "kept"}),
    ],
)
def test_settings_that_change_nothing_are_known(settings, idle):
    assert set(L2PNSP2(**settings).idle()) == idle


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eta2": 1.5}, "L2PNSP2.eta2 must be between 0 and 1; got 1.5"),
        ({"length": 0}, "L2PNSP2.length must be at least 1; got 0"),
        ({"knee": "official"}, "L2PNSP2.knee must be 'paper', 'code' or 'energy'; got 'official'"),
        (
            {"size": 2, "top": 1, "length": 1},
            "size * length must be at least 3, as fewer prompt tokens have no knee to cut at; got size=2, length=1: "
            "raise one of them",
        ),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError) as error:
        L2PNSP2(**values)
    assert str(error.value) == message


def test_three_prompts_of_one_token_and_an_empty_choice_are_enough():
    trainer = trainer_after(2, size=3, top=2, length=1)
    assert trainer.learner.protections[0].attention[0].shape == (3, 3)
    nothing = trainer_after(1, top=0, readout="backbone").learner.protections[0]
    assert not nothing.attention[0].any() and len(nothing.projections()) == 1
