"""PGP on a pool, on prefixes and on deep prompts: 27 training images a task, N 17, D 24, H 2, L 3 blocks."""

from functools import cache

import pytest
import torch
from torch.nn import functional as F

from lamina.backbones.load import Backbone
from lamina.continual import ContinualModel
from lamina.errors import ConfigError
from lamina.methods.dualprompt import DualPrompt
from lamina.methods.dualprompt_pgp import DualPromptPGP
from lamina.methods.l2p import L2P
from lamina.methods.l2p_pgp import L2PPGP
from lamina.methods.vpt_deep import InTurn
from lamina.methods.vpt_pgp import VPTPGP
from lamina.predictions import room
from tests.conftest import make_tiny_vit
from tests.streams import blobs, trainer_of
from tests.test_continual import material

SMALL = {"epochs": 1, "batch_size": 9, "length": 3, "lr": 0.02}
KINDS = {"l2p-pgp": (L2PPGP, L2P), "dualprompt-pgp": (DualPromptPGP, DualPrompt), "vpt-pgp": (VPTPGP, InTurn)}
every_kind = pytest.mark.parametrize("name", KINDS)


def settings_of(name, **changes):
    kind = KINDS[name][0]
    return kind(**SMALL | {key: value for key, value in changes.items() if key in kind.model_fields})


def trainer_after(name, tasks, **changes):
    trainer = trainer_of(settings_of(name, **changes), make_tiny_vit())
    for task in blobs().tasks[:tasks]:
        trainer.learn(task)
    return trainer


@cache
def learned(name, tasks):
    """A trainer that has learned so many of two tasks; nobody changes it."""
    return trainer_after(name, tasks)


def images_of(trainer, task=0):
    return torch.cat([batch.images for batch in trainer.feed.plain(blobs().tasks[task].train)])


def rows_of(name, trainer, last=-1):
    """What is held, by name: parameters' rows (R, D), and the layer and place of the protection that holds them."""
    prompts = trainer.learner.model.prompts
    if name == "l2p-pgp":
        return {"values": (prompts.values.flatten(0, 1), 0, 0), "keys": (prompts.keys, 0, 1)}
    if name == "vpt-pgp":
        return {f"block {i}": (prompts.value(i), i, 0) for i in range(3)}
    general = {f"general {i}": (prompts.general[i, 0], i, 0) for i in (0, 1)}
    return general | {"expert": (prompts.experts[last][0, 0], 2, 0)}


def used(trainer, place, layer):
    """The directions (D, r) that old features use, heads side by side."""
    return torch.block_diag(*trainer.learner.protections[place].used[layer])


# ── next to the method without it ────────────────────────────────────────────────────────────────────


@every_kind
@pytest.mark.parametrize("tasks", [1, 2])
def test_with_shares_of_nothing_it_is_the_method_it_stands_on_to_the_bit(name, tasks):
    """So it is for the first task with any shares; in the second, these are what makes the difference."""
    plain = trainer_of(KINDS[name][1](**SMALL), make_tiny_vit())
    for task in blobs().tasks[:tasks]:
        plain.learn(task)
    off = trainer_after(name, tasks, prompt_share=0.0, key_share=0.0)
    expected = plain.learner.model.learned()
    for trainer, equal in ((off, True), (learned(name, tasks), tasks == 1)):
        found = trainer.learner.model.learned()
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items()) == equal


@every_kind
def test_prompts_alone_are_held_and_everything_else_moves_as_it_likes(name):
    trainer = learned(name, 1)
    held = {id(p) for protection in trainer.learner.protections for p in protection.projections()}
    prompts = trainer.learner.model.prompts
    expected = {
        "l2p-pgp": lambda: [prompts.values, prompts.keys],
        "dualprompt-pgp": lambda: [prompts.general, prompts.experts[0]],
        "vpt-pgp": lambda: list(prompts.parameters()),
    }[name]()
    assert held == {id(p) for p in expected}


# ── steps of a second task ───────────────────────────────────────────────────────────────────────────


@every_kind
@pytest.mark.parametrize("apply", ["step", "gradient"])
def test_a_second_task_moves_nothing_along_directions_of_the_first_unless_gradients_are_projected(name, apply):
    trainer = trainer_after(name, 1, apply=apply)
    directions = {key: used(trainer, place, layer) for key, (_, layer, place) in rows_of(name, trainer).items()}
    before = {key: rows.detach().clone() for key, (rows, *_) in rows_of(name, trainer).items()}
    trainer.learn(blobs().tasks[1])
    for key, (rows, *_) in rows_of(name, trainer).items():
        step, basis = (rows.detach() - before[key]).double(), directions[key]
        assert 0 < basis.shape[1] < 24 and step.norm() > 1e-2
        inside = (step @ basis).norm() / step.norm()
        assert inside < 1e-5 if apply == "step" else inside > 1e-3, key


