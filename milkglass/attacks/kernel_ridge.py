"""Kernel ridge regression with a Gaussian kernel: what a smooth, non-linear decoder gets, in closed form.

Legend: N known pairs, M other rows, F features, P values a record.

Saunders, Gammerman and Vovk 1998. Scaling of the features, kernel width and penalty are chosen on validation pairs,
from a fit to the first `CHOICE_PAIRS` known pairs; then all known pairs (up to a number given) are fitted once with
them.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.features import Features, as_records, features, flat
from milkglass.attacks.ridge import least_error, second_moments
from milkglass.errors import AuditError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.transcript import MINIMUM_PAIRS, View

INVERSE_WIDTHS: Final = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Kernel exp(-w d^2 / mean d^2), d the distance of two rows of features: the w that are tried."""
PENALTIES: Final = tuple(10.0**power for power in (0, -1, -2, -3, -4, -5, -6))
CHOICE_PAIRS: Final = 1000


@final
class KernelRidge(Attack):
    """Smooth decoder in closed form, on at most `pairs` known pairs: its time grows with their cube."""

    name: ClassVar[str] = "kernel ridge"
    paper: ClassVar[str] = "Saunders, Gammerman and Vovk 1998"

    def __init__(self, pairs: int = 6000) -> None:
        if pairs < MINIMUM_PAIRS:
            raise AuditError(f"kernel ridge: pairs = {pairs}; expected at least {MINIMUM_PAIRS}")
        self._pairs = pairs

    def __repr__(self) -> str:
        return f"KernelRidge(pairs={self._pairs})"

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:  # noqa: ARG002
        """Rebuild by the kernel expansion that fits the known pairs best."""
        start = time.perf_counter()
        best = _choose(view)
        x_NF, y_NP = best.inputs.known_NF[: self._pairs], flat(view.known.records)[: self._pairs]
        mean_P = y_NP.mean(0)
        kernel_NN = _kernel(_squared_distances(x_NF), best.width)
        coefficients_NP = torch.cholesky_solve(y_NP - mean_P, _shifted_factor(kernel_NN, best.penalty))

        def rebuild(rows_MF: Tensor) -> Tensor:
            kernel_MN = _kernel(_distances_to(rows_MF, x_NF), best.width)
            return as_records(kernel_MN @ coefficients_NP + mean_P, view)

        validation, target = rebuild(best.inputs.validation_NF), rebuild(best.inputs.target_TF)
        return Reconstruction(validation, target, time.perf_counter() - start)


@dataclass(frozen=True)
class _Choice:
    """Settings: the kernel is exp(-width d^2) on these inputs."""

    inputs: Features
    width: float
    penalty: float


def _choose(view: View) -> _Choice:
    """Try every scaling, width and penalty, for the error may have two valleys."""
    mean_P = flat(view.known.records)[:CHOICE_PAIRS].mean(0)
    y_NP = flat(view.known.records)[:CHOICE_PAIRS] - mean_P
    fits = []
    for by_coordinate in (False, True):
        inputs = features(view, by_coordinate)
        between_NN = _squared_distances(inputs.known_NF[:CHOICE_PAIRS])
        across_MN = _distances_to(inputs.validation_NF, inputs.known_NF[:CHOICE_PAIRS])
        unit = between_NN.mean().item() or 1.0
        fits += [_fit(inputs, between_NN, across_MN, inverse_width / unit, y_NP) for inverse_width in INVERSE_WIDTHS]

    def error(tried: tuple[_Fit, float], rows: slice) -> float:
        fit, penalty = tried
        guess = as_records(fit.rebuild(rows, penalty) + mean_P, view)
        return squared_errors(guess, view.validation.records[rows]).mean().item()

    (fit, penalty), _ = least_error(list(itertools.product(fits, PENALTIES)), error, len(view.validation))
    return _Choice(fit.inputs, fit.width, penalty)


@dataclass(frozen=True, eq=False)
class _Fit:
    """Kernel ridge regression on the first known pairs for all penalties: an eigendecomposition of the kernel."""

    inputs: Features
    width: float
    values_N: Tensor
    probe_MN: Tensor
    right_NP: Tensor

    def rebuild(self, rows: slice, penalty: float) -> Tensor:
        """(M, P): of these validation rows, less the mean record."""
        return (self.probe_MN[rows] / (self.values_N + penalty)) @ self.right_NP


def _fit(inputs: Features, between_NN: Tensor, across_MN: Tensor, width: float, y_NP: Tensor) -> _Fit:
    values_N, vectors_NN = torch.linalg.eigh(_kernel(between_NN.clone(), width))
    probe_MN = _kernel(across_MN.clone(), width) @ vectors_NN
    return _Fit(inputs, width, values_N.clamp_min(0), probe_MN, vectors_NN.T @ y_NP)  # clamped: rounding


def _kernel(squared_distances_MN: Tensor, width: float) -> Tensor:
    """In place."""
    return squared_distances_MN.mul_(-width).exp_()


def _shifted_factor(system_NN: Tensor, shift: float) -> Tensor:
    """The lower Cholesky factor of system + shift * identity, or of a larger shift where rounding asks for one.

    That may happen where there are more pairs than the choice was made on. The system's diagonal is changed in place.
    """
    diagonal_N = system_NN.diagonal().clone()
    while True:
        system_NN.diagonal().copy_(diagonal_N + shift)
        factor_NN: Tensor
        factor_NN, failed = torch.linalg.cholesky_ex(system_NN)
        if not failed.item():
            return factor_NN
        shift *= 10


def _distances_to(x_MF: Tensor, y_NF: Tensor) -> Tensor:
    """Squared, (M, N)."""
    squares_MN = x_MF.square().sum(1)[:, None] + y_NF.square().sum(1)
    return squares_MN.addmm_(x_MF, y_NF.T, alpha=-2).clamp_min_(0)


def _squared_distances(x_NF: Tensor) -> Tensor:
    """Between all rows, (N, N)."""
    products_NN = second_moments(x_NF.T)
    squares_N = products_NN.diagonal().clone()
    return products_NN.mul_(-2).add_(squares_N[:, None]).add_(squares_N).clamp_min_(0)
