"""Steps and gradients under a projection (A8-12): M 3 prompt tokens, D 5 channels, in float64."""

import pytest
import torch
from torch import nn

from lamina.protections.projection import Projection, projected_gradients, projected_steps


def pair():
    """A protected and an unprotected parameter, twice over, with equal values."""
    torch.manual_seed(1)
    values = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    return [[nn.Parameter(value.clone()) for value in values] for _ in range(2)]


def steps(parameters, optimizer, count=4):
    """Take steps along gradients that depend on the number of the step alone."""
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()


def adam(parameters, weight_decay=0.05):
    return torch.optim.Adam(parameters, lr=0.1, weight_decay=weight_decay)


def projection():
    left, right = torch.randn(3, 3, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    return Projection(left @ left.T, right @ right.T)


def test_the_identity_leaves_adam_alone():
    ours, plain = pair()
    optimizer = adam(ours)
    with projected_steps(optimizer, {ours[0]: Projection(torch.eye(3), torch.eye(5))}):
        steps(ours, optimizer, 10)
    steps(plain, adam(plain), 10)
    torch.testing.assert_close(ours[0], plain[0], rtol=0, atol=1e-7)
    assert torch.equal(ours[1], plain[1])


def test_a_step_is_the_projection_of_adams_step():
    ours, plain = pair()
    start, optimizer, mapping = ours[0].detach().clone(), adam(ours), projection()
    with projected_steps(optimizer, {ours[0]: mapping}):
        steps(ours, optimizer, 1)
    steps(plain, adam(plain), 1)
    expected = start + mapping.left @ (plain[0] - start) @ mapping.right
    torch.testing.assert_close(ours[0].detach(), expected.detach(), rtol=0, atol=1e-7)


def test_many_steps_are_together_the_projection_of_adams_for_the_same_gradients():
    """Without decay, which would look at where the parameters are."""
    ours, plain = pair()
    start, optimizer, mapping = ours[0].detach().clone(), adam(ours, weight_decay=0), projection()
    with projected_steps(optimizer, {ours[0]: mapping}):
        steps(ours, optimizer, 10)
    steps(plain, adam(plain, weight_decay=0), 10)
    expected = start + mapping.left @ (plain[0] - start) @ mapping.right
    torch.testing.assert_close(ours[0].detach(), expected.detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("weight_decay", "count"), [(0.05, 1), (0.0, 10)])
def test_adams_moments_see_raw_gradients_and_other_parameters_are_untouched(weight_decay, count):
    ours, plain = pair()
    optimizer, reference = adam(ours, weight_decay), adam(plain, weight_decay)
    with projected_steps(optimizer, {ours[0]: projection()}):
        steps(ours, optimizer, count)
    steps(plain, reference, count)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[ours[0]][name], reference.state[plain[0]][name])
    assert torch.equal(ours[1], plain[1])
    assert not torch.allclose(ours[0], plain[0])


def test_outside_the_guard_steps_are_free_again():
    ours, plain = pair()
    optimizer = torch.optim.SGD(ours, lr=0.1)
    with projected_steps(optimizer, {ours[0]: Projection(torch.zeros(3, 3))}):
        steps(ours, optimizer, 2)
    assert torch.equal(ours[0], plain[0])
    steps(ours, optimizer, 1)
    assert not torch.allclose(ours[0], plain[0])


def test_for_sgd_projected_gradients_and_projected_steps_agree_and_for_adam_they_do_not():
    mapping = projection()
    for make, agree in ((lambda p: torch.optim.SGD(p, lr=0.1), True), (adam, False)):
        ours, other = pair()
        first, second = make(ours), make(other)
        with projected_steps(first, {ours[0]: mapping}), projected_gradients(second, {other[0]: mapping}):
            steps(ours, first)
            steps(other, second)
        assert torch.allclose(ours[0], other[0], rtol=1e-3, atol=1e-3) == agree


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_side_may_be_missing(side):
    step = torch.randn(6, 5)
    matrix = torch.randn(*{"left": (6, 6), "right": (5, 5)}[side])
    expected = matrix @ step if side == "left" else step @ matrix
    torch.testing.assert_close(Projection(**{side: matrix})(step), expected)


def test_the_left_factor_mixes_all_rows_of_a_parameter_whatever_its_shape():
    """2 prompts of 3 tokens: each of the 6 rows gets something of every other, of its own prompt or not."""
    step, left, right = torch.randn(2, 3, 5), torch.randn(6, 6), torch.randn(5, 5)
    found = Projection(left, right)(step)
    expected = torch.zeros(2, 3, 5)
    for prompt, token, other, row in torch.cartesian_prod(*map(torch.arange, (2, 3, 2, 3))).tolist():
        expected[prompt, token] += left[3 * prompt + token, 3 * other + row] * (step[other, row] @ right)
    torch.testing.assert_close(found, expected)
    parameter = nn.Parameter(torch.zeros(2, 3, 5))
    parameter.grad = -step
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    with projected_steps(optimizer, {parameter: Projection(left, right)}):
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), expected)
