"""Gated prompts, against sequences computed slowly. B 5, N 17, M 4, D 24, L 3."""

import pytest
import torch
from torch import nn

from lamina.backbones import tower as engine
from lamina.backbones.attention import attention_weights
from lamina.methods.gapt import GaPT
from lamina.prompts.deep import DeepPrompts
from lamina.prompts.gated import GatedPrompts
from lamina.prompts.long_term import LongTermPrompts
from lamina.prompts.shallow import ShallowPrompts
from lamina.protections.limits import Limits
from tests.prompts.sequences import by_hand, drawn, entering_of, gradients, images, near, tower64
from tests.streams import blobs, trainer_of

OPEN, SHUT = 50.0, -800.0  # the sigmoid of either is 1 or 0 to the last bit of float64


def prompts_of(gates=(0.3, -1.2), temperatures=(1.0, 0.7, 1.6)):
    prompts = GatedPrompts(3, 4, 24).double()
    with torch.no_grad():
        prompts.value(0).copy_(drawn(4, 24))
        prompts.gates.copy_(torch.tensor(gates, dtype=torch.float64))
        prompts.temperatures.copy_(torch.tensor(temperatures, dtype=torch.float64))
    return prompts


def features_of(prompts):
    return tower64()(images(), prompts.start()).features


def slowly(prompts):
    """Return features, and what entered and came out of each block, by the definition."""
    entered = []

    def entering(layer, out, _):
        if not layer:
            entered.append(prompts.value(0)[None])
        else:
            gate = prompts.gates[layer - 1].sigmoid()
            entered.append(gate * out + (1 - gate) * entered[-1])
        return entered[-1]

    return by_hand(tower64(), images(), entering, temperatures=prompts.temperatures)


# ── what it does ─────────────────────────────────────────────────────────────────────────────────────


def test_features_and_gradients_are_those_of_the_definition():
    prompts = prompts_of()
    got, (want, _) = features_of(prompts), slowly(prompts)
    near(got, want)
    ours, theirs = (gradients(features, prompts.parameters()) for features in (got, want))
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().min() > 1e-8
        near(a, b, 1e-9)


def test_open_gates_are_vpt_shallow_bit_for_bit():
    gated, shallow = prompts_of(gates=[OPEN] * 2, temperatures=[1.0] * 3), ShallowPrompts(3, 4, 24).double()
    shallow.values.load_state_dict(gated.values.state_dict())
    assert torch.equal(features_of(gated), features_of(shallow))


def test_closed_gates_are_vpt_deep_with_one_set_for_all_blocks():
    gated, deep = prompts_of(gates=[SHUT] * 2, temperatures=[1.0] * 3), DeepPrompts(range(3), 4, 24).double()
    with torch.no_grad():
        for value in deep.parameters():
            value.copy_(gated.value(0))
    near(features_of(gated), features_of(deep))
    assert all(torch.equal(seen, gated.value(0).expand(5, -1, -1)) for seen in entering_of(tower64(), gated, images()))


def test_a_gated_prompt_lies_between_what_entered_and_what_came_out():
    _, seen = slowly(prompts_of())
    got = entering_of(tower64(), prompts_of(), images())
    for (entered, out), now in zip(seen[:-1], got[1:], strict=True):
        assert (now >= entered.minimum(out) - 1e-12).all() and (now <= entered.maximum(out) + 1e-12).all()


def test_a_temperature_divides_the_logits_of_every_query_and_a_vast_one_makes_attention_uniform():
    prompts, weights = prompts_of(temperatures=[1e8] * 3), []
    tower64()(images(), prompts.start(), lambda probe: weights.append(probe.attention))
    assert [w.shape[-1] for w in weights] == [21, 21, 21]
    for part in weights:
        assert (part - 1 / 21).abs().max() <= 1e-6
    q, k = drawn(5, 2, 17, 12), drawn(5, 2, 21, 12, seed=5)
    near(attention_weights(q / 0.7, k), (q @ k.mT / 12**0.5 / 0.7).softmax(-1))


def test_with_dropout_every_block_is_shown_the_same_mask(tiny_vit):
    prompts = GatedPrompts(3, 4, 24, dropout=0.5)
    nn.init.constant_(prompts.gates, -100.0)
    first, *rest = entering_of(tiny_vit, prompts, images().float())
    assert 0.3 < (first == 0).float().mean() < 0.7 and all(torch.equal(first, other) for other in rest)


