"""Sums of components: blocks 1 and 2, 3 components a task, M 4 rows, D 6, F 16; on the tiny tower D 24 and F 24."""

import pytest
import torch
from torch.nn import functional as F

from lamina.data.stream import Task
from lamina.errors import ConfigError
from lamina.prompts.base import Scripted
from lamina.prompts.components import ComponentPrefixes, far_from_orthonormal, orthogonal_rows


def made(tasks=2, layers=(1, 2), components=3, width=6, features=16, **more):
    """As if trained: rows of all tasks but the last are neither orthogonal nor of unit norm any more."""
    prompts = ComponentPrefixes(layers, components, 4, width, features, **more)
    for index in range(tasks):
        stir(prompts)
        prompts.begin_task(index)
    return prompts


@torch.no_grad()
def stir(prompts):
    for parameter in prompts.parameters():
        parameter.mul_(1.5).add_(0.2 * torch.randn_like(parameter))


def kinds(prompts):
    return {"prefixes": prompts.prefixes, "keys": prompts.keys, "attentions": prompts.attentions}


def at(started, layer):
    return started.at(layer, None, None)


# ── how components start ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["prefixes", "keys", "attentions"])
@pytest.mark.parametrize("place", [0, 1])
def test_new_rows_have_unit_norm_and_are_orthogonal_to_each_other_and_to_trained_ones(kind, place):
    parts = [part[place].flatten(1) for part in kinds(made(tasks=4))[kind]]
    old, new = torch.cat(parts[:3]), parts[3]
    assert old.shape == (9, 48 if kind == "prefixes" else 16) and new.shape[0] == 3
    torch.testing.assert_close(new @ new.T, torch.eye(3), rtol=0, atol=1e-5)
    assert (F.normalize(old, dim=-1) @ new.T).abs().max() <= 1e-5
    assert (old @ old.T - torch.eye(9)).abs().max() > 0.1  # so a projection on each old row alone would not do


def test_old_rows_may_depend_on_each_other():
    old = torch.randn(1, 7)
    new = orthogonal_rows(4, 7, [old, 2 * old, torch.zeros(1, 7)])
    torch.testing.assert_close(new @ new.T, torch.eye(4), rtol=0, atol=1e-5)
    assert (new @ old.T).abs().max() <= 1e-5


def test_rows_lean_to_what_was_drawn():
    """The first one is the draw itself, brought to unit norm."""
    torch.manual_seed(3)
    drawn = torch.randn(2, 5)
    torch.manual_seed(3)
    rows = orthogonal_rows(2, 5)
    torch.testing.assert_close(rows[0], F.normalize(drawn[0], dim=0))
    assert rows[1] @ drawn[1] > 0


def test_new_rows_are_drawn_from_the_global_generator_for_each_block_apart():
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(made(tasks=1).state_dict())
    same = [[torch.equal(drawn[0][name], other[name]) for name in drawn[0]] for other in drawn[1:]]
    assert same == [[True] * 3, [False] * 3]
    assert all(not torch.equal(*value) for value in drawn[0].values())  # the two blocks


def test_a_new_task_freezes_old_rows_and_leaves_every_bit_of_them():
    prompts = made(tasks=3)
    before = {name: value.clone() for name, value in prompts.state_dict().items()}
    prompts.begin_task(3)
    after = prompts.state_dict()
    assert set(after) - set(before) == {"prefixes.3", "keys.3", "attentions.3"}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    learning = {name for name, parameter in prompts.named_parameters() if parameter.requires_grad}
    assert learning == {"prefixes.3", "keys.3", "attentions.3"}
    assert [tuple(after[name].shape) for name in sorted(learning)] == [(2, 3, 16), (2, 3, 16), (2, 3, 2, 4, 6)]


