"""How much of a record is in a reconstruction of it: errors, PSNR, SSIM, matching, and peek with its interval.

Legend: N records, T test records, R resamples, C channels, H height, W width; trailing `...` is any shape.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from scipy.stats import norm, t
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from milkglass.errors import AuditError
from milkglass.leakage.estimate import Estimate

RESAMPLES: Final = 2000
MATCH_AMONG: Final = 1000
BEST_PSNR_DB: Final = 120.0
_PIXELS_AT_ONCE: Final = 300_000
_RESAMPLES_AT_ONCE: Final = 4_000_000  # numbers drawn at a time


def squared_errors(reconstructions: Tensor, records: Tensor) -> Tensor:
    """Mean squared error of each record: (N, ...), (N, ...) -> (N,), float64. Lower = better rebuilt."""
    if reconstructions.shape != records.shape:
        raise AuditError(
            f"reconstructions of shape {tuple(reconstructions.shape)}; expected {tuple(records.shape)}, as the records"
        )
    return (reconstructions.to(torch.float64) - records.to(torch.float64)).flatten(1).square().mean(1)


def peek(
    attack_errors_T: Tensor, entitled_errors_T: Tensor, generator: torch.Generator, resamples: int = RESAMPLES
) -> Estimate:
    """1 - error_attack / error_entitled, from the same test records' errors under both; higher = more leaks.

    1 = the raw record, 0 = nothing beyond what the receiver is entitled to.

    The interval is made of quantiles of peek over resampled test records, both errors of a record drawn together (Efron
    and Tibshirani 1993, section 13.3). They are the 2.5 % and 97.5 % ones for many records, and further out for few,
    where these lie too close together (Hesterberg 2015, section 3.3). It holds for the fitted attacks: that they were
    fitted on these known pairs and not on others is not in it.
    """
    if attack_errors_T.shape != entitled_errors_T.shape or attack_errors_T.ndim != 1 or not len(attack_errors_T):
        raise AuditError(
            f"peek: errors of shapes {tuple(attack_errors_T.shape)} and {tuple(entitled_errors_T.shape)}; "
            "expected one of each for every test record"
        )
    attack_T, entitled_T = attack_errors_T.to(torch.float64), entitled_errors_T.to(torch.float64)
    if entitled_T.mean() < 1e-12:
        raise AuditError("peek: the entitled values alone rebuild the records exactly; nothing is left to protect")
    count = len(attack_T)
    ratios = []
    for done in range(0, resamples, step := max(1, _RESAMPLES_AT_ONCE // count)):
        rows_RT = torch.randint(count, (min(step, resamples - done), count), generator=generator)
        # a resample of records that the entitled baseline rebuilds exactly has no ratio of its own
        ratios.append(attack_T[rows_RT].mean(1) / entitled_T[rows_RT].mean(1).clamp_min(1e-12))
    low, high = _expanded_interval(1 - torch.cat(ratios), count)
    return Estimate(1 - (attack_T.mean() / entitled_T.mean()).item(), low, high)


def psnr_db(mean_squared_error: float, value_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in decibels of all test records together, at most 120. Higher = better rebuilt."""
    if mean_squared_error <= 0.0:
        return BEST_PSNR_DB
    return min(BEST_PSNR_DB, 10 * math.log10(value_range**2 / mean_squared_error))


def ssim(reconstructions: Tensor, records: Tensor) -> float | None:
    """Mean structural similarity of pictures, see `ssim_each`; None for flat records and pictures below 8 pixels."""
    if records.ndim != 4 or min(records.shape[2:]) < 8:
        return None
    return ssim_each(reconstructions, records).mean().item()


def ssim_each(reconstructions: Tensor, records: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of pictures (N, C, H, W) in [0, 1], each (N,); 1 = the same picture.

    The usual Gaussian window (11 pixels, sigma 1.5); pictures narrower or lower than 16 pixels, such as the 8 x 8
    digits, take one of 7 pixels (sigma 0.8). Pictures are mirrored at their edges, and all of their pixels count, where
    others leave out a margin.
    """
    sigma = 1.5 if min(records.shape[2:]) >= 16 else 0.8
    step = max(1, _PIXELS_AT_ONCE // records[0].numel())  # all at once took gigabytes for 2,000 colored pictures
    parts = []
    for guess, truth in zip(torch.split(reconstructions, step), torch.split(records, step), strict=True):
        part_N = structural_similarity_index_measure(
            guess.to(torch.float64), truth.to(torch.float64), sigma=sigma, data_range=1.0, reduction="none"
        )
        assert isinstance(part_N, Tensor)
        parts.append(part_N.reshape(len(truth)))
    return torch.cat(parts)


def mean_interval(values_T: Tensor, generator: torch.Generator, resamples: int = RESAMPLES) -> Estimate:
    """The mean of a value of each test record, with its 95 % bootstrap interval over these records."""
    count, means = len(values_T), []
    for done in range(0, resamples, step := max(1, _RESAMPLES_AT_ONCE // count)):
        rows_RT = torch.randint(count, (min(step, resamples - done), count), generator=generator)
        means.append(values_T.to(torch.float64)[rows_RT].mean(1))
    low, high = _expanded_interval(torch.cat(means), count)
    return Estimate(values_T.to(torch.float64).mean().item(), low, high)


def _expanded_interval(resampled_R: Tensor, count: int) -> tuple[float, float]:
    """The ends of a 95 % interval from a statistic of resamples of `count` records, (R,)."""
    if count < 2:
        return -math.inf, math.inf  # one record says nothing of others
    tail = float(norm.cdf(-math.sqrt(count / (count - 1)) * t.ppf(0.975, count - 1)))
    low, high = torch.quantile(resampled_R, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def match_top1(reconstructions: Tensor, records: Tensor) -> float:
    """Share (0..1) of reconstructions whose nearest record, of the first 1,000, is the right one. Chance = 1 / that.

    Euclidean distance. Higher = the attacker tells more reliably whose record it is.
    """
    x_NP = records[:MATCH_AMONG].flatten(1).to(torch.float64)
    guess_NP = reconstructions[:MATCH_AMONG].flatten(1).to(torch.float64)
    distances_NN = x_NP.square().sum(1) - 2 * guess_NP @ x_NP.T  # of each guess to every record, up to a constant
    return (distances_NN.diagonal() <= distances_NN.amin(1)).to(torch.float64).mean().item()