def test_rows_for_values_and_keys_of_experts_are_free():
    """Along directions that rows for keys may not take."""
    first, second = learned("dualprompt-pgp", 1), learned("dualprompt-pgp", 2)
    before, after = (trainer.learner.model.prompts for trainer in (first, second))
    for block in (0, 1):
        step = (after.general[block, 1] - before.general[block, 1]).detach().double()
        assert (step @ used(first, 0, block)).norm() > 0.1 * step.norm()
    assert all(p not in protection.projections() for protection in second.learner.protections for p in after.keys)


def test_a_prefix_is_projected_block_by_block_head_by_head_and_for_keys_alone():
    """The map of each block is its own; heads are apart in it, and rows for values get the identity."""
    trainer = learned("dualprompt-pgp", 1)
    (protection,) = trainer.learner.protections
    mapping = protection.projections()[trainer.learner.model.prompts.general].right
    assert mapping.shape == (2, 2, 24, 24)
    for block in (0, 1):
        assert (mapping[block, 0, :12, 12:] == 0).all() and torch.equal(mapping[block, 1], torch.eye(24))
        assert (mapping[block, 0].double() @ used(trainer, 0, block)).abs().max() < 1e-6


# ── what is kept of old images ───────────────────────────────────────────────────────────────────────


def gram(rows):
    rows = rows.detach().double().flatten(0, -2)
    return rows.mT @ rows


def close(found, expected):
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_prompts_of_a_pool_are_held_against_tokens_and_prompts_as_they_enter_the_first_block():
    trainer = learned("l2p-pgp", 1)
    vit, pool = trainer.learner.model.tower.model, trainer.learner.model.prompts
    tokens = vit._pos_embed(vit.patch_embed(images_of(trainer)))
    assert tokens.shape == (27, 17, 24)
    entered = pool.values + vit.pos_embed[0, 0]
    close(trainer.learner.protections[0].moments[0][0], gram(tokens) + gram(entered))
    assert gram(entered).norm() > 1e-3 * gram(tokens).norm()  # else the line above would not see it


def test_keys_of_a_pool_are_held_against_the_queries_that_choose_them():
    trainer = learned("l2p-pgp", 1)
    queries = trainer.learner.model.tower(images_of(trainer)).features
    assert queries.shape == (27, 24)
    close(trainer.learner.protections[1].moments[0][0], gram(queries))


def test_prefixes_are_held_against_the_queries_of_their_block_each_heads_apart():
    """Block 1 sees what the general prefix of block 0 did to the images."""
    trainer = learned("dualprompt-pgp", 1)
    vit, prompts = trainer.learner.model.tower.model, trainer.learner.model.prompts
    x = vit._pos_embed(vit.patch_embed(images_of(trainer)))
    for block in (0, 1):
        attention = vit.blocks[block].attn
        q, k, v = attention.qkv(vit.blocks[block].norm1(x)).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        for head in (0, 1):
            close(trainer.learner.protections[0].moments[block][head], gram(q[:, head]))
        key, value = (
            rows.unflatten(-1, (2, 12)).transpose(0, 1).expand(27, -1, -1, -1) for rows in prompts.general[block]
        )
        mixed = F.scaled_dot_product_attention(q, torch.cat([k, key], 2), torch.cat([v, value], 2))
        x = x + attention.proj(mixed.transpose(1, 2).flatten(2))
        x = x + vit.blocks[block].mlp(vit.blocks[block].norm2(x))


def test_deep_prompts_are_held_against_tokens_that_enter_their_block_and_themselves():
    trainer = learned("vpt-pgp", 1)
    vit, prompts = trainer.learner.model.tower.model, trainer.learner.model.prompts
    x = vit._pos_embed(vit.patch_embed(images_of(trainer)))
    for i in range(3):
        close(trainer.learner.protections[0].moments[i][0], gram(x) + gram(prompts.value(i)))
        x = vit.blocks[i](torch.cat([x, prompts.value(i).expand(27, -1, -1)], dim=1))[:, :17]


@every_kind
def test_the_batches_of_the_look_back_do_not_matter(name):
    ours = learned(name, 1)
    other = trainer_of(settings_of(name), make_tiny_vit())
    other.feed.eval_batch = 25
    other.learn(blobs().tasks[0])
    for one, two in zip(ours.learner.protections, other.learner.protections, strict=True):
        assert one.moments.keys() == two.moments.keys()
        for i, moment in one.moments.items():
            assert (moment - two.moments[i]).norm() <= 1e-5 * moment.norm()
            assert [basis.shape for basis in one.used[i]] == [basis.shape for basis in two.used[i]]


