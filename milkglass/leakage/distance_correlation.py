"""Distance correlation: how much of the records still shows in the activations, over all kinds of dependence.

Szekely, Rizzo and Bakirov (2007) for the biased V-statistic, Szekely and Rizzo (2014) for the U-centered one; the
names are those of the `dcor` package. 0 = independent, 1 = the same up to rotation, shift and scale. Higher = more
leakage. As a training penalty: NoPeek (Vepakomma et al. 2020, arXiv 2008.09161), whose code floors squared distances
at 1e-7; here distances are exact, equal records are 0 apart, and the derivative there is taken as 0.

In a batch the biased value misleads: for *independent* Gaussians of 784 and 500 dimensions it is .99 at n = 32 and .95
at n = 256. `u_distance_correlation_sqr` is about 0 there (and may be negative).

All functions take records `x` and activations `z` of shape (n, ...), flattened per record, n >= 4, all values finite
(else DataError). `z` is float32 or float64, and `x` is read as the same type; the reports (`measure` and
`permutation_floor`) compute in float64 whatever the type, since in float32 one far outlier costs the rest its digits.
Tables with a largest value near the ends of the type's range are scaled by a power of two first.

The value is differentiable in `z` alone, by a closed form: with G the derivative by the distances b, dz = 2 (diag(W 1)
- W) z, W = G / b. Extra memory is at most 4 n^2 values and a few vectors (in tiny batches with nearly equal rows: 64
rows of z, if that is more; where a table has to be scaled: its copies).

Legend: N records, D values in a record, E values in an activation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from milkglass.errors import DataError
from milkglass.leakage._distances import (
    Laplacian,
    NearPairs,
    laplacian_,
    pairwise_distances,
    scale_exponent,
    scaled,
    times_power_of_two,
)

MINIMUM_RECORDS: Final = 4
_PERMUTATIONS: Final = 200
_ROUNDING: Final = 8  # a spread of distances of so many units of their rounding is no spread


def distance_covariance_sqr(x: Tensor, z: Tensor) -> Tensor:
    """Squared distance covariance, biased (V-statistic); >= 0 up to rounding, in squared units of x times z."""
    return _statistic(x, z, unbiased=False, normalized=False)


def distance_covariance(x: Tensor, z: Tensor) -> Tensor:
    """Distance covariance, biased (V-statistic): the root of `distance_covariance_sqr`."""
    return _statistic(x, z, unbiased=False, normalized=False, root=True)


def distance_correlation_sqr(x: Tensor, z: Tensor) -> Tensor:
    """Squared distance correlation, biased (V-statistic), 0 to 1; 0 where x or z is constant."""
    return _statistic(x, z, unbiased=False, normalized=True)


def distance_correlation(x: Tensor, z: Tensor) -> Tensor:
    """Distance correlation, biased (V-statistic), 0 to 1: what NoPeek minimizes. 0 where x or z is constant."""
    return _statistic(x, z, unbiased=False, normalized=True, root=True)


def u_distance_covariance_sqr(x: Tensor, z: Tensor) -> Tensor:
    """Squared distance covariance, bias-corrected (U-centered): 0 on average for independent data, may be negative."""
    return _statistic(x, z, unbiased=True, normalized=False)


def u_distance_correlation_sqr(x: Tensor, z: Tensor) -> Tensor:
    """Squared distance correlation, bias-corrected (U-centered), -1 to 1: about 0 for independent data at any n."""
    return _statistic(x, z, unbiased=True, normalized=True)


def linear_distance_correlation(x: Tensor, z: Tensor) -> Tensor:
    """What the formula gives with *squared* distances, 0 to 1: the root of linear CKA, blind to non-linear dependence.

    Several public split-learning repositories compute this under the name of distance correlation. It reads .04 where
    z = x^2 and distance correlation reads .54. A baseline; differentiable by autograd, in x too.
    """
    x_ND, z_NE = tables(x, z)
    (x_ND, _), (z_NE, _) = scaled(x_ND, z_NE.dtype, "records"), scaled(z_NE, z_NE.dtype, "activations")
    x_ND, z_NE = x_ND - x_ND.mean(0), z_NE - z_NE.mean(0)
    (gram_x_NN, _), (gram_z_NN, _) = (scaled(a @ a.T, a.dtype, "products of rows") for a in (x_ND, z_NE))
    scale = torch.linalg.vector_norm(gram_x_NN) * torch.linalg.vector_norm(gram_z_NN)
    return _root((gram_x_NN * gram_z_NN).sum() / torch.where(scale > 0, scale, torch.ones_like(scale)))


@dataclass(frozen=True)
class PermutationFloor:
    """What the bias-corrected squared distance correlation reads by chance: activations dealt to the wrong records.

    `quantile_95`: a value above it is a dependence at the 5 % level. `mean` is near 0.
    """

    quantile_95: float
    mean: float
    permutations: int


def permutation_floor(
    x: Tensor, z: Tensor, *, generator: torch.Generator, permutations: int = _PERMUTATIONS
) -> PermutationFloor:
    """The floor of `u_distance_correlation_sqr(x, z)`; distances are computed once, then only rearranged."""
    if permutations < 1:
        raise DataError(f"permutation floor: {permutations} permutations; at least 1 is needed")
    return _floor(*_center_both(x, z), generator, permutations)


def _floor(a_NN: Tensor, b_NN: Tensor, sums: Sums, generator: torch.Generator, permutations: int) -> PermutationFloor:
    values = torch.tensor([_permuted(a_NN, b_NN, sums, generator) for _ in range(permutations)], dtype=torch.float64)
    return PermutationFloor(values.quantile(0.95).item(), values.mean().item(), permutations)


@dataclass(frozen=True)
class DistanceCorrelation:
    """Distance correlation of n records with their activations, and what chance alone would give.

    squared_unbiased: bias-corrected and squared, -1 to 1. biased: the usual estimate, 0 to 1, not squared, too high in
    small samples. permutation_floor: the 95 % quantile of squared_unbiased under wrong pairings.
    """

    squared_unbiased: float
    biased: float
    n: int
    permutation_floor: float


def measure(x: Tensor, z: Tensor, generator: torch.Generator) -> DistanceCorrelation:
    """Both estimates, and their floor over 200 permutations. Higher = more leakage.

    Takes time and memory as n^2; beyond some 5,000 records take a sample, or `streaming_distance_correlation`.
    """
    a_NN, b_NN, sums = _center_both(x, z)
    return DistanceCorrelation(
        squared_unbiased=sums.correlation_sqr(unbiased=True),
        biased=max(sums.correlation_sqr(unbiased=False), 0.0) ** 0.5,
        n=len(x),
        permutation_floor=_floor(a_NN, b_NN, sums, generator, _PERMUTATIONS).quantile_95,
    )


@dataclass(frozen=True)
class Margins:
    """Distances less `shift` (off the diagonal): their sums by row (N,), in float64, and in total."""

    row_sums_N: Tensor
    total: float
    shift: float

    def centering(self, *, unbiased: bool) -> tuple[Tensor, float]:
        """(t, k): the doubly centered distances are shifted distance - t_i - t_j + k, off the diagonal."""
        n = len(self.row_sums_N)
        if unbiased:
            return self.row_sums_N / (n - 2), self.total / ((n - 1) * (n - 2))
        return self.row_sums_N / n, self.total / n**2 + self.shift / n


@dataclass(frozen=True)
class Sums:
    """All that the statistics need: sums over pairs of products of shifted distances, and both sides' margins."""

    xx: float
    xz: float
    zz: float
    x: Margins
    z: Margins
    epsilon: float

    def covariance_sqr(self, *, unbiased: bool) -> float:
        """Squared distance covariance of x and z."""
        return _covariance_sqr(self.xz, self.x, self.z, unbiased=unbiased)

    def variances(self, *, unbiased: bool) -> tuple[float, float]:
        """Squared distance variances of x and of z; exactly 0 where all that is left is rounding."""
        variances = (
            _covariance_sqr(inner, side, side, unbiased=unbiased)
            for inner, side in ((self.xx, self.x), (self.zz, self.z))
        )
        x, z = (
            value if value > (_ROUNDING * self.epsilon * side.shift) ** 2 else 0.0
            for value, side in zip(variances, (self.x, self.z), strict=True)
        )
        return x, z

    def correlation_sqr(self, *, unbiased: bool) -> float:
        """Squared distance correlation; 0 where x or z is constant."""
        variance_x, variance_z = self.variances(unbiased=unbiased)
        scale = (variance_x * variance_z) ** 0.5
        return self.covariance_sqr(unbiased=unbiased) / scale if scale > 0 else 0.0


