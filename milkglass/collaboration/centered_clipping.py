"""Centered clipping: a mean of contributions that fewer than half of the weight cannot pull far, and a check of parts.

Karimireddy, He and Jaggi, "Learning from history for Byzantine robust optimization", ICML 2021, arXiv 2012.10333: from
a center v on, v <- v + sum_i w_i (x_i - v) min(1, radius / |x_i - v|) / sum_i w_i, a few times. Where we differ: the
radius is no setting, for nobody can tune it in a run of strangers. It is the weighted median of the distances |x_i - v|
(the lower one), taken anew each time. While fewer than half of the weight lies, the median lies between two honest
distances; so liars can neither widen it beyond the honest nor close it to 0.

What it does and what it does not:
- In each iteration liars of share d of the weight move the result by at most d * radius: what they send is worth no
  more than an honest contribution's noise. That noise is the yardstick. Liars who agree all push one way, so they turn
  training back once noise / gradient of one contribution is above about (1 - d) / d. Hence the paper's second half:
  peers contribute running means of their gradients (momentum), whose noise is smaller; see benchmarks/lying_peers.py.
- Nobody lies, noise alike in all directions: the result is close to the weighted mean. What is lopsided is not: what a
  minority alone contributes (records of its own kind) counts for less, and where more than half of the weight is at the
  center exactly (a part of a vector that most have no gradient for), the rest is not heard at all.

**Same bits**: equal rows in the same order give equal bits, whatever the machine's vector width and the number of
threads: there are only single operations of float64, element by element, and sums are folded in a fixed order.
Rows of memory: a block of columns is looked at at a time, so beside the input there is one float64 vector.

Legend: N contributions, D numbers of each, C columns of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

from milkglass.errors import MessageError

_COLUMNS: Final = 1 << 15
_LARGEST: Final = 1e140
"""A contribution with a larger number is as good as not finite: its square would not be."""


@dataclass(frozen=True, eq=False)
class ClippedMean:
    """value_D: (D,), the contributions' dtype. radius: of the last iteration, 0 or more, in their units.

    clipped_share: how much of the weight's pull the last iteration took away, 0 to 1; above 0 also if all are honest.
    """

    value_D: Tensor
    radius: float
    clipped_share: float


def centered_clip(x_ND: Tensor, weights_N: Tensor, center_D: Tensor | None = None, iterations: int = 3) -> ClippedMean:
    """The clipped mean of contributions (N, D), weights (N,), around `center_D` (D,).

    center_D: the last result, the same at all honest peers; None at first: then the weighted median of each column.
    Contributions that are not finite, or have no positive finite weight, count as absent. The result is a convex
    combination of the center and the contributions. Raises MessageError where shapes do not fit, the center is not
    finite, or no contribution is left.
    """
    _check(x_ND, weights_N, center_D, iterations)
    rows, weights = _present(x_ND, weights_N)
    v_D = _column_medians(rows, weights) if center_D is None else center_D.detach().to(torch.float64, copy=True)
    radius, pulls = 0.0, weights
    for _ in range(iterations):
        distances = _distances(rows, v_D)
        radius = _lower_median(distances, weights)
        pulls = [
            weight if distance <= radius else weight * (radius / distance)
            for weight, distance in zip(weights, distances, strict=True)
        ]
        _move(v_D, rows, pulls)
    return ClippedMean(v_D.to(x_ND.dtype), radius, max(0.0, 1 - math.fsum(pulls)))


def is_plausible(value_D: Tensor, center_D: Tensor | None, own_D: Tensor, factor: float = 4.0) -> bool:
    """Whether a part (D,) that reducers returned is at most `factor` times as far from the center as `own_D` is.

    For two reducers who agreed on a lie: nobody honest has a second result to compare theirs with. `own_D` is what this
    peer contributed to the part; center_D is the last result, None (nothing yet) counts as 0. A mean of several
    contributions has less noise than each of them, so an honest part is on average no farther from the center than
    one's own contribution, and factor 1 would often do; it is larger for those whose own happens to be near.

    False is an alarm, no proof: who raises it asks for the signed contributions and takes their mean, and only
    reducers whose part differs from that mean are liars. So a false alarm costs bytes, and nobody his place; a part
    where one's own contribution is the center exactly (no gradient) raises one whenever others have a gradient.
    True is no proof either: everything inside the ball passes, also zeros, or the true part turned around. A net for
    large lies only.
    """
    if not bool(torch.isfinite(value_D).all()):
        return False
    center_D = torch.zeros_like(own_D) if center_D is None else center_D
    if not value_D.shape == center_D.shape == own_D.shape:
        raise MessageError(
            f"a part of shape {tuple(value_D.shape)}, center {tuple(center_D.shape)}, own {tuple(own_D.shape)}; "
            "expected three vectors of one length"
        )
    far, own = _distances([value_D, own_D], center_D.to(torch.float64))
    return far <= factor * own


def _check(x_ND: Tensor, weights_N: Tensor, center_D: Tensor | None, iterations: int) -> None:
    if x_ND.dim() != 2 or not x_ND.is_floating_point() or weights_N.shape != x_ND.shape[:1]:
        raise MessageError(
            f"contributions of shape {tuple(x_ND.shape)}, {x_ND.dtype}, and weights {tuple(weights_N.shape)}; "
            "expected floats (N, D) and a weight for each of N"
        )
    if center_D is not None and (center_D.shape != x_ND.shape[1:] or not bool(torch.isfinite(center_D).all())):
        raise MessageError(
            f"center of shape {tuple(center_D.shape)}: expected {tuple(x_ND.shape[1:])} numbers, all of them finite"
        )
    if iterations < 1:
        raise MessageError(f"iterations = {iterations}; expected at least 1")


def _present(x_ND: Tensor, weights_N: Tensor) -> tuple[list[Tensor], list[float]]:
    """Rows that count, and their weights, which come to 1."""
    rows, weights = [], []
    for row_D, weight in zip(x_ND.detach(), weights_N.tolist(), strict=True):
        if 0 < weight < math.inf and (not len(row_D) or _largest(row_D) <= _LARGEST):  # NaN is never less
            rows.append(row_D)
            weights.append(weight)
    if not rows:
        raise MessageError(f"none of {len(x_ND)} contributions is finite with a positive weight; expected one or more")
    scale = math.frexp(max(weights))[1]
    weights = [math.ldexp(weight, -scale) for weight in weights]  # exact, and their sum cannot overflow
    total = math.fsum(weights)
    return rows, [weight / total for weight in weights]


def _largest(row_D: Tensor) -> float:
    low, high = torch.aminmax(row_D)
    return max(-low.item(), high.item()) if low == low else math.nan


def _blocks(rows: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Columns and what the rows hold there (N, C), a float64 copy."""
    for start in range(0, len(rows[0]), _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        yield columns, torch.stack([row_D[columns] for row_D in rows]).to(torch.float64)


def _distances(rows: Sequence[Tensor], v_D: Tensor) -> list[float]:
    """|x_i - v| of each row."""
    squares = [0.0] * len(rows)
    for columns, x_NC in _blocks(rows):
        x_NC -= v_D[columns]
        x_NC *= x_NC
        squares = [one + more for one, more in zip(squares, _folded(x_NC.T).tolist(), strict=True)]
    return [math.sqrt(each) for each in squares]


def _move(v_D: Tensor, rows: Sequence[Tensor], pulls: Sequence[float]) -> None:
    """v + sum_i pull_i (x_i - v), in place."""
    pulls_N1 = torch.tensor(pulls, dtype=torch.float64).unsqueeze(1)
    for columns, x_NC in _blocks(rows):
        x_NC -= v_D[columns]
        x_NC *= pulls_N1
        v_D[columns] += _folded(x_NC)


def _folded(values: Tensor) -> Tensor:
    """The sum over the first dimension, in an order that is always the same; what is given is overwritten."""
    count = len(values)
    while count > 1:
        half = count // 2
        values[:half] += values[count - half : count]
        count -= half
    return values[0]


def _lower_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """The least value such that the values up to it have at least half of the weight."""
    order = sorted(range(len(values)), key=values.__getitem__)
    half = math.fsum(weights) / 2
    reached = accumulate(weights[i] for i in order)
    return next(values[i] for i, weight in zip(order, reached, strict=True) if weight >= half)


def _column_medians(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted median (D,) of each column, float64; half-way between two where they split the weight."""
    medians_D = torch.empty(len(rows[0]), dtype=torch.float64)
    weights_N1 = torch.tensor(weights, dtype=torch.float64).unsqueeze(1)
    half = math.fsum(weights) / 2
    for columns, x_NC in _blocks(rows):
        sorted_NC, order_NC = x_NC.sort(dim=0, stable=True)
        reached_C = torch.zeros(x_NC.shape[1], dtype=torch.float64)
        low_C, high_C = torch.zeros_like(reached_C, dtype=torch.int64), torch.zeros_like(reached_C, dtype=torch.int64)
        for weight_C in weights_N1.expand_as(x_NC).gather(0, order_NC):
            reached_C += weight_C
            low_C += reached_C < half
            high_C += reached_C <= half
        ends_2C = torch.stack([low_C, high_C]).clamp_max_(len(rows) - 1)
        low, high = sorted_NC.gather(0, ends_2C)
        medians_D[columns] = low + (high - low) / 2
    return medians_D
