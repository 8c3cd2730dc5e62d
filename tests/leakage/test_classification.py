"""Proportions and balanced accuracy against closed forms, and how often their intervals hold the truth."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import beta, binom
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor

from milkglass.errors import AuditError
from milkglass.leakage.classification import (
    balanced_accuracy,
    balanced_accuracy_over_prior,
    check_classes,
    clopper_pearson,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (0, 40), (7, 40), (39, 40), (40, 40), (3, 10_000)])
def test_clopper_pearson_is_the_two_quantiles_of_beta(successes: int, trials: int) -> None:
    found = clopper_pearson(successes, trials)
    low = beta.ppf(0.025, successes, trials - successes + 1) if successes else 0.0
    high = beta.ppf(0.975, successes + 1, trials - successes) if successes < trials else 1.0
    assert found.value == successes / trials
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_clopper_pearson_holds_the_truth_at_least_as_often_as_it_says(share: float) -> None:
    held = 0.0
    for successes in range(26 if share < 0.1 else 61):  # the chance of more than 25 of 60 at 1 % is below 1e-30
        found = clopper_pearson(successes, 60)
        held += binom.pmf(successes, 60, share) * (found.low <= share <= found.high)
    assert 0.95 <= held < 1


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_a_proportion_of_nothing_is_refused(successes: int, trials: int) -> None:
    with pytest.raises(AuditError, match="expected 0 to n of n"):
        clopper_pearson(successes, trials)


def guessed(counts: tuple[int, ...], right: tuple[float, ...], draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Guesses that are right for so large a share of each class, else one class off."""
    true_T = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    is_right_T = torch.rand(len(true_T), generator=draws) < torch.tensor(right)[true_T]
    return torch.where(is_right_T, true_T, (true_T + 1) % len(counts)), true_T


def test_balanced_accuracy_is_scikit_learns_and_over_the_classes_that_occur() -> None:
    predicted_T, true_T = guessed((50, 7, 30), (0.9, 0.5, 0.2), generator())
    found = balanced_accuracy(predicted_T, true_T)
    assert found == pytest.approx(balanced_accuracy_score(true_T.numpy(), predicted_T.numpy()))
    two_T = true_T < 2
    over = balanced_accuracy_over_prior(predicted_T[two_T], true_T[two_T], classes=3)
    assert over.value == pytest.approx(balanced_accuracy(predicted_T[two_T], true_T[two_T]) - 1 / 2)


@pytest.mark.parametrize("counts", [(5, 5), (90, 10), (40, 30, 20, 10)])
def test_always_guessing_one_class_is_worth_nothing_and_its_interval_has_a_width(counts: tuple[int, ...]) -> None:
    true_T = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for label in range(len(counts)):
        found = balanced_accuracy_over_prior(torch.full_like(true_T, label), true_T, len(counts))
        assert found.value == pytest.approx(0.0)
        assert found.low < -0.0005
        assert found.high > 0.01


@pytest.mark.parametrize(
    ("counts", "right"),
    [((200, 200), (0.5, 0.5)), ((300, 12), (0.97, 0.2)), ((40,) * 10, (0.99,) * 10), ((60, 30, 20), (0.8, 0.4, 0.1))],
)
def test_the_interval_holds_the_true_value_about_as_often_as_it_says(
    counts: tuple[int, ...], right: tuple[float, ...]
) -> None:
    truth, draws, held = sum(right) / len(right) - 1 / len(right), generator(1), 0
    for _ in range(200):
        found = balanced_accuracy_over_prior(*guessed(counts, right, draws), len(counts))
        held += found.low <= truth <= found.high
    assert held >= 0.91 * 200  # two standard errors below 95 %


def test_bad_classes_are_refused() -> None:
    with pytest.raises(AuditError, match="all records are of one class"):
        balanced_accuracy_over_prior(torch.tensor([0, 1, 1]), torch.tensor([1, 1, 1]), 2)
    with pytest.raises(AuditError, match="expected classes from 0 to 1"):
        balanced_accuracy_over_prior(torch.tensor([0, 2]), torch.tensor([0, 1]), 2)
    with pytest.raises(AuditError, match="expected classes from 0 on"):
        check_classes("attribute", torch.tensor([0, -1]))
    with pytest.raises(AuditError, match="whole numbers"):
        check_classes("attribute", torch.tensor([0.0, torch.nan]))
    with pytest.raises(AuditError, match="expected as many"):
        balanced_accuracy(torch.tensor([0, 1]), torch.tensor([0, 1, 1]))
