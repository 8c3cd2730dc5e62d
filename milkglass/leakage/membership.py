"""How well scores tell one group from another: the area under the ROC curve, and true positives at few false ones.

Legend: T scored records, M of them members, O of them not, N non-members set aside for the threshold, K classes.

Carlini et al. 2022 (arXiv 2112.03570) on why an average over all thresholds says little about a few people's privacy,
and the true positive rate at a low false positive rate says more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta, rankdata
from torch import Tensor

from milkglass.errors import AuditError
from milkglass.leakage.classification import Z, clopper_pearson
from milkglass.leakage.estimate import Estimate

QUARTER: Final = 0.0125
"""Of 5 %: each end of an interval may be wrong for the threshold's sake, and for the share's."""


@dataclass(frozen=True)
class TruePositives:
    """true: the share of members above the threshold. false: the share of non-members above it that were not used to
    set it, which may differ from the rate that was aimed at. Higher `true` at the same `false` = leaks more.
    """

    true: Estimate
    false: Estimate
    threshold: float


def auc(scores_T: Tensor, member_T: Tensor) -> Estimate:
    """The chance that a member scores higher than a non-member, ties counting half; .5 = chance, higher = leaks more.

    The 95 % interval is that of DeLong et al. (1988), on the logit scale, so that it stays within 0 and 1. Where the
    groups do not overlap their variance reads 0; the interval is then that of min(M, O) successes in as many trials.

    Raises AuditError for scores that are not finite, and for fewer than two of either group.
    """
    if scores_T.ndim != 1 or scores_T.shape != member_T.shape:
        raise AuditError(
            f"auc: {tuple(scores_T.shape)} scores for {tuple(member_T.shape)} records; expected one for each"
        )
    return leak_auc(torch.stack([-scores_T, scores_T], dim=1), member_T.long())


def leak_auc(scores_TK: Tensor, labels_T: Tensor) -> Estimate:
    """Mean over classes of `auc` of "this class" against "any other", as `auc` for two; .5 = chance.

    A record's score for class k is its scores_TK[:, k] over the best of its other ones. Only classes in `labels_T`
    count. The variance is DeLong's, summed over records: one record takes part in the areas of all classes.
    """
    if scores_TK.ndim != 2 or scores_TK.shape[1] < 2 or len(scores_TK) != len(labels_T):
        raise AuditError(
            f"auc: scores of shape {tuple(scores_TK.shape)} for {len(labels_T)} records; expected one a class for each"
        )
    if not bool(torch.isfinite(scores_TK).all()):
        raise AuditError("auc: not all scores are finite (NaN or infinity)")
    labels, margins_TK = labels_T.numpy(), _margins(scores_TK.to(torch.float64)).numpy()
    present, counts = np.unique(labels, return_counts=True)
    if len(present) < 2 or counts.min() < 2:
        raise AuditError(
            f"auc: {len(present)} classes of {counts.tolist()} records; expected two classes of at least 2"
        )
    value, shares_T = 0.0, np.zeros(len(labels))
    for k in present:
        is_k = labels == k
        placed_T = _placements(margins_TK[:, k], is_k)
        value += placed_T[is_k].mean() / len(present)
        shares_T += placed_T / np.where(is_k, is_k.sum(), (~is_k).sum()) / len(present)
    variance = sum(count * shares_T[labels == k].var(ddof=1) for k, count in zip(present, counts, strict=True))
    return _logit_interval(float(value), float(variance), int(counts.min()))


def true_positive_rate(member_M: Tensor, other_O: Tensor, calibration_N: Tensor, rate: float) -> TruePositives:
    """The share of members called so by a threshold that calls about `rate` of all non-members so.

    The threshold is the floor(rate * (N + 1))-th highest of `calibration_N`, scores of non-members that are not counted
    again: a new non-member then lies above it with chance `rate` at most. The interval of `false` is Clopper and
    Pearson's, for this threshold. That of `true` is for the rate: few non-members pin down no threshold, so its upper
    end is Clopper and Pearson's at one that surely calls more than `rate` of them so, its lower end at one that surely
    calls less, each error a quarter of 5 %.

    Raises AuditError where N is too small for the rate, and for scores that are not finite.
    """
    above = math.floor(rate * (len(calibration_N) + 1) + 1e-9)
    if not 0 < rate < 1 or above < 1:
        raise AuditError(
            f"true positive rate at {rate:g}: {len(calibration_N)} non-members to set the threshold; expected at least "
            f"{math.ceil(1 / rate) - 1 if 0 < rate < 1 else 'a rate between 0 and 1'}"
        )
    if not all(bool(torch.isfinite(scores).all()) for scores in (member_M, other_O, calibration_N)):
        raise AuditError(f"true positive rate at {rate:g}: not all scores are finite (NaN or infinity)")
    highest_N = calibration_N.to(torch.float64).sort(descending=True).values

    def found(scores: Tensor, rank: int, confidence: float = 0.95) -> Estimate:
        """The share of the scores above the rank-th highest of the calibration's."""
        return clopper_pearson(int((scores.to(torch.float64) > highest_N[rank - 1]).sum()), len(scores), confidence)

    rank_N = np.arange(1, len(highest_N) + 1)
    at_most_N = beta.cdf(rate, rank_N, rank_N[::-1])  # the chance that the rank-th lets at most `rate` pass
    surely_less, surely_more = rank_N[at_most_N >= 1 - QUARTER], rank_N[at_most_N <= QUARTER]
    low = found(member_M, int(surely_less[-1]), 1 - 2 * QUARTER).low if len(surely_less) else 0.0
    high = found(member_M, int(surely_more[0]), 1 - 2 * QUARTER).high if len(surely_more) else 1.0
    true = Estimate(found(member_M, above).value, low, high)
    return TruePositives(true, found(other_O, above), highest_N[above - 1].item())


def _margins(scores_TK: Tensor) -> Tensor:
    """Each score less the best of the record's other scores: (T, K)."""
    best_T2, at_T2 = scores_TK.topk(2, dim=1)
    is_best_TK = torch.arange(scores_TK.shape[1])[None] == at_T2[:, :1]
    return scores_TK - torch.where(is_best_TK, best_T2[:, 1:], best_T2[:, :1])


def _placements(scores_T: NDArray[np.float64], positive_T: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The share of the other group that each record is placed rightly against (T,); each group's mean is the area."""
    rank_T, placed_T = rankdata(scores_T), np.empty(len(scores_T))
    below_T = rank_T[positive_T] - rankdata(scores_T[positive_T])
    placed_T[positive_T] = below_T / (~positive_T).sum()
    placed_T[~positive_T] = 1 - (rank_T[~positive_T] - rankdata(scores_T[~positive_T])) / positive_T.sum()
    return placed_T


def _logit_interval(value: float, variance: float, smallest: int) -> Estimate:
    if value in (0.0, 1.0):
        return clopper_pearson(round(value * smallest), smallest)
    half, center = Z * math.sqrt(variance) / (value * (1 - value)), math.log(value / (1 - value))
    low, high = (1 / (1 + math.exp(-min(max(end, -700.0), 700.0))) for end in (center - half, center + half))
    return Estimate(value, min(low, value), max(high, value))
