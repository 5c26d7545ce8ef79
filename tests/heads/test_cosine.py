"""A classifier by cosine: F 6 features, 4 images, tasks of 2, 3 and 1 classes."""

import pytest
import torch
from torch import nn

from lamina.heads.cosine import CosineHead
from lamina.heads.linear import LinearHead

TASKS = [["a", "b"], ["c", "d", "e"], ["f"]]
COLUMNS = [[0, 1], [2, 3, 4], [5]]


@pytest.fixture
def features():
    return torch.randn(4, 6)


@pytest.fixture
def head():
    head = CosineHead(6)
    for index, classes in enumerate(TASKS):
        head.begin_task(index, classes, COLUMNS[index])
        with torch.no_grad():
            head.blocks[index].weight.copy_(torch.randn(len(classes), 6))
    return head


def test_a_score_is_a_hundred_cosines(head, features):
    expected = [
        [100 * nn.functional.cosine_similarity(x, w, dim=0).item() for block in head.blocks for w in block.weight]
        for x in features
    ]
    torch.testing.assert_close(head(features).logits, torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_lengths_of_weights_and_features_and_biases_play_no_part(head, features):
    before = head(features).logits
    with torch.no_grad():
        for block in head.blocks:
            block.weight.mul_(torch.rand(len(block.weight), 1) + 0.5)
            block.bias.fill_(7.0)
    torch.testing.assert_close(head(features * torch.tensor([[1e-3], [1], [20], [1e4]])).logits, before)


def test_another_scale_multiplies_all_scores(head, features):
    small = CosineHead(6, scale=4.0)
    for index, classes in enumerate(TASKS):
        small.begin_task(index, classes, COLUMNS[index])
    small.load_state_dict(head.state_dict())
    torch.testing.assert_close(25 * small(features).logits, head(features).logits)


def test_only_the_newest_weight_is_trained_and_never_a_bias():
    head = CosineHead(6)
    for index, classes in enumerate(TASKS):
        head.begin_task(index, classes, COLUMNS[index])
        trained = [name for name, parameter in head.named_parameters() if parameter.requires_grad]
        assert trained == [f"blocks.{index}.weight"]


def test_scores_of_a_new_task_send_a_gradient_to_its_weight_alone(head, features):
    head(features).logits.square().sum().backward()
    told = {name for name, parameter in head.named_parameters() if parameter.grad is not None}
    assert told == {"blocks.2.weight"} and head.blocks[2].weight.grad.abs().sum() > 0


def test_a_class_met_again_goes_on_from_where_it_was_in_a_block_that_is_trained(head, features):
    before = head(features).logits
    head.begin_task(3, ["g", "d", "a"], [6, 3, 0])
    after = head(features).logits
    assert after.shape == (4, 7)
    torch.testing.assert_close(after[:, :6], before)
    head.blocks[3].weight.data = head.blocks[3].weight.data * torch.tensor([[1.0], [-1.0], [1.0]])
    torch.testing.assert_close(head(features).logits[:, 3], -before[:, 3])
    assert head.blocks[3].weight.requires_grad and not head.blocks[1].weight.requires_grad


def test_a_cosine_head_starts_as_a_linear_one_does():
    torch.manual_seed(3)
    cosine = CosineHead(6)
    cosine.begin_task(0, TASKS[0], COLUMNS[0])
    torch.manual_seed(3)
    linear = LinearHead(6)
    linear.begin_task(0, TASKS[0], COLUMNS[0])
    assert torch.equal(cosine.blocks[0].weight, linear.blocks[0].weight)
