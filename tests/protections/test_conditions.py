"""When old images feel nothing of a step of the prompts, on one block (A8-1 to 4, 8 to 11).

One image, N 10 tokens, M 64 prompt tokens, D 96 channels, H 4 heads, d 24; block 1 of two. The image has 40 rows
of queries, fewer than there are channels and tokens, so that both null spaces are exact.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lamina.backbones.splice import Probe, Splice
from lamina.backbones.timm_vit import TimmTower
from lamina.backbones.tower import Tower
from lamina.prompts.base import Scripted
from lamina.prompts.deep import DeepPrompts
from lamina.protections.null_space import NullSpace
from lamina.protections.projector import Blend, Spectrum
from lamina.protections.spectrum import Cut

LAYER = 1
FULL = Blend(normalize=False)
#: in float32, sums are zero only up to its rounding; the smallest share of a used direction is above 1e-5
EXACT = {torch.float64: Cut(knee="energy", kept=1.0), torch.float32: Cut(knee="energy", kept=1 - 1e-6)}
AFFINE = {"ln_correction": "affine"}


class Toy(NamedTuple):
    """A block with its prompts and an image that it has learned from."""

    tower: Tower
    prompts: DeepPrompts
    image: Tensor

    @property
    def start(self) -> Tensor:
        return self.prompts.value(LAYER).detach()

    @property
    def norm(self) -> torch.nn.LayerNorm:
        return self.tower.blocks()[LAYER].first_norm


def toy(dtype=torch.float64, weight=None, alike=False):
    """Make a block whose every weight matters.

    Args:
        weight: of all channels in the first norm; random from 0.1 to 2.1 if None.
        alike: all prompts have mean 0 and deviation 1; else their deviations lie a factor of 6 apart.
    """
    torch.manual_seed(0)
    tower = TimmTower.create(
        "vit_tiny_patch16_224", img_size=12, patch_size=4, embed_dim=96, depth=2, num_heads=4, dtype=dtype
    )
    prompts = DeepPrompts([LAYER], 64, 96).to(dtype)
    with torch.no_grad():
        for name, value in tower.named_parameters():
            if value.ndim > 1:
                scale = 1.0 if value.ndim == 3 else value[0].numel() ** -0.5  # tokens and positions, or weights
                value.copy_(scale * torch.randn_like(value))
            elif "norm1.weight" in name:
                value.copy_(2 * torch.rand_like(value) + 0.1 if weight is None else torch.full_like(value, weight))
            else:
                value.copy_(0.3 * torch.randn_like(value) + (0.0 if name.endswith("bias") else 1.0))
        value = prompts.value(LAYER)
        value.copy_((value - value.mean(-1, keepdim=True)) / value.std(-1, unbiased=False, keepdim=True))
        if not alike:
            value.mul_(torch.linspace(0.5, 3.0, 64)[torch.randperm(64), None])
            value.add_(torch.randn(64, 1))
    return Toy(tower, prompts, torch.randn(1, 3, 12, 12, dtype=dtype))


class Seen(NamedTuple):
    """What the image has of the prompts: scores and attention (B, H, N, M), and tokens after the block (B, N, D)."""

    scores: Tensor
    attention: Tensor
    output: Tensor


@torch.no_grad()
def probed(block, prompt, normed=False):
    """Return what a tap sees of the block with prompts (M, D), and the tokens after it."""
    probes: list[Probe] = []
    splice = Splice(context=prompt, context_normed=normed)
    script = Scripted(lambda layer, tokens, carried: splice if layer == LAYER else None)
    tokens = block.tower(block.image, script, tap=probes.append, all_rows=True).tokens
    return probes[LAYER], tokens


@torch.no_grad()
def seen(block, prompt, normed=False):
    probe, tokens = probed(block, prompt, normed)
    view = block.tower.blocks()[LAYER]
    keys, _ = view.keys_values(prompt[None] if normed else view.norm(prompt[None]))
    return Seen(probe.queries @ keys.mT, probe.to_prompts, tokens)


def changes(block, step, frozen=True):
    """How far a step moves what is seen, relative to its norm; with a norm that is frozen where the step begins."""
    norm, start = block.norm, block.start
    if frozen:
        deviation = (start.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        before, after = norm(start), norm(start) + step / deviation * norm.weight
    else:
        before, after = start, start + step
    return Seen(
        *(
            float((now - then).norm() / then.norm())
            for then, now in zip(seen(block, before, frozen), seen(block, after, frozen), strict=True)
        )
    )


def protection(block, **options):
    """Look back on the image."""
    options = {"channels": FULL, "tokens": FULL, "cut": EXACT[block.image.dtype], **options}
    null_space = NullSpace(block.tower, block.prompts, **options)
    null_space.begin_look()
    with torch.no_grad():
        block.tower(block.image, block.prompts.start(), tap=null_space.see)
    null_space.end_look(lambda total: total)
    return null_space


def step_of(block, null_space, size):
    """What a step of SGD, which would be `size` times as long as the prompts, becomes under the protection."""
    value, start = block.prompts.value(LAYER), block.start.clone()
    value.grad = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)).to(value)
    optimizer = torch.optim.SGD([value], lr=float(size * start.norm() / value.grad.norm()))
    with null_space.guard(optimizer):
        optimizer.step()
    step = value.detach() - start
    value.data.copy_(start)
    assert step.norm() > 0.3 * size * start.norm()
    return step


# ── the norm goes on as it did ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("dtype", "size", "bound"),
    [(torch.float64, size, 1e-10) for size in (0.01, 1.0, 100.0)]
    + [(torch.float32, size, 1e-5) for size in (0.01, 1.0, 10.0)],
)
def test_with_the_affine_correction_a_step_of_any_size_changes_nothing_that_the_image_has_of_the_prompts(
    dtype, size, bound
):
    block = toy(dtype)
    assert max(changes(block, step_of(block, protection(block, **AFFINE), size))) <= bound


def test_the_published_conditions_do_the_same_where_the_norm_treats_all_channels_and_tokens_alike():
    block = toy(weight=0.7, alike=True)
    assert max(changes(block, step_of(block, protection(block), 2.0))) <= 1e-10


@pytest.mark.parametrize(
    ("weight", "alike", "scores_move"), [(None, False, True), (None, True, True), (0.7, False, False)]
)
def test_the_published_conditions_do_not_where_it_does_not(weight, alike, scores_move):
    """What is published stays as published: only where it is asked for are they corrected."""
    block = toy(weight=weight, alike=alike)
    changed = changes(block, step_of(block, protection(block), 2.0))
    assert changed.output > 1e-2
    assert changed.scores > 1e-2 if scores_move else changed.scores <= 1e-10


def test_without_the_projection_of_tokens_scores_stay_and_the_output_does_not():
    block = toy()
    changed = changes(block, step_of(block, protection(block, **AFFINE, tokens=None), 1.0))
    assert changed.scores <= 1e-10 and changed.attention <= 1e-10 and changed.output > 1e-2


def test_without_the_projection_of_channels_scores_do_not_stay():
    block = toy()
    assert changes(block, step_of(block, protection(block, **AFFINE, channels=None), 1.0)).scores > 1e-2


# ── the norm as it is ────────────────────────────────────────────────────────────────────────────────

SHORT = 1e-3


def outputs(block, step):
    """How far the output moves, relative to its norm, for steps of a thousandth of the prompts and twice that."""
    step = step * (SHORT * block.start.norm() / step.norm())
    return [changes(block, times * step, frozen=False).output for times in (1, 2)]


def test_under_the_true_norm_each_correction_lessens_what_a_step_moves_in_proportion_to_its_length():
    block, found = toy(), []
    for options in ({}, AFFINE, {**AFFINE, "center": True}):
        once, twice = outputs(block, step_of(block, protection(block, **options), 1.0))
        assert twice == pytest.approx(2 * once, rel=0.02)
        found.append(once)
    published, affine, centred = found
    assert 0 < centred < affine < 0.5 * published


def test_under_the_true_norm_a_step_that_also_keeps_each_token_moves_the_output_with_the_square_of_its_length():
    """Of all steps in the null spaces, one whose rows are orthogonal to ones and to their token without its mean."""
    block = toy()
    spectra = protection(block, **AFFINE, center=True).spectra(LAYER)
    tokens, channels = (spectra[side].free(EXACT[torch.float64]) for side in ("tokens", "channels"))
    rows = torch.stack([torch.ones_like(block.start), block.start - block.start.mean(-1, keepdim=True)])
    conditions = torch.einsum("mr,kmc->kmrc", tokens, rows @ channels).flatten(0, 1).flatten(1)
    mixture = torch.randn(conditions.shape[1])
    mixture = mixture.double() - torch.linalg.pinv(conditions) @ (conditions @ mixture.double())
    step = tokens @ mixture.view(tokens.shape[1], channels.shape[1]) @ channels.T
    step *= SHORT * block.start.norm() / step.norm()
    growth = [
        (block.start + times * step).std(-1, unbiased=False) - block.start.std(-1, unbiased=False) for times in (1, 2)
    ]
    assert step.mean(-1).abs().max() <= 1e-12
    torch.testing.assert_close(growth[1], 4 * growth[0], rtol=1e-3, atol=1e-10)
    assert growth[0].min() > 0
    once, twice = outputs(block, step)
    assert twice == pytest.approx(4 * once, rel=0.02)


# ── what is kept, and what is made of it ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_grams_of_heads_expand_to_the_second_moment_of_all_rows(dtype, bound):
    block = toy(dtype)._replace(image=torch.randn(3, 3, 12, 12, dtype=dtype))
    null_space, (probe, _) = protection(block), probed(block, block.start)
    keys = probe.key_weight.double().unflatten(0, (4, 24))
    channels = torch.einsum("bhnd,hdc->bhnc", probe.queries.double(), keys).flatten(0, 2)
    tokens = probe.to_prompts.double().flatten(0, 2)
    for rows, sums in ((channels, null_space.channels(LAYER)), (tokens, null_space.attention[LAYER])):
        assert len(rows) == 3 * 4 * 10 and sums.dtype == torch.float64
        assert (sums - rows.T @ rows).norm() <= bound * sums.norm()


@pytest.mark.parametrize("options", [{}, AFFINE, {"center": True}], ids=str)
def test_second_moments_have_no_direction_below_zero_but_for_rounding(options):
    for values, _ in protection(toy(), **options).spectra(LAYER).values():
        assert values[0] >= -1e-8 * values[-1]


@pytest.mark.parametrize("side", ["channels", "tokens"])
def test_free_directions_are_those_that_an_svd_finds(side):
    null_space = protection(toy())
    moment = null_space.channels(LAYER) if side == "channels" else null_space.attention[LAYER]
    spectrum = Spectrum.of(moment)
    free = spectrum.free(EXACT[torch.float64])
    count = free.shape[1]
    assert count == len(moment) - 40
    assert spectrum.values[count] - spectrum.values[count - 1] > 1e-6 * spectrum.values[-1]
    expected = torch.linalg.svd(moment).Vh[40:]
    torch.testing.assert_close(FULL(free), expected.T @ expected, rtol=0, atol=1e-10)


# ── prompts as keys and values alone ─────────────────────────────────────────────────────────────────


def full_attention(block, prompt):
    """What timm's block makes of the image's tokens when prompts stand in the sequence; their rows are dropped."""
    inputs = probed(block, prompt)[0].inputs
    return block.tower.model.blocks[LAYER](torch.cat([inputs, prompt[None]], dim=1))[:, :10]


def test_a_block_with_prompts_as_keys_and_values_is_full_attention_without_the_prompts_rows():
    block = toy(torch.float32)
    with torch.no_grad():
        expected = full_attention(block, block.start)
    assert expected.shape == (1, 10, 96)
    torch.testing.assert_close(seen(block, block.start).output, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(seen(block, block.start[:63]).output, expected, rtol=0, atol=1e-3)


def test_the_order_of_prompts_does_not_matter():
    block = toy(torch.float32)
    shuffled = block.start[torch.randperm(64)]
    once, again = seen(block, block.start).output, seen(block, shuffled).output
    assert (once - again).abs().max() <= 1e-6 * once.abs().max()
