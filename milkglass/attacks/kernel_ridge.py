"""Kernel ridge regression with a Gaussian kernel: what a smooth, non-linear decoder gets, in closed form.

Legend: N known pairs, M other rows, F features, P values a record.

Saunders, Gammerman and Vovk 1998. Kernel width and penalty are chosen on validation pairs, from a fit to the first
`CHOICE_PAIRS` known pairs; then all known pairs (up to a number given) are fitted once with them.
"""

from __future__ import annotations

import time
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from milkglass.attacks.base import Attack, Reconstruction
from milkglass.attacks.features import as_records, features, flat
from milkglass.attacks.ridge import shifted_factor
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

    def __init__(self, pairs: int = 6000) -> None:
        if pairs < MINIMUM_PAIRS:
            raise AuditError(f"kernel ridge: pairs = {pairs}; expected at least {MINIMUM_PAIRS}")
        self._pairs = pairs

    def __repr__(self) -> str:
        return f"KernelRidge(pairs={self._pairs})"

    def attack(self, view: View) -> Reconstruction:
        """Rebuild by the kernel expansion that fits the known pairs best."""
        start = time.perf_counter()
        inputs = features(view)
        x_NF, y_NP = inputs.known_NF[: self._pairs], flat(view.known.records)[: self._pairs]
        mean_P = y_NP.mean(0)
        unit = _squared_distances(x_NF[:CHOICE_PAIRS], x_NF[:CHOICE_PAIRS]).mean().item() or 1.0
        width, penalty = _choose(view, x_NF[:CHOICE_PAIRS], y_NP[:CHOICE_PAIRS], inputs.validation_NF, unit)

        kernel_NN = _squared_distances(x_NF, x_NF).mul_(-width / unit).exp_()
        factor_NN = shifted_factor(kernel_NN, penalty)
        while factor_NN is None:  # more pairs than the choice was made on: rounding may ask for a larger penalty
            penalty *= 10
            factor_NN = shifted_factor(kernel_NN, penalty)
        coefficients_NP = torch.cholesky_solve(y_NP - mean_P, factor_NN)

        def rebuild(rows_MF: Tensor) -> Tensor:
            kernel_MN = _squared_distances(rows_MF, x_NF).mul_(-width / unit).exp_()
            return as_records(kernel_MN @ coefficients_NP + mean_P, view)

        validation, target = rebuild(inputs.validation_NF), rebuild(inputs.target_TF)
        return Reconstruction(validation, target, time.perf_counter() - start)


def _choose(view: View, x_NF: Tensor, y_NP: Tensor, validation_MF: Tensor, unit: float) -> tuple[float, float]:
    """The (inverse width, penalty) with the least error on validation pairs; larger penalties first."""
    mean_P = y_NP.mean(0)
    between_NN, across_MN = _squared_distances(x_NF, x_NF), _squared_distances(validation_MF, x_NF)
    best = (float("inf"), INVERSE_WIDTHS[0], PENALTIES[0])
    for width in INVERSE_WIDTHS:
        kernel_NN, kernel_MN = (between_NN * (-width / unit)).exp(), (across_MN * (-width / unit)).exp()
        last = float("inf")
        for penalty in PENALTIES:
            factor_NN = shifted_factor(kernel_NN, penalty)
            if factor_NN is None:
                break
            guess = as_records(kernel_MN @ torch.cholesky_solve(y_NP - mean_P, factor_NN) + mean_P, view)
            error = squared_errors(guess, view.validation.records).mean().item()
            best = min(best, (error, width, penalty))
            if error > last:
                break
            last = error
    return best[1], best[2]


def _squared_distances(x_MF: Tensor, y_NF: Tensor) -> Tensor:
    squares_MN = x_MF.square().sum(1)[:, None] + y_NF.square().sum(1)
    return squares_MN.addmm_(x_MF, y_NF.T, alpha=-2).clamp_min_(0)
