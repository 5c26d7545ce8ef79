"""Pools of prefixes: blocks 1 and 2, 6 prefixes at each, 3 for an image, M 4, D 24, F 19, 7 images; N 17, H 2, L 3."""

import pytest
import torch
from torch.nn import functional as F

from lamina.errors import ConfigError
from lamina.prompts.base import Scripted
from lamina.prompts.prefix_pool import PrefixPool

B, LAYERS, SIZE, TOP, LENGTH, WIDTH, FEATURES = 7, (1, 2), 6, 3, 4, 24, 19


def pool(layers=LAYERS, size=SIZE, features=FEATURES, **changes):
    """As if trained: keys lie all around zero, so that images choose differently, and differently at each block."""
    made = PrefixPool(layers, size, **{"top": TOP, "length": LENGTH, "width": WIDTH, "features": features} | changes)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return made


def queries(count=B, features=FEATURES):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(3))


def at(started, layer):
    return started.at(layer, None, None)


def cosines_by_hand(made, query, place):
    return [[F.cosine_similarity(row, key, dim=0).item() for key in made.keys[place]] for row in query]


def by_hand(made, query, place):
    """Which prefixes each image takes at one of the blocks, best first: a sort of cosines, one image after another."""
    cosines = cosines_by_hand(made, query, place)
    return [sorted(range(len(row)), key=lambda i: (-row[i], i))[: made.top] for row in cosines]


def taken(made, query):
    """(blocks, size): whether any image takes a prefix."""
    return torch.tensor(
        [[any(i in row for row in by_hand(made, query, place)) for i in range(made.size)] for place in range(2)]
    )


# ── who takes what ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task", [None, 1])
def test_each_image_takes_at_each_block_keys_and_values_of_the_prefixes_whose_keys_there_are_nearest(task):
    made, query = pool(), queries()
    started = made.start(query, task)
    assert at(started, 0) is None and at(started, 3) is None
    choices = []
    for place, layer in enumerate(LAYERS):
        own = by_hand(made, query, place)
        assert len({tuple(row) for row in own}) > 1
        keys, values = at(started, layer).prefix
        assert keys.shape == values.shape == (B, TOP * LENGTH, WIDTH)
        for b, row in enumerate(own):
            assert torch.equal(keys[b], torch.cat([made.values[place, i, 0] for i in row]))
            assert torch.equal(values[b], torch.cat([made.values[place, i, 1] for i in row]))
        choices.append(own)
    assert choices[0] != choices[1]


def test_choices_are_numbered_block_by_block_best_first():
    made, query = pool(), queries()
    first, second = (by_hand(made, query, place) for place in range(2))
    expected = [a + [SIZE + i for i in b] for a, b in zip(first, second, strict=True)]
    assert made.start(query).chosen.tolist() == expected
    assert made.pool_size == 12 and pool(layers=[0]).pool_size == 6


def test_neither_the_length_of_a_query_nor_that_of_a_key_matters():
    made, query = pool(), queries()
    before = made.start(query).chosen
    made.keys.data.mul_(torch.arange(1.0, SIZE + 1)[:, None])
    assert torch.equal(made.start(query * torch.arange(1.0, B + 1)[:, None]).chosen, before)


def test_an_image_takes_the_same_prefixes_whatever_its_batch_in_training_too():
    made, query = pool(), queries()
    for task in (None, 0, 1):
        together = made.start(query, task).chosen
        assert torch.equal(torch.cat([made.start(row[None], task).chosen for row in query]), together)
        assert torch.equal(made.start(query.flip(0), task).chosen.flip(0), together)
    assert torch.equal(made.start(query, 0).chosen, together) and not made.transductive


def test_of_equal_keys_the_earlier_one_is_taken():
    made = pool(size=40)
    made.keys.data[:] = made.keys.data[:, :1]
    assert made.start(queries()).chosen.tolist() == [[0, 1, 2, 40, 41, 42]] * B


def test_all_prefixes_of_a_pool_can_be_taken():
    assert sorted(pool(top=SIZE).start(queries(1)).chosen[0].tolist()) == list(range(2 * SIZE))


# ── what feels what ──────────────────────────────────────────────────────────────────────────────────


