"""Steps out of the span of old features: B 9 images, N 7 tokens, H 2 heads, d 6, D 12, M 3, two blocks; float64."""

import pytest
import torch
from torch import nn

from lamina.backbones.splice import Probe
from lamina.errors import ShapeError
from lamina.protections.base import Room
from lamina.protections.subspace import Subspace, grown, keys_alone, second_moment

F64 = torch.float64


def rows(count, *shape, rank=None, seed=0):
    """Rows (count, *shape), whose last axis spans only `rank` directions where that is given."""
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(count, *shape, generator=generator, dtype=F64)
    *outer, width = shape
    basis = torch.randn(rank, width, generator=generator, dtype=F64)
    return torch.randn(count, *outer, rank, generator=generator, dtype=F64) @ basis


def probe(layer, tokens, queries=None):
    queries = torch.zeros(len(tokens), 2, 7, 6, dtype=F64) if queries is None else queries
    return Probe(layer, tokens, queries, torch.zeros(len(tokens), 2, 7, 0), None)


def prompts(layers=(0,)):
    torch.manual_seed(3)
    return {i: nn.Parameter(torch.randn(3, 12, dtype=F64)) for i in layers}


def protection(values, *, share=1.0, **options):
    arguments = {"features": "tokens", "width": 12} | options
    return Subspace(list(values), lambda maps: {values[i]: maps[i] for i in values}, share=share, **arguments)


def looked(subspace, *probes, reduce=lambda total: total):
    subspace.begin_look()
    for seen in probes:
        subspace.see(seen)
    subspace.end_look(reduce)
    return subspace


def projector(subspace, layer=0):
    """I - U Uᵀ, of one head."""
    (basis,) = subspace.used[layer]
    return torch.eye(len(basis), dtype=F64) - basis @ basis.mT


def moved(values, subspace, make, steps=10, pull=None):
    """Take steps along gradients that depend on the number of the step alone; return how far each prompt went."""
    before = {i: value.detach().clone() for i, value in values.items()}
    optimizer = make(list(values.values()))
    with subspace.guard(optimizer):
        for number in range(steps):
            for i, value in values.items():
                value.grad = rows(*value.shape, seed=100 * i + number) if pull is None else pull.clone()
            optimizer.step()
    return {i: value.detach() - before[i] for i, value in values.items()}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1, weight_decay=0.05)


# ── the basis ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-8), (torch.float32, 1e-5)])
def test_the_basis_stays_orthonormal_and_never_loses_a_direction_over_twenty_tasks(dtype, bound):
    basis, ranks = torch.empty(40, 0, dtype=dtype), []
    for task in range(20):
        found = grown(basis, second_moment(rows(30, 40, rank=4, seed=task).to(dtype)), 0.9)
        assert torch.equal(found[:, : basis.shape[1]], basis.double())
        basis = found
        ranks.append(basis.shape[1])
        assert (basis.mT @ basis - torch.eye(ranks[-1])).abs().max() <= bound
    assert ranks == sorted(ranks) and 1 < ranks[0] < 20 < ranks[-1] <= 40


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97, 1.0])
def test_the_used_directions_hold_the_share_of_every_tasks_sum_and_no_more_directions_than_needed(share):
    basis, sums = torch.empty(12, 0, dtype=F64), []
    for task in range(4):
        fresh = rows(30, 12, rank=5, seed=task) * 10.0 ** (-2 * task)  # later tasks are faint, but count as much
        before = basis
        sums.append(second_moment(fresh))
        basis = grown(before, sums[-1], share)
        assert all((basis.mT @ each @ basis).trace() >= (share - 1e-9) * each.trace() for each in sums)
        if basis.shape[1] > before.shape[1]:
            less = basis[:, :-1]
            assert (less.mT @ sums[-1] @ less).trace() < (share - 1e-12) * sums[-1].trace()


@pytest.mark.parametrize("share", [0.5, 0.97, 1.0])
@pytest.mark.parametrize("rank", [5, None])
def test_the_same_images_again_add_no_direction(share, rank):
    for seed in range(9):
        moment = second_moment(rows(30, 12, rank=rank, seed=seed))
        once = grown(torch.empty(12, 0), moment, share)
        assert once.shape[1] > 0 and torch.equal(grown(once, moment, share), once)


