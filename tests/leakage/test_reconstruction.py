"""Peek, its interval, and the measures beside it, against outside oracles and simulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from skimage.metrics import structural_similarity
from torch.nn import functional as F

from milkglass.errors import AuditError
from milkglass.leakage.reconstruction import BEST_PSNR_DB, match_top1, peek, psnr_db, squared_errors, ssim


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_squared_errors_are_those_of_each_record() -> None:
    records = torch.rand(5, 2, 3, 3, generator=generator())
    rebuilt = records.clone()
    rebuilt[3, 1, 2, 2] += 0.5
    assert squared_errors(rebuilt, records).tolist() == pytest.approx([0, 0, 0, 0.25 / 18, 0], abs=1e-7)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(AuditError, match=r"\(4, 2\); expected \(4, 3\)"):
        squared_errors(torch.zeros(4, 2), torch.zeros(4, 3))


@pytest.mark.parametrize(("factor", "expected"), [(0.0, 1.0), (0.25, 0.75), (1.0, 0.0), (1.5, -0.5)])
def test_peek_is_one_minus_the_ratio_of_errors(factor: float, expected: float) -> None:
    entitled_T = torch.rand(50, generator=generator()) + 0.1
    found = peek(factor * entitled_T, entitled_T, generator())
    assert (found.value, found.low, found.high) == pytest.approx((expected,) * 3)


def test_the_interval_covers_the_true_peek_in_about_95_of_100_audits() -> None:
    draws, count, audits = generator(1), 120, 400
    covered = 0
    for _ in range(audits):
        shared_T = -torch.rand(count, generator=draws).log()  # hard records are hard for both
        entitled_T = shared_T + 0.5 * torch.rand(count, generator=draws)  # mean 1.25
        attack_T = 0.4 * shared_T + 0.2 * torch.rand(count, generator=draws)  # mean 0.5
        found = peek(attack_T, entitled_T, draws, resamples=400)
        covered += found.low <= 1 - 0.5 / 1.25 <= found.high
    assert 0.91 <= covered / audits <= 0.98


def test_the_interval_pairs_the_errors_of_a_record() -> None:
    entitled_T = -torch.rand(200, generator=generator()).log()
    shuffled_T = 0.5 * entitled_T[torch.randperm(200, generator=generator(1))]
    paired, unpaired = peek(0.5 * entitled_T, entitled_T, generator()), peek(shuffled_T, entitled_T, generator())
    assert paired.high - paired.low < 1e-9
    assert unpaired.high - unpaired.low > 0.05


def test_peek_without_anything_to_protect_is_refused() -> None:
    with pytest.raises(AuditError, match="rebuild the records exactly"):
        peek(torch.zeros(9), torch.zeros(9), generator())
    with pytest.raises(AuditError, match="one of each for every test record"):
        peek(torch.zeros(8), torch.ones(9), generator())


def test_psnr() -> None:
    assert psnr_db(0.01) == pytest.approx(20.0)
    assert psnr_db(0.04, value_range=2.0) == pytest.approx(20.0)
    assert psnr_db(0.0) == BEST_PSNR_DB
    assert math.isfinite(psnr_db(1e-300))


@pytest.mark.parametrize(("side", "sigma", "margin"), [(28, 1.5, 5), (16, 1.5, 5), (8, 0.8, 3)])
def test_ssim_agrees_with_scikit_image(side: int, sigma: float, margin: int) -> None:
    records = torch.rand(4, 3, side, side, generator=generator())
    rebuilt = (records + 0.2 * torch.randn(records.shape, generator=generator(1))).clamp(0, 1)
    # scikit-image leaves out a margin of the window's radius: mirror the pictures outwards, and it is the whole picture
    mirrored = [F.pad(pictures, (margin,) * 4, mode="reflect").double().numpy() for pictures in (records, rebuilt)]
    of_each: Callable[..., Any] = structural_similarity
    expected = [
        of_each(
            *pair,
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=sigma,
            truncate=3.5,
            use_sample_covariance=False,
        )
        for pair in zip(*mirrored, strict=True)
    ]
    assert ssim(rebuilt, records) == pytest.approx(sum(expected) / 4, abs=1e-6)
    assert ssim(records, records) == pytest.approx(1.0)


def test_ssim_is_none_where_it_has_no_meaning() -> None:
    assert ssim(torch.zeros(3, 20), torch.zeros(3, 20)) is None
    assert ssim(torch.zeros(3, 1, 7, 28), torch.zeros(3, 1, 7, 28)) is None


def test_matching_is_the_share_of_nearest_records_that_are_right() -> None:
    records = torch.randn(40, 6, generator=generator())
    rebuilt = records + 0.8 * torch.randn(40, 6, generator=generator(1))
    slow = sum(min(range(40), key=lambda j: float((records[j] - rebuilt[i]).square().sum())) == i for i in range(40))
    assert 0 < slow < 40
    assert match_top1(rebuilt, records) == pytest.approx(slow / 40)
    assert match_top1(records, records) == 1.0


def test_one_guess_for_all_matches_one_record() -> None:
    records = torch.randn(40, 6, generator=generator())
    assert match_top1(records.mean(0).expand(40, 6), records) == pytest.approx(1 / 40)


def test_matching_is_among_the_first_thousand() -> None:
    records = torch.randn(1200, 4, generator=generator())
    rebuilt = records.clone()
    rebuilt[1000:] = 0
    assert match_top1(rebuilt, records) == 1.0


def test_the_interval_of_a_few_records_errs_above_no_more_often_than_it_says() -> None:
    draws, audits, missed = generator(2), 1000, 0
    for _ in range(audits):  # a mean of eight, its variance unknown: the plain percentile interval misses 9 to 10 %
        errors_T = 1 + 0.2 * torch.randn(8, generator=draws)
        found = peek(errors_T, torch.full((8,), 2.0), draws, resamples=400)
        missed += not found.low <= 0.5 <= found.high
    assert missed <= 0.065 * audits


def test_one_record_says_nothing_of_others() -> None:
    assert not peek(torch.ones(1), torch.ones(1), generator()).is_finite
