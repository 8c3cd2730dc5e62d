"""The Gaussian mechanism's (epsilon, delta), exactly: Balle and Wang 2018, arXiv 1805.06530, theorem 8.

A release is a vector plus independent Gaussian noise of standard deviation sigma in each coordinate. Two inputs whose
vectors lie at most `sensitivity` apart (Euclidean; 2 C where norms are clipped to C and any record may stand for any
other) are then hard to tell apart: P(S | one) <= exp(epsilon) P(S | other) + delta for every set S of releases. For
one release; several add up. Lower epsilon and delta = more private.

The certificate is about real numbers. Noise in floating point has gaps and ends that can tell inputs apart (Mironov
2012), which nothing here accounts for; `defenses/noise.py` says what is done about it where releases are made.

Where we differ: the paper's difference of two normal tails loses its digits to cancellation and its exp(epsilon)
overflows. With a = sensitivity / 2 sigma - epsilon sigma / sensitivity, b = a - sensitivity / sigma, and Mills' ratio
m(x) = Q(x) / phi(x), the same delta is phi(a) (m(-a) - m(-b)), which does neither; its logarithm is solved for.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import erfcx, ndtr

from milkglass.errors import AuditError


def gaussian_delta(epsilon: float, sensitivity: float, sigma: float) -> float:
    """The least delta (0..1) with which one release is (epsilon, delta) private; lower = more private.

    Exact: no smaller delta is true of two vectors at that distance. Raises AuditError for an epsilon below 0, and for
    a sensitivity or sigma that is not positive.
    """
    _check_epsilon(epsilon)
    return _delta(epsilon, _ratio(sensitivity, sigma))


def gaussian_epsilon(delta: float, sensitivity: float, sigma: float) -> float:
    """The least epsilon (0 or more) with which one release is (epsilon, delta) private; lower = more private.

    Exact; 0 where delta alone is enough; infinity where it lies beyond a float's range. Raises AuditError for a delta
    not between 0 and 1, and for a sensitivity or sigma that is not positive.
    """
    _check_delta(delta)
    ratio = _ratio(sensitivity, sigma)
    # At `high` a = -sqrt(2 ln 1/delta), and delta(epsilon) <= Phi(a) <= exp(-a^2 / 2) / 2 < delta.
    high = 0.5 / ratio / ratio + math.sqrt(-2 * math.log(delta)) / ratio
    if _delta(0.0, ratio) <= delta:
        return 0.0
    if high == math.inf:
        return high
    target = math.log(delta)
    return float(brentq(lambda epsilon: _log_delta(epsilon, ratio) - target, 0.0, high, xtol=1e-300, rtol=1e-14))


def gaussian_sigma(epsilon: float, delta: float, sensitivity: float) -> float:
    """The least noise (standard deviation per coordinate) with which one release is (epsilon, delta) private.

    Raises AuditError for an epsilon below 0 or without end, a delta not between 0 and 1, and a sensitivity that is not
    positive.
    """
    _check_epsilon(epsilon)
    _check_delta(delta)
    _ratio(sensitivity, 1.0)
    # At either of these sigma / sensitivity delta is surely met: the bound of `gaussian_epsilon`, solved for the ratio,
    # and delta(epsilon) <= delta(0) <= 1 / (sqrt(2 pi) ratio).
    high = 1 / (math.sqrt(2 * math.pi) * delta)
    if epsilon > 0:
        tail = math.sqrt(-2 * math.log(delta))
        high = min(high, (tail + math.sqrt(tail * tail + 2 * epsilon)) / (2 * epsilon))
    low = high
    while _delta(epsilon, low) <= delta:  # towards 1 as the noise goes to 0
        low /= 2
    target = math.log(delta)
    ratio = brentq(lambda ratio: _log_delta(epsilon, ratio) - target, low, 2 * low, xtol=1e-300, rtol=1e-14)
    return sensitivity * float(ratio)


def _ends(epsilon: float, ratio: float) -> tuple[float, float]:
    """a and b, for sigma / sensitivity = ratio."""
    return 0.5 / ratio - epsilon * ratio, -0.5 / ratio - epsilon * ratio


def _delta(epsilon: float, ratio: float) -> float:
    a, b = _ends(epsilon, ratio)
    bell = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    if a > 1:  # m(-a) may overflow, phi(a) m(-a) = Phi(a) does not
        return float(ndtr(a)) - bell * _mills(-b)
    return bell * _mills_drop(-a, 1 / ratio)


def _log_delta(epsilon: float, ratio: float) -> float:
    a, _ = _ends(epsilon, ratio)
    if a > 1:
        return math.log(_delta(epsilon, ratio))
    return -a * a / 2 - math.log(2 * math.pi) / 2 + math.log(_mills_drop(-a, 1 / ratio))


def _mills_drop(x: float, step: float) -> float:
    """m(x) - m(x + step); over a small step, which would leave no digits, by the slope m'(x) = x m(x) - 1 half-way."""
    if step < 1e-6:
        middle = x + step / 2
        return step * (1 - middle * _mills(middle))
    return _mills(x) - _mills(x + step)


def _mills(x: float) -> float:
    """Q(x) / phi(x), the normal law's upper tail over its density."""
    return math.sqrt(math.pi / 2) * float(erfcx(x / math.sqrt(2)))


def _ratio(sensitivity: float, sigma: float) -> float:
    for name, value in (("sensitivity", sensitivity), ("sigma", sigma)):
        if not 0 < value < math.inf:
            raise AuditError(f"Gaussian mechanism: {name} is {value:g}; expected a positive number")
    if not 0 < sigma / sensitivity < math.inf:
        raise AuditError(f"Gaussian mechanism: sigma {sigma:g} over sensitivity {sensitivity:g} is beyond a float")
    return sigma / sensitivity


def _check_epsilon(epsilon: float) -> None:
    if not 0 <= epsilon < math.inf:
        raise AuditError(f"Gaussian mechanism: epsilon is {epsilon:g}; expected 0 or more")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise AuditError(f"Gaussian mechanism: delta is {delta:g}; expected a number between 0 and 1")
