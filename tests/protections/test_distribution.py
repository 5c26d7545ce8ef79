"""The loss that keeps mean and deviation of prompt tokens (A8-13): M 3, D 6, two blocks."""

import pytest
import torch

from lamina.prompts.deep import DeepPrompts
from lamina.protections.distribution import TokenMoments


@pytest.fixture
def held():
    """Prompts of blocks 0 and 1, and moments taken when their task ended."""
    prompts = DeepPrompts(range(2), 3, 6)
    moments = TokenMoments(prompts)
    moments.end_look(lambda total: total)
    return prompts, moments


def loss(moments):
    return moments.terms(model=None)["moments"].item()


def test_there_is_nothing_to_keep_before_a_task_is_over():
    assert TokenMoments(DeepPrompts(range(2), 3, 6)).terms(model=None) == {}


def test_it_is_zero_where_the_last_task_ended(held):
    assert loss(held[1]) == 0


def test_a_shift_costs_its_size_once_per_block(held):
    prompts, moments = held
    with torch.no_grad():
        prompts.value(0).add_(0.25)
    assert loss(moments) == pytest.approx(0.25, rel=1e-5)
    with torch.no_grad():
        prompts.value(1).add_(0.5)
    assert loss(moments) == pytest.approx(0.75, rel=1e-5)


def test_stretching_about_the_mean_costs_the_growth_of_the_deviation(held):
    prompts, moments = held
    value = prompts.value(1).detach().clone()
    with torch.no_grad():
        prompts.value(1).copy_(value.mean(-1, keepdim=True) + 1.3 * (value - value.mean(-1, keepdim=True)))
    assert loss(moments) == pytest.approx(0.3 * value.std(-1, unbiased=False).mean().item(), rel=1e-4)


def test_it_averages_over_tokens_and_uses_the_biased_deviation():
    prompts = DeepPrompts(range(1), 3, 2)
    moments = TokenMoments(prompts, weight=2.0)
    with torch.no_grad():
        prompts.value(0).zero_()
        moments.end_look(lambda total: total)
        prompts.value(0)[0] = torch.tensor([0.0, 2.0])  # mean 1, deviation 1, in one token of three
    assert loss(moments) == pytest.approx(2.0 * (1 + 1) / 3)


def test_more_tokens_of_the_same_kind_cost_no_more():
    value, costs = torch.randn(3, 6), []
    for times in (1, 4):
        prompts = DeepPrompts(range(1), 3 * times, 6)
        moments = TokenMoments(prompts)
        with torch.no_grad():
            prompts.value(0).copy_(value.repeat(times, 1))
            moments.end_look(lambda total: total)
            prompts.value(0).mul_(1.5).add_(torch.tensor([[0.5], [-2.0], [0.25]]).repeat(times, 1))
        costs.append(loss(moments))
    assert costs[1] == pytest.approx(costs[0], rel=1e-6) and costs[0] > 0.1


def test_it_follows_the_task_that_ended_last(held):
    prompts, moments = held
    with torch.no_grad():
        prompts.value(0).add_(1.0)
    moments.end_look(lambda total: total)
    assert loss(moments) == 0


def test_it_comes_back_from_a_checkpoint(held):
    prompts, moments = held
    again = TokenMoments(prompts)
    again.load_state_dict(moments.state_dict())
    with torch.no_grad():
        prompts.value(0).mul_(1.7)
    assert loss(again) == loss(moments) > 0