@pytest.mark.parametrize(("width", "features"), [(6, 8), (1, 50)])
def test_the_last_task_that_finds_room_takes_what_is_left_and_the_next_is_refused(width, features):
    """Rows are of 8 numbers: keys in the first case, prefixes in the second."""
    prompts = made(tasks=3, width=width, features=features)
    assert [part.shape[1] for part in prompts.keys] == [3, 3, 2]
    rows = (prompts.keys if features == 8 else prompts.prefixes)[2][1].flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(2), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError) as error:
        prompts.begin_task(3)
    assert str(error.value) == (
        "task 4 finds no room for components: there are 8, and no more than 8 rows of 8 numbers can be "
        "orthogonal to each other; start anew with fewer components for each task"
    )
    assert [len(parts) for parts in kinds(prompts).values()] == [3, 3, 3]  # nothing has changed
    assert all(parts[2].requires_grad for parts in kinds(prompts).values())


def tasks_of(count):
    return [Task(index, ["x", "y"], [2 * index, 2 * index + 1], None, None) for index in range(count)]


@pytest.mark.parametrize(("width", "features", "room", "tasks"), [(6, 13, 13, 5), (2, 50, 16, 6)])
def test_more_tasks_than_there_is_room_for_are_refused_before_the_first(width, features, room, tasks):
    """Rows are of 13 numbers, or of 16: keys in the first case, prefixes in the second."""
    prompts = made(tasks=0, width=width, features=features)
    prompts.check(tasks_of(tasks - 1))
    with pytest.raises(ConfigError) as error:
        prompts.check(tasks_of(tasks))
    assert str(error.value) == (
        f"components of all tasks must be orthogonal to each other, so there is room for {room}; got {tasks} tasks of "
        f"3, {3 * tasks} in all: set components=2 or fewer"
    )
    assert not list(prompts.parameters())


def test_components_that_fill_the_room_to_the_last_are_taken():
    made(tasks=0, components=4).check(tasks_of(4))
    with pytest.raises(ConfigError, match=r"20 in all: set components=3 or fewer$"):
        made(tasks=0, components=4).check(tasks_of(5))


def test_more_tasks_than_rows_are_refused_with_the_number_of_tasks_that_can_be():
    made(tasks=0, components=1).check(tasks_of(16))
    with pytest.raises(ConfigError, match=r"got 17 tasks of 1, 17 in all: take at most 16 tasks$"):
        made(tasks=0, components=1).check(tasks_of(17))


def test_growing_takes_no_memory_where_shapes_alone_are_asked_for():
    shapes = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            prompts = ComponentPrefixes([1, 2], 3, 4, 6, 8)
            for index in range(3):
                prompts.begin_task(index)
        assert {parameter.device.type for parameter in prompts.parameters()} == {device}
        shapes.append({name: value.shape for name, value in prompts.state_dict().items()})
    assert shapes[0] == shapes[1] and len(shapes[0]) == 9


