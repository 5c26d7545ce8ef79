"""LSPT and GaPT beside prompts in null spaces, on towers in which exact null spaces exist, and on one without.

Exact: 3 images a task of 2 classes, N 5 tokens, H 2 heads, so at most 30 rows; 71 prompts beside, M 6, D 86, L 4.
"""

import pytest
import torch

from lamina.backbones.attention import attention_weights
from lamina.errors import ConfigError
from lamina.methods.lspt import LSPT
from lamina.methods.lspt_nsp2 import LSPTNSP2
from lamina.prompts.beside import PromptsBeside
from lamina.prompts.deep import DeepPrompts
from lamina.prompts.gated import GatedPrompts
from lamina.prompts.long_term import LongTermPrompts
from lamina.prompts.recurrent import LSTM
from lamina.protections.bounded import BoundedNullSpace
from lamina.protections.limits import Limits
from lamina.protections.null_space import NullSpace
from lamina.protections.projector import Blend
from lamina.protections.spectrum import Cut
from tests.methods.states import kept, moved
from tests.methods.test_vpt_nsp2_exact import second_task
from tests.streams import blobs, trainer_of

DOZEN = {"length": 6, "epochs": 12, "batch_size": 3, "lr": 0.02, "optimizer": "adamw"}
both = pytest.mark.parametrize("travelling", ["lspt", "gapt"])


def beside(tower, length=6, count=71, travelling="lspt", **options):
    """Prompts of both kinds, away from their start: gates half open, temperatures on either side of 1."""
    if travelling == "gapt":
        carrier = GatedPrompts(tower.depth, length, tower.width, **options)
        carrier.gates.data.uniform_(-1, 1)
        carrier.temperatures.data.uniform_(0.5, 2)
    else:
        carrier = LongTermPrompts.behind(tower, length, **options)
        for value in carrier.carriers.parameters():
            value.data.mul_(2)
    return PromptsBeside(carrier, range(tower.depth), count, tower.width).eval()


def null_space_of(tower, prompts, images):
    """Return exact null spaces of what images look at."""
    blend = Blend(normalize=False)
    protection = NullSpace(tower, prompts, cut=Cut(knee="energy", kept=1.0), channels=blend, tokens=blend)
    protection.begin_look()
    tower(images, prompts.start(), protection.see)
    protection.end_look(lambda sums: sums)
    return protection


@torch.no_grad()
def drift(tower, prompts, images, other, projections, share=0.3):
    """Move the prompts beside by a share of their length; return how far features of both kinds of images moved."""
    before = [tower(part, prompts.start()).features for part in (images, other)]
    for layer in prompts.layers:
        value = prompts.value(layer)
        step = torch.randn_like(value)
        step = projections[value](step) if projections else step
        value.add_(step, alpha=float(share * value.norm() / step.norm()))
    after = [tower(part, prompts.start()).features for part in (images, other)]
    return [float((now - then).norm() / then.norm()) for then, now in zip(before, after, strict=True)]


@pytest.fixture
def pictures(double):
    return torch.randn(3, 3, 8, 8), torch.randn(2, 3, 8, 8)


# ── the promise ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options",
    [{}, {"carriers": 2}, {"carry": "gru"}, {"carry": "none"}, {"hears": False}, {"travelling": "gapt"}],
    ids=str,
)
def test_a_long_step_in_exact_null_spaces_moves_other_images_alone(roomy, pictures, options):
    prompts = beside(roomy, **options)
    projections = null_space_of(roomy, prompts, pictures[0]).projections()
    old, other = drift(roomy, prompts, *pictures, projections)
    assert old < 1e-12 and other > 1e-4
    old, other = drift(roomy, prompts, *pictures, projections)  # and once more in the same null spaces
    assert old < 1e-12 and other > 1e-4


@both
def test_a_step_that_is_not_projected_moves_them_all(roomy, pictures, travelling):
    assert drift(roomy, beside(roomy, travelling=travelling), *pictures, {})[0] > 1e-6


