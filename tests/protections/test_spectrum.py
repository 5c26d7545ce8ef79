"""Where a spectrum bends: the two knee rules, against the reference values of the method sheet (A8-7)."""

import pytest
import torch

from lamina.protections.spectrum import free_directions, nullity

K = torch.arange(1, 769, dtype=torch.float64)


@pytest.mark.parametrize(
    ("values", "free"),
    [
        ([10.0, 1.0, 0.5, 0.4], 3),
        ([10.0, 9.0, 1.0, 0.9], 2),
        ([3.0, 2.5, 0.1], 2),
        ([9.0, 1.0, 0.5], 2),
        (1 / K, 750),
        (K**-2, 751),
        (torch.exp(-0.05 * (K - 1)), 743),
        (torch.exp(-0.005 * (K - 1)), 730),
    ],
)
def test_the_released_rule_gives_the_reference_nullities(values, free):
    assert nullity(torch.as_tensor(values), "code") == free


@pytest.mark.parametrize("values", [1 / K, K**-2, torch.exp(-0.05 * (K - 1)), torch.exp(-0.005 * (K - 1))])
def test_the_papers_rule_leaves_all_but_two_directions_free_on_such_spectra(values):
    assert nullity(values, "paper") == 766


@pytest.mark.parametrize("knee", ["code", "paper"])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scale_does_not_matter(knee, scale):
    values = torch.rand(200, dtype=torch.float64).sort(descending=True).values
    assert nullity(scale * values, knee) == nullity(values, knee)


def test_equal_values_do_not_collapse_the_null_space():
    """The released code cuts by value, and would keep one direction here."""
    assert nullity(torch.tensor([5.0, 0.0, 0.0, 0.0]), "code") == 3


def test_the_released_rule_keeps_one_direction_more_on_short_spectra():
    values = torch.rand(50, dtype=torch.float64).sort(descending=True).values
    assert nullity(values, "code") == nullity(values, "paper") + 1


@pytest.mark.parametrize("shape", [(2,), (3, 3)])
def test_two_values_have_no_knee(shape):
    with pytest.raises(ValueError, match="a knee needs at least 3 eigenvalues in one row"):
        nullity(torch.ones(shape), "code")


def test_free_directions_are_those_of_the_smallest_eigenvalues():
    """Against an SVD, as the released code does it (A8-10)."""
    rows = torch.randn(40, 7, dtype=torch.float64) * torch.tensor([9.0, 7.0, 6.0, 0.3, 0.2, 0.1, 0.05])
    moment = rows.T @ rows
    _, values, basis = torch.linalg.svd(moment)
    expected = basis[len(values) - nullity(values, "code") :]
    free = free_directions(moment, "code")
    assert free.shape == (7, nullity(values, "code"))
    torch.testing.assert_close(free @ free.T, expected.T @ expected, rtol=0, atol=1e-10)


def test_directions_come_in_double_precision_whatever_comes_in():
    rows = torch.randn(11, 5)
    assert free_directions(rows.T @ rows, "paper").dtype == torch.float64
