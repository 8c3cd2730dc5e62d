"""How well a fact was guessed, with its interval: proportions, and balanced accuracy over the prior.

Legend: T records, K classes that occur.
"""

from __future__ import annotations

from typing import Final

import torch
from scipy.stats import binomtest
from torch import Tensor

from milkglass.errors import AuditError
from milkglass.leakage.estimate import Estimate

Z: Final = 1.959963984540054
"""Of a two-sided 95 % normal interval."""


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Estimate:
    """A proportion and its exact interval (Clopper and Pearson 1934), which holds the truth at least that often.

    Raises AuditError where there are no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise AuditError(f"proportion: {successes} of {trials}; expected 0 to n of n, n at least 1")
    interval = binomtest(successes, trials).proportion_ci(confidence_level=confidence, method="exact")
    return Estimate(successes / trials, float(interval.low), float(interval.high))


def balanced_accuracy(predicted_T: Tensor, true_T: Tensor) -> float:
    """Mean over the classes that occur in `true_T` of the share (0..1) of their records that is guessed right."""
    right_K, count_K = _right_by_class(predicted_T, true_T)
    return (right_K / count_K).mean().item()


def balanced_accuracy_over_prior(predicted_T: Tensor, true_T: Tensor, classes: int) -> Estimate:
    """Balanced accuracy minus 1 / K, what always guessing one class reaches; 0 = nothing learned, higher = leaks more.

    predicted_T, true_T: (T,) int64 in 0 .. classes - 1. K counts the classes that occur in `true_T`. The 95 % interval
    adds up the squares of the distances from each class's share to the ends of its own interval, as Newcombe 1998 does
    for a difference of two shares. A class's interval is Wilson's (1927) or the plain normal one, at each end the
    wider: the plain one, like a bootstrap, has no width for a class of five records that was never guessed right, and
    with ten classes near 1 Wilson's alone held the truth in 88 % of trials.

    Raises AuditError where only one class occurs, or a class is out of range.
    """
    for what, values_T in (("predicted", predicted_T), ("true", true_T)):
        check_classes(f"{what} classes", values_T, classes)
    right_K, count_K = _right_by_class(predicted_T, true_T)
    if len(count_K) < 2:
        raise AuditError("balanced accuracy: all records are of one class; expected at least two classes")
    share_K, prior = right_K / count_K, 1 / len(count_K)
    variance_K, pull_K = share_K * (1 - share_K) / count_K, Z**2 / count_K
    center_K = (share_K + pull_K / 2) / (1 + pull_K)
    half_K = Z / (1 + pull_K) * (variance_K + pull_K / (4 * count_K)).sqrt()
    plain_K = Z * variance_K.sqrt()
    below = torch.maximum(share_K - center_K + half_K, plain_K).norm().item() / len(share_K)
    above = torch.maximum(center_K + half_K - share_K, plain_K).norm().item() / len(share_K)
    value = share_K.mean().item() - prior
    return Estimate(value, max(value - below, -prior), min(value + above, 1 - prior))


def check_classes(what: str, values_N: Tensor, classes: int | None = None) -> None:
    """Refuse anything but a vector of whole numbers from 0 on, below `classes` where that is given."""
    if values_N.ndim != 1 or values_N.is_floating_point() or values_N.is_complex() or not len(values_N):
        raise AuditError(
            f"{what}: {values_N.dtype} of shape {tuple(values_N.shape)}; expected a vector of whole numbers"
        )
    low, high = int(values_N.min()), int(values_N.max())
    if low < 0 or (classes is not None and high >= classes):
        end = "on" if classes is None else f"to {classes - 1}"
        raise AuditError(f"{what}: from {low} to {high}; expected classes from 0 {end}")


def _right_by_class(predicted_T: Tensor, true_T: Tensor) -> tuple[Tensor, Tensor]:
    """Of each class that occurs: records guessed right (K,), and records (K,), both float64."""
    if predicted_T.shape != true_T.shape:
        raise AuditError(
            f"balanced accuracy: {tuple(predicted_T.shape)} guesses for {tuple(true_T.shape)} records; expected as many"
        )
    _, of_T, count_K = torch.unique(true_T, return_inverse=True, return_counts=True)
    right_K = torch.zeros(len(count_K), dtype=torch.float64)
    right_K.index_add_(0, of_T, (predicted_T == true_T).to(torch.float64))
    return right_K, count_K.to(torch.float64)