@both
def test_where_travelling_prompts_see_those_beside_the_same_null_spaces_do_not_hold(
    roomy, pictures, monkeypatch, travelling
):
    prompts = beside(roomy, travelling=travelling)
    start = prompts.start

    def unmasked(*arguments):
        started = start(*arguments)
        at = started.at

        def open_to_all(*where):
            splice = at(*where)
            object.__setattr__(splice, "frozen_only", False)
            return splice

        started.at = open_to_all
        return started

    monkeypatch.setattr(prompts, "start", unmasked)
    projections = null_space_of(roomy, prompts, pictures[0]).projections()
    assert drift(roomy, prompts, *pictures, projections)[0] > 1e-6


def test_a_projected_step_of_what_travels_is_no_better_than_any(roomy, pictures):
    """Why the carrier is frozen: at its input, the condition of the block that it enters says nothing."""
    moves = []
    for projected in (True, False):
        torch.manual_seed(5)
        prompts = beside(roomy)
        maps = null_space_of(roomy, prompts, pictures[0]).projections()
        with torch.no_grad():
            before = roomy(pictures[0], prompts.start()).features
            for layer in range(1, 4):
                value = prompts.carrier.value(layer)
                step = torch.randn_like(value)
                step = step @ maps[prompts.value(layer)].right if projected else step
                value.add_(step, alpha=float(0.1 * value.norm() / step.norm()))
            moves.append(float((roomy(pictures[0], prompts.start()).features - before).norm()))
    assert 0.5 < moves[0] / moves[1] < 2


@torch.no_grad()
def test_weights_of_the_hidden_state_could_move_unseen_by_old_images_and_by_no_others(roomy, pictures, monkeypatch):
    """All that an LSTM's memory has of an image goes through these, so they have a null space of their own."""
    prompts, states = beside(roomy), []
    forward = LSTM.forward

    def note(lstm, prepared, hidden, cells, chain):
        states.append(hidden.flatten(0, 1))
        return forward(lstm, prepared, hidden, cells, chain)

    with monkeypatch.context() as patch:
        patch.setattr(LSTM, "forward", note)
        before = [roomy(part, prompts.start()).features for part in pictures]
    old = torch.cat([state for state in states if len(state) == 18])  # of 3 images, 6 prompts each, behind 3 blocks
    assert len(old) == 54
    weight = prompts.carrier.carriers[0].steps[0].weight_hh
    start, drifts = weight.clone(), []
    for free in (torch.eye(86) - torch.linalg.pinv(old) @ old, torch.eye(86)):
        step = torch.randn_like(weight) @ free
        weight.copy_(start + step * (0.5 * start.norm() / step.norm()))
        after = [roomy(part, prompts.start()).features for part in pictures]
        drifts.append([float((now - then).norm() / then.norm()) for then, now in zip(before, after, strict=True)])
    (hidden, other), unhidden = drifts
    assert hidden < 1e-12 and other > 1e-4 and min(unhidden) > 1e-4


@both
def test_whole_tasks_leave_old_features_and_logits_where_they_are_and_move_new_ones(roomy, travelling):
    features, logits, new = second_task(LSPTNSP2(**DOZEN, carrier=travelling, plastic=71, kept=1.0), roomy)
    assert features <= 1e-10 and logits <= 1e-10
    assert new > 1e-4


@both
def test_a_bound_of_nothing_finds_the_exact_null_spaces_by_itself(roomy, travelling):
    features, _, new = second_task(LSPTNSP2(**DOZEN, carrier=travelling, plastic=71, max_drift=1e-10), roomy)
    assert features <= 1e-10 and new > 1e-4


def test_lspt_on_two_tasks_keeps_no_promise_unless_frozen(roomy):
    assert second_task(LSPT(**DOZEN), roomy)[0] > 1e-3
    assert second_task(LSPT(**DOZEN, freeze_after_first=True), roomy) == [0.0, 0.0, 0.0]


# ── who sees whom ────────────────────────────────────────────────────────────────────────────────────


