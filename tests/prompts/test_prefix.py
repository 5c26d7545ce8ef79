"""General and expert prefixes: M 5 general and 4 expert rows, D 6, F 8; on the tiny tower D 24, H 2, N 17, L 3."""

import pytest
import torch
from torch.nn import functional as F

from lamina.errors import ConfigError
from lamina.prompts.base import Scripted
from lamina.prompts.prefix import ExpertPrefixes, blocks_of

TASKS = 9


def made(tasks=TASKS, general=(1,), expert=(0, 2, 4), width=6, features=8, **more):
    prompts = ExpertPrefixes(general, expert, 5, 4, width, features, **more)
    for index in range(tasks):
        prompts.begin_task(index)
    with torch.no_grad():
        for parameter in prompts.parameters():  # as if they had been trained
            parameter.add_(torch.randn_like(parameter))
    return prompts


def at(started, layer):
    return started.at(layer, None, None)


def with_keys(rows, **more):
    prompts = made(len(rows), features=len(rows[0]), **more)
    for key, row in zip(prompts.keys, rows, strict=True):
        key.data = torch.tensor(row)
    return prompts


# ── which rows an image gets ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_each_image_takes_keys_and_values_of_the_expert_whose_key_is_nearest(count):
    prompts = made()
    index = torch.randperm(TASKS)[:count]
    started = prompts.start(torch.stack([2.5 * prompts.keys[i].detach() for i in index]))
    assert torch.equal(started.chosen, index[:, None]) and started.terms == {}
    for place, layer in enumerate([0, 2, 4]):
        keys, values = at(started, layer).prefix
        assert keys.shape == values.shape == (count, 4, 6)
        for b, i in enumerate(index):
            assert torch.equal(keys[b], prompts.experts[i][place, 0])
            assert torch.equal(values[b], prompts.experts[i][place, 1])


def test_nearest_is_by_angle_not_by_length():
    prompts = with_keys([[0.1, 0.0, 0.0], [7.0, 9.0, 0.0]])
    assert prompts.nearest(torch.tensor([[50.0, 9.0, 0.0], [0.2, 0.2, 0.1]])).tolist() == [0, 1]


@pytest.mark.parametrize("task", [0, 5, 8])
def test_in_training_all_images_take_the_expert_of_the_true_task_whatever_their_queries_say(task):
    prompts = made()
    started = prompts.start(torch.stack([prompts.keys[i].detach() for i in (3, 7, 2)]), task)
    assert started.chosen.tolist() == [[task]] * 3
    for place, layer in enumerate([0, 2, 4]):
        keys, values = at(started, layer).prefix
        assert torch.equal(keys, prompts.experts[task][place, 0])
        assert torch.equal(values, prompts.experts[task][place, 1])


@pytest.mark.parametrize("task", [None, 2])
def test_general_rows_are_the_same_for_all_and_other_blocks_get_none(task):
    prompts = made(general=(1, 5))
    started = prompts.start(torch.randn(3, 8), task)
    for place, layer in enumerate([1, 5]):
        keys, values = at(started, layer).prefix
        assert torch.equal(keys, prompts.general[place, 0]) and torch.equal(values, prompts.general[place, 1])
    assert at(started, 3) is None and at(started, 6) is None


@pytest.mark.parametrize("task", [None, 2])
def test_a_block_in_both_places_gets_general_rows_and_then_the_experts(task):
    prompts = made(general=(1, 2))
    started = prompts.start(torch.randn(3, 8), task)
    for half, rows in enumerate(at(started, 2).prefix):
        assert rows.shape == ((3, 9, 6) if task is None else (9, 6))
        for b, i in enumerate(started.chosen[:, 0]):
            own = rows[b] if task is None else rows
            assert torch.equal(own, torch.cat([prompts.general[1, half], prompts.experts[i][1, half]]))


EYE = torch.eye(4).tolist()


