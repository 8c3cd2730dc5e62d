"""Distance correlation of whole data sets: the same numbers as the direct form, without its n^2 memory.

The sums that distance correlation is made of are gathered from blocks of the two distance matrices, above the
diagonal only, one block of each at a time. Time is still O(n^2); memory is O(n + block_rows^2) beyond the data. As in
all reports, the computation is in float64; the data are converted a block at a time.

Legend: N records, D values in a record, E values in an activation; R, C rows and columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from milkglass.errors import DataError
from milkglass.leakage._distances import block_distances, scale_exponent, times_power_of_two
from milkglass.leakage.distance_correlation import Margins, Sums, tables


@dataclass(frozen=True)
class StreamedDistanceCorrelation:
    """Distance correlation of n records with their activations. Higher = more leakage.

    biased: `distance_correlation`, 0 to 1. squared_unbiased: `u_distance_correlation_sqr`, -1 to 1.
    """

    squared_unbiased: float
    biased: float
    n: int


def streaming_distance_correlation(x: Tensor, z: Tensor, *, block_rows: int = 1024) -> StreamedDistanceCorrelation:
    """Both estimates over records x (n, ...) and activations z (n, ...), in O(n x block_rows) memory at most."""
    if block_rows < 1:
        raise DataError(f"streaming distance correlation: block_rows is {block_rows}; at least 1 is needed")
    x_ND, z_NE = tables(x, z)
    n = len(x_ND)
    with torch.no_grad():
        side_x, side_z = _Side(x_ND, block_rows, "records"), _Side(z_NE, block_rows, "activations")
        xx = xz = zz = 0.0
        for top in range(0, n, block_rows):
            for left in range(top, n, block_rows):
                rows, columns = slice(top, top + block_rows), slice(left, left + block_rows)
                a_RC, b_RC = side_x.block(rows, columns), side_z.block(rows, columns)
                times = 1 if top == left else 2  # the block below the diagonal has the same sums
                xx += times * _sum(a_RC * a_RC)
                zz += times * _sum(b_RC * b_RC)
                xz += times * _sum(a_RC.mul_(b_RC))
    sums = Sums(xx, xz, zz, side_x.margins(), side_z.margins(), torch.finfo(z_NE.dtype).eps)
    biased = max(sums.correlation_sqr(unbiased=False), 0.0) ** 0.5
    return StreamedDistanceCorrelation(sums.correlation_sqr(unbiased=True), biased, n)


@final
class _Side:
    """One side's distances, block by block, and their row sums so far.

    They are shifted by the mean of a sample: any shift near the mean serves, and the true one comes out last.
    """

    def __init__(self, x_ND: Tensor, block_rows: int, what: str) -> None:
        self._x_ND = x_ND
        self._exponent = scale_exponent(x_ND, torch.float64, what)
        blocks = (self._rows(slice(top, top + block_rows)) for top in range(0, len(x_ND), block_rows))
        self._offset_D = sum((block.sum(0) for block in blocks), start=x_ND.new_zeros(()).double()) / len(x_ND)
        self._row_sums_N = torch.zeros(len(x_ND), dtype=torch.float64, device=x_ND.device)
        sample_SD = self._rows(slice(None, None, max(1, len(x_ND) // min(block_rows, 512))))
        sample_SS = block_distances(sample_SD, sample_SD, self._offset_D)
        self._shift = sample_SS.mean().item()

    def block(self, rows: slice, columns: slice) -> Tensor:
        """The block's shifted distances (R, C), `rows` not below `columns`; a block is to be asked for once."""
        rows_RD, columns_CD = self._rows(rows), self._rows(columns)
        shifted_RC = block_distances(rows_RD, columns_CD, self._offset_D).sub_(self._shift)
        if rows == columns:
            shifted_RC.fill_diagonal_(0)
        else:
            self._row_sums_N[columns] += shifted_RC.sum(0)
        self._row_sums_N[rows] += shifted_RC.sum(1)
        return shifted_RC

    def _rows(self, rows: slice) -> Tensor:
        return times_power_of_two(self._x_ND[rows].to(torch.float64), self._exponent)

    def margins(self) -> Margins:
        """The row sums of all blocks."""
        return Margins(self._row_sums_N, self._row_sums_N.sum().item(), self._shift)


def _sum(product_RC: Tensor) -> float:
    return product_RC.sum(1).sum(dtype=torch.float64).item()