@both
def test_what_travels_does_not_see_what_stands_beside_and_the_images_see_both(tiny_vit, travelling):
    """In the last step: those beside the last block change features, those before change travelling prompts, too."""
    prompts = beside(tiny_vit, length=4, count=7, travelling=travelling)
    images, seen = torch.randn(5, 3, 32, 32), []

    def look():
        seen.clear()
        out = tiny_vit(images, prompts.start(), lambda probe: seen.append(probe), all_rows=True)
        return out.features, out.prompts

    features, travelled = look()
    assert [probe.entering.shape[1] for probe in seen] == [11] * 3
    assert all(probe.to_prompts.min() > 0 and probe.to_prompts.shape[-1] == 11 for probe in seen)
    prompts.value(2).data.add_(1.0)
    after, unmoved = look()
    assert (after - features).abs().max() > 1e-3 and torch.equal(unmoved, travelled)
    prompts.value(0).data.add_(1.0)
    assert not torch.equal(look()[1], travelled)


@both
def test_null_spaces_know_the_attention_to_prompts_beside_alone(tiny_vit, travelling):
    prompts, seen = beside(tiny_vit, length=4, count=7, travelling=travelling), []
    images = torch.randn(5, 3, 32, 32)
    protection = null_space_of(tiny_vit, prompts, images)
    tiny_vit(images, prompts.start(), seen.append)
    assert protection.rows == 5 * 2 * 17
    for probe in seen:
        rows = probe.to_prompts[..., 4:].flatten(0, 2)
        torch.testing.assert_close(protection.attention[probe.layer].float(), rows.T @ rows)


@torch.no_grad()
def test_what_null_spaces_know_of_attention_and_queries_has_the_temperature_in(tiny_vit):
    """Of block 0, by its own layers."""
    prompts, images = beside(tiny_vit, length=4, count=7, travelling="gapt"), torch.randn(5, 3, 32, 32)
    protection, attention = null_space_of(tiny_vit, prompts, images), tiny_vit.model.blocks[0].attn
    temperature = prompts.carrier.temperatures[0]
    assert abs(temperature - 1) > 0.1
    frozen = tiny_vit.embed(images)[0]
    normed = tiny_vit.model.blocks[0].norm1(torch.cat([frozen, prompts.carrier.value(0).expand(5, -1, -1)], dim=1))
    rows = torch.cat([normed, prompts.value(0).expand(5, -1, -1)], dim=1)  # behind the norm
    q, k, _ = attention.qkv(rows).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
    q = q[:, :, :17] / temperature
    weights = attention_weights(q, k)[..., 21:].flatten(0, 2)
    torch.testing.assert_close(protection.attention[0].float(), weights.T @ weights)
    grams = torch.einsum("bhnd,bhne->hde", q, q)
    torch.testing.assert_close(protection.queries[0].float(), grams, rtol=1e-5, atol=1e-4)


@both
def test_without_those_beside_it_is_what_travels(tiny_vit, travelling):
    prompts, images = beside(tiny_vit, length=4, count=0, travelling=travelling), torch.randn(5, 3, 32, 32)
    ours, theirs = (tiny_vit(images, part.start()).features for part in (prompts, prompts.carrier))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_beside_nothing_that_travels_they_are_deep_prompts_after_the_norm(tiny_vit):
    prompts, images = beside(tiny_vit, length=0, count=7), torch.randn(5, 3, 32, 32)
    deep = DeepPrompts(range(3), 7, 24, normed=True)
    deep.load_state_dict({name: value for name, value in prompts.state_dict().items() if "carrier" not in name})
    ours, theirs = (tiny_vit(images, part.start()).features for part in (prompts, deep))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ── the method ───────────────────────────────────────────────────────────────────────────────────────


