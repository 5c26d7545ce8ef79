"""Prompts for the first blocks, of which the last travels on. B 7, N 17, D 48, H 3, L 3, M 5; sources of width 40."""

import copy

import pytest
import torch
from torch import nn

from lamina.backbones.clip import ClipImageTower
from lamina.prompts.stacked import CoupledPrompts, FreePrompts
from tests.backbones.clips import clip, close, images
from tests.conftest import make_tiny_vit

KINDS = ["plain", "no pre-norm", "quick own attention"]


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def by_hand(model, rows, *, behind_the_class_token=False):
    """Features of open_clip's own image tower with rows put into the sequence and replaced there."""
    side, batch = model.visual, images()
    x = side.conv1(batch).flatten(2).transpose(1, 2)
    x = torch.cat([side.class_embedding.expand(len(x), 1, -1), x], dim=1) + side.positional_embedding
    place = 1 if behind_the_class_token else x.shape[1]
    before, after = x[:, :place], x[:, place:]
    x = side.ln_pre(torch.cat([before, rows[0].expand(len(x), -1, -1), after], dim=1))
    count = rows[0].shape[0]
    for layer, block in enumerate(side.transformer.resblocks):
        if 0 < layer < len(rows):
            x = torch.cat([x[:, :place], rows[layer].expand(len(x), -1, -1), x[:, place + count :]], dim=1)
        x = block(x)
    return side.ln_post(x[:, 0]) @ side.proj


def prompted(kind, depth, length=5):
    tower = ClipImageTower(clip(kind))
    prompts = FreePrompts(tower, depth, length)
    with torch.no_grad():
        for number, value in enumerate(prompts.values):
            value.copy_(drawn(length, 48).roll(number, 1) * (1 + number))
    return tower, prompts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_features_and_gradients_are_those_of_rows_put_into_the_sequence(kind, depth):
    tower, prompts = prompted(kind, depth)
    copies = [value.detach().clone().requires_grad_() for value in prompts.values]
    ours, theirs = tower(images(), prompts.start()).features, by_hand(clip(kind), copies)
    assert (theirs - tower(images()).features).abs().max() > 0.01
    close(ours, theirs, 5e-6)
    weights = drawn(7, 24)
    for features in (ours, theirs):
        (features * weights).sum().backward()
    for value, copied in zip(prompts.values, copies, strict=True):
        assert copied.grad.abs().max() > 0
        close(value.grad / copied.grad.abs().max(), copied.grad / copied.grad.abs().max(), 5e-6)


@pytest.mark.parametrize("depth", [1, 3])
def test_it_does_not_matter_where_in_the_sequence_they_stand(depth):
    tower, prompts = prompted("plain", depth)
    close(tower(images(), prompts.start()).features, by_hand(clip(), prompts.rows(), behind_the_class_token=True), 5e-6)


def test_what_enters_first_passes_the_pre_norm_where_there_is_one():
    raw = prompted("plain", 1)
    normed = clip().visual.ln_pre(raw[1].rows()[0])
    close(raw[1].start().at(0, torch.zeros(7, 17, 48), None).tokens[3], normed)
    bare = prompted("no pre-norm", 1)
    assert torch.equal(bare[1].start().at(0, torch.zeros(7, 17, 48), None).tokens[3], bare[1].rows()[0])


def test_only_the_last_set_takes_a_place_in_the_sequence_and_none_that_enters_the_last_block():
    def kinds(depth):
        started, tokens = prompted("plain", depth)[1].start(), torch.zeros(7, 17, 48)
        splices = [started.at(layer, tokens, None) for layer in range(3)]
        return ["" if s is None else "context" if s.tokens is None else "tokens" for s in splices]

    assert [kinds(depth) for depth in (1, 2, 3)] == [
        ["tokens", "", ""],
        ["context", "tokens", ""],
        ["context", "context", "context"],
    ]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_prompts_without_tokens_leave_the_tower_as_it_is(depth):
    tower, prompts = prompted("plain", depth, length=0)
    close(tower(images(), prompts.start()).features, clip().encode_image(images()))


def test_a_tower_of_timm_takes_them_too():
    tower = make_tiny_vit()
    prompts = FreePrompts(tower, 2, 5)
    plain, moved = tower(images()).features, tower(images(), prompts.start()).features
    assert moved.shape == plain.shape == (7, 24) and (moved - plain).abs().max() > 1e-5


def test_coupled_prompts_are_linear_images_of_their_sources_and_hand_gradients_on():
    tower, sources = ClipImageTower(clip()), [drawn(5, 40).add(i).requires_grad_() for i in range(3)]
    prompts = CoupledPrompts(tower, 3, 40, lambda: sources)
    for made, source, row in zip(prompts.maps, sources, prompts.rows(), strict=True):
        close(row, source @ made.weight.T + made.bias)
    tower(images(), prompts.start()).features.square().sum().backward()
    assert all(part.grad.abs().max() > 0 for part in [*sources, *prompts.parameters()])
    assert len(list(prompts.parameters())) == 6


def test_all_maps_but_the_first_start_alike_and_are_their_own():
    prompts = CoupledPrompts(ClipImageTower(clip()), 3, 40, list)
    first, second, third = (made.weight for made in prompts.maps)
    assert torch.equal(second, third) and second is not third and not torch.equal(first, second)


def test_at_the_sizes_of_a_vit_b_16_the_maps_have_as_many_numbers_as_in_the_released_code():
    class Wide(nn.Module):
        depth, width, pre_norm = 12, 768, None

    assert sum(p.numel() for p in CoupledPrompts(Wide(), 9, 512, list).parameters()) == 9 * 393_984


def test_free_prompts_start_small():
    prompts = FreePrompts(ClipImageTower(clip()), 3, 500)
    assert [tuple(value.shape) for value in prompts.values] == [(500, 48)] * 3
    assert all(0.019 < value.std() < 0.021 for value in copy.deepcopy(prompts).values)