@every_kind
def test_room_shrinks_from_task_to_task_and_holds_the_share(name):
    for place, share in enumerate((0.5, 0.97)[: len(learned(name, 1).learner.protections)]):
        once, twice = (learned(name, tasks).learner.protections[place].room() for tasks in (1, 2))
        assert [room.layer for room in once] == ([0] if name == "l2p-pgp" else [0, 1, 2])
        assert {(room.what, room.size) for room in once} == {(("channels", "keys")[place], 24)}
        for one, two in zip(once, twice, strict=True):
            assert 0 < one.used <= two.used <= 24 and min(one.kept, two.kept) >= share - 1e-9


# ── files ────────────────────────────────────────────────────────────────────────────────────────────


@every_kind
def test_a_lesson_learned_on_a_file_is_the_lesson_learned_in_memory(name, monkeypatch):
    pixels = {"size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    monkeypatch.setattr("lamina.continual.load_backbone", lambda n, dtype: Backbone(n, make_tiny_vit(dtype), pixels))
    ours = ContinualModel(name, settings={"epochs": 1, "batch_size": 8, "length": 3}, precision="32")
    ours.learn(material(0, 1))
    theirs = ContinualModel.load(ours.file())
    assert room(ours) == room(theirs) and len(room(ours)) == (2 if name == "l2p-pgp" else 3)
    lessons = [model.learn(material(2, 3)) for model in (ours, theirs)]
    assert lessons[0].drift == lessons[1].drift and lessons[0].drift.new > 0 and lessons[0].drift.old is None
    one, two = ours.file(), theirs.file()
    assert all(torch.equal(value, two.learned[key]) for key, value in one.learned.items())
    for ours, theirs in zip(one.memory, two.memory, strict=True):
        assert all(torch.equal(value, theirs["moments"][i]) for i, value in ours.get("moments", {}).items())
        assert all(
            torch.equal(*pair)
            for i in ours.get("used", {})
            for pair in zip(ours["used"][i], theirs["used"][i], strict=True)
        )


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("l2p-pgp", {"key_share": 0.97, "space": "feature"}),
        ("dualprompt-pgp", {"space": "feature"}),
        ("vpt-pgp", {}),
    ],
)
def test_defaults_are_the_shares_of_the_released_code_and_beside_them_those_of_the_method_it_stands_on(name, own):
    kind, plain = KINDS[name]
    assert kind().model_dump() == {**plain().model_dump(), "prompt_share": 0.5, "apply": "step", **own}


@every_kind
def test_settings_reach_the_protections(name, tiny_vit):
    protections = settings_of(name, prompt_share=0.25, key_share=0.75, apply="gradient").build(tiny_vit).protections
    assert [(p.share, p.apply) for p in protections] == [(0.25, "gradient"), (0.75, "gradient")][: len(protections)]
    assert len(protections) == (2 if name == "l2p-pgp" else 1)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (L2PPGP, {"prompt_share": 1.5}, "L2PPGP.prompt_share must be between 0 and 1; got 1.5"),
        (L2PPGP, {"key_share": -0.1}, "L2PPGP.key_share must be between 0 and 1; got -0.1"),
        (DualPromptPGP, {"prompt_share": 2.0}, "DualPromptPGP.prompt_share must be between 0 and 1; got 2.0"),
        (L2PPGP, {"space": "token"}, "L2PPGP.space must be 'feature' or 'sample'; got 'token'"),
        (VPTPGP, {"apply": "update"}, "VPTPGP.apply must be 'step' or 'gradient'; got 'update'"),
    ],
)
def test_settings_out_of_range_are_refused(kind, values, message):
    with pytest.raises(ConfigError) as error:
        kind(**values)
    assert str(error.value) == message


def test_a_pool_without_position_is_held_against_its_prompts_as_they_are():
    trainer = trainer_after("l2p-pgp", 1, position="none")
    vit, pool = trainer.learner.model.tower.model, trainer.learner.model.prompts
    tokens = vit._pos_embed(vit.patch_embed(images_of(trainer)))
    close(trainer.learner.protections[0].moments[0][0], gram(tokens) + gram(pool.values))


def test_a_pool_that_enters_later_is_held_against_what_enters_there():
    trainer = trainer_after("l2p-pgp", 1, entry=2, position="none")
    vit, pool = trainer.learner.model.tower.model, trainer.learner.model.prompts
    tokens = vit.blocks[1](vit.blocks[0](vit._pos_embed(vit.patch_embed(images_of(trainer)))))
    prompts, keys = trainer.learner.protections
    close(prompts.moments[2][0], gram(tokens) + gram(pool.values))
    assert [prompts.moments.keys(), keys.moments.keys()] == [{2}, {2}]
    assert prompts.projections().keys() == {pool.values} and keys.projections().keys() == {pool.keys}
