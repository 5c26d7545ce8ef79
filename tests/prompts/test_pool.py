"""A pool of 6 prompts of 3 tokens, of which an image takes 2; B 7, N 17, D 24, F 19 where no tower says otherwise."""

from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from lamina.errors import ConfigError
from lamina.prompts.pool import PromptPool

B, SIZE, TOP, LENGTH, WIDTH, FEATURES = 7, 6, 2, 3, 24, 19


def pool(features=FEATURES, **changes):
    return PromptPool(**{"size": SIZE, "top": TOP, "length": LENGTH, "width": WIDTH, "features": features, **changes})


def queries(count=B, features=FEATURES):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(3))


def tokens_of(begun):
    return begun.at(0, torch.zeros(1, 17, WIDTH), None).tokens


def by_hand(made, query):
    """Which prompts each image takes, best first: a sort of cosines, one image after another."""
    out = []
    for row in query:
        cosines = [F.cosine_similarity(row, key, dim=0).item() for key in made.keys]
        out.append(sorted(range(len(cosines)), key=lambda place: (-cosines[place], place))[: made.top])
    return out


# ── who takes what ───────────────────────────────────────────────────────────────────────────────────


def test_each_image_takes_the_prompts_whose_keys_are_nearest_its_query():
    made, query = pool(), queries()
    begun = made.start(query)
    assert begun.chosen.tolist() == by_hand(made, query)
    assert len({tuple(sorted(row)) for row in begun.chosen.tolist()}) > 1
    for image, row in enumerate(begun.chosen):
        assert torch.equal(tokens_of(begun)[image], torch.cat([made.values[row[0]], made.values[row[1]]]))


def test_the_length_of_a_query_or_a_key_does_not_matter():
    made, query = pool(), queries()
    before = made.start(query).chosen
    made.keys.data.mul_(torch.arange(1.0, SIZE + 1)[:, None])
    assert torch.equal(made.start(query * torch.arange(1.0, B + 1)[:, None]).chosen, before)


def test_an_image_takes_the_same_prompts_whatever_its_batch():
    made, query = pool(), queries()
    together = made.start(query).chosen
    assert torch.equal(torch.cat([made.start(row[None]).chosen for row in query]), together)
    assert torch.equal(made.start(query.flip(0)).chosen.flip(0), together)


def test_of_equal_keys_the_earlier_one_is_taken():
    made = pool(size=40, top=3, length=1)
    made.keys.data[:] = made.keys.data[0]
    assert made.start(queries()).chosen.tolist() == [[0, 1, 2]] * B


def test_by_vote_all_images_take_what_most_would_take():
    made, query = pool(selection="batch"), queries()
    votes = Counter(place for row in by_hand(made, query) for place in row)
    most = sorted(range(SIZE), key=lambda place: (-votes[place], place))[:TOP]
    assert made.start(query).chosen.tolist() == [most] * B
    assert made.transductive and not pool().transductive


def test_a_tie_of_votes_goes_to_the_earlier_prompt():
    """Prompt 3 has three votes; 1, 4 and 5 have one each."""
    made = pool(selection="batch")
    cosines = torch.zeros(3, SIZE)
    for image, row in enumerate([(5, 3), (3, 4), (1, 3)]):
        cosines[image, list(row)] = torch.tensor([0.9, 0.8])
    assert made.choose(cosines).tolist() == [[3, 1]] * 3


def test_by_vote_an_image_alone_takes_what_it_would_take():
    made, query = pool(selection="batch"), queries()
    for row, own in zip(query, by_hand(made, query), strict=True):
        assert sorted(made.start(row[None]).chosen[0].tolist()) == sorted(own)


# ── what feels what ──────────────────────────────────────────────────────────────────────────────────


def test_the_pull_is_the_mean_over_images_of_the_summed_cosines_times_its_weight():
    made, query = pool(pull=0.3), queries()
    sums = [
        sum(F.cosine_similarity(row, made.keys[place], dim=0).item() for place in own)
        for row, own in zip(query, by_hand(made, query), strict=True)
    ]
    assert made.start(query).terms["pull"].item() == pytest.approx(-0.3 * sum(sums) / B, rel=1e-5)


def test_the_pull_moves_chosen_keys_and_nothing_else():
    made, query = pool(), queries(2)
    begun = made.start(query)
    begun.terms["pull"].backward()
    taken = sorted({place for row in begun.chosen.tolist() for place in row})
    assert len(taken) < SIZE and made.values.grad is None
    assert made.keys.grad.abs().sum(1).nonzero().flatten().tolist() == taken


def test_a_step_down_the_pull_brings_chosen_keys_nearer_to_the_query():
    made, query = pool(), queries(1)
    begun = made.start(query)
    begun.terms["pull"].backward()
    before, chosen = F.cosine_similarity(query, made.keys.detach()), begun.chosen[0]
    made.keys.data.sub_(made.keys.grad)
    assert (F.cosine_similarity(query, made.keys.detach()) - before)[chosen].min() > 0


