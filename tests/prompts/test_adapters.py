"""Adapters: B 7, N 17, D 24, L 3; 5 hidden numbers."""

import copy

import pytest
import torch

from lamina.backbones.timm_vit import TimmTower
from lamina.errors import ConfigError
from lamina.methods.adapter import Adapter
from lamina.methods.bi_adaptformer import BiAdaptFormer
from lamina.prompts.adapters import Adapters, ParallelAdapter, SerialAdapter, codebook, hidden_width, quantised
from tests.backbones.conftest import tiny
from tests.conftest import make_tiny_vit
from tests.streams import blobs, trainer_of

IMAGES = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def stirred(module):
    """Give every weight a value that matters."""
    torch.manual_seed(3)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return module


def serial():
    return Adapters([SerialAdapter(24, 5) for _ in range(3)])


def parallel(bits=1, scale=2.0, dropout=0.1):
    return Adapters([ParallelAdapter(24, 5, bits=bits, scale=scale, dropout=dropout) for _ in range(3)]).eval()


def block_by_hand(block, z, added):
    """One block of timm, with what is said of (x, y) in place of y."""
    z = z + block.attn(block.norm1(z))
    return z + added(z, block.mlp(block.norm2(z)))


def features_by_hand(model, images, said):
    z = model._pos_embed(model.patch_embed(images))
    for block, added in zip(model.blocks, said, strict=True):
        z = block_by_hand(block, z, added)
    return model.norm(z)[:, 0]


@pytest.mark.parametrize("all_rows", [False, True])
def test_an_adapter_behind_the_mlp_is_inside_the_residual_branch(all_rows):
    model, adapters = tiny().double(), stirred(serial()).double()

    def said(part):
        def added(x, y):
            hidden = y @ part.down.weight.T + part.down.bias
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
            return y + hidden @ part.up.weight.T + part.up.bias

        return added

    expected = features_by_hand(model, IMAGES.double(), [said(part) for part in adapters.parts])
    tower = TimmTower(copy.deepcopy(model), dtype=torch.float64)
    found = tower(IMAGES.double(), adapters.start(), all_rows=all_rows).features
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert (found - tower(IMAGES.double()).features).abs().max() > 1e-2


@pytest.mark.parametrize("bits", [0, 1, 3])
def test_an_adapter_beside_the_mlp_reads_what_comes_before_its_norm(bits):
    model, adapters = tiny().double(), stirred(parallel(bits)).double()

    def said(part):
        down, up = (by_hand(layer.weight, bits) if bits else layer.weight for layer in (part.down, part.up))
        return lambda x, y: y + 2.0 * (x @ down.T).clamp(min=0) @ up.T

    expected = features_by_hand(model, IMAGES.double(), [said(part) for part in adapters.parts])
    tower = TimmTower(copy.deepcopy(model), dtype=torch.float64)
    found = tower(IMAGES.double(), adapters.start()).features
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert (found - tower(IMAGES.double()).features).abs().max() > 1e-2


def by_hand(weight, bits):
    """Quantise a weight: its standard score's share of a normal distribution says which part it falls in."""
    normal, parts = torch.distributions.Normal(0.0, 1.0), 2**bits
    mean, deviation = weight.mean(), weight.std() + 1e-5
    share = normal.cdf((weight - mean) / deviation)
    part = (share * parts).floor().clamp(0, parts - 1)
    return normal.icdf((part + 0.5) / parts) * deviation + mean


# ── where they start ───────────────────────────────────────────────────────────────────────────────


def test_an_adapter_behind_the_mlp_starts_as_one_that_says_nothing():
    tower = TimmTower(tiny())
    assert torch.equal(tower(IMAGES, serial().start()).features, tower(IMAGES).features)


def gradients(adapters, steps=2):
    """Which parameters of the first adapter got a gradient that is not zero, step by step."""
    tower, optimizer = TimmTower(tiny()), torch.optim.SGD(adapters.parameters(), lr=0.1)
    direction, seen = torch.linspace(-1, 1, 24), []
    for _ in range(steps):
        optimizer.zero_grad()
        (tower(IMAGES, adapters.start()).features @ direction).sum().backward()
        seen.append({name for name, p in adapters.parts[0].named_parameters() if p.grad.abs().max() > 0})
        optimizer.step()
    return seen


def test_down_learns_from_the_second_step_on():
    assert gradients(serial()) == [
        {"up.weight", "up.bias"},
        {"up.weight", "up.bias", "down.weight", "down.bias"},
    ]


def test_where_down_starts_at_zero_too_nothing_but_one_bias_ever_learns():
    """The trap of the released code, kept here so that nobody walks into it."""
    adapters = serial()
    for weight in adapters.parameters():
        torch.nn.init.zeros_(weight)
    assert gradients(adapters, steps=6) == [{"up.bias"}] * 6


