"""What a generalization gap proves about membership, and what mutual information rules out.

*Lower* bounds (Del Grosso, Pichler, Palamidessi, Piantanida 2021, arXiv 2105.03875) say what some attacker surely can
do: a small one certifies nothing. *Upper* bounds say what no attacker can do, for the game that their text names.
Keep the two apart where they print.

The membership game: a fair coin says whether the attacker sees a member's record or another one; success is the chance
that it tells which, .5 = guessing. Let TV be the total variation distance between what it sees in the two cases. The
best attack succeeds with 1/2 + TV/2; and a function f with values in [a, b] has |E[f | other] - E[f | member]| <=
(b - a) TV. The lower bounds here take for f the loss, cut off at a radius R where it has no end of its own.

Where we differ: the maximum over R is exact (the authors' search stops at R = 40); and `clipped_gap_bound`, which is
not theirs, clips the loss at R where they drop what lies beyond it, so that it needs no promise about tails.

Legend: M members' losses, O losses of other records, L their distinct values; N candidates, D coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import erfcx, rel_entr
from torch import Tensor

from milkglass.errors import AuditError

_GRID: Final = 256
"""Radii to try before the best of them are refined."""


@dataclass(frozen=True)
class GapBound:
    """A lower bound on the best membership attack's success (.5 to 1, higher = leaks more), and the R it is read at."""

    value: float
    radius: float


@dataclass(frozen=True)
class ClippedBound:
    """value: the bound measured, too high by chance as often as not. low: what holds with the confidence said.

    Both are .5 to 1, higher = leaks more. radius: the loss at which both clip.
    """

    value: float
    low: float
    radius: float
    confidence: float


def bounded_gap_bound(gap: float, radius: float, *, nonnegative: bool = False) -> GapBound:
    """Lower bound on the best membership attack's success: 1/2 + |gap| / (4 R) for losses of |loss| <= R.

    gap: E[loss | not a member] - E[loss | member], of either sign. With `nonnegative`, for 0 <= loss <= R, 2 R stands
    in place of 4 R. Some attack reaches it, where gap and R are right; a measured gap has an error that is not in it.
    It does not say that no attack does better: a gap of 0 certifies nothing.

    Raises AuditError for a radius that is not positive, and for a gap that no such loss can have.
    """
    _check("gap bound", "R", radius)
    spread = radius if nonnegative else 2 * radius
    if not abs(gap) <= spread:
        raise AuditError(f"gap bound: a gap of {gap:g} with R = {radius:g}; expected at most {spread:g} of either sign")
    return GapBound(0.5 + abs(gap) / (2 * spread), radius)


def exponential_gap_bound(gap: float, scale: float) -> GapBound:
    """Lower bound on the best membership attack's success, for losses with P(|loss| >= t) <= 2 exp(-t / (2 scale)).

    The greatest over R of 1/2 + |gap| / (4 R) - exp(-R / (2 scale)) (1 + 2 scale / R). The tail must hold for members
    and for others alike: with a scale that only members keep to, the number is no bound. Some attack reaches it; it
    does not say that no attack does better.

    Raises AuditError for a scale that is not positive, and for a gap that such tails cannot have.
    """
    _check("exponential gap bound", "scale", scale)
    # In t = R / (2 scale) and a = |gap| / (8 scale) it is 1/2 + a/t - exp(-t) (1 + 1/t), whose slope has the sign of
    # h(t) - a, h(t) = exp(-t) (t^2 + t + 1). From h(0) = 1 on, h rises until t = 1 and falls ever after. Such tails
    # have E|loss| <= 2 scale (1 + ln 2), so a <= (1 + ln 2) / 2 < 1: one root, one maximum. There it is 1/2 +
    # t exp(-t).
    a = _scaled_gap("exponential gap bound", gap, 8 * scale, (1 + math.log(2)) / 2)
    if a == 0:
        return GapBound(0.5, math.inf)
    t = _root(lambda t: math.log(t * t + t + 1) - t - math.log(a), 1.0, 20 - 2 * math.log(a))
    return GapBound(0.5 + t * math.exp(-t), 2 * scale * t)


