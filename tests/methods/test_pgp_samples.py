"""PGP with directions among images: 24 of the 27 of a task, as many as D; N 17, H 2, L 3 blocks."""

import itertools

import pytest
import torch

from lamina.errors import ConfigError
from lamina.methods.dualprompt_pgp import DualPromptPGP
from lamina.methods.l2p_pgp import L2PPGP
from lamina.protections.samples import SampleSubspace, extended, scores
from lamina.protections.subspace import Subspace
from lamina.training.trainer import Stopped
from tests.conftest import make_tiny_vit
from tests.methods.test_pgp import KINDS, SMALL, rows_of, settings_of, trainer_after, used
from tests.streams import blobs, trainer_of

AMONG_IMAGES = {"space": "sample", "prompt_share": 0.9, "key_share": 0.9}
both = pytest.mark.parametrize("name", ["l2p-pgp", "dualprompt-pgp"])


def few_of(trainer, task):
    return torch.cat([batch.images for batch in trainer.feed.plain(blobs().tasks[task].train.some(24))])


def outside(basis):
    return torch.eye(24, dtype=torch.float64) - basis @ basis.T


def test_a_pool_is_held_against_patches_and_from_the_second_task_on_itself_as_it_was_before():
    trainer = trainer_of(settings_of("l2p-pgp", **AMONG_IMAGES), make_tiny_vit())
    vit, pool, (prompts, keys) = (
        trainer.learner.model.tower.model,
        trainer.learner.model.prompts,
        trainer.learner.protections,
    )
    ours = of_keys = None
    for task in blobs().tasks:
        before, few = pool.values.detach().clone(), few_of(trainer, task.index)
        trainer.learn(task)
        assert torch.equal(prompts.before, pool.values) and not torch.equal(pool.values, before)
        assert keys.before is None
        with torch.no_grad():
            table = scores(vit.patch_embed(few).flatten(1), 9)
            queries = scores(trainer.learner.model.tower(few).features, 5)
        if task.index:
            table = table + scores(before.flatten(0, 1).T, 9)
        ours, of_keys = extended(ours, table @ table.T, 0.9), extended(of_keys, queries @ queries.T, 0.9)
        for subspace, expected in ((prompts, ours), (keys, of_keys)):
            (basis,) = subspace.used[0]
            assert 0 < basis.shape[1] == expected.shape[1] < 24
            assert (outside(basis) - outside(expected)).abs().max() <= 1e-3
    for parameter, expected in ((pool.values, ours), (pool.keys, of_keys)):
        maps = prompts.projections() | keys.projections()
        assert (maps[parameter].right.double() - outside(expected)).abs().max() <= 1e-3


def test_rows_for_keys_of_a_prefix_are_held_by_one_map_for_all_heads_of_a_block():
    """From 50 components, of which there are no more than images; values move as they like."""
    trainer = trainer_after("dualprompt-pgp", 1, **AMONG_IMAGES)
    (protection,), prompts = trainer.learner.protections, trainer.learner.model.prompts
    vit, few = trainer.learner.model.tower.model, few_of(trainer, 0)
    with torch.no_grad():
        x = vit.blocks[0].norm1(vit._pos_embed(vit.patch_embed(few)))
        table = scores(vit.blocks[0].attn.qkv(x)[..., :24].flatten(1), 50)
    assert (outside(protection.used[0][0]) - outside(extended(None, table @ table.T, 0.9))).abs().max() <= 1e-3
    maps = protection.projections()
    assert maps.keys() == {prompts.general, prompts.experts[0]} and [*protection.used] == [0, 1, 2]
    for parameter, blocks in ((prompts.general, (0, 1)), (prompts.experts[0], (2,))):
        for place, block in enumerate(blocks):
            keys, values = maps[parameter].right[place]
            assert (keys.double() - outside(protection.used[block][0])).abs().max() < 1e-6
            assert keys[:12, 12:].abs().max() > 1e-3 and torch.equal(values, torch.eye(24))


@both
@pytest.mark.parametrize("apply", ["step", "gradient"])
def test_a_second_task_moves_nothing_along_directions_among_images_unless_gradients_are_projected(name, apply):
    trainer = trainer_after(name, 1, apply=apply, **AMONG_IMAGES)
    held = rows_of(name, trainer)
    before = {key: (rows.detach().clone(), used(trainer, place, layer)) for key, (rows, layer, place) in held.items()}
    trainer.learn(blobs().tasks[1])
    for key, (rows, *_) in rows_of(name, trainer).items():
        start, basis = before[key]
        step = (rows.detach() - start).double()
        assert 0 < basis.shape[1] < 24 and step.norm() > 1e-2
        inside = (step @ basis).norm() / step.norm()
        assert inside < 1e-5 if apply == "step" else inside > 1e-3, key


