"""Euclidean distances between the rows of a table, and the way back from distances to rows.

The distances come from one matrix product, |a - b|^2 = |a|^2 + |b|^2 - 2ab, which is fast but loses digits in two
places, each mended here:

- Rows far from the origin: they are shifted to their mean first (distances do not change), a block of columns at a
  time, so that no copy of the table is made.
- Rows near each other: there the product cancels. Those few pairs are measured from their differences, and their part
  of the gradient is added from the differences too. Equal rows are exactly 0 apart.

Very large and very small tables are brought near 1 by a power of two first, or their squares would leave the type's
range.

Legend: N rows (records), M rows of another table, D columns, P pairs of near rows. float32 or float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from milkglass.errors import DataError

# Largest absolute values that need no scaling: the squares of distances, and products of those, stay far within range.
_PLAIN: Final = {torch.float32: (1e-10, 1e10), torch.float64: (1e-50, 1e50)}
_STEP: Final = 100  # 2^100 fits in float32

# Squared distances below this share of |a|^2 + |b|^2 are measured again: the product keeps 3 digits there.
_NEAR: Final = {torch.float32: 1e-4, torch.float64: 1e-9}
_OFFSET: Final = 0.8  # the share of the rows' squared length that may be their mean's: costs 2 binary digits


@dataclass(frozen=True)
class NearPairs:
    """Pairs of rows, row < column, whose distance was measured from their difference."""

    rows_P: Tensor
    columns_P: Tensor
    distances_P: Tensor


@dataclass(frozen=True)
class Laplacian:
    """diag(W 1) - W of symmetric weights W between rows; those of the near pairs are apart, in `weights_P`."""

    matrix_NN: Tensor
    rows_P: Tensor
    columns_P: Tensor
    weights_P: Tensor

    def product(self, x_ND: Tensor, scale: float) -> Tensor:
        """scale * sum_j w_ij (x_i - x_j) for every row i: a table (N, D)."""
        n, d = x_ND.shape
        product_ND = x_ND.new_empty(n, d)
        for start, stop, block in _blocks(x_ND, shift=_is_far(x_ND)):
            product_ND[:, start:stop].addmm_(self.matrix_NN, block, beta=0, alpha=scale)
            del block  # its scratch space is needed below
        for chunk in _chunks(self.rows_P, n * n, d):
            rows_P, columns_P = self.rows_P[chunk], self.columns_P[chunk]
            force_PD = x_ND[rows_P].sub_(x_ND[columns_P]).mul_(self.weights_P[chunk, None] * scale)
            product_ND.index_add_(0, rows_P, force_PD).index_add_(0, columns_P, force_PD, alpha=-1)
        return product_ND


def scale_exponent(x_ND: Tensor, dtype: torch.dtype, what: str) -> int:
    """The even e with which x * 2^e is safe to compute with in `dtype`: mostly 0. DataError where x is not finite."""
    if not x_ND.is_floating_point():
        return 0
    if x_ND.numel() == 0:
        raise DataError(f"distance correlation: the {what} hold no values, shape {tuple(x_ND.shape)}")
    lowest, highest = (value.item() for value in torch.aminmax(x_ND.detach()))
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise DataError(f"distance correlation: the {what} hold NaN or infinite values; all must be finite")
    largest = max(-lowest, highest)
    smallest_plain, largest_plain = _PLAIN[dtype]
    if largest == 0 or smallest_plain <= largest <= largest_plain:
        return 0
    exponent = math.frexp(largest)[1]
    return -(exponent + exponent % 2)  # even, so that its half is a power of two as well


def scaled(x_ND: Tensor, dtype: torch.dtype, what: str) -> tuple[Tensor, int]:
    """x * 2^e in `dtype`, and e; x itself where it needs neither."""
    x_ND = x_ND.to(torch.promote_types(x_ND.dtype, dtype))  # a float64 value may not fit in float32 before scaling
    exponent = scale_exponent(x_ND, dtype, what)
    return times_power_of_two(x_ND, exponent).to(dtype), exponent


def times_power_of_two(x: Tensor, exponent: int) -> Tensor:
    """x * 2^exponent, exact where the result is a normal number; x itself where the exponent is 0."""
    while exponent != 0:
        step = max(-_STEP, min(_STEP, exponent))  # 2^exponent alone may be out of range where the result is not
        x = x * 2.0**step
        exponent -= step
    return x


def pairwise_distances(x_ND: Tensor) -> tuple[Tensor, NearPairs]:
    """Distances (N, N) between the rows of x, symmetric with an exact 0 diagonal, and the near pairs with theirs."""
    distance_NN = _gram(x_ND)
    squares_N = distance_NN.diagonal().clone()
    torch.add(squares_N, distance_NN, alpha=-2, out=distance_NN).add_(squares_N[:, None]).fill_diagonal_(torch.inf)
    near = _near(distance_NN, squares_N, squares_N)
    rows_P = columns_P = torch.empty(0, dtype=torch.long, device=x_ND.device)
    if near is not None:
        if torch.equal(x_ND, x_ND[:1].expand_as(x_ND)):  # a collapsed layer: all pairs are near, and all are 0 apart
            distance_NN.zero_()
        else:
            rows_P, columns_P = near.triu_(1).nonzero(as_tuple=True)
        del near
    distance_NN.sqrt_().fill_diagonal_(0)
    distances_P = _exact_distances(x_ND, x_ND, rows_P, columns_P)
    if len(rows_P):
        distance_NN[rows_P, columns_P] = distances_P
        distance_NN[columns_P, rows_P] = distances_P
    return distance_NN, NearPairs(rows_P, columns_P, distances_P)


def block_distances(x_ND: Tensor, y_MD: Tensor, offset_D: Tensor) -> Tensor:
    """Distances (N, M) between the rows of two blocks of one table; `offset_D` is a point near the table's middle."""
    shifted_x_ND, shifted_y_MD = x_ND - offset_D, y_MD - offset_D
    squares_N = shifted_x_ND.square().sum(1)
    squares_M = shifted_y_MD.square().sum(1)
    distance_NM = torch.mm(shifted_x_ND, shifted_y_MD.T)
    torch.add(squares_M, distance_NM, alpha=-2, out=distance_NM).add_(squares_N[:, None])
    near = _near(distance_NM, squares_N, squares_M)
    distance_NM.sqrt_()
    if near is not None:
        rows_P, columns_P = near.nonzero(as_tuple=True)
        distance_NM[rows_P, columns_P] = _exact_distances(x_ND, y_MD, rows_P, columns_P)
    return distance_NM