def tables(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, D) and z (N, E), flattened per record; DataError where they are no pairs, or too few, or z no floats."""
    if len(x) != len(z):
        raise DataError(f"distance correlation: {len(x)} records, but activations of {len(z)}")
    if len(x) < MINIMUM_RECORDS:
        raise DataError(f"distance correlation: {len(x)} records; at least {MINIMUM_RECORDS} are needed")
    if z.dtype not in (torch.float32, torch.float64):
        raise DataError(f"distance correlation: activations are {z.dtype}; expected float32 or float64")
    return x.flatten(1), z.flatten(1)


def _covariance_sqr(inner: float, a: Margins, b: Margins, *, unbiased: bool) -> float:
    """Mean product of doubly centered distances, from the sum `inner` of the products of the shifted ones."""
    n = len(a.row_sums_N)
    cross = torch.dot(a.row_sums_N, b.row_sums_N).item()
    if unbiased:
        return (inner - 2 * cross / (n - 2) + a.total * b.total / ((n - 1) * (n - 2))) / (n * (n - 3))
    # The shift is constant off the diagonal only, so something of it is left after centering.
    left = (n - 1) * a.shift * b.shift + (a.shift * b.total + b.shift * a.total) / n
    return (inner - 2 * cross / n + a.total * b.total / n**2 + left) / n**2


def _shift_(distance_NN: Tensor) -> Margins:
    """Take the mean distance off, in place, and leave the diagonal 0: a large mean would cost the sums their digits."""
    n = len(distance_NN)
    shift = distance_NN.sum(1).sum(dtype=torch.float64).item() / (n * (n - 1))
    row_sums_N = distance_NN.sub_(shift).fill_diagonal_(0).sum(1).to(torch.float64)
    return Margins(row_sums_N, row_sums_N.sum().item(), shift)


def _squared(a_NN: Tensor) -> float:
    lengths_N: Tensor = torch.linalg.vector_norm(a_NN, dim=1)
    return lengths_N.to(torch.float64).square().sum().item()


def _center_both(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Sums]:
    """Both sides' shifted distances, and all sums, in float64."""
    with torch.no_grad():
        x_ND, z_NE = tables(x, z)
        (x_ND, _), (z_NE, _) = scaled(x_ND, torch.float64, "records"), scaled(z_NE, torch.float64, "activations")
        a_NN, b_NN = pairwise_distances(x_ND)[0], pairwise_distances(z_NE)[0]
        margins_x, margins_z = _shift_(a_NN), _shift_(b_NN)
        xz = (a_NN * b_NN).sum(1).sum(dtype=torch.float64).item()
    epsilon = torch.finfo(z.dtype).eps  # the given values are no more exact than their type
    return a_NN, b_NN, Sums(_squared(a_NN), xz, _squared(b_NN), margins_x, margins_z, epsilon)


