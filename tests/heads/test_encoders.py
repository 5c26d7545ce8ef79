"""A Gaussian for each class by an encoder for each task: B 7, C 6 in tasks of 3, 1 and 2, F 10, 4 templates."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from lamina.heads.encoders import Encoder, Encoders, divergence
from lamina.heads.guidance import Guidance
from tests.backbones.clips import close

SIZES = [3, 1, 2]
TASK_OF = [0, 0, 0, 1, 2, 2]


def drawn(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grown(tasks=3, **options):
    """Encoders of some tasks, whose norms are not those they start with."""
    torch.manual_seed(0)
    encoders = Encoders(10, **options)
    for _ in range(tasks):
        encoders.grow()
    with torch.no_grad():
        for module in encoders.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(0.3 * torch.randn(10))
                module.bias.add_(0.3 * torch.randn(10))
    return encoders


def by_hand(encoders, names, which):
    """Means and deviations, one image and one class after the other."""
    means, spreads = torch.zeros_like(names), torch.zeros_like(names)
    for image in range(len(names)):
        for place, task in enumerate(TASK_OF):
            encoder, x = encoders.tasks[which[task]], names[image, place]
            means[image, place] = encoder.mean(encoder.mean_norm(x) if encoder.mean_norm else x)
            if encoder.spread is not None:
                raw = encoder.spread(encoder.spread_norm(x) if encoder.spread_norm else x)
                spreads[image, place] = 0.999 * F.softplus(raw) + 0.001
    return means, spreads


# ── what they say ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("which", [[0, 1, 2], [0, 1, 1], [2, 2, 2]])
def test_each_class_goes_through_the_encoder_of_its_own_task(normed, which):
    """Gradients, too, though tasks of unequal sizes are computed side by side."""
    encoders, names = grown(normed=normed), drawn(7, 6, 10).requires_grad_()
    encoders.requires_grad_(True)
    found, expected = encoders(names, SIZES, which), by_hand(encoders, names, which)
    learned = [names, *(p for number in set(which) for p in encoders.tasks[number].parameters())]
    gradients = []
    for mean, spread in (found, expected):
        close(mean, expected[0])
        close(spread, expected[1])
        total = (mean * drawn(7, 6, 10, seed=4)).sum() + (spread * drawn(7, 6, 10, seed=5)).sum()
        gradients.append(torch.autograd.grad(total, learned))
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)


def test_without_a_spread_there_are_means_alone():
    encoders, names = grown(normed=True, learns_spread=False), drawn(7, 6, 10)
    mean, spread = encoders(names, SIZES, [0, 1, 2])
    assert spread is None
    close(mean, by_hand(encoders, names, [0, 1, 2])[0])
    assert {name.split(".")[2] for name, _ in encoders.named_parameters()} == {"mean", "mean_norm"}


def test_a_deviation_never_falls_below_a_thousandth():
    encoders = grown()
    with torch.no_grad():
        for task in encoders.tasks:
            task.spread.weight.zero_()
            task.spread.bias.fill_(-200.0)
    assert encoders(drawn(7, 6, 10), SIZES, [0, 1, 2])[1].unique().tolist() == pytest.approx([0.001])
    for task in encoders.tasks:
        nn.init.zeros_(task.spread.bias)
    assert encoders(drawn(7, 6, 10), SIZES, [0, 1, 2])[1].unique().tolist() == pytest.approx([0.69345], abs=1e-5)
    assert pytest.approx(0.999 * math.log(2) + 0.001, abs=1e-5) == 0.69345


# ── the divergence ───────────────────────────────────────────────────────────────────────────────────


def test_the_divergence_is_that_of_torch_summed_over_channels():
    mean, spread = drawn(7, 6, 10), drawn(7, 6, 10, seed=3).exp()
    slow = kl_divergence(Normal(mean, spread), Normal(torch.zeros(7, 6, 10), torch.ones(7, 6, 10))).sum(-1)
    torch.testing.assert_close(divergence(mean, spread), slow, rtol=1e-5, atol=1e-5)
    assert divergence(mean, spread).shape == (7, 6) and divergence(mean, spread).min() > 0
    assert divergence(torch.zeros(6, 10), torch.ones(6, 10)).abs().max() <= 1e-6


# ── how they grow ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("width", "normed", "numbers"),
    [(512, False, 525_312), (512, True, 527_360), (768, False, 1_181_184), (768, True, 1_184_256)],
)
def test_an_encoder_has_as_many_numbers_as_published(width, normed, numbers):
    with torch.device("meta"):
        assert sum(p.numel() for p in Encoder(width, normed=normed).parameters()) == numbers


def test_ten_tasks_and_the_attention_have_as_many_numbers_as_published():
    with torch.device("meta"):
        encoders, guidance = Encoders(512), Guidance(512)
        for _ in range(10):
            encoders.grow()
        assert sum(p.numel() for part in (encoders, guidance) for p in part.parameters()) == 9_457_152


def test_a_new_task_freezes_the_encoders_before_it():
    encoders = Encoders(10, normed=True)
    for task in range(3):
        assert encoders.grow() is encoders.tasks[task] and encoders.learning == [task]
        asked = [all(p.requires_grad for p in encoder.parameters()) for encoder in encoders.tasks]
        assert asked == [False] * task + [True]
        assert not any(p.requires_grad for encoder in encoders.tasks[:task] for p in encoder.parameters())


def test_one_for_all_tasks_grows_once_and_learns_on():
    encoders = Encoders(10, shared=True)
    assert [encoders.grow() is None for _ in range(3)] == [False, True, True]
    assert len(encoders.tasks) == 1 and all(p.requires_grad for p in encoders.parameters())


# ── how they start ───────────────────────────────────────────────────────────────────────────────────


def started(templates, **options):
    torch.manual_seed(0)
    encoder = Encoder(10, **options)
    biases = [part.bias.clone() for part in (encoder.mean, encoder.spread) if part is not None]
    encoder.start(templates)
    assert [part.bias.tolist() for part in (encoder.mean, encoder.spread) if part is not None] == [
        bias.tolist() for bias in biases
    ]
    return encoder


def test_an_encoder_starts_with_second_moments_of_templates():
    templates = F.normalize(drawn(6, 4, 10), dim=-1)
    encoder, means, spreads = started(templates, normed=True), torch.zeros(10, 10), torch.zeros(10, 10)
    for said in templates:
        mean = sum(said) / 4
        variance = sum((row - mean) ** 2 for row in said) / (4 - 1)
        means += torch.outer(mean, mean) / 10
        spreads += torch.outer(variance, variance) / 10
    close(encoder.mean.weight, means, 1e-6)
    torch.testing.assert_close(encoder.spread.weight, spreads, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("classes", [6, 13])
def test_what_it_starts_with_is_symmetric_and_small(classes):
    templates = F.normalize(drawn(classes, 4, 10), dim=-1)
    encoder = started(templates)
    weight = encoder.mean.weight.detach().double()
    values = torch.linalg.eigvalsh(weight)
    assert (weight - weight.T).abs().max() < 1e-8 and values.min() > -1e-8
    assert (values > 1e-6).sum() <= min(classes, 10)
    trace = templates.mean(1).square().sum().item() / 10
    assert weight.trace().item() == pytest.approx(trace, rel=1e-5) and trace <= classes / 10
    assert encoder.spread.weight.min() >= 0
    for part in (encoder.mean, encoder.spread):
        assert part.bias.abs().max() <= 10**-0.5 and part.bias.std() > 0.1


def test_one_template_is_enough_for_means_alone():
    encoder = started(drawn(6, 1, 10), learns_spread=False)
    assert encoder.spread is None and torch.isfinite(encoder.mean.weight).all()


@pytest.mark.parametrize("learns_spread", [True, False])
def test_an_encoder_can_start_with_maps_that_are_zero(learns_spread):
    encoder = Encoder(10, learns_spread=learns_spread)
    biases = {name: value.clone() for name, value in encoder.named_parameters() if "bias" in name}
    encoder.clear()
    for name, value in encoder.named_parameters():
        assert torch.equal(value, biases[name]) if "bias" in name else not value.any()