@pytest.mark.parametrize(("selection", "chosen"), [("image", [2, 2, 1, 0, 1]), ("batch", [1, 1, 1, 1, 1])])
def test_a_vote_is_for_the_whole_batch_and_of_equals_the_first_wins(selection, chosen):
    prompts = with_keys(EYE, selection=selection)
    assert prompts.transductive == (selection == "batch")
    started = prompts.start(torch.eye(4)[[2, 2, 1, 0, 1]])
    assert started.chosen[:, 0].tolist() == chosen
    keys, _ = at(started, 4).prefix
    assert torch.equal(keys, torch.stack([prompts.experts[i][2, 0] for i in chosen]))
    assert prompts.start(torch.eye(4)[[2, 2, 1]], 3).chosen[:, 0].tolist() == [3, 3, 3]


def test_of_equally_near_keys_the_first_is_taken():
    prompts = with_keys(EYE)
    assert prompts.nearest(torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])).tolist() == [1, 0]


def test_queries_may_be_of_another_precision():
    prompts = with_keys(EYE)
    assert prompts.start(torch.eye(4).double()[[3, 1]]).chosen.tolist() == [[3], [1]]
    assert prompts.start(torch.eye(4).double()[[3, 1]], 0).terms["pull"].dtype == torch.float32


def test_without_queries_there_are_no_experts():
    with pytest.raises(ValueError, match="experts are found by queries"):
        made().start()


# ── the loss that pulls keys ─────────────────────────────────────────────────────────────────────────


def test_the_pull_is_minus_the_mean_cosine_to_the_key_of_the_task():
    prompts, query = made(pull=0.3), torch.randn(7, 8)
    term = prompts.start(query, 4).terms["pull"]
    key = prompts.keys[4]
    cosines = [float(q @ key / q.norm() / key.norm()) for q in query]
    assert term.item() == pytest.approx(-0.3 * sum(cosines) / 7, abs=1e-6)