def _permuted(a_NN: Tensor, b_NN: Tensor, sums: Sums, generator: torch.Generator) -> float:
    """The bias-corrected squared correlation with the activations dealt out anew."""
    order_N = torch.randperm(len(b_NN), generator=generator).to(b_NN.device)
    dealt_NN = b_NN[order_N][:, order_N]
    xz = dealt_NN.mul_(a_NN).sum(1).sum(dtype=torch.float64).item()
    margins = replace(sums.z, row_sums_N=sums.z.row_sums_N[order_N])
    return replace(sums, xz=xz, z=margins).correlation_sqr(unbiased=True)


@dataclass(frozen=True)
class _Scales:
    """Powers of two, as exponents: 0 unless values are near the ends of their type's range."""

    z: int
    value: int
    derivative: int


class _Statistic(torch.autograd.Function):
    """Squared distance covariance or correlation, with the closed-form derivative by z.

    Computed of `z * 2^scales.z`; value and derivative are then multiplied by 2^scales.value and 2^scales.derivative.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, z_NE: Tensor, scales: _Scales, unbiased: bool, normalized: bool) -> Tensor:
        z_NE = times_power_of_two(z_NE, scales.z)
        ctx.exponent = scales.derivative
        a_NN, _ = pairwise_distances(x_ND)
        margins_x = _shift_(a_NN)
        b_NN, near = pairwise_distances(z_NE)
        product_NN = b_NN.clone()  # small distances lose digits when shifted, and the derivative divides by them
        margins_z = _shift_(product_NN)
        zz = _squared(product_NN)
        xz = product_NN.mul_(a_NN).sum(1).sum(dtype=torch.float64).item()
        del product_NN
        sums = Sums(_squared(a_NN), xz, zz, margins_x, margins_z, torch.finfo(z_NE.dtype).eps)
        value = sums.correlation_sqr(unbiased=unbiased) if normalized else sums.covariance_sqr(unbiased=unbiased)
        if ctx.needs_input_grad[1]:
            by_a, by_b = _derivative(sums, unbiased=unbiased, normalized=normalized)
            if by_a != 0 and margins_z.shift > 0:
                laplacian = _laplacian_(a_NN, b_NN, sums, near, by_a, by_b, unbiased=unbiased)
                ctx.save_for_backward(
                    z_NE, laplacian.matrix_NN, laplacian.rows_P, laplacian.columns_P, laplacian.weights_P
                )
            else:
                ctx.save_for_backward(z_NE)
        return times_power_of_two(z_NE.new_tensor(value, dtype=torch.float64), scales.value).to(z_NE.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None, None]:
        z_NE, *laplacian = ctx.saved_tensors
        if not laplacian:
            return None, torch.zeros_like(z_NE), None, None, None
        gradient_NE = Laplacian(*laplacian).product(z_NE, grad_output.item())
        if ctx.exponent != 0:  # of activations near the smallest numbers, the true gradient may exceed the largest
            largest = torch.finfo(z_NE.dtype).max
            gradient_NE = times_power_of_two(gradient_NE, ctx.exponent).clamp_(-largest, largest)
        return None, gradient_NE, None, None, None


def _derivative(sums: Sums, *, unbiased: bool, normalized: bool) -> tuple[float, float]:
    """(p, q): the derivative by the distances of z is p A - q B, of the doubly centered distances; (0, 0) if flat."""
    n = sums.x.row_sums_N.numel()
    pairs = n * (n - 3) if unbiased else n * n
    if not normalized:
        return 1 / pairs, 0.0
    variance_x, variance_z = sums.variances(unbiased=unbiased)
    scale = (variance_x * variance_z) ** 0.5
    if scale == 0:
        return 0.0, 0.0
    by_a = 1 / (pairs * scale)
    return by_a, by_a * sums.covariance_sqr(unbiased=unbiased) / variance_z


def _laplacian_(
    a_NN: Tensor, b_NN: Tensor, sums: Sums, near: NearPairs, by_a: float, by_b: float, *, unbiased: bool
) -> Laplacian:
    """Make of a_NN, in place, the Laplacian of W = 2 (p A - q B) / b, where b > 0; b_NN is used up."""
    t_x_N, k_x = sums.x.centering(unbiased=unbiased)
    t_z_N, k_z = sums.z.centering(unbiased=unbiased)
    by_row_N = (by_a * k_x - by_b * k_z - 2 * (by_a * t_x_N - by_b * t_z_N)).to(a_NN.dtype)
    torch.add(by_row_N, a_NN, alpha=2 * by_a, out=a_NN).add_(by_row_N[:, None])
    if by_b != 0:
        a_NN.add_(b_NN - sums.z.shift, alpha=-2 * by_b)
    b_NN.fill_diagonal_(torch.inf)  # where rows touch, the weight is to be 0
    rows_P, columns_P = near.rows_P[near.distances_P == 0], near.columns_P[near.distances_P == 0]
    if len(rows_P):
        b_NN[rows_P, columns_P] = torch.inf
        b_NN[columns_P, rows_P] = torch.inf
    return laplacian_(a_NN.div_(b_NN), near)


def _statistic(x: Tensor, z: Tensor, *, unbiased: bool, normalized: bool, root: bool = False) -> Tensor:
    """The squared statistic, or its root. A squared covariance of tables c x and d z is c d times that of x and z."""
    if x.requires_grad and torch.is_grad_enabled():
        raise DataError("distance correlation: the records need no gradient; pass x.detach()")
    x_ND, z_NE = tables(x, z)
    x_ND, by_x = scaled(x_ND, z.dtype, "records")
    by_z = scale_exponent(z_NE, z.dtype, "activations")
    scales = _Scales(by_z, 0, by_z) if normalized or root else _Scales(by_z, -by_x - by_z, -by_x)
    value: Tensor = _Statistic.apply(x_ND, z_NE, scales, unbiased, normalized)  # type: ignore[no-untyped-call]
    if not root:
        return value
    # The square may be out of range where its root is not: the root is taken first.
    return _root(value) if normalized else times_power_of_two(_root(value), -(by_x + by_z) // 2)


def _root(value: Tensor) -> Tensor:
    """The square root; 0, with derivative 0, at 0 and below (which is rounding)."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, torch.ones_like(value)).sqrt(), torch.zeros_like(value))
