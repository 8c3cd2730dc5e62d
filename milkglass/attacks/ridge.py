"""Ridge regression from (activations, entitled) to records, in closed form: the attack that no other may lose to.

Legend: N known pairs, F features, P values a record.

Hoerl and Kennard 1970; the penalty is the one of `PENALTIES` that does best on validation pairs. Leave-one-out
predictions come in closed form as well (Allen 1974): what is fitted on top of ridge regression must see the known
records as badly rebuilt as new ones will be.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from milkglass.attacks.base import Attack, Reconstruction
from milkglass.attacks.features import Features, as_records, features, flat
from milkglass.errors import AuditError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.transcript import View

PENALTIES: Final = tuple(10.0**power for power in (1, 0, -1, -2, -3, -4, -5, -6, -7, -8))
"""What is tried, largest first, in units of the mean eigenvalue of the features' second moments."""
WORSE_IN_A_ROW: Final = 2
"""The search for a penalty ends when this many smaller ones in a row did worse than the best."""


@dataclass(frozen=True)
class RidgeFit:
    """Predictions (rows, P), float64, not yet held within the records' range.

    left_out_NP: of each known pair, by the fit on all the others.
    """

    left_out_NP: Tensor
    validation_NP: Tensor
    target_TP: Tensor
    penalty: float


def fit_ridge(view: View, inputs: Features) -> RidgeFit:
    """Ridge regression of the known records on `inputs`, through the smaller of the two systems (F, F) and (N, N)."""
    x_NF, y_NP = inputs.known_NF, flat(view.known.records)
    mean_P = y_NP.mean(0)
    y_NP = y_NP - mean_P
    few_features = x_NF.shape[1] <= len(x_NF)
    system = x_NF.T @ x_NF if few_features else x_NF @ x_NF.T
    right = x_NF.T @ y_NP if few_features else y_NP
    probe = inputs.validation_NF if few_features else inputs.validation_NF @ x_NF.T
    unit = system.diagonal().mean().item() or 1.0

    best: tuple[float, float, Tensor, Tensor] | None = None
    worse = 0
    for penalty in PENALTIES:
        factor = shifted_factor(system, penalty * unit)
        if factor is None:
            break
        solution = torch.cholesky_solve(right, factor)
        guess = as_records(probe @ solution + mean_P, view)
        error = squared_errors(guess, view.validation.records).mean().item()
        if best is None or error < best[0]:
            best, worse = (error, penalty, solution, factor), 0
        else:
            worse += 1
            if worse == WORSE_IN_A_ROW:
                break
    if best is None:
        raise AuditError("ridge: the known activations are too large to compute with; expected finite, sane values")
    _, penalty, solution, factor = best

    weights_FP = solution if few_features else x_NF.T @ solution
    residuals_NP = y_NP - x_NF @ weights_FP
    if few_features:
        leverage_N = torch.linalg.solve_triangular(factor, x_NF.T, upper=False).square().sum(0)
    else:
        leverage_N = 1 - penalty * unit * torch.cholesky_inverse(factor).diagonal()
    left_N = (1 - leverage_N - 1 / len(x_NF)).clamp_min(1e-9)  # 1 / N: the mean is fitted too
    return RidgeFit(
        left_out_NP=y_NP - residuals_NP / left_N[:, None] + mean_P,
        validation_NP=inputs.validation_NF @ weights_FP + mean_P,
        target_TP=inputs.target_TF @ weights_FP + mean_P,
        penalty=penalty,
    )


def shifted_factor(system_KK: Tensor, shift: float) -> Tensor | None:
    """The lower Cholesky factor of system + shift * identity, or None where rounding has made it indefinite."""
    shifted_KK = system_KK.clone()
    shifted_KK.diagonal().add_(shift)
    factor_KK, failed = torch.linalg.cholesky_ex(shifted_KK)
    return None if failed.item() else factor_KK


@final
class Ridge(Attack):
    """Linear decoder in closed form. Exact on an identity cut, rotated or not, from as many pairs as dimensions."""

    name: ClassVar[str] = "ridge"

    def __repr__(self) -> str:
        return "Ridge()"

    def attack(self, view: View) -> Reconstruction:
        """Rebuild by the linear map that fits the known pairs best."""
        start = time.perf_counter()
        fit = fit_ridge(view, features(view))
        validation, target = as_records(fit.validation_NP, view), as_records(fit.target_TP, view)
        return Reconstruction(validation, target, time.perf_counter() - start)