@both
def test_the_first_task_trains_all_and_later_ones_those_beside_alone(tiny_vit, travelling):
    settings = LSPTNSP2(carrier=travelling, length=4, plastic=9, epochs=2, batch_size=9, head_start="small")
    trainer, stream = trainer_of(settings, tiny_vit), blobs()
    trainer.learner.model.begin_task(stream.tasks[0])
    start = kept(trainer)
    trainer = trainer_of(settings, tiny_vit)
    trainer.learn(stream.tasks[0])
    first = kept(trainer)
    names = {name for name in first if name.startswith("prompts")}
    assert names <= moved(start, first)
    gated = {"prompts.carrier.values.0", "prompts.carrier.gates", "prompts.carrier.temperatures"}
    assert (gated <= names) == (travelling == "gapt")
    trainer.learn(stream.tasks[1])
    assert moved(first, kept(trainer)) & names == {f"prompts.values.{i}" for i in range(3)}


def test_temperatures_stay_within_limits_in_the_first_task(tiny_vit):
    settings = LSPTNSP2(carrier="gapt", length=4, plastic=9, epochs=2, batch_size=9, lr=30.0, clip_norm=0.0)
    trainer = trainer_of(settings, tiny_vit)
    trainer.learn(blobs(tasks=1).tasks[0])
    temperatures = [round(value, 6) for value in trainer.learner.model.prompts.carrier.temperatures.tolist()]
    assert all(0.01 <= value <= 10 for value in temperatures) and {*temperatures} & {0.01, 10.0}


def test_with_the_prompts_of_gapt_settings_of_lspt_s_change_nothing_and_say_so(tiny_vit):
    assert LSPTNSP2().idle() == {"gate_init": "with carrier=lspt"}
    of_lspt = {"carry", "carriers", "shared", "forget_bias", "spatial", "hidden_norm", "tie_first", "learn_cell"}
    idle = LSPTNSP2(carrier="gapt", kept=0.9).idle()
    assert idle.keys() == of_lspt | {"hears", "recurrent_rate", "max_drift"}
    assert idle["carry"] == "with carrier=gapt" and idle["max_drift"].startswith("where kept is given")
    with pytest.raises(ConfigError, match=r"^carry changes nothing with carrier=gapt; leave it out, or change that$"):
        LSPTNSP2(carrier="gapt", carry="gru").heed({"carry": "gru"}, {})


def test_the_settings_of_gapt_reach_its_prompts(tiny_vit):
    settings = LSPTNSP2(carrier="gapt", length=4, gate_init=3.0, dropout=0.3, dropout_mode="shared")
    learner = settings.build(tiny_vit)
    null_space, limits = learner.protections
    carrier = learner.model.prompts.carrier
    assert type(carrier) is GatedPrompts and carrier.value(0).shape == (4, 24)
    assert carrier.gates.tolist() == [-3.0] * 2 and (carrier.dropout, carrier.dropout_mode) == (0.3, "shared")
    assert carrier.value(0).abs().max() <= (6 / (192 + 24)) ** 0.5
    assert type(limits) is Limits and limits.parameter is carrier.temperatures
    assert type(null_space) is BoundedNullSpace and null_space.prompts is learner.model.prompts


def test_defaults_and_what_is_built_from_them(tiny_vit):
    settings = LSPTNSP2()
    assert (settings.length, settings.plastic, settings.max_drift, settings.kept) == (10, 16, 0.05, None)
    assert settings.freeze_after_first and settings.recurrent_rate == 0.1
    assert (settings.carrier, settings.gate_init) == ("lspt", 5.0)
    learner = settings.build(tiny_vit)
    (null_space,), prompts = learner.protections, learner.model.prompts
    assert type(null_space) is BoundedNullSpace and null_space.prompts is prompts and null_space.normed
    assert prompts.value(1).shape == (16, 24) and prompts.carrier.value(1).shape == (10, 24)
    (plain,) = LSPTNSP2(kept=0.75).build(tiny_vit).protections
    assert type(plain) is NullSpace and plain.cut == Cut(knee="energy", kept=0.75) and plain.right_alone


def test_a_carrier_that_goes_on_learning_is_refused():
    with pytest.raises(ConfigError) as error:
        LSPTNSP2(freeze_after_first=False)
    assert str(error.value) == (
        "LSPTNSP2.freeze_after_first must be true, since no null space protects what travels; got False: take lspt to "
        "train all of it"
    )