@both
@pytest.mark.parametrize(("tasks", "share"), [(2, 0.0), (1, 0.9)])
def test_with_shares_of_nothing_and_in_a_first_task_directions_among_images_change_no_bit(name, tasks, share):
    plain = trainer_of(KINDS[name][1](**SMALL), make_tiny_vit())
    for task in blobs().tasks[:tasks]:
        plain.learn(task)
    ours = trainer_after(name, tasks, space="sample", prompt_share=share, key_share=share)
    expected = plain.learner.model.learned()
    assert all(torch.equal(value, expected[key]) for key, value in ours.learner.model.learned().items())


@both
@pytest.mark.parametrize("stop", [2, 4])
def test_a_run_with_directions_among_images_goes_on_to_the_same_bits(name, stop, tmp_path):
    """Three steps a task: it stops inside the first one, or the second."""
    whole, calls = trainer_of(settings_of(name, **AMONG_IMAGES), make_tiny_vit()), itertools.count(1)
    whole.run(blobs())
    part = trainer_of(settings_of(name, **AMONG_IMAGES), make_tiny_vit(), run_dir=tmp_path)
    part.should_stop = lambda: next(calls) == stop
    with pytest.raises(Stopped):
        part.run(blobs())
    again = trainer_of(settings_of(name, **AMONG_IMAGES), make_tiny_vit(), run_dir=tmp_path)
    assert again.restore(blobs())
    again.run(blobs())
    for trainer in (again, whole):
        assert all(isinstance(protection, SampleSubspace) for protection in trainer.learner.protections)
    assert again.matrix == whole.matrix
    expected = whole.learner.model.learned()
    assert all(torch.equal(value, expected[key]) for key, value in again.learner.model.learned().items())
    for ours, theirs in zip(again.learner.protections, whole.learner.protections, strict=True):
        assert ours.room() == theirs.room()
        assert all(torch.equal(*bases) for i in ours.used for bases in zip(ours.used[i], theirs.used[i], strict=True))


@both
def test_a_stream_of_smaller_tasks_is_refused_before_it_is_learned(name):
    trainer = trainer_of(settings_of(name, **AMONG_IMAGES), make_tiny_vit())
    with pytest.raises(ConfigError) as error:
        trainer.run(blobs(train=23))
    assert str(error.value) == (
        'space="sample", which parity="official" has, needs as many images of each task as the backbone has channels, '
        '24; task 1 has 23: take space="feature", or fewer and larger tasks'
    )
    assert trainer.position == (0, 0, 0) and trainer.matrix == []


@both
def test_the_official_way_is_that_of_the_released_code_unless_told_otherwise(name):
    kind = KINDS[name][0]
    official = kind(parity="official")
    assert (official.space, official.apply, official.selection) == ("sample", "gradient", "batch")
    told = kind(parity="official", space="feature", apply="step", selection="image")
    assert (told.space, told.apply, told.selection) == ("feature", "step", "image")
    found = [type(p) for settings in (official, told) for p in settings.build(make_tiny_vit()).protections]
    assert found == [SampleSubspace] * (len(found) // 2) + [Subspace] * (len(found) // 2)


def test_components_are_as_many_as_in_the_released_code(tiny_vit):
    kinds = (L2PPGP, DualPromptPGP)
    protections = [p for kind in kinds for p in kind(space="sample", apply="gradient").build(tiny_vit).protections]
    assert [(p.components, p.share, p.apply) for p in protections] == [
        (9, 0.5, "gradient"),
        (5, 0.97, "gradient"),
        (50, 0.5, "gradient"),
    ]


def test_images_cannot_stand_for_channels_and_for_another_number_of_features(tiny_vit):
    tiny_vit.features = 25
    L2PPGP().build(tiny_vit)
    with pytest.raises(ConfigError) as error:
        L2PPGP(space="sample").build(tiny_vit)
    assert str(error.value) == (
        'space="sample" needs as many features as channels, since images stand for both; this backbone has 25 and 24: '
        'take space="feature"'
    )