def test_only_the_key_of_the_task_is_pulled_and_ends_at_the_mean_direction_of_its_queries():
    prompts, query = made(tasks=3), torch.randn(7, 8) + 1
    others = [key.detach().clone() for key in prompts.keys[:2]]
    optimizer = torch.optim.Adam([p for p in prompts.parameters() if p.requires_grad], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        prompts.start(query, 2).terms["pull"].backward()
        assert prompts.general.grad is None and all(expert.grad is None for expert in prompts.experts)
        optimizer.step()
    mean = F.normalize(query, dim=-1).mean(0)
    assert F.cosine_similarity(prompts.keys[2], mean, dim=0) > 0.999
    assert all(torch.equal(key, other) for key, other in zip(prompts.keys, others, strict=False))


# ── tasks ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_expert_is_a_copy_of_the_one_before_and_its_key_is_new():
    prompts = made(tasks=3)
    before = {name: value.clone() for name, value in prompts.state_dict().items()}
    prompts.begin_task(3)
    assert torch.equal(prompts.experts[3], prompts.experts[2])
    with torch.no_grad():
        prompts.experts[3].add_(1)
    after = prompts.state_dict()
    assert set(after) - set(before) == {"experts.3", "keys.3"}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(not torch.equal(prompts.keys[3], key) for key in prompts.keys[:3])
    assert prompts.keys[3].requires_grad and prompts.keys[3].abs().max() <= 1


def test_what_belongs_to_earlier_tasks_is_frozen_and_the_rest_learns():
    prompts = made(tasks=3)
    learning = {name for name, parameter in prompts.named_parameters() if parameter.requires_grad}
    assert learning == {"general", "experts.2", "keys.2"}
    shapes = {name: tuple(value.shape) for name, value in prompts.state_dict().items()}
    assert shapes == {
        "general": (1, 2, 5, 6),
        **{f"experts.{i}": (3, 2, 4, 6) for i in range(3)},
        **{f"keys.{i}": (8,) for i in range(3)},
    }


def test_the_first_expert_and_all_keys_are_drawn_from_the_global_generator():
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        prompts = ExpertPrefixes([0], [1], 5, 4, 6, 8)
        prompts.begin_task(0)
        drawn.append(torch.cat([p.detach().flatten() for p in prompts.parameters()]))
        assert -1 <= drawn[-1].min() < -0.9 and 0.9 < drawn[-1].max() <= 1
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_growing_takes_no_memory_where_shapes_alone_are_asked_for():
    shapes = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            prompts = ExpertPrefixes([0], [1, 2], 5, 4, 6, 8)
            for index in range(3):
                prompts.begin_task(index)
        assert {parameter.device.type for parameter in prompts.parameters()} == {device}
        shapes.append({name: value.shape for name, value in prompts.state_dict().items()})
    assert shapes[0] == shapes[1] and len(shapes[0]) == 7


# ── on a tower ───────────────────────────────────────────────────────────────────────────────────────


def entries(tower, images, started):
    """What enters each block (B, N, D)."""
    seen = []

    def at(layer, tokens, carried):
        seen.append(tokens)
        return started.at(layer, tokens, carried) if started is not None else None

    tower(images, Scripted(at))
    return seen


def by_hand(tower, x, keys, values, *, hide):
    """Block 1 on x (B, N, D) with extra rows (B, M, D) of keys and values; the logits to them are -inf if hidden."""
    block = tower.blocks()[1]
    q, k, v = block.project(block.norm(x))
    keys, values = (rows.reshape(*rows.shape[:2], 2, 12).permute(0, 2, 1, 3) for rows in (keys, values))
    logits = q @ torch.cat([k, keys], dim=2).transpose(-2, -1) / 12**0.5
    if hide:
        logits[..., -keys.shape[2] :] = float("-inf")
    x = block.attended(x, logits.softmax(-1) @ torch.cat([v, values], dim=2))
    return x + block.branch(x)


@torch.no_grad()
def test_a_prefix_is_extra_rows_of_keys_and_values_and_nothing_else(tiny_vit):
    prompts = made(tasks=4, general=(2,), expert=(1,), width=24, features=24)
    images = torch.randn(7, 3, 32, 32)
    plain = entries(tiny_vit, images, None)
    started = prompts.start(torch.stack([prompts.keys[i] for i in (3, 0, 2, 2, 1, 3, 0)]))
    prompted = entries(tiny_vit, images, started)
    keys, values = at(started, 1).prefix
    assert torch.equal(prompted[1], plain[1])
    shown, hidden = (by_hand(tiny_vit, plain[1], keys, values, hide=hide) for hide in (False, True))
    torch.testing.assert_close(prompted[2], shown, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain[2], hidden, rtol=1e-6, atol=1e-6)
    assert (shown - hidden).abs().max() > 0.01


@pytest.mark.parametrize("task", [None, 1])
def test_backward_stops_at_the_first_block_with_a_prefix(tiny_vit, task):
    prompts = made(tasks=2, general=(1,), expert=(2,), width=24, features=24)
    seen = entries(tiny_vit, torch.randn(3, 3, 32, 32), prompts.start(torch.randn(3, 24), task))
    assert [tokens.requires_grad for tokens in seen] == [False, False, True]
    assert seen[1].grad_fn is None


# ── which blocks ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wanted", "depth", "blocks"),
    [(None, 12, [2, 3, 4]), (None, 4, [2, 3]), (None, 3, [2]), ([5, 1], 12, [1, 5]), ([0], 1, [0])],
)
def test_blocks_are_the_wanted_ones_or_the_usual_ones_that_there_are(wanted, depth, blocks):
    assert blocks_of(wanted, [2, 3, 4], depth, "x") == blocks


@pytest.mark.parametrize(
    ("wanted", "depth", "got"),
    [([2, 3, 4], 3, [2, 3, 4]), ([1, 1], 3, [1, 1]), ([-1], 3, [-1]), ([], 3, []), (None, 2, [2, 3, 4])],
)
def test_blocks_that_a_backbone_has_not_are_refused(wanted, depth, got):
    with pytest.raises(ConfigError) as error:
        blocks_of(wanted, [2, 3, 4], depth, "M.blocks")
    assert str(error.value) == (
        f"M.blocks must name different blocks of the backbone, from 0 to {depth - 1}; got {got}"
    )