# ── what learns from a loss behind the last block ────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: ShallowPrompts(3, 4, 24), 1),
        (lambda: DeepPrompts(range(3), 4, 24), 3),
        (lambda: GatedPrompts(3, 4, 24, gate_init=5.0), 3),
        (lambda: LongTermPrompts(3, 4, 24), 7),
        (lambda: LongTermPrompts(3, 4, 24, carry="none"), 3),
    ],
    ids=["shallow", "deep", "gated", "long-term", "long-term without a carrier"],
)
def test_a_loss_behind_the_last_block_reaches_every_prompt_from_where_they_start(make, count):
    torch.manual_seed(1)
    prompts = make().double()
    found = gradients(features_of(prompts), prompts.parameters())
    assert len(found) == count
    for gradient in found:  # of prompts each token, of gates and temperatures each block
        assert gradient.reshape(len(gradient), -1).norm(dim=1).min() > 1e-8


@pytest.mark.parametrize("gate", [0.3, SHUT])
def test_where_images_bring_no_gradient_early_blocks_learn_through_open_gates_alone(monkeypatch, gate):
    """Closed gates leave the prompts' own way to the last block, and the temperature there."""
    run = engine.run_block

    def cut(block, x, splice, mask, tap, layer, length, *rest):
        x = torch.cat([x[:, :length].detach(), x[:, length:]], dim=1)
        return run(block, x, splice, mask, tap, layer, length, *rest)

    monkeypatch.setattr(engine, "run_block", cut)
    prompts = prompts_of(gates=[gate] * 2)
    learned = prompts.value(0), prompts.gates, prompts.temperatures
    tokens, gates, temperatures = gradients(features_of(prompts), learned)
    assert tokens.norm(dim=1).min() > 1e-8 and temperatures[-1].abs() > 1e-8
    early = torch.cat([gates, temperatures[:-1]]).abs()
    assert not early.any() if gate == SHUT else early.min() > 1e-8


# ── the method ───────────────────────────────────────────────────────────────────────────────────────


def test_as_many_numbers_are_learned_as_counted():
    prompts = GatedPrompts(12, 100, 768)
    assert sum(value.numel() for value in prompts.parameters()) == 76_823
    assert prompts.gates.shape == (11,) and prompts.temperatures.shape == (12,)


def test_gates_start_almost_closed_and_temperatures_at_one():
    prompts = GatedPrompts(3, 4, 24)
    assert prompts.gates.sigmoid().tolist() == pytest.approx([4.54e-5] * 2, rel=1e-3)
    assert prompts.temperatures.tolist() == [1.0] * 3
    assert GatedPrompts(3, 4, 24, gate_init=5.0).gates.sigmoid().tolist() == pytest.approx([0.00669] * 2, rel=1e-3)


def test_a_temperature_that_a_step_takes_beyond_its_limits_is_at_the_limit_and_comes_back():
    value = nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    optimizer = torch.optim.SGD([value], lr=1.0)
    with Limits(value, 0.01, 10.0).guard(optimizer):
        for push, want in [([5.0, -50.0, 0.5], [0.01, 10.0, 0.5]), ([-1.0, 1.0, 0.0], [1.01, 9.0, 0.5])]:
            value.grad = torch.tensor(push)
            optimizer.step()
            torch.testing.assert_close(value.detach(), torch.tensor(want))
    value.grad = torch.tensor([5.0, 0.0, 0.0])
    optimizer.step()
    assert value[0] < 0  # outside, nothing holds it


def test_temperatures_stay_within_limits_in_training_and_a_forward_pass_changes_nothing(tiny_vit):
    trainer = trainer_of(GaPT(length=4, epochs=2, batch_size=9, lr=30.0, head_start="small"), tiny_vit)
    trainer.learn(blobs(tasks=1).tasks[0])
    prompts = trainer.learner.model.prompts
    assert all(0.01 <= value <= 10 for value in prompts.temperatures.tolist())
    with torch.no_grad():
        prompts.temperatures.fill_(50.0)
        tiny_vit(images().float(), prompts.start())
    assert prompts.temperatures.tolist() == [50.0] * 3


def test_defaults_are_those_of_the_released_example(tiny_vit):
    settings = GaPT()
    assert (settings.length, settings.gate_init, settings.dropout) == (100, 5.0, 0.1)
    assert (settings.lr, settings.weight_decay, settings.batch_size) == (0.1, 0.0, 64)
    learner = GaPT(length=4).build(tiny_vit)
    (limits,) = learner.protections
    assert limits.parameter is learner.model.prompts.temperatures and (limits.low, limits.high) == (0.01, 10.0)
