"""Budgets: what is understood, what is refused, and that the upper end of an interval decides."""

from __future__ import annotations

import pytest

from milkglass.errors import AuditError
from milkglass.leakage.estimate import Estimate
from milkglass.verdict import check_budget, judge, parse_budget


def test_a_budget_of_several_measures() -> None:
    limits = parse_budget("peek<=0.1, attribute.sex<=0.05,tpr@1%<=3e-2 , psnr_db <= 14")
    assert dict(limits) == {"peek": 0.1, "attribute.sex": 0.05, "tpr@1%": 0.03, "psnr_db": 14.0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("peek", "'peek' is not understood"),
        ("", "'' is not understood"),
        ("peek<0.1", "'peek<0.1' is not understood"),
        ("peek<=0.1,", "'' is not understood"),
        ("peek<=high", "'peek<=high' is not understood"),
        ("peak<=0.3", "did you mean 'peek'"),
        ("peek<=1.5", "1.5 is out of range; expected 0 to 1"),
        ("peek<=-0.1", "-0.1 is out of range"),
        ("peek<=nan", "'peek<=nan' is not understood"),
        ("psnr_db<=200", "200 is out of range; expected 0 to 120"),
        ("peek<=0.1, peek<=0.2", "peek is there twice"),
    ],
)
def test_a_budget_that_is_not_understood_is_one_clear_line(text: str, words: str) -> None:
    with pytest.raises(AuditError) as error:
        parse_budget(text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_budget_on_what_is_not_measured_names_the_nearest() -> None:
    with pytest.raises(AuditError, match=r"did you mean 'attribute.sex'"):
        check_budget({"attribute.sax": 0.1}, ["peek", "attribute.sex"])
    check_budget({"peek": 0.1}, ["peek"])


def test_the_upper_end_of_every_interval_decides() -> None:
    measures = {"peek": Estimate(0.1, 0.05, 0.15), "match": Estimate(0.0, 0.0, 0.01)}
    assert judge(measures, {"peek": 0.15, "match": 0.01}, sound=True) == "within budget"
    assert judge(measures, {"peek": 0.149, "match": 0.01}, sound=True) == "over budget"
    assert judge(measures, {"peek": 0.15, "match": 0.009}, sound=True) == "over budget"
    assert judge(measures, None, sound=True) == "no budget set"


@pytest.mark.parametrize("budget", [None, {"peek": 1.0}, {"peek": 0.0}])
def test_attacks_that_failed_their_own_controls_never_judge(budget: dict[str, float] | None) -> None:
    assert judge({"peek": Estimate(0.0, 0.0, 0.0)}, budget, sound=False) == "inconclusive"


def test_what_is_not_a_number_or_failed_in_part_is_never_within() -> None:
    nothing, good = Estimate(float("nan"), float("nan"), float("nan")), Estimate(0.0, 0.0, 0.1)
    assert judge({"ssim": nothing}, {"ssim": 0.1}, sound=True) == "inconclusive"
    assert judge({"peek": good}, {"peek": 0.2}, sound=True, failed={"peek"}) == "inconclusive"
    assert judge({"peek": good}, {"peek": 0.2}, sound=True, failed={"ssim"}) == "within budget"
    assert judge({"peek": good}, {"peek": 0.05}, sound=True, failed={"peek"}) == "over budget"
    assert judge({"peek": good}, {"peek": 0.2, "match": 0.1}, sound=True) == "inconclusive"
    for limit in (float("nan"), -0.1, 1.1):
        with pytest.raises(AuditError, match="out of range"):
            check_budget({"peek": limit}, ["peek"])
