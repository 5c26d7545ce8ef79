"""CLIP-NSP²: CLIP-Seq whose prompts move in null spaces; B 7, N 17, D 48, H 3, L 3, F 24, M 5 in 2 blocks."""

from functools import cache

import pytest
import torch

from lamina.errors import ConfigError
from lamina.heads.projected import ProjectedTextHead
from lamina.heads.text import TextHead
from lamina.methods.clip_nsp2 import CLIPNSP2
from lamina.methods.clip_seq import CLIPSeq
from lamina.model import Batch
from lamina.protections.projector import Blend
from lamina.protections.spectrum import Cut
from tests.backbones.clips import clip, close, tiny_clip
from tests.methods.states import kept, moved
from tests.streams import blobs, trainer_of

BASE = {"length": 5, "blocks": 2, "epochs": 2, "batch_size": 9, "templates": "photo", "lr": 0.01}
BASE |= {"refine_epochs": 2, "refine_draws": 5}
SMALL = {**BASE, "eta1": 1.0, "eta2": 1.0, "knee": "code"}


def trainer_after(tasks, kind=CLIPNSP2, **changes):
    values = {**(SMALL if kind is CLIPNSP2 else BASE), **changes}
    trainer = trainer_of(kind(**values), tiny_clip())
    for task in blobs().tasks[:tasks]:
        trainer.learn(task)
    return trainer


@cache
@torch.enable_grad()
def learned():
    """A trainer that has learned the first of two tasks; nobody changes it."""
    return trainer_after(1)


def images_of(trainer, task=0):
    return torch.cat([batch.images for batch in trainer.feed.plain(blobs().tasks[task].train)])


# ── next to CLIP-Seq ─────────────────────────────────────────────────────────────────────────────────


def test_the_first_task_is_learned_to_the_bit_as_by_clip_seq():
    """What is balanced then agrees but for rounding: a look back that shows attention computes it another way."""
    ours, theirs = kept(learned()), kept(trainer_after(1, CLIPSeq, refine=True))
    assert ours.keys() == theirs.keys()
    assert not moved(ours, theirs) & {"prompts.values.0", "prompts.values.1", "head.log_scale"}
    for name, value in ours.items():
        close(value, theirs[name])


@pytest.mark.parametrize("off", [True, False])
def test_without_projections_and_loss_so_is_the_second(off):
    changes = {"use_b1": False, "use_b2": False, "moments": 0.0} if off else {}
    ours, theirs = kept(trainer_after(2, refine=False, **changes)), kept(trainer_after(2, CLIPSeq))
    assert ours.keys() == theirs.keys() and ("prompts.values.0" in moved(ours, theirs)) != off
    assert bool(moved(ours, theirs)) != off


# ── what protects ────────────────────────────────────────────────────────────────────────────────────


def test_a_step_has_no_part_that_old_images_use_and_the_scale_moves_as_it_likes():
    trainer = trainer_after(1)
    prompts, head = trainer.learner.model.prompts, trainer.learner.model.head
    null_space, _ = trainer.learner.protections
    assert set(null_space.projections()) == set(prompts.parameters())
    before = {i: prompts.value(i).detach().clone() for i in prompts.layers}
    parameters = [*prompts.parameters(), head.log_scale]
    scale = head.log_scale.item()
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    with null_space.guard(optimizer):
        sum(p.square().sum() for p in parameters).backward()
        optimizer.step()
    for i in (0, 1):
        step = (prompts.value(i).detach() - before[i]).double()  # (5, 48)
        channels, tokens = (null_space.spectra(i)[side].free(Cut(knee="code")) for side in ("channels", "tokens"))
        assert step.norm() > 1e-4
        assert (step - step @ channels @ channels.T).norm() < 1e-4 * step.norm()
        assert (step - tokens @ tokens.T @ step).norm() < 1e-4 * step.norm()
    assert head.log_scale.item() == pytest.approx(scale - 0.01, rel=1e-4)


