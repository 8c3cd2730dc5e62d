"""The Gaussian mechanism against an established accountant, and against the definition, integrated."""

from __future__ import annotations

import math

import pytest
from dp_accounting.pld.common import DifferentialPrivacyParameters
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss
from scipy.integrate import quad

from milkglass.errors import AuditError
from milkglass.leakage.gaussian_mechanism import gaussian_delta, gaussian_epsilon, gaussian_sigma

SETTINGS = [(0.0, 1.0, 1.0), (0.1, 2.0, 30.0), (1.0, 1.0, 1.0), (3.0, 2.0, 1.5), (10.0, 4.0, 1.0), (30.0, 1.0, 0.2)]
"""Of epsilon, sensitivity and sigma."""


def slow_delta(epsilon: float, ratio: float) -> float:
    """E[1 - exp(epsilon - loss)] where the loss exceeds epsilon, integrated: nothing is taken from anything.

    The privacy loss of a release is normal: v / ratio + epsilon, v - a of the standard normal law.
    """
    a = 0.5 / ratio - epsilon * ratio
    points = [point for point in (20 * ratio, a, 1 / max(1.0, -a)) if 0 < point < max(a, 0.0) + 20]

    def integrand(v: float) -> float:
        return -math.expm1(-v / ratio) * math.exp(-((v - a) ** 2) / 2 + min(a, 0.0) ** 2 / 2)

    whole = quad(integrand, 0, max(a, 0.0) + 20, points=points or None, limit=500, epsabs=0, epsrel=1e-10)[0]
    return float(whole * math.exp(-(min(a, 0.0) ** 2) / 2) / math.sqrt(2 * math.pi))


@pytest.mark.parametrize(("epsilon", "sensitivity", "sigma"), SETTINGS)
def test_delta_and_epsilon_are_those_of_an_established_accountant(
    epsilon: float, sensitivity: float, sigma: float
) -> None:
    theirs = GaussianPrivacyLoss(sigma, sensitivity=sensitivity)
    found = gaussian_delta(epsilon, sensitivity, sigma)
    assert found == pytest.approx(theirs.get_delta_for_epsilon(epsilon), rel=1e-7, abs=1e-13)
    for delta in (1e-10, 1e-5, 0.01):
        by_distribution = from_gaussian_mechanism(
            sigma, sensitivity=sensitivity, value_discretization_interval=1e-3
        ).get_epsilon_for_delta(delta)
        assert gaussian_epsilon(delta, sensitivity, sigma) == pytest.approx(by_distribution, rel=1e-3, abs=2e-3)
        assert gaussian_epsilon(delta, sensitivity, sigma) <= by_distribution + 1e-9  # theirs is rounded up


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 1e-6), (1.0, 1e-5), (5.0, 0.01)])
def test_the_noise_is_that_of_an_established_accountant(epsilon: float, delta: float) -> None:
    theirs = GaussianPrivacyLoss.from_privacy_guarantee(DifferentialPrivacyParameters(epsilon, delta), sensitivity=3.0)
    assert gaussian_sigma(epsilon, delta, 3.0) == pytest.approx(theirs.standard_deviation, rel=1e-5)


@pytest.mark.parametrize(
    ("epsilon", "ratio"),
    [
        *((epsilon, sigma / sensitivity) for epsilon, sensitivity, sigma in SETTINGS),
        *((1e4, 0.007), (1e4, 0.0072), (710.0, 0.03), (1000.0, 0.04), (5.0, 7.0), (0.02, 1000.0), (1e-3, 3e4)),
        *((1e-9, 1e9), (0.0, 1e9), (3e-6, 1_000_001.0), (3e-6, 999_999.0)),
    ],
)
def test_delta_keeps_its_digits_where_the_textbook_form_loses_them(epsilon: float, ratio: float) -> None:
    found, truth = gaussian_delta(epsilon, 1.0, ratio), slow_delta(epsilon, ratio)
    assert truth > 0
    assert found == pytest.approx(truth, rel=1e-8, abs=0)


@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0, 20.0, 1e5])
@pytest.mark.parametrize("delta", [1e-300, 1e-12, 1e-5, 0.3, 0.999])
def test_epsilon_delta_and_sigma_are_one_relation(delta: float, ratio: float) -> None:
    epsilon = gaussian_epsilon(delta, 2.0, 2.0 * ratio)
    if epsilon == 0:
        assert gaussian_delta(0.0, 2.0, 2.0 * ratio) <= delta
    else:
        assert gaussian_delta(epsilon, 2.0, 2.0 * ratio) == pytest.approx(delta, rel=1e-6)
        assert gaussian_sigma(epsilon, delta, 2.0) == pytest.approx(2.0 * ratio, rel=1e-6)
    assert gaussian_delta(0.0, 2.0, gaussian_sigma(0.0, delta, 2.0)) == pytest.approx(delta, rel=1e-6)


def test_more_noise_a_greater_epsilon_and_a_nearer_neighbor_each_lower_delta() -> None:
    base = gaussian_delta(1.0, 1.0, 1.0)
    assert gaussian_delta(1.1, 1.0, 1.0) < base
    assert gaussian_delta(1.0, 0.9, 1.0) < base
    assert gaussian_delta(1.0, 1.0, 1.1) < base
    assert gaussian_delta(1.0, 7.0, 7.0) == pytest.approx(base)  # only the ratio counts
    assert gaussian_delta(1.0, 1.0, 1e-200) == 1.0
    assert gaussian_delta(50.0, 1.0, 1e6) == 0.0


def test_delta_is_the_chance_gained_by_the_best_set_of_releases() -> None:
    """P(S | one) - exp(epsilon) P(S | other) for all releases S above a threshold: delta at most, and once."""
    epsilon, sensitivity, sigma = 1.0, 2.0, 1.5

    def upper_tail(x: float) -> float:
        return math.erfc(x / math.sqrt(2)) / 2

    gains = [
        upper_tail((t - sensitivity) / sigma) - math.exp(epsilon) * upper_tail(t / sigma)
        for t in [0.001 * i for i in range(-10_000, 10_000)]
    ]
    assert max(gains) == pytest.approx(gaussian_delta(epsilon, sensitivity, sigma), abs=1e-6)


def test_an_epsilon_beyond_a_floats_range_is_infinite() -> None:
    assert gaussian_epsilon(1e-5, 1.0, 1e-200) == math.inf


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_values_out_of_range_are_refused(bad: float) -> None:
    with pytest.raises(AuditError, match="sigma is"):
        gaussian_delta(1.0, 1.0, bad)
    with pytest.raises(AuditError, match="sensitivity is"):
        gaussian_epsilon(1e-5, bad, 1.0)
    with pytest.raises(AuditError, match="sensitivity is"):
        gaussian_sigma(1.0, 1e-5, bad)
    for delta in (bad, 1.0):
        with pytest.raises(AuditError, match="delta is"):
            gaussian_epsilon(delta, 1.0, 1.0)
        with pytest.raises(AuditError, match="delta is"):
            gaussian_sigma(1.0, delta, 1.0)
    if bad != 0:
        with pytest.raises(AuditError, match="epsilon is"):
            gaussian_delta(bad, 1.0, 1.0)
        with pytest.raises(AuditError, match="epsilon is"):
            gaussian_sigma(bad, 1e-5, 1.0)
    with pytest.raises(AuditError, match="beyond a float"):
        gaussian_delta(1.0, 1e300, 1e-300)