def test_a_loss_on_the_tokens_moves_chosen_prompts_and_no_key():
    made, query = pool(), queries(2)
    begun = made.start(query)
    tokens_of(begun).square().sum().backward()
    taken = sorted({place for row in begun.chosen.tolist() for place in row})
    assert len(taken) < SIZE and made.keys.grad is None
    assert made.values.grad.abs().sum((1, 2)).nonzero().flatten().tolist() == taken


def test_under_adam_keys_go_the_same_way_whatever_the_weight_of_the_pull():
    ends = []
    for pull in (0.1, 1.0):
        torch.manual_seed(0)
        made = pool(pull=pull)
        start = made.keys.detach().clone()
        optimizer = torch.optim.Adam([made.keys], lr=0.002)
        for _ in range(100):
            optimizer.zero_grad()
            made.start(queries()).terms["pull"].backward()
            optimizer.step()
        ends.append(made.keys.detach())
    assert (ends[0] - start).norm() > 0.5
    assert (ends[0] - ends[1]).norm() <= 1e-4 * ends[1].norm()


# ── in a tower ───────────────────────────────────────────────────────────────────────────────────────


def walked(tower, images, tokens):
    """What becomes of tokens (B, n, D) behind a tower's sequence, and of its first row: timm's blocks, one by one."""
    model = tower.model
    x = torch.cat([model._pos_embed(model.patch_embed(images)), tokens], 1)
    for block in model.blocks:
        x = block(x)
    x = model.norm(x)
    return x[:, -tokens.shape[1] :], x[:, 0]


@pytest.mark.parametrize("placed", [False, True])
@torch.no_grad()
def test_prompts_enter_block_0_behind_the_sequence_and_pass_through_every_block(tiny_vit, placed):
    position = torch.randn(WIDTH) if placed else None
    made, images = pool(tiny_vit.features, position=position), torch.randn(B, 3, 32, 32)
    begun = made.start(tiny_vit(images).features)
    encoded = tiny_vit(images, begun)
    taken = made.values[begun.chosen].reshape(B, TOP * LENGTH, WIDTH)
    prompts, first = walked(tiny_vit, images, taken + position if placed else taken)
    assert encoded.prompts.shape == (B, TOP * LENGTH, WIDTH)
    torch.testing.assert_close(encoded.prompts, prompts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoded.features, first, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_every_block_sees_so_many_tokens_more(tiny_vit):
    images, seen = torch.randn(B, 3, 32, 32), []
    begun = pool(tiny_vit.features).start(tiny_vit(images).features)
    tiny_vit(images, begun, lambda probe: seen.append(tuple(probe.to_prompts.shape)))
    assert seen == [(B, 2, 17, TOP * LENGTH)] * 3


@pytest.mark.parametrize("none", [{"top": 0}, {"length": 0}])
@torch.no_grad()
def test_without_a_token_the_tower_is_as_it_was(tiny_vit, none):
    images = torch.randn(B, 3, 32, 32)
    plain = tiny_vit(images).features
    begun = pool(tiny_vit.features, readout="backbone", **none).start(plain)
    torch.testing.assert_close(tiny_vit(images, begun).features, plain, rtol=1e-5, atol=1e-5)


def test_a_pool_in_bfloat16_company_stays_in_float32():
    begun = pool().start(queries().bfloat16())
    assert tokens_of(begun).dtype == begun.terms["pull"].dtype == torch.float32


# ── what is kept and what is refused ─────────────────────────────────────────────────────────────────


def test_prompts_and_keys_start_spread_around_zero_and_are_all_that_is_kept():
    made = pool(size=50, position=torch.ones(WIDTH))
    kept = made.state_dict()
    assert {name: tuple(value.shape) for name, value in kept.items()} == {"values": (50, 3, 24), "keys": (50, 19)}
    for value in kept.values():
        assert -1 <= value.min() < -0.9 and 0.9 < value.max() <= 1 and abs(value.mean()) < 0.1


def test_a_pass_leaves_nothing_on_the_pool():
    made = pool()
    before, first = set(vars(made)), made.start(queries())
    kept = first.chosen.clone()
    made.start(queries().flip(0))
    assert set(vars(made)) == before and torch.equal(first.chosen, kept)


def test_the_place_of_prompts_is_a_copy():
    position = torch.ones(WIDTH)
    made = pool(position=position)
    position.zero_()
    assert made.position.tolist() == [1.0] * WIDTH


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": 7}, "top must be at most size, the prompts in the pool; got top=7, size=6: lower top"),
        (
            {"top": 0},
            'readout="prompts" needs at least one prompt token to read; got top=0, length=3: raise them or take '
            'readout="backbone"',
        ),
        (
            {"length": 0},
            'readout="prompts" needs at least one prompt token to read; got top=2, length=0: raise them or take '
            'readout="backbone"',
        ),
    ],
)
def test_a_pool_that_cannot_give_what_is_asked_is_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        pool(**changes)
    assert str(error.value) == message


def test_all_prompts_of_a_pool_can_be_taken():
    assert sorted(pool(top=SIZE).start(queries(1)).chosen[0].tolist()) == list(range(SIZE))


def test_a_pool_asks_for_the_query():
    assert pool().query == "frozen"
    with pytest.raises(ValueError, match="chooses by the query"):
        pool().start()