def sub_gaussian_gap_bound(gap: float, scale: float) -> GapBound:
    """Lower bound on the best membership attack's success, for losses with P(|loss| >= t) <= 2 exp(-t^2 / 2 scale^2).

    The greatest over R of 1/2 + |gap| / (4 R) - exp(-R^2 / 2 scale^2) - sqrt(2 pi) (scale / R) Q(R / scale), Q the
    normal law's upper tail. The tail must hold for members and for others alike, around 0 and not around the mean.
    Some attack reaches it; it does not say that no attack does better.

    Raises AuditError for a scale that is not positive, and for a gap that such tails cannot have.
    """
    _check("sub-Gaussian gap bound", "scale", scale)
    # In u = R / scale and a = |gap| / (4 scale) the slope has the sign of h(u) - a, h(u) = exp(-u^2/2) (u^3 + u) +
    # sqrt(2 pi) Q(u). From h(0) = 1.253 on, h rises until u = sqrt 2 and falls ever after. Such tails have E|loss| <=
    # scale (c + 2 sqrt(2 pi) Q(c)), c = sqrt(2 ln 2), so a <= .888 < h(0): one maximum. There it is 1/2 + u^2
    # exp(-u^2/2).
    c = math.sqrt(2 * math.log(2))
    a = _scaled_gap("sub-Gaussian gap bound", gap, 4 * scale, (c + 2 * _tail_over_bell(c) * math.exp(-c * c / 2)) / 2)
    if a == 0:
        return GapBound(0.5, math.inf)

    def slope(u: float) -> float:
        return math.log(u**3 + u + _tail_over_bell(u)) - u * u / 2 - math.log(a)

    u = _root(slope, math.sqrt(2), 10 + 2 * math.sqrt(-math.log(a)))
    return GapBound(0.5 + u * u * math.exp(-u * u / 2), scale * u)


def clipped_gap_bound(member_M: Tensor, other_O: Tensor, *, confidence: float = 0.95) -> ClippedBound:
    """Lower bound on the best membership attack's success, for losses of at least 0, with no promise about their tails.

    The greatest over R of 1/2 + (E[min(loss, R) | not a member] - E[min(loss, R) | member]) / (2 R): the success of an
    attack that says "member" below a threshold drawn evenly from 0 to R. So the best threshold on the loss does as well
    or better, and so does the best attack. `low` holds with the confidence said, although R is chosen on the losses.

    member_M, other_O: losses of independently drawn records; members of one model are not quite that, for they shaped
    it together. Sound one way only: members with no smaller losses read .5, and .5 says nothing about attacks that use
    more than the loss.

    Raises AuditError for losses that are negative or not finite, for none, and for a confidence not in [.5, 1).
    """
    if not 0.5 <= confidence < 1:
        raise AuditError(f"clipped gap bound: a confidence of {confidence:g}; expected at least .5 and under 1")
    member, other = (np.sort(losses.detach().cpu().double().numpy().ravel()) for losses in (member_M, other_O))
    for what, losses in (("members", member), ("other records", other)):
        if not len(losses) or not np.isfinite(losses).all() or losses[0] < 0:
            raise AuditError(f"clipped gap bound: losses of {len(losses)} {what}; expected finite ones of at least 0")
    # E[min(loss, R)] is the integral of 1 - F from 0 to R, so the bound is 1/2 + half the mean of F_member - F_other
    # over [0, R]. By Dvoretzky, Kiefer, Wolfowitz and Massart (1990), each with chance 1 - share at least, F_member >=
    # its step function - e_M and F_other <= its step function + e_O at all losses at once, e = sqrt(ln(1/share) / 2n)
    # (share <= 1/2). So at every R at once the truth is at least what is measured less (e_M + e_O) / 2.
    share = (1 - confidence) / 2
    error = sum(math.sqrt(-math.log(share) / (2 * len(losses))) for losses in (member, other))
    # Between two distinct losses the step functions stand still and the mean moves towards their difference, one way
    # only: it is greatest at a loss.
    loss_L = np.unique(np.concatenate([[0.0], member, other]))
    if len(loss_L) == 1:
        return ClippedBound(0.5, 0.5, math.inf, confidence)
    below_member_L, below_other_L = (np.searchsorted(each, loss_L, "right") / len(each) for each in (member, other))
    ahead_L = below_member_L - below_other_L
    width_L = np.diff(loss_L / loss_L[-1])
    mean_L = np.cumsum(ahead_L[:-1] * width_L) / np.cumsum(width_L)
    best = int(mean_L.argmax())
    if mean_L[best] <= 0:
        return ClippedBound(0.5, 0.5, math.inf, confidence)
    value = 0.5 + float(mean_L[best]) / 2
    return ClippedBound(value, max(0.5, value - error / 2), float(loss_L[best + 1]), confidence)