def test_the_pull_is_the_mean_over_images_of_the_cosines_to_own_keys_summed_over_blocks():
    made, query, total = pool(pull=0.3), queries(), 0.0
    for place in range(2):
        cosines = cosines_by_hand(made, query, place)
        total += sum(cosines[b][i] for b, own in enumerate(by_hand(made, query, place)) for i in own)
    assert made.start(query, 1).terms["pull"].item() == pytest.approx(-0.3 * total / B, rel=1e-5)


def test_as_released_every_image_is_pulled_to_every_choice_of_its_batch_and_all_is_summed():
    """The similarities (B, size), indexed on the second axis alone with the choices (B, k): (B, B, k) of them."""
    made, query, total = pool(pull=0.3, pull_all=True), queries(), 0.0
    for place in range(2):
        cosines, own = (torch.tensor(f(made, query, place)) for f in (cosines_by_hand, by_hand))
        assert cosines[:, own].shape == (B, B, TOP)
        total += cosines[:, own].sum().item()
    assert made.start(query, 1).terms["pull"].item() == pytest.approx(-0.3 * total, rel=1e-5)
    assert torch.equal(made.start(query, 1).chosen, pool().start(query, 1).chosen)


def test_one_image_alone_is_pulled_alike_either_way():
    own, everybody = (pool(pull_all=pull_all).start(queries(1), 0).terms["pull"] for pull_all in (False, True))
    torch.testing.assert_close(own, everybody)


@pytest.mark.parametrize("pull_all", [False, True])
def test_a_key_moves_towards_the_images_that_chose_it_or_as_released_towards_the_whole_batch(pull_all):
    """A cosine grows with a key along what of the query is not along the key, divided by the key's length."""
    made, query = pool(pull=0.3, pull_all=pull_all), queries()
    made.start(query, 0).terms["pull"].backward()
    drawn, rows = torch.zeros(2, SIZE, FEATURES), F.normalize(query, dim=-1)
    for place in range(2):
        for b, own in enumerate(by_hand(made, query, place)):
            for i in own:
                drawn[place, i] += rows.sum(0) if pull_all else rows[b] / B
    units = F.normalize(made.keys.detach(), dim=-1)
    expected = (
        0.3 * (drawn - (drawn * units).sum(-1, keepdim=True) * units) / made.keys.detach().norm(dim=-1)[..., None]
    )
    torch.testing.assert_close(-made.keys.grad, expected, rtol=1e-4, atol=1e-5)


def test_in_evaluation_nothing_is_pulled():
    assert pool().start(queries()).terms == {} and pool(pull_all=True).start(queries()).terms == {}


@pytest.mark.parametrize("pull_all", [False, True])
def test_the_pull_moves_chosen_keys_and_nothing_else(pull_all):
    made, query = pool(pull_all=pull_all), queries(1)
    made.start(query, 0).terms["pull"].backward()
    assert made.values.grad is None and not taken(made, query).all()
    assert torch.equal(made.keys.grad.abs().sum(-1) > 0, taken(made, query))


def test_a_loss_on_prefixes_moves_chosen_ones_and_no_key():
    made, query = pool(), queries(1)
    started = made.start(query, 0)
    sum(part.square().sum() for layer in LAYERS for part in at(started, layer).prefix).backward()
    assert made.keys.grad is None and not taken(made, query).all()
    assert torch.equal(made.values.grad.flatten(2).abs().sum(-1) > 0, taken(made, query))


def test_under_adam_keys_go_the_same_way_whatever_the_weight_of_the_pull():
    ends = []
    for pull in (0.1, 1.0):
        made = pool(pull=pull)
        start, optimizer = made.keys.detach().clone(), torch.optim.Adam([made.keys], lr=0.002)
        for _ in range(100):
            optimizer.zero_grad()
            made.start(queries(), 0).terms["pull"].backward()
            optimizer.step()
        ends.append(made.keys.detach())
    assert (ends[0] - start).norm() > 0.5
    assert (ends[0] - ends[1]).norm() <= 1e-4 * ends[1].norm()


# ── in a tower ───────────────────────────────────────────────────────────────────────────────────────


def entries(tower, images, started):
    """The sequence on entry to each block."""
    seen = []

    def at(layer, tokens, carried):
        seen.append(tokens)
        return started.at(layer, tokens, carried) if started is not None else None

    tower(images, Scripted(at))
    return seen