def laplacian_(weight_NN: Tensor, near: NearPairs) -> Laplacian:
    """The Laplacian of symmetric weights with an exact 0 diagonal, made in their place."""
    weights_P = weight_NN[near.rows_P, near.columns_P]
    if len(weights_P):
        weight_NN[near.rows_P, near.columns_P] = 0
        weight_NN[near.columns_P, near.rows_P] = 0
    weight_NN.neg_()
    weight_NN.diagonal().copy_(weight_NN.sum(1).neg_())
    return Laplacian(weight_NN, near.rows_P, near.columns_P, weights_P)


def _gram(x_ND: Tensor) -> Tensor:
    """The product x x^T (N, N) of the rows, shifted where it matters; upper strips only, then mirrored."""
    n = len(x_ND)
    height = max(64, n // 8)
    shift = _is_far(x_ND)
    gram_NN = x_ND.new_empty(n, n)
    for start, _, block in _blocks(x_ND, shift=shift):
        for top in range(0, n, height):
            strip = slice(top, top + height)
            gram_NN[strip, top:].addmm_(block[strip], block[top:].T, beta=0 if start == 0 else 1)
    for top in range(height, n, height):
        gram_NN[top:, top - height : top] = gram_NN[top - height : top, top:].T
    return gram_NN


def _is_far(x_ND: Tensor) -> bool:
    """Whether the rows are so far from the origin, for their spread, that products of them lose digits."""
    n = len(x_ND)
    mean = torch.linalg.vector_norm(x_ND.new_full((n,), 1 / n) @ x_ND).item()
    energy: float = torch.linalg.vector_norm(x_ND).item() ** 2 / n
    return not mean**2 <= _OFFSET * energy


def _blocks(x_ND: Tensor, *, shift: bool) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks of columns of x: (first column, last column + 1, block).

    All of x at once; or, shifted by their mean, as many columns as fit in scratch space of 3/2 N^2 values.
    """
    n, d = x_ND.shape
    if not shift:
        yield 0, d, x_ND
        return
    average_N = x_ND.new_full((n,), 1 / n)
    width = min(d, n * 3 // 2)
    scratch_NW = x_ND.new_empty(n, width)
    for start in range(0, d, width):
        columns = x_ND[:, start : start + width]
        block = torch.sub(columns, average_N @ columns, out=scratch_NW[:, : columns.shape[1]])
        yield start, start + columns.shape[1], block


def _near(squared_NM: Tensor, squares_N: Tensor, squares_M: Tensor) -> Tensor | None:
    """Where (N, M) the squared distances have too few good digits; None: nowhere."""
    share = _NEAR[squared_NM.dtype]
    if squared_NM.min() > share * (squares_N.max() + squares_M.max()):
        return None
    return squared_NM <= (squares_N[:, None] + squares_M).mul_(share)


def _exact_distances(x_ND: Tensor, y_MD: Tensor, rows_P: Tensor, columns_P: Tensor) -> Tensor:
    """Distances (P) of x[rows] from y[columns], from their differences."""
    distance_P = x_ND.new_empty(len(rows_P))
    for chunk in _chunks(rows_P, len(x_ND) * len(y_MD), x_ND.shape[1]):
        difference_PD = x_ND[rows_P[chunk]].sub_(y_MD[columns_P[chunk]])
        distance_P[chunk] = torch.linalg.vector_norm(difference_PD, dim=1)
    return distance_P


def _chunks(rows_P: Tensor, values: int, columns: int) -> Iterator[slice]:
    """Slices of the pairs: one chunk's rows, once, take a quarter of `values` numbers (but at least 16 pairs)."""
    length = max(16, values // (4 * columns))
    for start in range(0, len(rows_P), length):
        yield slice(start, start + length)