def maximum_over_radius(bound: Callable[[float], float], low: float, high: float) -> GapBound:
    """The greatest value of `bound` (of any shape, lower bound or not) over radii from low to high, and where it is.

    Each peak of a grid of 256, evenly spaced in the logarithm, is refined by Brent's bounded search; a peak narrower
    than a step of the grid can be missed. Whatever it finds is a value of `bound`: a lower bound stays one.

    Raises AuditError for radii that are not 0 < low < high.
    """
    if not 0 < low < high < math.inf:
        raise AuditError(f"maximum over R: from {low:g} to {high:g}; expected 0 < low < high")
    radii = np.geomspace(low, high, _GRID)
    found = [(bound(float(radius)), float(radius)) for radius in radii]
    best = max(found)
    for i in range(_GRID):
        left, right = max(i - 1, 0), min(i + 1, _GRID - 1)
        if found[i][0] >= max(found[left][0], found[right][0]):
            ends = (math.log(radii[left]), math.log(radii[right]))
            peak = minimize_scalar(
                lambda x: -bound(math.exp(x)), bounds=ends, method="bounded", options={"xatol": 1e-9}
            )
            best = max(best, (-float(peak.fun), math.exp(peak.x)))
    return GapBound(*best)


def pinsker_upper_bound(information_nats: float) -> float:
    """Upper bound on the chance to guess one *fair* bit: 1/2 + 1/2 sqrt(2 I), at most 1; I in nats.

    No attack that sees only what has mutual information I with the bit does better, whatever its means. It says
    nothing of a bit that is not fair, of an attacker who knows more about it, or, where it `is_vacuous`, of anything.
    The exact Fano bound with two candidates is never above it.

    Raises AuditError for a mutual information that is negative or no number.
    """
    _check_information("Pinsker's bound", information_nats)
    return min(1.0, 0.5 + 0.5 * math.sqrt(2 * information_nats))


def fano_upper_bound(information_bits: float, candidates: int) -> float:
    """Upper bound on the chance to pick the right one of N candidates, all equally likely: (I + 1) / log2 N, at most 1.

    I in bits. No attack that sees only what has mutual information I with the choice does better. It says nothing of
    an attacker who knows that some candidates are likelier, or, where it `is_vacuous`, of anything: so always when N is
    2. `exact_fano_upper_bound` is tighter.

    Raises AuditError for a mutual information that is negative or no number, and for fewer than two candidates.
    """
    _check_information("Fano's bound", information_bits)
    _check_count("Fano's bound", "candidates", candidates, 2)
    return min(1.0, (information_bits + 1) / math.log2(candidates))