@torch.no_grad()
def test_what_is_kept_of_old_images_is_what_clips_own_blocks_make_of_them():
    """Both second moments of block 0, against their definition."""
    trainer = learned()
    null_space, prompts, side = trainer.learner.protections[0], trainer.learner.model.prompts, clip().visual
    block = side.transformer.resblocks[0]
    weights, biases = block.attn.in_proj_weight.split(48), block.attn.in_proj_bias.split(48)
    x = side.conv1(images_of(trainer)).flatten(2).transpose(1, 2)
    x = side.ln_pre(torch.cat([side.class_embedding.expand(len(x), 1, -1), x], 1) + side.positional_embedding)
    frozen, joined = block.ln_1(x), block.ln_1(torch.cat([x, prompts.value(0).expand(len(x), -1, -1)], 1))
    channels, tokens = torch.zeros(48, 48), torch.zeros(5, 5)
    for head in (slice(0, 16), slice(16, 32), slice(32, 48)):
        q = (frozen @ weights[0][head].T + biases[0][head]).flatten(0, 1)
        k = joined @ weights[1][head].T + biases[1][head]
        looks = (q.unflatten(0, (27, 17)) @ k.mT / 4).softmax(-1)[..., 17:].flatten(0, 1)
        channels += (q @ weights[1][head]).T @ (q @ weights[1][head])
        tokens += looks.T @ looks
    torch.testing.assert_close(null_space.channels(0).float(), channels, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(null_space.attention[0].float(), tokens, rtol=1e-4, atol=1e-3)


def test_blocks_with_prompts_are_looked_back_on_and_no_other():
    null_space, moments = learned().learner.protections
    assert sorted(null_space.queries) == sorted(moments.last) == [0, 1] and null_space.rows == 27 * 3 * 17


def test_old_features_drift_less_than_without_protection():
    drift = {}
    for name, changes in {"held": {}, "free": {"use_b1": False, "use_b2": False, "moments": 0.0}}.items():
        trainer = trainer_after(1, lr=0.03, **changes)
        old = Batch(images_of(trainer))
        before = trainer.learner.model.features(old)[0].detach()
        trainer.learn(blobs().tasks[1])
        drift[name] = (trainer.learner.model.features(old)[0] - before).norm().item()
    assert drift["held"] < 0.5 * drift["free"]


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────


def test_defaults_are_the_authors():
    ours, base = CLIPNSP2().model_dump(), CLIPSeq().model_dump()
    assert ours == base | {
        "refine": True, "eta1": 0.98, "eta2": 0.98, "use_b1": True, "use_b2": True, "moments": 1.0, "knee": "paper",
        "kept": 0.99, "normalize": True, "parity": "paper",
    }  # fmt: skip
    for refine, kind, width in ((True, ProjectedTextHead, 48), (False, TextHead, 24)):
        model = CLIPNSP2(refine=refine).build(tiny_clip()).model
        assert (type(model.head), model.width) == (kind, width)


def test_settings_reach_the_protections():
    given = {"knee": "energy", "kept": 0.875, "eta1": 0.25, "eta2": 0.75, "normalize": False, "moments": 0.5}
    null_space, moments = CLIPNSP2(**given).build(tiny_clip()).protections
    assert null_space.cut == Cut(knee="energy", kept=0.875) and moments.weight == 0.5
    assert null_space.blends == {
        "channels": Blend(eta=0.25, normalize=False),
        "tokens": Blend(eta=0.75, normalize=False),
    }
    null_space, _ = CLIPNSP2(use_b1=False, use_b2=False).build(tiny_clip()).protections
    assert null_space.blends == {"channels": None, "tokens": None} and not null_space.batch_means


def test_official_shuffles_two_passes_together_decays_after_eight_and_fourteen_and_cuts_by_value():
    settings = CLIPNSP2(parity="official", kept=0.5)
    learner = settings.build(tiny_clip())
    (phase,) = learner.phases(blobs().tasks[0])
    assert (phase.epochs, phase.repeat, phase.batch_size) == (10, 2, 220)
    factors = [phase.schedule(passed / 20) for passed in (0, 7, 8, 13, 14, 19)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert learner.protections[0].cut == Cut(knee="official", kept=0.5) and learner.protections[0].batch_means
    assert CLIPNSP2(**settings.model_dump()) == settings


@pytest.mark.parametrize(
    ("values", "idle"),
    [
        ({}, ["kept"]),
        ({"knee": "energy"}, []),
        ({"use_b1": False, "refine": False}, ["eta1", "kept", "refine_draws", "refine_epochs"]),
        ({"use_b1": False, "use_b2": False, "knee": "energy"}, ["eta1", "eta2", "kept", "knee", "normalize"]),
    ],
    ids=str,
)
def test_settings_that_change_nothing_are_known(values, idle):
    assert sorted(CLIPNSP2(**values).idle()) == idle


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": 2}, "CLIPNSP2.length must be at least 3; got 2"),
        (
            {"parity": "official", "knee": "paper"},
            'knee must be left out or "code" with parity="official"; got \'paper\'',
        ),
        ({"parity": "official", "epochs": 5}, 'epochs must be even with parity="official"; got 5'),
    ],
    ids=str,
)
def test_a_wrong_setting_says_what_would_be_right(values, message):
    with pytest.raises(ConfigError) as error:
        CLIPNSP2(**values)
    assert str(error.value) == message
