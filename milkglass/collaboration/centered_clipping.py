"""Centered clipping: a mean of contributions that fewer than half of the weight cannot pull far, and a check of parts.

Karimireddy, He and Jaggi, "Learning from history for Byzantine robust optimization", ICML 2021, arXiv 2012.10333: from
a center v on, v <- v + sum_i w_i (x_i - v) min(1, radius / |x_i - v|) / sum_i w_i, a few times, of contributions that
have a memory (momentum), so that their noise is small beside what they agree on. Where we differ:

- The radius is no setting, for nobody can tune it in a run of strangers: it is twice the weighted median of the
  distances, taken anew each time. While fewer than half of the weight lies, liars can neither widen it beyond twice the
  largest honest distance nor close it. Where nobody is an outlier the result is the weighted mean itself.
- A mean of n records has a noise of 1 / sqrt(n): distances are compared after they are multiplied with the root of the
  weight. So the slow are no outliers, and who claims many records must be the closer to the others.
- Beyond the radius the pull falls with the third power, not the first, and the sum of weights by as much: who is five
  times as far as he may be keeps 1/125 of his pull, where clipping would leave him a fifth.
- The memory is in what is contributed, not in the optimizer (`compensated`): the average of all contributions is
  the average gradient of this epoch, and any optimizer works as ever.

What remains: liars who hide in the noise of the others, all pushing one way, move the average by up to about
2 d / (1 - d) typical distances where their share of the weight is d. They cannot be told from honest peers in one
epoch. The memory makes that small beside the sum of many steps: measured in benchmarks/lying_peers.py. And who is
alone with his records is an outlier too: peers are expected to draw from the same ones, as in DeDLOC. Where more than
half of the weight is at the center exactly (a part that most have no gradient for), nobody else is heard.

**Same bits**: equal rows in the same order give equal bits, whatever the machine's vector width and the number of
threads: all is single operations of float64, element by element, and sums are folded in a fixed order. Rows are
looked at in blocks of columns, so beside the input there is one float64 vector.

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

MEMORY: Final = 0.98
"""Of `compensated`: a noise of one epoch is spread over about 1 / (1 - MEMORY) epochs."""
_REACH: Final = 2.0
_POWER: Final = 3
_COLUMNS: Final = 1 << 15
_LARGEST: Final = 1e140
"""A contribution with a larger number is as good as not finite: its square would not be."""


@dataclass(frozen=True, eq=False)
class ClippedMean:
    """value_D: (D,), the contributions' dtype. radius: of the last iteration, for a contribution of the median weight.

    heard_N: (N,) float64, the share of each contribution's weight that counted: 1 within the radius, 0 if absent.
    clipped_share: the share of the weight of those present that did not count, 0 to 1.
    """

    value_D: Tensor
    radius: float
    clipped_share: float
    heard_N: Tensor


def centered_clip(x_ND: Tensor, weights_N: Tensor, center_D: Tensor | None = None, iterations: int = 3) -> ClippedMean:
    """The robust mean of contributions (N, D), weights (N,), around `center_D` (D,), the same at all honest peers.

    center_D: the running mean of earlier results; None (nothing yet) counts as 0. Contributions that are not finite, or
    have no positive finite weight, count as absent. The result is a convex combination of the others. Raises
    MessageError where shapes do not fit, the center is not finite, or no contribution is left.
    """
    _check(x_ND, weights_N, center_D, iterations)
    present, weights = _present(x_ND, weights_N)
    rows = [x_ND[i].detach() for i in present]
    v_D = torch.zeros(x_ND.shape[1], dtype=torch.float64)
    if center_D is not None:
        v_D += center_D.detach()
    typical = _lower_median(weights, weights)
    radius, heard = 0.0, [1.0] * len(rows)
    for _ in range(iterations):
        distances = [
            distance * math.sqrt(weight / typical)
            for distance, weight in zip(_distances(rows, v_D), weights, strict=True)
        ]
        radius = _REACH * _lower_median(distances, weights)
        heard = [1.0 if distance <= radius else _power(radius / distance) for distance in distances]
        pulls = [weight * share for weight, share in zip(weights, heard, strict=True)]
        total = math.fsum(pulls)
        _move(v_D, rows, [pull / total for pull in pulls])
    heard_N = torch.zeros(len(x_ND), dtype=torch.float64)
    heard_N[present] = torch.tensor(heard, dtype=torch.float64)
    clipped = math.fsum(weight * (1 - share) for weight, share in zip(weights, heard, strict=True))
    return ClippedMean(v_D.to(x_ND.dtype), radius, clipped, heard_N)


def compensated(gradient_D: Tensor, left_out_D: Tensor, weight: float, memory: float = MEMORY) -> Tensor:
    """What a peer contributes (D,): its gradient, and what earlier averages have left out of its earlier gradients.

    left_out_D: from `remembered`, zeros for who is new; weight: the one that this contribution will have. The same as
    contributing a running mean of one's gradients and taking the averages' increments: noise in what all contribute
    stays that of a mean of many epochs, relative to all of their signal. What is left out comes to 0 over all peers,
    so the weighted mean of contributions is that of the gradients, however weights change.
    """
    return gradient_D + left_out_D * (memory / (1 - memory) / weight)


def remembered(
    left_out_D: Tensor, gradient_D: Tensor, average_D: Tensor, weight: float, memory: float = MEMORY
) -> Tensor:
    """What is left out (D,) after an average: `left_out_D` of before, the gradient and weight contributed to it."""
    return left_out_D * memory + (gradient_D - average_D) * ((1 - memory) * weight)


def running_mean(center_D: Tensor | None, average_D: Tensor, memory: float = MEMORY) -> Tensor:
    """The center (D,) for the next epoch; None before there was one. Peers who agree on both agree on its bits."""
    return average_D.clone() if center_D is None else center_D * memory + average_D * (1 - memory)


def is_plausible(value_D: Tensor, center_D: Tensor | None, own_D: Tensor, factor: float = 4.0) -> bool:
    """Whether a part (D,) that reducers returned is at most `factor` times as far from the center as `own_D` is.

    For two reducers who agreed on a lie: nobody honest has a second result to compare theirs with. own_D: this peer's
    gradient there, not compensated. center_D: None (nothing yet) counts as 0. A mean of gradients has less noise
    than each of them, so an honest part is on average no farther from the center than one's own gradient, and a
    factor of 1 would often do; it is larger for those whose own happens to be near.

    False is an alarm, no proof: who raises it asks for the signed contributions and takes their mean, and only
    reducers whose part differs from that mean are liars. So a false alarm costs bytes, and nobody his place; a peer
    whose own gradient is the center exactly (no gradient for that part) raises one whenever others have a gradient.
    True is no proof either: everything inside the ball passes, also zeros, or the true part turned around. It is a net
    for large lies; for small ones, peers check parts at random.
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


def _present(x_ND: Tensor, weights_N: Tensor) -> tuple[list[int], list[float]]:
    """Which rows count, and their weights, which come to 1."""
    present, weights = [], []
    for i, weight in enumerate(weights_N.tolist()):
        if 0 < weight < math.inf and _largest(x_ND[i]) <= _LARGEST:  # NaN is never less
            present.append(i)
            weights.append(weight)
    if not present:
        raise MessageError(f"none of {len(x_ND)} contributions is finite with a positive weight; expected one or more")
    scale = math.frexp(max(weights))[1]
    weights = [math.ldexp(weight, -scale) for weight in weights]  # exact, and their sum cannot overflow
    total = math.fsum(weights)
    return present, [weight / total for weight in weights]


def _largest(row_D: Tensor) -> float:
    if not len(row_D):
        return 0.0
    low, high = torch.aminmax(row_D)
    return max(-low.item(), high.item()) if low == low else math.nan


def _power(share: float) -> float:
    """Its _POWER, by multiplications, which round alike everywhere."""
    return math.prod([share] * _POWER)


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
