"""Areas under the ROC curve and true positive rates against closed forms and scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from torch import Tensor

from milkglass.errors import AuditError
from milkglass.leakage.classification import clopper_pearson
from milkglass.leakage.membership import auc, leak_auc, true_positive_rate


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussians(shift: float, members: int, others: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Standard normal scores, the members' moved up by `shift`."""
    member_T = torch.arange(members + others) < members
    return torch.randn(members + others, generator=draws, dtype=torch.float64) + shift * member_T, member_T


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_the_area_of_two_gaussians_is_the_closed_form_and_scikit_learns(shift: float) -> None:
    scores_T, member_T = gaussians(shift, 3000, 2000, generator())
    found = auc(scores_T, member_T)
    assert found.value == pytest.approx(roc_auc_score(member_T.numpy(), scores_T.numpy()))
    assert found.low <= norm.cdf(shift / math.sqrt(2)) <= found.high
    assert found.high - found.low < 0.04


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_the_areas_interval_holds_the_closed_form_about_as_often_as_it_says(shift: float) -> None:
    draws, truth = generator(1), norm.cdf(shift / math.sqrt(2))
    found = [auc(*gaussians(shift, 60, 90, draws)) for _ in range(200)]
    held = sum(each.low <= truth <= each.high for each in found)
    assert 0.91 * 200 <= held < 200


def test_ties_count_half_and_scores_that_say_nothing_read_one_half() -> None:
    scores_T = torch.tensor([1.0, 1.0, 2.0, 0.0, 1.0])
    member_T = torch.tensor([True, True, True, False, False])
    assert auc(scores_T, member_T).value == pytest.approx(5 / 6)
    nothing = auc(torch.zeros(5), member_T)
    assert (nothing.value, nothing.low, nothing.high) == pytest.approx((0.5, 0.5, 0.5))


def test_groups_that_do_not_overlap_have_an_interval_with_a_width() -> None:
    member_T = torch.arange(30) < 10
    apart = auc(member_T.double(), member_T)
    assert apart.value == apart.high == 1.0
    assert apart.low == pytest.approx(0.025 ** (1 / 10))
    assert auc(-member_T.double(), member_T).high == pytest.approx(1 - 0.025 ** (1 / 10))


def test_the_area_of_several_classes_is_the_mean_of_one_against_the_rest() -> None:
    draws = generator(2)
    labels_T = torch.randint(4, (300,), generator=draws)
    scores_TK = torch.randn(300, 4, generator=draws, dtype=torch.float64)
    scores_TK[torch.arange(300), labels_T] += 1.0
    top_T = scores_TK.max(1).values
    areas = []
    for k in range(4):
        others_T = scores_TK[:, [j for j in range(4) if j != k]].amax(1)
        areas.append(roc_auc_score((labels_T == k).numpy(), (scores_TK[:, k] - others_T).numpy()))
    found = leak_auc(scores_TK, labels_T)
    assert found.value == pytest.approx(sum(areas) / 4)
    assert found.low < found.value < found.high
    moved = leak_auc(scores_TK - top_T[:, None], labels_T)
    assert moved.value == pytest.approx(found.value)


def test_the_area_of_two_classes_is_that_of_their_difference_with_its_interval() -> None:
    scores_T, member_T = gaussians(0.7, 40, 60, generator(3))
    two = leak_auc(torch.stack([torch.zeros_like(scores_T), scores_T], dim=1), member_T.long())
    one = auc(scores_T, member_T)
    assert (two.value, two.low, two.high) == pytest.approx((one.value, one.low, one.high))


def test_the_interval_over_several_classes_holds_the_truth_about_as_often_as_it_says() -> None:
    draws, labels_T = generator(4), torch.arange(150) % 3

    def drawn(labels_T: Tensor) -> Tensor:
        noise_TK = torch.randn(len(labels_T), 3, generator=draws, dtype=torch.float64)
        return noise_TK + 0.8 * torch.nn.functional.one_hot(labels_T, 3)

    many_T = torch.arange(60_000) % 3
    truth = leak_auc(drawn(many_T), many_T).value
    found = [leak_auc(drawn(labels_T), labels_T) for _ in range(200)]
    held = sum(each.low <= truth <= each.high for each in found)
    assert 0.91 * 200 <= held < 200


