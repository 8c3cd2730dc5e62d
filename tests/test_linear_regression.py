"""The example of the linear regression: its closed forms, its published figures, and bounds below attacks."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chi2, multivariate_normal

from milkglass.leakage.information import exponential_gap_bound
from milkglass.randomness import public_source

EXAMPLE = Path(__file__).parents[1] / "examples" / "linear_regression.py"


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


@pytest.fixture(scope="module")
def attacks(example: SimpleNamespace) -> dict[int, SimpleNamespace]:
    """The simulation by rows, with draws that are not those of the printed table."""
    return {
        rows: example.simulate(rows, 100, 200, public_source(7).generator("linear regression", rows))
        for rows in (21, 40, 140)
    }


def test_the_published_bounds_are_the_formula_with_r_up_to_40(example: SimpleNamespace) -> None:
    for rows, (published, _) in example.PUBLISHED.items():
        gap = example.expected_gap(rows)
        radius = min(exponential_gap_bound(gap, example.VARIANCE).radius, 40.0)
        at_radius = 0.5 + gap / (4 * radius) - math.exp(-radius / 8) * (1 + 8 / radius)
        assert at_radius == pytest.approx(published, abs=5e-6)
    assert exponential_gap_bound(example.expected_gap(21), example.VARIANCE).value == pytest.approx(0.53966, abs=5e-6)
    assert exponential_gap_bound(example.expected_gap(40), example.VARIANCE).value == pytest.approx(0.51800, abs=5e-6)


def test_the_attacks_reach_the_published_success_and_the_one_that_knows_the_row_more(
    attacks: dict[int, SimpleNamespace],
) -> None:
    assert attacks[21].mixture.mean().item() == pytest.approx(0.744, abs=0.02)
    assert attacks[40].mixture.mean().item() == pytest.approx(0.563, abs=0.02)
    for rows, success in ((21, 0.847), (40, 0.635), (140, 0.534)):
        assert attacks[rows].threshold.mean().item() == pytest.approx(success, abs=0.012)


def test_simulated_gap_and_threshold_attack_are_the_closed_forms(
    example: SimpleNamespace, attacks: dict[int, SimpleNamespace]
) -> None:
    for rows, found in attacks.items():
        assert found.gap == pytest.approx(example.expected_gap(rows), abs=0.3)
        assert found.leverage_H.mean() == pytest.approx(20 / rows)
        best = example.best_threshold(found.leverage_H)
        mean, half = example.mean_and_half(found.threshold)
        assert mean == pytest.approx(best.value, abs=1.5 * half)


def test_sound_bounds_are_below_every_attack_that_they_bound_and_in_order(
    example: SimpleNamespace, attacks: dict[int, SimpleNamespace]
) -> None:
    for rows, found in attacks.items():
        gap = example.expected_gap(rows)
        right_scale = exponential_gap_bound(gap, example.VARIANCE * (1 + found.leverage_H.max())).value
        clipped = example.clipped_bound(found.leverage_H).value
        threshold = example.best_threshold(found.leverage_H).value
        best, half = example.mean_and_half(found.best)
        assert 0.5 < right_scale < clipped < threshold < best - half
        assert found.mixture.mean() < best
    at_21 = exponential_gap_bound(example.expected_gap(21), 4 * (1 + attacks[21].leverage_H.max())).value
    assert at_21 == pytest.approx(0.517, abs=5e-4)


def test_the_clipped_bound_has_exact_chi_square_tails(example: SimpleNamespace) -> None:
    equal_H = np.full(21, 20 / 21)
    assert example.clipped_bound(equal_H).value == pytest.approx(0.823, abs=5e-4)
    draws = np.random.default_rng(0).chisquare(1, 400_000)
    for radius in (0.3, 2.0, 40.0):
        other, member = (np.minimum(4 * scale * draws, radius).mean() for scale in (1 + 20 / 21, 1 / 21))
        assert example.clipped_success(equal_H, radius) == pytest.approx(
            0.5 + (other - member) / (2 * radius), abs=2e-3
        )
    below = [chi2.cdf(1.7 / (4 * scale), 1) for scale in (1 / 21, 1 + 20 / 21)]
    assert example.threshold_success(equal_H, 1.7) == pytest.approx(0.5 + (below[0] - below[1]) / 2)


def test_the_log_ratio_is_that_of_the_two_laws_of_the_weights(example: SimpleNamespace) -> None:
    """Of d weights, by their whole covariance, where the example uses one direction."""
    draws = np.random.default_rng(1)
    x_ND, beta_D = 2 * draws.standard_normal((30, 4)), draws.standard_normal(4)
    inverse_DD = np.linalg.inv(x_ND.T @ x_ND)
    for i in range(5):
        x_D = x_ND[i]
        weights_D, s = beta_D + 0.3 * draws.standard_normal(4), draws.normal(x_D @ beta_D, 2)
        pull_D = inverse_DD @ x_D
        member = multivariate_normal(
            beta_D + pull_D * (s - x_D @ beta_D), 4 * (inverse_DD - np.outer(pull_D, pull_D))
        ).logpdf(weights_D)
        other = multivariate_normal(beta_D, 4 * inverse_DD).logpdf(weights_D)
        found = example.log_ratios(
            *(torch.tensor(each) for each in (x_D @ (weights_D - beta_D), s - x_D @ beta_D, x_D @ pull_D))
        )
        assert found.item() == pytest.approx(member - other)


def test_the_table_is_printed(example: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(designs=5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["21", "40", "60", "80", "140"]
    assert "0.51800" in lines[2]
    assert "lower bounds" in lines[-1]
