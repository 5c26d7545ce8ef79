"""From a second moment to a projector: n 7 directions."""

import pytest
import torch

from lamina.protections.projector import Blend, Spectrum
from lamina.protections.spectrum import Cut, nullity

CODE = Cut(knee="code")


@pytest.fixture
def moment():
    """(7, 7), with a clear gap after three directions."""
    rows = torch.randn(40, 7, dtype=torch.float64) * torch.tensor([9.0, 7.0, 6.0, 0.3, 0.2, 0.1, 0.05])
    return rows.T @ rows


def test_free_directions_are_those_of_the_smallest_eigenvalues(moment):
    """Against an SVD, as the released code does it (A8-10)."""
    _, values, basis = torch.linalg.svd(moment)
    expected = basis[len(values) - nullity(values, CODE) :]
    free = Spectrum.of(moment).free(CODE)
    assert free.shape == (7, nullity(values, CODE))
    torch.testing.assert_close(free @ free.T, expected.T @ expected, rtol=0, atol=1e-10)


def test_a_spectrum_rises_and_its_directions_are_columns(moment):
    values, basis = Spectrum.of(moment)
    assert torch.equal(values, values.sort().values)
    torch.testing.assert_close(moment @ basis, basis * values, rtol=1e-9, atol=1e-9)


def test_directions_come_in_double_precision_whatever_comes_in(moment):
    assert Spectrum.of(moment.float()).free(CODE).dtype == torch.float64


def test_without_a_cut_nothing_is_free(moment):
    assert Spectrum.of(moment).free(None).shape == (7, 0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.6, 0.97, 1.0])
def test_a_blend_has_two_gains(moment, eta, normalize):
    """On the R free directions eta / sqrt(R) + 1 - eta, or 1 un-normalised; 1 - eta on the others (A8-6)."""
    free = Spectrum.of(moment).free(CODE)
    count = free.shape[1]
    blend = Blend(eta=eta, normalize=normalize)(free)
    gain = eta / count**0.5 + 1 - eta if normalize else 1.0
    assert 1 < count < 7
    torch.testing.assert_close(blend @ free, gain * free, rtol=0, atol=1e-12)
    used = torch.linalg.qr(free, mode="complete").Q[:, count:]
    torch.testing.assert_close(blend @ used, (1 - eta) * used, rtol=0, atol=1e-12)
    assert torch.equal(blend, blend.T)


def test_a_plain_projector_is_its_own_square_and_a_normalised_one_has_unit_norm(moment):
    """A8-5; the norm of the one is the root of the number of free directions, and divides the other."""
    free = Spectrum.of(moment).free(CODE)
    count = free.shape[1]
    plain, unit = Blend(normalize=False)(free), Blend()(free)
    assert torch.equal(plain, plain.T) and torch.equal(unit, unit.T)
    assert (plain @ plain - plain).norm() <= 1e-10 * 7**0.5
    assert plain.trace() == pytest.approx(count, abs=1e-9)
    assert plain.norm() == pytest.approx(count**0.5, abs=1e-12) and unit.norm() == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(unit @ unit, unit / count**0.5, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_eta_zero_is_the_identity_to_the_bit(moment, normalize):
    blend = Blend(eta=0.0, normalize=normalize)(Spectrum.of(moment).free(CODE))
    assert torch.equal(blend, torch.eye(7, dtype=torch.float64))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_control_has_the_gain_of_free_directions_in_every_direction(moment, normalize):
    free = Spectrum.of(moment).free(CODE)
    real = Blend(eta=0.9, normalize=normalize)(free)
    control = Blend(eta=0.9, normalize=normalize, gain_control=True)(free)
    gain = float((real @ free[:, 0]) @ free[:, 0])
    torch.testing.assert_close(control, gain * torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gain_control", [True, False])
def test_where_nothing_is_free_the_projector_is_zero(normalize, gain_control):
    nothing = torch.zeros(7, 0, dtype=torch.float64)
    for eta in (1.0, 0.75):
        blend = Blend(eta=eta, normalize=normalize, gain_control=gain_control)(nothing)
        assert torch.equal(blend, (1 - eta) * torch.eye(7, dtype=torch.float64))


def test_a_blend_projects_fully_and_is_normalised_unless_told_otherwise():
    assert Blend() == Blend(eta=1.0, normalize=True, gain_control=False)