def exact_fano_upper_bound(information_bits: float, candidates: int) -> float:
    """Upper bound as `fano_upper_bound`, without its slack: the greatest P with log2 N - I <= h(P) + (1-P) log2(N-1).

    h is the binary entropy in bits. The bound is met where the right candidate is seen with chance P, and else any
    other one alike. From 1/N (I = 0) to 1 (I >= log2 N). What it says nothing of, and its errors, are the same.
    """
    _check_information("Fano's bound", information_bits)
    _check_count("Fano's bound", "candidates", candidates, 2)
    if information_bits >= math.log2(candidates):
        return 1.0
    chance, nats = 1 / candidates, information_bits * math.log(2)

    def excess(success: float) -> float:  # the same inequality, as the relative entropy of guesses to blind ones
        return float(rel_entr(success, chance) + rel_entr(1 - success, 1 - chance)) - nats

    if excess(1.0) <= 0:  # I a rounding error below log2 N
        return 1.0
    return _root(excess, chance, 1.0) if information_bits > 0 else chance


def is_vacuous(upper_bound: float) -> bool:
    """Whether an upper bound on a chance says nothing: 1 or more."""
    return not upper_bound < 1


def gaussian_capacity_bits(dimensions: int, norm: float, sigma: float) -> float:
    """Upper bound on the bits that one release tells: D/2 log2(1 + C^2 / (D sigma^2)).

    A release is a vector of D coordinates with Euclidean norm at most C, plus independent Gaussian noise of standard
    deviation sigma in each. Its mutual information with whatever went into the vector is at most this, for any law of
    the records, as long as the rest (weights, other records) is fixed or independent of it. It is a mean over records:
    single ones may tell more. Several releases of a record add up; what leaves beside the vector is not counted.

    Raises AuditError for fewer than one coordinate, and for C or sigma not positive: without noise nothing is bounded.
    """
    _check_count("Gaussian capacity", "D", dimensions, 1)
    _check("Gaussian capacity", "C", norm)
    _check("Gaussian capacity", "sigma", sigma)
    ratio = norm / sigma
    return dimensions / 2 * math.log1p(ratio * ratio / dimensions) / math.log(2)


def gaussian_sigma_for_bits(bits: float, dimensions: int, norm: float) -> float:
    """The noise sigma per coordinate at which `gaussian_capacity_bits` is `bits`; with more noise it is less.

    Raises AuditError for bits or C not positive, for fewer than one coordinate, and for more bits than a float's range
    of sigma can hold.
    """
    _check_count("sigma for bits", "D", dimensions, 1)
    _check("sigma for bits", "C", norm)
    _check("sigma for bits", "bits", bits)
    exponent = 2 * bits * math.log(2) / dimensions
    # C / sqrt(D (exp(x) - 1)), with the exponential where it cannot overflow.
    sigma = norm / math.sqrt(dimensions) * math.exp(-exponent / 2) / math.sqrt(-math.expm1(-exponent))
    if not 0 < sigma < math.inf:
        raise AuditError(f"sigma for bits: {bits:g} bits in {dimensions} coordinates; no such sigma is a float")
    return sigma


def _tail_over_bell(u: float) -> float:
    """sqrt(2 pi) Q(u) exp(u^2 / 2), without overflow."""
    return math.sqrt(math.pi / 2) * float(erfcx(u / math.sqrt(2)))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(brentq(function, low, high, xtol=1e-15, rtol=1e-14))


def _scaled_gap(what: str, gap: float, unit: float, greatest: float) -> float:
    """|gap| / unit, at most `greatest`."""
    if not abs(gap) <= greatest * unit:
        raise AuditError(
            f"{what}: a gap of {gap:g}; such tails allow at most {greatest * unit:g} of either sign: a greater scale?"
        )
    return abs(gap) / unit


def _check(what: str, name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise AuditError(f"{what}: {name} is {value:g}; expected a positive number")


def _check_information(what: str, information: float) -> None:
    if not information >= 0:
        raise AuditError(f"{what}: a mutual information of {information:g}; expected 0 or more")


def _check_count(what: str, name: str, count: int, least: int) -> None:
    if count < least:
        raise AuditError(f"{what}: {name}: {count}; expected at least {least}")