def test_an_adapter_beside_the_mlp_starts_nearly_silent_and_learns_everywhere():
    part = ParallelAdapter(768, 32, bits=1, scale=1.0, dropout=0.1)
    assert part.up.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert not [name for name, _ in part.named_parameters() if "bias" in name]
    assert gradients(parallel(), steps=1) == [{"down.weight", "up.weight"}]


# ── counts ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_vit_b_has_148_320_numbers_in_each_adapter_of_a_reduction_by_8():
    assert hidden_width(768, 8) == 96
    assert sum(p.numel() for p in SerialAdapter(768, 96).parameters()) == 148_320
    assert 12 * sum(p.numel() for p in SerialAdapter(768, hidden_width(768, 3)).parameters()) == 4_730_880


@pytest.mark.parametrize(
    "settings, hidden", [(Adapter(), 3), (Adapter(reduction=5), 4), (Adapter(hidden=7), 7)], ids=["8", "5", "hidden"]
)
def test_what_is_trained_is_the_adapters_and_the_classifier(settings, hidden, tiny_vit):
    trainer = trainer_of(settings, tiny_vit)
    trainer._begin([blobs().tasks[0]])
    assert trainer.learner.model.trainable_parameters == 3 * (2 * 24 * hidden + hidden + 24) + 24 * 3 + 3


def test_the_adapters_of_bi_adaptformer_have_no_biases(tiny_vit):
    trainer = trainer_of(BiAdaptFormer(hidden=5), tiny_vit)
    trainer._begin([blobs().tasks[0]])
    assert trainer.learner.model.trainable_parameters == 3 * 2 * 24 * 5 + 24 * 3 + 3
    assert all("codes" not in name and "cuts" not in name for name in trainer.learner.model.learned())


def test_a_reduction_that_leaves_nothing_is_refused(tiny_vit):
    with pytest.raises(ConfigError) as error:
        Adapter(reduction=25).build(tiny_vit)
    assert str(error.value) == "reduction must be at most the backbone's width, 24; got 25"
    with pytest.raises(ConfigError) as error:
        Adapter(reduction=4, hidden=5).heed({"reduction": 4, "hidden": 5}, {})
    assert str(error.value) == "reduction changes nothing with hidden=5; leave it out, or change that"


# ── few bits ───────────────────────────────────────────────────────────────────────────────────────


def test_one_bit_stands_for_the_quartiles_of_a_normal_distribution():
    codes, cuts = codebook(1)
    assert codes.tolist() == pytest.approx([-0.67449, 0.67449], abs=1e-5)
    assert cuts.tolist() == [0.0]


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_weight_takes_no_more_values_than_its_bits_can_tell_apart(bits):
    weight = torch.randn(40, 24) * 0.2 + 3
    found = quantised(weight, *codebook(bits))
    assert len(found.unique()) == 2**bits
    torch.testing.assert_close(found, by_hand(weight, bits), rtol=1e-5, atol=1e-5)
    assert all(count > 960 / 2**bits / 2 for count in found.unique(return_counts=True)[1])


def test_a_gradient_goes_through_as_if_no_bit_had_been_lost():
    weight, upstream = torch.randn(5, 24, requires_grad=True), torch.randn(5, 24)
    (quantised(weight, *codebook(1)) * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream)


def test_a_weight_of_one_number_over_and_over_stays_finite():
    assert quantised(torch.full((5, 24), 0.3), *codebook(1)).isfinite().all()


# ── training and precision ─────────────────────────────────────────────────────────────────────────


def test_hidden_numbers_are_dropped_in_training_alone_each_by_itself():
    part = stirred(ParallelAdapter(24, 5, bits=0, scale=1.0, dropout=0.5))
    x = torch.randn(7, 17, 24)
    y = torch.zeros_like(x)
    assert not torch.equal(part(x, y), part(x, y))
    part.eval()
    assert torch.equal(part(x, y), part(x, y))
    part.train().dropout = 0.0
    assert torch.equal(part(x, y), part.eval()(x, y))


@pytest.mark.parametrize("make", [serial, parallel])
def test_what_is_learned_stays_float32_on_a_tower_in_bf16(make):
    half, adapters = TimmTower(tiny(), dtype=torch.bfloat16), stirred(make())
    found = half(IMAGES, adapters.start())
    assert found.features.dtype == torch.float32
    found.features.square().sum().backward()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in adapters.parameters())
    exact = TimmTower(tiny())(IMAGES, adapters.start()).features
    assert (found.features - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("settings", [Adapter(epochs=5, batch_size=27), BiAdaptFormer(epochs=5, batch_size=27)])
def test_after_five_steps_the_tower_is_bit_for_bit_what_it_was(settings):
    tower = make_tiny_vit()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    trainer = trainer_of(settings, tower)
    trainer.learn(blobs().tasks[0])
    moved = trainer.learner.model.prompts.state_dict()
    fresh = trainer_of(settings, make_tiny_vit()).learner.model.prompts.state_dict()
    assert trainer.log is not None and all(not torch.equal(moved[name], fresh[name]) for name in fresh)
    assert all(torch.equal(value, tower.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None for p in tower.parameters())
