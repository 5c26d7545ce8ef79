"""Prompts per task and keys per class: tasks of 3, 1 and 4 classes, M 5, D 6, F 10, prompts at blocks 0 and 2.

On the tiny tower D 24, H 2, N 17, L 3.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from lamina.prompts.base import Scripted
from lamina.prompts.consistent import ConsistentPrompts, new_keys

#: columns in no order, so that neither place nor column alone says which task a class is of
COLUMNS = [[2, 0, 1], [3], [7, 4, 6, 5]]
TASK_OF_KEY = [0, 0, 0, 1, 2, 2, 2, 2]


def grown(columns=COLUMNS, layers=(0, 2), width=6, features=10, **more):
    prompts = ConsistentPrompts(layers, 5, width, features, **more)
    for index, places in enumerate(columns):
        prompts.begin_task(index, places)
        with torch.no_grad():
            for part in (prompts.values[-1], prompts.keys[-1]):  # as if they had been trained
                part.add_(torch.randn_like(part))
    return prompts


def rows(prompts):
    return torch.cat(list(prompts.keys)).detach()


def state(prompts):
    return {name: value.clone() for name, value in prompts.state_dict().items()}


# ── which prompts an image gets ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_each_image_takes_the_prompts_of_the_task_that_has_the_class_with_the_nearest_key(count):
    prompts = grown()
    keys = torch.randperm(8)[:count]
    started = prompts.start(2.5 * rows(prompts)[keys])
    tasks = [TASK_OF_KEY[key] for key in keys]
    assert started.chosen.tolist() == [[task] for task in tasks] and started.copies == 1
    tokens = started.at(0, None, None).tokens
    assert tokens.shape == (count, 5, 6)
    assert all(torch.equal(tokens[b], prompts.values[task][0]) for b, task in enumerate(tasks))


def test_nearest_is_by_angle_and_of_equals_the_first():
    prompts = grown([[0], [1], [2]], features=3)
    for key, row in zip(prompts.keys, [[0.1, 0.0, 0.0], [7.0, 9.0, 0.0], [0.2, 0.0, 0.0]], strict=True):
        key.data = torch.tensor([row])
    queries = torch.tensor([[50.0, 9.0, 0.0], [0.2, 0.2, 0.1], [0.0, 0.0, 0.0]])
    assert prompts.nearest(queries).tolist() == [0, 1, 0]


def test_prompts_of_later_blocks_go_behind_what_became_of_earlier_ones():
    prompts = grown()
    started = prompts.start(rows(prompts)[[4, 3, 0]])
    carried = torch.randn(3, 5, 6, dtype=torch.bfloat16)
    tokens = started.at(2, None, carried).tokens
    assert tokens.shape == (3, 10, 6) and tokens.dtype == torch.bfloat16
    assert torch.equal(tokens[:, :5], carried)
    for b, task in enumerate([2, 1, 0]):
        assert torch.equal(tokens[b, 5:], prompts.values[task][1].bfloat16())
    assert started.at(1, None, carried) is None


def test_training_shows_the_prompts_of_the_task_and_then_those_of_drawn_tasks():
    prompts = grown()
    started = prompts.start(torch.randn(40, 10), 2)
    tasks = started.chosen[:, 0].tolist()
    assert started.copies == 2 and len(tasks) == 80
    assert tasks[:40] == [2] * 40 and set(tasks[40:]) == {0, 1, 2}
    tokens = started.at(0, None, None).tokens
    assert all(torch.equal(tokens[b], prompts.values[task][0]) for b, task in enumerate(tasks))


def test_the_first_task_shows_every_image_once():
    started = grown().start(torch.randn(7, 10), 0)
    assert started.copies == 1 and started.chosen.tolist() == [[0]] * 7


def test_every_task_so_far_is_drawn_as_often_image_by_image():
    """Chi-squared of 4 tasks, 3 degrees of freedom: above 16.27 once in a thousand."""
    prompts = grown([[0], [1], [2], [3], [4]])
    drawn = prompts.start(torch.randn(10_000, 10), 3).chosen[10_000:, 0]
    counts = torch.bincount(drawn).double()
    assert len(counts) == 4
    assert ((counts - 2500).square() / 2500).sum() < 16.27
    pairs = torch.bincount(4 * drawn[:-1] + drawn[1:], minlength=16).double()  # 15 degrees of freedom
    assert ((pairs - 9999 / 16).square() / (9999 / 16)).sum() < 37.7


def test_draws_follow_the_global_generator():
    prompts, drawn = grown(), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(prompts.start(torch.ones(60, 10), 2).chosen)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_without_queries_there_are_no_prompts():
    with pytest.raises(ValueError) as error:
        grown().start()
    assert str(error.value) == "prompts are found by queries; give `start` the features of the same images"


# ── the loss of the keys ─────────────────────────────────────────────────────────────────────────────


def test_keys_learn_by_the_cross_entropy_of_plain_cosines_with_all_keys_so_far():
    prompts, query = grown(), torch.randn(5, 10)
    labels = torch.tensor([6, 7, 5, 5, 4])
    loss = prompts.start(query, 2).losses(labels)["keys"]
    place = {7: 4, 4: 5, 6: 6, 5: 7}  # of a column, among the keys of all tasks
    by_hand = []
    for image, label in zip(query, labels.tolist(), strict=True):
        exponents = [math.exp(F.cosine_similarity(image, key, dim=0)) for key in rows(prompts)]
        by_hand.append(-math.log(exponents[place[label]] / sum(exponents)))
    assert loss.item() == pytest.approx(sum(by_hand) / 5, abs=1e-5)


def test_keys_of_later_tasks_do_not_compete():
    prompts, query, labels = grown(), torch.randn(5, 10), torch.tensor([3, 3, 3, 3, 3])
    early = grown(COLUMNS[:2])
    early.load_state_dict({name: value for name, value in state(prompts).items() if not name.endswith(".2")})
    assert torch.equal(prompts.start(query, 1).losses(labels)["keys"], early.start(query, 1).losses(labels)["keys"])


def test_only_keys_of_the_task_get_a_gradient_from_it_and_no_prompt_does():
    prompts = grown()
    prompts.start(torch.randn(9, 10), 2).losses(torch.tensor([4, 5, 6, 7, 4, 5, 6, 7, 4]))["keys"].backward()
    grads = {name: part.grad for name, part in prompts.named_parameters() if part.grad is not None}
    assert set(grads) == {"keys.2"} and (grads["keys.2"].norm(dim=1) > 0).all()


def test_the_loss_of_the_keys_cannot_fall_below_what_cosines_allow():
    prompts = grown([[0, 1]])
    prompts.keys[0].data = torch.eye(10)[0] * torch.tensor([[1.0], [-1.0]])
    least = prompts.start(torch.eye(10)[[0]], 0).losses(torch.tensor([0]))["keys"]
    assert least.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)


def test_there_is_no_loss_in_evaluation_and_none_without_labels():
    prompts, query = grown(), torch.randn(4, 10)
    assert prompts.start(query).losses(torch.tensor([4, 5, 6, 7])) == {}
    assert prompts.start(query, 2).losses(None) == {}


def test_queries_may_be_of_another_precision():
    prompts = grown()
    query = rows(prompts)[[4, 3]].double()
    assert prompts.start(query).chosen.tolist() == [[2], [1]]
    assert prompts.start(query, 2).losses(torch.tensor([7, 4]))["keys"].dtype == torch.float32


def test_keys_learned_task_by_task_find_the_tasks_of_new_queries():
    """Classes as far apart as these, in tasks of 3, 1 and 4; old keys never see an old query again."""
    prompts, centres = ConsistentPrompts([0], 5, 6, 10), torch.linalg.qr(torch.randn(10, 10))[0][:8]

    def queries(columns):
        return centres[columns] + 0.1 * torch.randn(len(columns), 10)

    for index, columns in enumerate(COLUMNS):
        prompts.begin_task(index, columns)
        optimizer = torch.optim.SGD([prompts.keys[index]], lr=0.1, momentum=0.9)
        for _ in range(60):
            labels = torch.tensor(columns * 4)
            optimizer.zero_grad()
            prompts.start(queries(labels), index).losses(labels)["keys"].backward()
            optimizer.step()
    labels = torch.arange(8).repeat(30)
    tasks = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])[labels]
    assert (prompts.start(queries(labels)).chosen[:, 0] == tasks).double().mean() > 0.95


# ── tasks ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_task_starts_from_a_copy_of_the_prompts_before_and_freezes_what_there_is():
    prompts = grown()
    before = state(prompts)
    prompts.begin_task(3, [8, 9])
    after = state(prompts)
    assert set(after) - set(before) == {"values.3", "keys.3"} and after["keys.3"].shape == (2, 10)
    assert torch.equal(after["values.3"], before["values.2"])
    with torch.no_grad():
        prompts.values[3].add_(1)
    assert all(torch.equal(value, prompts.state_dict()[name]) for name, value in before.items())
    assert {name for name, part in prompts.named_parameters() if part.requires_grad} == {"values.3", "keys.3"}


def test_the_first_prompts_are_uniform_within_one_over_the_root_of_the_width():
    prompts = ConsistentPrompts([0, 1], 50, 16, 10)
    prompts.begin_task(0, [0])
    value = prompts.values[0].detach()
    assert value.shape == (2, 50, 16)
    assert -0.25 <= value.min() < -0.24 and 0.24 < value.max() <= 0.25
    assert value.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.05)


def test_new_keys_are_orthogonal_to_each_other_and_to_what_old_ones_have_become():
    prompts = grown(COLUMNS[:2])
    old = rows(prompts)
    prompts.begin_task(2, COLUMNS[2])
    new = prompts.keys[2].detach()
    torch.testing.assert_close(new @ new.T, torch.eye(4), rtol=0, atol=1e-6)
    assert (new @ old.T).abs().max() < 1e-5


def test_where_no_room_is_left_keys_are_unit_vectors_all_the_same():
    prompts = grown([[0, 1, 2], [3, 4, 5, 6], [7]], features=5)
    torch.testing.assert_close(new_keys(4, 5, [torch.eye(5)[:3]]).norm(dim=1), torch.ones(4))
    assert [key.shape for key in prompts.keys] == [(3, 5), (4, 5), (1, 5)]
    prompts.begin_task(3, [8, 9])
    keys = prompts.keys[3].detach()
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(2))
    assert (keys[0] @ keys[1]).abs() < 0.999


def test_keys_in_advance_are_handed_out_in_order_and_then_drawn():
    prompts = ConsistentPrompts([0], 5, 6, 10, keys_in_advance=4)
    reserve = prompts.reserve.clone()
    torch.testing.assert_close(reserve @ reserve.T, torch.eye(4), rtol=0, atol=1e-6)
    for index, columns in enumerate([[0], [1, 2], [3, 4, 5], [6]]):
        prompts.begin_task(index, columns)
    given = rows(prompts)
    assert torch.equal(given[:4], reserve)
    torch.testing.assert_close(given @ given.T, torch.eye(7), rtol=0, atol=1e-6)
    with torch.no_grad():
        prompts.keys[0].add_(1)
    assert torch.equal(prompts.reserve, reserve)


def test_a_class_met_again_has_a_key_with_each_of_its_tasks():
    prompts = grown([[0, 1], [1, 2]])
    first, second = (prompts.start(key.detach()[[1 - i]]).chosen for i, key in enumerate(prompts.keys))
    assert (first.tolist(), second.tolist()) == ([[0]], [[1]])
    prompts.start(torch.randn(3, 10), 1).losses(torch.tensor([1, 1, 1]))["keys"].backward()
    assert prompts.keys[0].grad is None and (prompts.keys[1].grad.norm(dim=1) > 0).all()


def test_growing_takes_no_memory_where_shapes_alone_are_asked_for():
    shapes = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            prompts = ConsistentPrompts([0, 2], 5, 6, 10, keys_in_advance=2)
            for index, columns in enumerate(COLUMNS):
                prompts.begin_task(index, columns)
        assert {parameter.device.type for parameter in prompts.parameters()} == {device}
        shapes.append({name: value.shape for name, value in prompts.state_dict().items()})
    assert shapes[0] == shapes[1] and len(shapes[0]) == 7


# ── on a tower ───────────────────────────────────────────────────────────────────────────────────────


def on_tower():
    prompts = grown(layers=(0, 2), width=24, features=24)
    return prompts, torch.randn(4, 3, 32, 32)


@torch.no_grad()
def test_copies_of_a_batch_are_what_passes_one_after_another_would_be(tiny_vit):
    prompts, images = on_tower()
    started = prompts.start(torch.randn(4, 24), 2)
    together = tiny_vit(images, started)
    assert together.features.shape == (8, 24) and together.prompts.shape == (8, 10, 24)
    for half, chosen in enumerate(started.chosen[:, 0].split(4)):
        alone = prompts.start(torch.cat([prompts.keys[task][:1] for task in chosen]))
        assert torch.equal(alone.chosen[:, 0], chosen)
        torch.testing.assert_close(together.features[4 * half :][:4], tiny_vit(images, alone).features)
    assert (together.features[:4] - together.features[4:]).abs().max() > 0.01


@torch.no_grad()
def test_tokens_take_part_in_all_blocks_from_where_they_enter(tiny_vit):
    """Block by block the definition: the sequence and its prompts, through the block as they are."""
    prompts, images = on_tower()
    started = prompts.start(torch.cat([prompts.keys[task][:1] for task in (2, 0, 1, 2)]))
    x, _ = tiny_vit.embed(images)
    first, second = (torch.stack([prompts.values[task][place] for task in (2, 0, 1, 2)]) for place in (0, 1))
    seen = []

    def at(layer, tokens, carried):
        seen.append(tokens)
        return started.at(layer, tokens, carried)

    encoded = tiny_vit(images, Scripted(at), all_rows=True)
    x = torch.cat([x, first], dim=1)
    blocks = tiny_vit.model.blocks
    for layer, block in enumerate(blocks):
        if layer == 2:
            x = torch.cat([x, second], dim=1)
        torch.testing.assert_close(seen[layer], x[:, :17], rtol=1e-5, atol=1e-5)
        x = block(x)
    torch.testing.assert_close(encoded.tokens, x[:, :17], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoded.prompts, tiny_vit.model.norm(x[:, 17:]), rtol=1e-5, atol=1e-5)
