"""Kernel ridge regression with a Gaussian kernel: what a smooth, non-linear decoder gets, in closed form.

Legend: N known pairs, M other rows, F features, P values a record.

Saunders, Gammerman and Vovk 1998. Scaling of the features, kernel width and penalty are chosen on validation pairs,
from a fit to the first `CHOICE_PAIRS` known pairs; then all known pairs (up to a number given) are fitted once with
them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.features import Features, as_records, features, flat
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
        choices = [_choose(view, features(view, by_coordinate)) for by_coordinate in (False, True)]
        best = min(choices, key=lambda choice: choice.error)
        x_NF, y_NP = best.inputs.known_NF[: self._pairs], flat(view.known.records)[: self._pairs]
        mean_P = y_NP.mean(0)
        kernel_NN = _kernel(_squared_distances(x_NF, x_NF), best.width)
        coefficients_NP = torch.cholesky_solve(y_NP - mean_P, _shifted_factor(kernel_NN, best.penalty))

        def rebuild(rows_MF: Tensor) -> Tensor:
            kernel_MN = _kernel(_squared_distances(rows_MF, x_NF), best.width)
            return as_records(kernel_MN @ coefficients_NP + mean_P, view)

        validation, target = rebuild(best.inputs.validation_NF), rebuild(best.inputs.target_TF)
        return Reconstruction(validation, target, time.perf_counter() - start)


@dataclass(frozen=True)
class _Choice:
    """Settings with the least error (mean squared, validation pairs) on these inputs; width of exp(-width d^2)."""

    error: float
    inputs: Features
    width: float
    penalty: float


def _choose(view: View, inputs: Features) -> _Choice:
    """Try every width and penalty, for the error may have two valleys; one eigendecomposition serves all penalties."""
    x_NF, y_NP = inputs.known_NF[:CHOICE_PAIRS], flat(view.known.records)[:CHOICE_PAIRS]
    mean_P = y_NP.mean(0)
    between_NN, across_MN = _squared_distances(x_NF, x_NF), _squared_distances(inputs.validation_NF, x_NF)
    unit = between_NN.mean().item() or 1.0
    tried = []
    for inverse_width in INVERSE_WIDTHS:
        width = inverse_width / unit
        values_N, vectors_NN = torch.linalg.eigh(_kernel(between_NN.clone(), width))
        values_N = values_N.clamp_min(0)  # rounding
        right_NP, probe_MN = vectors_NN.T @ (y_NP - mean_P), _kernel(across_MN.clone(), width) @ vectors_NN
        for penalty in PENALTIES:
            guess = as_records((probe_MN / (values_N + penalty)) @ right_NP + mean_P, view)
            error = squared_errors(guess, view.validation.records).mean().item()
            tried.append((error, width, penalty))
    return _Choice(min(tried)[0], inputs, *min(tried)[1:])


def _kernel(squared_distances_MN: Tensor, width: float) -> Tensor:
    """In place."""
    return squared_distances_MN.mul_(-width).exp_()


def _shifted_factor(system_NN: Tensor, shift: float) -> Tensor:
    """The lower Cholesky factor of system + shift * identity, or of a larger shift where rounding asks for one.

    That may happen where there are more pairs than the choice was made on.
    """
    while True:
        shifted_NN = system_NN.clone()
        shifted_NN.diagonal().add_(shift)
        factor_NN: Tensor
        factor_NN, failed = torch.linalg.cholesky_ex(shifted_NN)
        if not failed.item():
            return factor_NN
        shift *= 10


def _squared_distances(x_MF: Tensor, y_NF: Tensor) -> Tensor:
    squares_MN = x_MF.square().sum(1)[:, None] + y_NF.square().sum(1)
    return squares_MN.addmm_(x_MF, y_NF.T, alpha=-2).clamp_min_(0)