def block_by_hand(block, x, keys, values):
    """One of timm's blocks on x (B, N, D) with more keys and values (B, n, D), one head after another."""
    q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    mixed = []
    for head in (slice(0, 12), slice(12, 24)):
        logits = q[..., head] @ torch.cat([k, keys], 1)[..., head].transpose(1, 2) / 12**0.5
        mixed.append(logits.softmax(-1) @ torch.cat([v, values], 1)[..., head])
    x = x + block.attn.proj(torch.cat(mixed, -1))
    return x + block.mlp(block.norm2(x))


@torch.no_grad()
def test_chosen_prefixes_join_keys_and_values_of_their_blocks_and_the_sequence_does_not_grow(tiny_vit):
    made, images = pool(features=24), torch.randn(B, 3, 32, 32)
    started = made.start(tiny_vit(images).features)
    plain, prompted = entries(tiny_vit, images, None), entries(tiny_vit, images, started)
    assert [tuple(x.shape) for x in prompted] == [(B, 17, 24)] * 3
    assert torch.equal(prompted[1], plain[1])  # block 0 has no pool
    x = plain[1]
    for layer in LAYERS:
        x = block_by_hand(tiny_vit.model.blocks[layer], x, *at(started, layer).prefix)
        if layer == 1:
            torch.testing.assert_close(prompted[2], x, rtol=1e-5, atol=1e-5)
            assert (prompted[2] - plain[2]).abs().max() > 0.01
    features = tiny_vit(images, made.start(tiny_vit(images).features)).features
    torch.testing.assert_close(features, tiny_vit.model.norm(x)[:, 0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_blocks_with_a_pool_see_so_many_keys_more_and_others_none(tiny_vit):
    images, seen = torch.randn(B, 3, 32, 32), []
    tiny_vit(
        images,
        pool(features=24).start(tiny_vit(images).features),
        lambda probe: seen.append((tuple(probe.inputs.shape), tuple(probe.to_prompts.shape))),
    )
    assert seen == [((B, 17, 24), (B, 2, 17, count)) for count in (0, TOP * LENGTH, TOP * LENGTH)]


@pytest.mark.parametrize("none", [{"top": 0}, {"length": 0}])
@torch.no_grad()
def test_without_a_row_the_tower_is_as_it_was(tiny_vit, none):
    images = torch.randn(B, 3, 32, 32)
    plain = tiny_vit(images).features
    started = pool(features=24, **none).start(plain, 0)
    torch.testing.assert_close(tiny_vit(images, started).features, plain, rtol=1e-5, atol=1e-5)
    assert started.terms["pull"].isfinite()


def test_a_pool_in_bfloat16_company_stays_in_float32():
    started = pool().start(queries().bfloat16(), 0)
    assert at(started, 1).prefix[0].dtype == started.terms["pull"].dtype == torch.float32


# ── what is kept and what is refused ─────────────────────────────────────────────────────────────────


def test_prefixes_and_keys_start_uniform_from_0_to_1_and_are_all_that_is_kept():
    kept = PrefixPool(LAYERS, 50, TOP, LENGTH, WIDTH, FEATURES).state_dict()
    shapes = {"values": (2, 50, 2, LENGTH, WIDTH), "keys": (2, 50, FEATURES)}
    assert {name: tuple(value.shape) for name, value in kept.items()} == shapes
    for value in kept.values():
        assert 0 <= value.min() < 0.01 and 0.99 < value.max() < 1
        assert abs(value.mean() - 0.5) < 0.05 and abs(value.var() - 1 / 12) < 0.01


def test_tasks_change_nothing():
    made = pool()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    for index in range(3):
        made.begin_task(index, [2 * index, 2 * index + 1])
    assert made.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    assert all(parameter.requires_grad for parameter in made.parameters())


def test_a_pass_leaves_nothing_on_the_pool():
    made = pool()
    before, first = set(vars(made)), made.start(queries(), 0)
    kept = first.chosen.clone(), at(first, 1).prefix[0].clone()
    made.start(queries().flip(0), 0)
    assert set(vars(made)) == before
    assert torch.equal(first.chosen, kept[0]) and torch.equal(at(first, 1).prefix[0], kept[1])


def test_more_prefixes_than_there_are_cannot_be_taken():
    with pytest.raises(ConfigError) as error:
        pool(top=7)
    assert str(error.value) == "top must be at most size, the prompts in the pool; got top=7, size=6: lower top"


def test_a_pool_asks_for_the_query():
    assert pool().query == "frozen" and pool().readout == "backbone"
    with pytest.raises(ValueError, match="prefixes are chosen by queries"):
        pool().start()