def test_true_positives_are_counted_above_a_threshold_that_keeps_the_rate_on_new_non_members() -> None:
    draws, above = generator(5), []
    for _ in range(200):
        calibration_N = torch.randn(199, generator=draws)
        above.append(true_positive_rate(torch.ones(1), torch.ones(1), calibration_N, 0.01).threshold)
    assert norm.sf(above).mean() == pytest.approx(2 / 200, abs=0.0015)  # the second highest of 199: 2/200 on average

    scores_T, member_T = gaussians(3.0, 4000, 4000, generator(6))
    calibration_N = torch.randn(20_000, generator=generator(7), dtype=torch.float64)
    found = true_positive_rate(scores_T[member_T], scores_T[~member_T], calibration_N, 0.01)
    assert found.threshold == pytest.approx(norm.isf(0.01), abs=0.06)
    assert found.true.value == pytest.approx(norm.sf(norm.isf(0.01) - 3.0), abs=0.03)
    assert found.false.low <= 0.01 <= found.false.high


def test_equal_scores_are_not_called_members() -> None:
    found = true_positive_rate(torch.zeros(10), torch.zeros(10), torch.zeros(100), 0.01)
    assert found.true.value == found.false.value == 0.0


@pytest.mark.parametrize(("calibration", "rate"), [(98, 0.01), (998, 0.001), (5, 0.0), (5, 1.0)])
def test_too_few_non_members_for_the_rate_are_refused(calibration: int, rate: float) -> None:
    with pytest.raises(AuditError, match="expected at least"):
        true_positive_rate(torch.zeros(10), torch.zeros(10), torch.zeros(calibration), rate)


def test_bad_scores_are_refused() -> None:
    member_T = torch.tensor([True, True, False, False])
    with pytest.raises(AuditError, match="finite"):
        auc(torch.tensor([0.0, torch.nan, 1.0, 2.0]), member_T)
    with pytest.raises(AuditError, match="two classes of at least 2"):
        auc(torch.zeros(4), torch.ones(4, dtype=torch.bool))
    with pytest.raises(AuditError, match="two classes of at least 2"):
        auc(torch.zeros(4), torch.tensor([True, False, False, False]))
    with pytest.raises(AuditError, match="expected one for each"):
        auc(torch.zeros(3), member_T)
    with pytest.raises(AuditError, match="finite"):
        true_positive_rate(torch.zeros(4), torch.full((4,), torch.inf), torch.zeros(100), 0.01)


@pytest.mark.parametrize("outsiders", [99, 540])
def test_the_interval_of_a_rate_holds_it_although_few_non_members_set_the_threshold(outsiders: int) -> None:
    draws, rate = generator(8), 0.01
    truth = norm.sf(norm.isf(rate) - 2.0)
    found = []
    for _ in range(300):
        (scores_T, member_T), calibration_N = gaussians(2.0, 300, 300, draws), torch.randn(outsiders, generator=draws)
        found.append(true_positive_rate(scores_T[member_T], scores_T[~member_T], calibration_N, rate).true)
    assert all(each.low <= each.value <= each.high for each in found)
    assert sum(each.high < truth for each in found) <= 0.025 * 300
    assert sum(each.low > truth for each in found) <= 0.025 * 300
    assert max(each.high for each in found) < 1


def test_with_many_non_members_the_interval_of_a_rate_is_about_that_of_a_share() -> None:
    scores_T, member_T = gaussians(2.0, 1000, 1000, generator(9))
    calibration_N = torch.randn(200_000, generator=generator(10), dtype=torch.float64)
    found = true_positive_rate(scores_T[member_T], scores_T[~member_T], calibration_N, 0.01).true
    share = clopper_pearson(round(found.value * 1000), 1000)
    assert found.low <= share.low
    assert found.high >= share.high
    assert found.high - found.low < 1.35 * (share.high - share.low)


def test_with_some_hundred_non_members_a_tight_budget_is_rarely_met_even_where_nothing_leaks() -> None:
    draws, met = generator(11), 0
    for _ in range(100):
        (scores_T, member_T), calibration_N = gaussians(0.0, 400, 400, draws), torch.randn(540, generator=draws)
        met += true_positive_rate(scores_T[member_T], scores_T[~member_T], calibration_N, 0.01).true.high <= 0.03
    assert met < 30