def test_shares_are_of_squares_and_a_first_direction_counts_even_if_it_holds_all():
    """Singular values 3, 2, 1: squares hold 9, 4, 1 of 14; the released code's fourth powers 81, 16, 1 of 98."""
    moment = second_moment(torch.diag(torch.tensor([2.0, 3.0, 1.0])))
    counts = {share: grown(torch.empty(3, 0), moment, share).shape[1] for share in (0.0, 0.6, 0.66, 0.8, 0.92, 0.94)}
    assert counts == {0.0: 0, 0.6: 1, 0.66: 2, 0.8: 2, 0.92: 2, 0.94: 3}
    alone = grown(torch.empty(3, 0), torch.diag(torch.tensor([0.0, 4.0, 0.0])), 0.5)
    torch.testing.assert_close(alone.abs(), torch.tensor([[0.0], [1.0], [0.0]], dtype=F64))


def test_nothing_seen_uses_nothing_and_everything_used_can_grow_no_more():
    assert grown(torch.empty(4, 0), torch.zeros(4, 4), 1.0).shape == (4, 0)
    full = grown(torch.empty(4, 0), torch.eye(4), 1.0)
    assert full.shape == (4, 4) and torch.equal(grown(full, torch.eye(4), 1.0), full)


# ── two conditions at once ───────────────────────────────────────────────────────────────────────────


def test_what_the_sum_of_second_moments_leaves_free_neither_old_tokens_nor_old_prompts_use():
    tokens, values = rows(9, 7, 12, rank=4), prompts()
    values[0].data.copy_(rows(3, 12, rank=2, seed=8))
    subspace = looked(protection(values, own=lambda: values), probe(0, tokens))
    free = projector(subspace)
    assert round(float(free.trace())) == 12 - 4 - 2
    assert (tokens @ free).abs().max() <= 1e-8 and (values[0] @ free).abs().max() <= 1e-8


def test_a_direction_that_only_the_sum_of_tokens_and_prompts_leaves_free_is_refused():
    """x = e1 + e2 and p = -e1 + e2, so x + p is blind to e1; x and p are not."""
    e1, e2, e3 = torch.eye(12, dtype=F64)[:3]
    x, p = e1 + e2, e2 - e1
    assert (x + p) @ e1 == 0 and x @ e1 != 0
    values = prompts()
    values[0].data.copy_(p.expand(3, 12))
    subspace = looked(protection(values, own=lambda: values), probe(0, x.expand(2, 7, 12)))
    free = projector(subspace)
    assert (e1 @ free).abs().max() <= 1e-10
    torch.testing.assert_close(e3 @ free, e3)


def test_prompts_without_the_second_condition_may_move_along_themselves():
    values = prompts()
    subspace = looked(protection(values), probe(0, rows(9, 7, 12, rank=4)))
    assert round(float(projector(subspace).trace())) == 8


# ── the look back ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("share", [0.9, 1.0])
def test_order_and_batches_of_images_do_not_matter(share):
    tokens = rows(50, 7, 12, rank=6)
    whole = projector(looked(protection(prompts(), share=share), probe(0, tokens)))
    shuffled = tokens[torch.randperm(50)][:, torch.randperm(7)]
    for parts in ([shuffled], tokens.split(16), tokens.split(1)):
        found = projector(looked(protection(prompts(), share=share), *(probe(0, part) for part in parts)))
        assert (found - whole).abs().max() <= 1e-10


@pytest.mark.parametrize("count", [1, 5, 12, 40])
def test_any_number_of_images_will_do(count):
    frozen = protection(prompts(), features="frozen", what="keys")
    assert frozen.looks_at == "queries"
    frozen.begin_look()
    for part in rows(count, 12).split(4):
        frozen.collect(part, torch.zeros(len(part)))
    frozen.end_look(lambda total: total)
    (basis,) = frozen.used[0]
    assert basis.shape == (12, min(count, 12))


