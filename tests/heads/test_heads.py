"""Heads grow by task and keep what they learned: F 6 features, tasks of 2, 3 and 1 classes."""

import pytest
import torch

from lamina.heads.linear import LinearHead
from lamina.heads.statistics import NearestMean

TASKS = [["a", "b"], ["c", "d", "e"], ["f"]]
COLUMNS = [[0, 1], [2, 3, 4], [5]]


@pytest.fixture
def features():
    return torch.randn(4, 6)


def test_a_task_adds_its_columns_and_leaves_earlier_ones_as_they_were(features):
    head = LinearHead(6)
    before = torch.empty(4, 0)
    for index, classes in enumerate(TASKS):
        head.begin_task(index, classes, COLUMNS[index])
        logits = head(features).logits
        assert logits.shape == (4, sum(map(len, TASKS[: index + 1])))
        assert torch.equal(logits[:, : before.shape[1]], before)
        before = logits


def test_columns_of_a_task_are_its_own_layer(features):
    head = LinearHead(6)
    for index, classes in enumerate(TASKS):
        head.begin_task(index, classes, COLUMNS[index])
    torch.testing.assert_close(head(features).logits[:, 2:5], head.blocks[1](features))


def test_only_the_newest_columns_are_trained():
    head = LinearHead(6)
    for index, classes in enumerate(TASKS):
        head.begin_task(index, classes, COLUMNS[index])
        assert [p.requires_grad for p in head.parameters()] == [False] * (2 * index) + [True, True]


def test_a_class_met_again_goes_on_from_where_it_was_in_a_block_that_is_trained(features):
    head = LinearHead(6)
    for index, classes in enumerate(TASKS):
        head.begin_task(index, classes, COLUMNS[index])
    before = head(features).logits
    head.begin_task(3, ["g", "d", "a"], [6, 3, 0])
    after = head(features).logits
    assert after.shape == (4, 7) and torch.equal(after[:, :6], before)
    head.blocks[3].bias.data += torch.tensor([10.0, 20.0, 30.0])
    torch.testing.assert_close((head(features).logits - after)[0].round(), torch.tensor([30.0, 0, 0, 20, 0, 0, 10]))
    assert [p.requires_grad for p in head.parameters()] == [False] * 6 + [True, True]


def test_a_class_met_a_third_time_goes_on_from_the_second(features):
    head = LinearHead(6)
    head.begin_task(0, ["a", "b"], [0, 1])
    head.begin_task(1, ["b"], [1])
    head.blocks[1].bias.data += 5
    before = head(features).logits
    head.begin_task(2, ["b", "a"], [1, 0])
    assert torch.equal(head(features).logits, before)


