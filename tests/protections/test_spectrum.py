"""Where a spectrum is cut: the rules, against the reference values of the method sheet (A8-7) and by hand."""

import pytest
import torch

from lamina.errors import ConfigError
from lamina.protections.spectrum import Cut, nullity

K = torch.arange(1, 769, dtype=torch.float64)
LONG = [1 / K, K**-2, torch.exp(-0.05 * (K - 1)), torch.exp(-0.005 * (K - 1))]
CODE, OFFICIAL, PAPER = Cut(knee="code"), Cut(knee="official"), Cut(knee="paper")
EVERY = [CODE, OFFICIAL, PAPER, Cut(knee="energy", kept=0.9), Cut(knee="multiple", multiple=3.0)]


def falling(count):
    return torch.rand(count, dtype=torch.float64).sort(descending=True).values


@pytest.mark.parametrize(
    ("values", "free"),
    [
        ([10.0, 1.0, 0.5, 0.4], 3),
        ([10.0, 9.0, 1.0, 0.9], 2),
        ([3.0, 2.5, 0.1], 2),
        ([9.0, 1.0, 0.5], 2),
        *zip(LONG, [750, 751, 743, 730], strict=True),
    ],
)
def test_the_released_rule_gives_the_reference_nullities(values, free):
    for cut in (CODE, OFFICIAL):  # alike where no two values are equal
        assert nullity(torch.as_tensor(values), cut) == free


def test_the_released_rule_frees_two_of_any_three():
    for _ in range(50):
        assert nullity(falling(3), CODE) == nullity(falling(3), OFFICIAL) == 2


@pytest.mark.parametrize("values", LONG)
def test_the_papers_rule_leaves_all_but_two_directions_free_on_such_spectra(values):
    assert nullity(values, PAPER) == 766


@pytest.mark.parametrize("cut", EVERY, ids=lambda cut: cut.knee)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scale_does_not_matter(cut, scale):
    values = falling(200)
    assert 0 < nullity(scale * values, cut) == nullity(values, cut)


def test_equal_values_collapse_the_null_space_where_the_cut_is_found_by_value_and_not_elsewhere():
    values = torch.tensor([5.0, 0.0, 0.0, 0.0])
    assert [nullity(values, cut) for cut in (CODE, OFFICIAL, PAPER)] == [3, 1, 2]


def test_equal_values_at_the_knee_cost_directions_where_the_cut_is_found_by_value():
    values = torch.tensor([9.0, 3.0, 3.0, 3.0, 2.0, 1.0])
    assert [nullity(values, cut) for cut in (CODE, OFFICIAL)] == [5, 3]


def test_the_released_rule_keeps_one_direction_more_on_short_spectra():
    values = falling(50)
    assert nullity(values, CODE) == nullity(values, PAPER) + 1


@pytest.mark.parametrize(
    ("kept", "free"),
    [(0.0, 5), (0.45, 4), (0.46, 3), (0.72, 3), (0.73, 2), (0.9, 2), (0.91, 1), (0.99, 1), (0.995, 0), (1.0, 0)],
)
def test_energy_frees_the_smallest_values_that_together_hold_no_more_than_what_is_left_over(kept, free):
    """Tails of 1, 11, 31, 61 and 111 of 111: shares of 0.009, 0.099, 0.279, 0.550 and 1."""
    assert nullity(torch.tensor([50.0, 30.0, 20.0, 10.0, 1.0]), Cut(knee="energy", kept=kept)) == free


@pytest.mark.parametrize(("multiple", "free"), [(1.0, 1), (1.9, 1), (2.0, 2), (2.5, 3), (2.6, 3), (9.0, 4), (10.0, 5)])
def test_a_multiple_frees_what_is_at_most_so_many_times_the_smallest(multiple, free):
    assert nullity(torch.tensor([5.0, 4.0, 1.25, 1.0, 0.5]), Cut(knee="multiple", multiple=multiple)) == free


@pytest.mark.parametrize("cut", [Cut(knee="energy", kept=1.0), Cut(knee="multiple", multiple=1.0)])
@pytest.mark.parametrize("rank", [2, 6])
def test_what_is_zero_up_to_rounding_is_free_and_nothing_else(cut, rank):
    rows = torch.randn(rank, 9, dtype=torch.float64)
    values = torch.linalg.eigvalsh(rows.T @ rows)  # some below 0
    assert values[0] != 0 and nullity(values.flip(0), cut) == 9 - rank
    smallest = values.clamp_min(0) + 1e-12 * values[-1]
    assert nullity(smallest.flip(0), Cut(knee="energy", kept=1.0)) == 0


def test_of_nothing_at_all_everything_is_free():
    for cut in (Cut(knee="energy"), Cut(knee="multiple")):
        assert nullity(torch.zeros(4), cut) == 4


@pytest.mark.parametrize("cut", [CODE, PAPER, OFFICIAL], ids=lambda cut: cut.knee)
def test_two_values_have_no_knee(cut):
    with pytest.raises(ValueError) as error:
        nullity(torch.ones(2), cut)
    assert str(error.value) == "a knee needs at least 3 eigenvalues; got 2"


@pytest.mark.parametrize("shape", [(0,), (3, 4)])
def test_a_spectrum_is_one_row(shape):
    with pytest.raises(ValueError) as error:
        nullity(torch.ones(shape), Cut(knee="energy"))
    assert str(error.value) == f"a spectrum is one row of eigenvalues; got shape {shape}"


@pytest.mark.parametrize("values", [{"kept": 1.1}, {"kept": -0.1}, {"multiple": 0.9}, {"kept": float("nan")}])
def test_numbers_out_of_range_are_refused(values):
    kept, multiple = values.get("kept", 0.99), values.get("multiple", 10.0)
    with pytest.raises(ConfigError) as error:
        Cut(**values)
    assert str(error.value) == (f"kept must be between 0 and 1 and multiple at least 1; got {kept} and {multiple}")


def test_the_rules_have_the_defaults_of_the_settings():
    assert Cut() == Cut(knee="paper", kept=0.99, multiple=10.0)