def test_processes_add_up_but_prompts_which_all_of_them_have_count_once():
    tokens, values = rows(9, 7, 12), prompts()
    whole = looked(protection(values, share=0.8, own=lambda: values), probe(0, tokens))
    other = second_moment(tokens[5:].flatten(0, 1))[None]
    part = looked(
        protection(values, share=0.8, own=lambda: values), probe(0, tokens[:5]), reduce=lambda total: total + other
    )
    torch.testing.assert_close(part.moments[0], whole.moments[0], rtol=1e-12, atol=0)
    expected = tokens.flatten(0, 1).mT @ tokens.flatten(0, 1) + values[0].mT @ values[0]
    torch.testing.assert_close(whole.moments[0][0], expected.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(whole.moments[0], whole.moments[0].mT)


def test_tasks_add_up_and_a_look_that_was_broken_off_leaves_nothing():
    first, second = rows(4, 7, 12, seed=1), rows(5, 7, 12, seed=2)
    subspace = protection(prompts((0, 1)))
    subspace.begin_look()
    subspace.see(probe(0, second))
    looked(subspace, probe(0, first), probe(1, first), probe(2, first))
    looked(subspace, probe(0, second), probe(1, first))
    expected = {0: torch.cat([first, second]), 1: torch.cat([first, first])}
    assert sorted(subspace.moments) == [0, 1]
    for i, tokens in expected.items():
        torch.testing.assert_close(subspace.moments[i][0], second_moment(tokens.flatten(0, 1)))


def test_a_look_back_draws_no_random_number():
    subspace, seen = protection(prompts()), probe(0, rows(9, 7, 12))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    looked(subspace, seen)
    assert torch.equal(torch.rand(3), expected)


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_map_is_a_projector_out_of_what_is_used():
    subspace = looked(protection(prompts(), share=0.9), probe(0, rows(9, 7, 12)))
    free, (basis,) = projector(subspace), subspace.used[0]
    (mapping,) = subspace.projections().values()
    assert 0 < basis.shape[1] < 12 and mapping.left is None
    assert (mapping.right - free).abs().max() <= 1e-10
    assert (mapping.right - mapping.right.mT).abs().max() <= 1e-10
    assert (mapping.right @ mapping.right - mapping.right).abs().max() <= 1e-10
    gradient = rows(3, 12, seed=6)
    assert (mapping(gradient) @ basis).norm() <= 1e-10 * gradient.norm()
    harmless = gradient @ free
    assert (mapping(harmless) - harmless).abs().max() <= 1e-12


@pytest.mark.parametrize(
    ("make", "apply", "kept"),
    [(sgd, "gradient", True), (sgd, "step", True), (adam, "step", True), (adam, "gradient", False)],
    ids=["sgd on gradients", "sgd by steps", "adam by steps", "adam on gradients"],
)
def test_products_of_old_tokens_with_prompts_stay_where_they_were_unless_adam_gets_projected_gradients(
    make, apply, kept
):
    """The scores of old tokens on prompts, where nothing but a product lies between: norm and weights the identity."""
    tokens, values = rows(9, 7, 12, rank=4), prompts((0, 1))
    subspace = looked(protection(values, apply=apply), *(probe(i, tokens) for i in values))
    before = {i: tokens @ value.detach().mT for i, value in values.items()}
    for i, step in moved(values, subspace, make).items():
        assert step.norm() > 0.1
        change = (tokens @ values[i].detach().mT - before[i]).abs().max()
        assert change <= 1e-8 if kept else change > 1e-3


def test_weight_decay_is_projected_with_the_step():
    tokens, values = rows(9, 7, 12, rank=4), prompts()
    subspace = looked(protection(values), probe(0, tokens))
    shrinking = torch.optim.AdamW(list(values.values()), lr=0.1, weight_decay=0.5)
    moved_by = moved(values, subspace, lambda _: shrinking, pull=torch.zeros(3, 12, dtype=F64))[0]
    assert moved_by.norm() > 0.1 and (tokens @ moved_by.mT).abs().max() <= 1e-8


@pytest.mark.parametrize("apply", ["step", "gradient"])
def test_rows_of_prompts_without_a_gradient_keep_none_and_stay(apply):
    values = prompts()
    subspace = looked(protection(values, share=0.7, apply=apply), probe(0, rows(9, 7, 12)))
    pull = rows(3, 12)
    pull[1] = 0
    step = moved(values, subspace, sgd, pull=pull)[0]
    assert step[1].abs().max() == 0 < step[[0, 2]].abs().sum(-1).min()
    assert values[0].grad[1].abs().max() == 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_is_projected_before_the_first_task_is_over_nor_for_a_share_of_nothing(share):
    values, free = prompts(), prompts()
    subspace = protection(values, share=share)
    if not share:
        looked(subspace, probe(0, rows(9, 7, 12)))
        assert subspace.room() == [Room(0, "channels", 0, 12, 0.0)]
    assert subspace.projections() == {}
    moved(values, subspace, adam)
    moved(free, protection(free), adam)
    assert torch.equal(values[0], free[0])


# ── heads and halves ─────────────────────────────────────────────────────────────────────────────────


def test_each_head_has_directions_of_its_own_and_logits_of_old_queries_on_prefix_keys_stay():
    """Head 0 uses 2 of its 6 directions, head 1 uses 4; values move as they like."""
    queries = torch.stack([rows(9, 7, 6, rank=2, seed=1), rows(9, 7, 6, rank=4, seed=2)], dim=1)  # (9, 2, 7, 6)
    torch.manual_seed(2)
    prefix = nn.Parameter(torch.randn(1, 2, 3, 12, dtype=F64))
    subspace = Subspace([4], lambda maps: {prefix: keys_alone([maps[4]])}, features="heads", heads=2, width=12, share=1)
    looked(subspace, probe(4, torch.zeros(9, 7, 12), queries))
    assert [basis.shape for basis in subspace.used[4]] == [(6, 2), (6, 4)]

    def logits():
        return queries @ prefix.detach()[0, 0].unflatten(-1, (2, 6)).transpose(0, 1).mT  # (9, 2, 7, 3)

    before = logits()
    step = moved({0: prefix}, subspace, adam, pull=rows(1, 2, 3, 12))[0]
    assert (logits() - before).abs().max() <= 1e-8
    assert step[0, 0, :, :6].norm() > 0.1 and step[0, 0, :, 6:].norm() > 0.1 and step[0, 1].abs().min() > 0.1
    assert subspace.room() == [Room(4, "channels", 6, 12, pytest.approx(1.0))]


def test_prefixes_of_each_block_get_its_own_map_for_keys_and_none_for_values():
    maps = rows(3, 12, 12)
    right, step = keys_alone(list(maps)), rows(3, 2, 5, 12)
    torch.testing.assert_close((step @ right)[:, 0], torch.stack([step[b, 0] @ maps[b] for b in range(3)]))
    assert torch.equal((step @ right)[:, 1], step[:, 1])


# ── what is remembered ───────────────────────────────────────────────────────────────────────────────


def test_room_says_how_many_directions_are_used_and_what_they_hold_of_all_tasks():
    spectra = [[5.0, 3.0, 2.0] + [0.0] * 9, [0.0] * 3 + [6.0, 4.0] + [0.0] * 7]
    subspace = protection(prompts(), share=0.5, what="keys")
    for values in spectra:
        looked(subspace, probe(0, torch.diag(torch.tensor(values, dtype=F64).sqrt())[None]))
    assert subspace.room() == [Room(0, "keys", 2, 12, pytest.approx(11 / 20))]


@pytest.mark.parametrize("heads", [1, 2])
def test_a_state_taken_back_goes_on_to_the_same_bits(heads):
    kind = {"features": "tokens" if heads == 1 else "heads", "heads": heads, "share": 0.8}
    first, second = (probe(0, rows(9, 7, 12, seed=s), rows(9, 2, 7, 6, seed=s)) for s in (1, 2))
    ours = looked(protection(prompts(), **kind), first)
    again = protection(prompts(), **kind)
    again.load_state_dict(ours.state_dict())
    for subspace in (ours, again):
        looked(subspace, second)
    assert torch.equal(ours.moments[0], again.moments[0]) and ours.moments[0].dtype == F64
    assert all(torch.equal(one, other) for one, other in zip(ours.used[0], again.used[0], strict=True))
    assert again.room() == ours.room() and sum(basis.shape[1] for basis in ours.used[0]) > 0


MOMENT, BASIS = torch.zeros(2, 6, 6), torch.zeros(6, 1)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"moments": {1: MOMENT}, "used": {}}, "moments must be there for blocks [0]; got [1]"),
        ({"moments": {0: MOMENT}, "used": {3: []}}, "used must be there for blocks [0]; got [3]"),
        (
            {"moments": {0: MOMENT}, "used": {}},
            "moments and used must be there for the same blocks; one of them is missing",
        ),
        (
            {"moments": {0: MOMENT[0]}, "used": {0: [BASIS, BASIS]}},
            "moments of block 0 must have shape (2, 6, 6); got (6, 6)",
        ),
        (
            {"moments": {0: MOMENT}, "used": {0: [BASIS]}},
            "used of block 0 must hold 2 of shape (6, r) with r at most 6; got [(6, 1)]",
        ),
        (
            {"moments": {0: MOMENT}, "used": {0: [BASIS, torch.zeros(6, 7)]}},
            "used of block 0 must hold 2 of shape (6, r) with r at most 6; got [(6, 1), (6, 7)]",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(state, message):
    subspace = protection(prompts(), features="heads", heads=2)
    with pytest.raises(ShapeError) as error:
        subspace.load_state_dict(state)
    assert str(error.value) == message
    assert subspace.moments == {} and subspace.used == {}