def test_a_new_block_starts_small_and_without_bias():
    head = LinearHead(600)
    head.begin_task(0, [str(i) for i in range(50)], range(50))
    assert head.blocks[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not head.blocks[0].bias.any()


def started(classes, start="released"):
    """A head of 600 features that has met tasks of so many classes, each trained a little."""
    head, first = LinearHead(600, start=start), 0
    for index, count in enumerate(classes):
        head.begin_task(index, [str(first + i) for i in range(count)], range(first, first + count))
        head.blocks[index].weight.data += 0.25 * index + 0.5
        head.blocks[index].bias.data -= 0.75
        first += count
    return head


def test_a_released_head_starts_small_goes_on_from_the_first_task_and_is_then_as_torch_has_it():
    head = started([50, 50])
    weight, bias = head.blocks[0].weight, head.blocks[0].bias
    assert (weight - 0.5).std().item() == pytest.approx(0.02, rel=0.05) and torch.equal(bias, torch.full((50,), -0.75))
    torch.testing.assert_close(head.blocks[1].weight, weight + 0.75)
    torch.testing.assert_close(head.blocks[1].bias, bias - 0.75)
    head.begin_task(2, [f"c{i}" for i in range(50)], range(100, 150))
    for value in head.blocks[2].parameters():
        assert value.abs().max() <= 600**-0.5 and value.std().item() == pytest.approx((3 * 600) ** -0.5, rel=0.2)


def test_a_released_head_does_not_go_on_from_a_task_of_another_size():
    head = started([50, 49])
    assert head.blocks[1].weight.mean().item() == pytest.approx(0.75, abs=0.01)  # what it was moved by
    assert (head.blocks[1].weight - 0.75).abs().max() <= 600**-0.5 + 1e-6


def test_a_head_starts_small_for_every_task_unless_told_otherwise():
    head = started([50, 50, 50], start="small")
    for index in range(3):
        assert (head.blocks[index].weight - 0.25 * index - 0.5).std().item() == pytest.approx(0.02, rel=0.05)
        assert torch.equal(head.blocks[index].bias, torch.full((50,), -0.75))
    assert LinearHead(6).start == "small"


def test_a_class_met_again_goes_on_from_its_own_row_in_a_released_head_too(features):
    head = LinearHead(6, start="released")
    head.begin_task(0, ["a", "b"], [0, 1])
    before = head(features).logits
    head.begin_task(1, ["b", "c"], [1, 2])
    assert torch.equal(head(features).logits[:, :2], before)


def means_after(batches, tasks=TASKS[:2]):
    head = NearestMean(6)
    for index, classes in enumerate(tasks):
        head.begin_task(index, classes, COLUMNS[index])
    head.begin_look()
    for features, columns in batches:
        head.collect(features, columns)
    head.end_look(lambda total: total)
    return head


def test_an_image_gets_the_class_whose_mean_direction_is_nearest():
    features, columns = torch.randn(40, 6), torch.arange(40) % 5
    head = means_after([(features, columns)])
    unit = features / features.norm(dim=1, keepdim=True)
    means = torch.stack([unit[columns == c].mean(0) for c in range(5)])
    expected = unit @ (means / means.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(head(features).logits, expected, rtol=1e-5, atol=1e-6)


def test_means_do_not_depend_on_the_split_into_batches():
    features, columns = torch.randn(40, 6), torch.arange(40) % 5
    whole = means_after([(features, columns)])
    parts = means_after([(features[:7], columns[:7]), (features[7:], columns[7:])])
    torch.testing.assert_close(whole.seen.sums, parts.seen.sums, rtol=0, atol=1e-12)
    assert torch.equal(whole.seen.counts, parts.seen.counts)


def test_length_of_features_does_not_matter():
    features, columns = torch.randn(40, 6), torch.arange(40) % 5
    stretched = features * torch.rand(40, 1).add(0.5)
    torch.testing.assert_close(
        means_after([(features, columns)]).seen.sums, means_after([(stretched, columns)]).seen.sums, rtol=0, atol=1e-6
    )


def test_a_class_met_again_adds_to_its_mean_and_gets_no_second_column():
    first, second = torch.randn(10, 6), torch.randn(3, 6)
    head = means_after([(first, torch.arange(10) % 5)])
    head.begin_task(2, ["d", "f"], [3, 5])
    head.begin_look()
    head.collect(second, torch.tensor([3, 5, 3]))
    head.end_look(lambda total: total)
    unit = torch.nn.functional.normalize(torch.cat([first[3::5], second[::2]]).double(), dim=-1)
    assert head.seen.counts.tolist() == [2, 2, 2, 4, 2, 1]
    torch.testing.assert_close(head.seen.sums[3], unit.sum(0), rtol=0, atol=1e-12)


def test_new_classes_leave_old_means_alone():
    head = means_after([(torch.randn(10, 6), torch.arange(10) % 5)])
    before = head.seen.sums.clone()
    head.begin_task(2, TASKS[2], COLUMNS[2])
    assert torch.equal(head.seen.sums[:5], before) and head.seen.sums.shape == (6, 6)