# ── how they are mixed ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task", [None, 1])
def test_a_prefix_is_the_sum_of_all_components_by_the_cosine_of_attended_query_and_key(task):
    prompts, query = made(), torch.randn(7, 16)
    started = prompts.start(query, task)
    assert started.chosen is None and started.terms == {} and at(started, 0) is None
    for place, layer in enumerate([1, 2]):
        expected = torch.zeros(2, 7, 4, 6)
        for b in range(7):
            for part, keys, attentions in zip(prompts.prefixes, prompts.keys, prompts.attentions, strict=True):
                for m in range(3):
                    attended, key = query[b] * attentions[place, m], keys[place, m]
                    weight = attended @ key / attended.norm() / key.norm()
                    expected[:, b] += (weight * part[place, m]).detach()
        keys, values = at(started, layer).prefix
        torch.testing.assert_close(keys, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaled", ["query", "keys", "attentions"])
@pytest.mark.parametrize("factor", [1e-3, 40.0])
@torch.no_grad()
def test_weights_lie_between_minus_one_and_one_and_do_not_change_with_scale(scaled, factor):
    prompts, query = made(), torch.randn(7, 16)
    before = prompts.weights(query, 2)
    assert before.shape == (7, 6) and before.abs().max() <= 1 + 1e-6 and before.min() < 0 < before.max()
    if scaled == "query":
        query = factor * query
    else:
        getattr(prompts, scaled)[1].mul_(factor)
    torch.testing.assert_close(prompts.weights(query, 2), before, rtol=0, atol=1e-6)


@torch.no_grad()
def test_one_component_that_is_fully_meant_is_the_prefix():
    prompts, query = made(tasks=1, components=1), torch.randn(1, 16)
    prompts.attentions[0].fill_(1)
    prompts.keys[0].copy_(F.normalize(query, dim=-1))
    keys, values = at(prompts.start(query), 2).prefix
    torch.testing.assert_close(keys[0], prompts.prefixes[0][1, 0, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(values[0], prompts.prefixes[0][1, 0, 1], rtol=0, atol=1e-6)


def test_a_query_of_zeros_gets_a_prefix_of_zeros_and_finite_gradients():
    prompts = made()
    keys, values = at(prompts.start(torch.zeros(3, 16), 1), 1).prefix
    (keys.sum() + values.sum()).backward()
    assert not keys.any() and not values.any()
    assert all(part.grad.isfinite().all() for parts in kinds(prompts).values() for part in parts[1:])


def test_without_queries_there_are_no_weights():
    with pytest.raises(ValueError, match="components are weighted by queries"):
        made().start()


# ── the loss that keeps rows orthonormal ─────────────────────────────────────────────────────────────


def test_the_penalty_of_known_matrices():
    assert far_from_orthonormal(orthogonal_rows(5, 9)).item() == pytest.approx(0, abs=1e-6)
    assert far_from_orthonormal(torch.zeros(5, 9)).item() == torch.tensor(1 / 5).item()
    assert far_from_orthonormal(torch.rand(100, 768)).item() == pytest.approx(3.7e4, rel=0.1)


def test_the_penalty_adds_up_over_blocks_and_kinds_in_training_and_moves_new_rows_alone():
    prompts = made(tasks=3, orthogonality=0.01)
    stir(prompts)
    expected = 0.0
    for parts in kinds(prompts).values():
        for place in range(2):
            rows = torch.cat([part[place].flatten(1) for part in parts]).detach()
            expected += sum(float((rows[i] @ rows[j] - float(i == j)) ** 2) for i in range(9) for j in range(9)) / 81
    term = prompts.start(torch.randn(2, 16), 2).terms["orthogonality"]
    assert term.item() == pytest.approx(0.01 * expected, rel=1e-5)
    term.backward()
    moved = {name for name, parameter in prompts.named_parameters() if parameter.grad is not None}
    assert moved == {"prefixes.2", "keys.2", "attentions.2"}
    assert prompts.start(torch.randn(2, 16)).terms == {}


# ── on a tower ───────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def test_new_components_of_zeros_change_nothing(tiny_vit):
    prompts = made(tasks=2, layers=(0, 2), width=24, features=24)
    images = torch.randn(5, 3, 32, 32)
    query = tiny_vit(images).features
    before = tiny_vit(images, prompts.start(query)).features
    assert (before - query).abs().max() > 1e-3
    prompts.begin_task(2)
    prompts.prefixes[2].zero_()
    torch.testing.assert_close(tiny_vit(images, prompts.start(query)).features, before, rtol=1e-5, atol=1e-5)


def test_backward_stops_at_the_first_block_with_components_and_leaves_the_tower_alone(tiny_vit):
    prompts = made(tasks=2, layers=(1, 2), width=24, features=24)
    seen, started = [], prompts.start(torch.randn(5, 24), 1)

    def watched(layer, tokens, carried):
        seen.append(tokens.requires_grad)
        return started.at(layer, tokens, carried)

    tiny_vit(torch.randn(5, 3, 32, 32), Scripted(watched)).features.square().sum().backward()
    assert seen == [False, False, True]
    assert all(parameter.grad is None for parameter in tiny_vit.parameters())
    for parts in kinds(prompts).values():
        assert parts[0].grad is None and parts[1].grad.flatten(1).norm(dim=1).min() > 0
