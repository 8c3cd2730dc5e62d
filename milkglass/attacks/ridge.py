"""Ridge regression from (activations, entitled) to records, in closed form: the attack that no other may lose to.

Legend: N known pairs, F features, P values a record.

Hoerl and Kennard 1970; penalty and scaling of the features do best on validation pairs. Leave-one-out
predictions come in closed form as well (Allen 1974): what is fitted on top of ridge regression must see the known
records as badly rebuilt as new ones will be.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.features import Features, as_records, features, flat
from milkglass.leakage.reconstruction import squared_errors
from milkglass.transcript import View

PENALTIES: Final = tuple(10.0**power for power in range(1, -13, -1))
"""What is tried, largest first, in units of the mean eigenvalue of the features' second moments. All of them: where the
record crosses at a small scale, the error over penalties has two valleys, and the deep one comes last."""


@dataclass(frozen=True)
class RidgeFit:
    """Predictions (rows, P), float64, not yet held within the records' range.

    left_out_NP: of each known pair, by the fit on all the others. validation_error: mean squared error per value.
    """

    left_out_NP: Tensor
    validation_NP: Tensor
    target_TP: Tensor
    penalty: float
    validation_error: float


def fit_ridge(view: View, inputs: Features) -> RidgeFit:
    """Ridge regression of the known records on `inputs`, through the smaller of the two systems (F, F) and (N, N).

    One eigendecomposition of the system serves all penalties.
    """
    x_NF, y_NP = inputs.known_NF, flat(view.known.records)
    mean_P = y_NP.mean(0)
    y_NP = y_NP - mean_P
    few_features = x_NF.shape[1] <= len(x_NF)
    values_K, vectors_KK = torch.linalg.eigh(x_NF.T @ x_NF if few_features else x_NF @ x_NF.T)
    values_K = values_K.clamp_min(0)  # rounding
    unit = values_K.mean().item() or 1.0
    right_KP = vectors_KK.T @ (x_NF.T @ y_NP if few_features else y_NP)
    probe_MK = (inputs.validation_NF if few_features else inputs.validation_NF @ x_NF.T) @ vectors_KK

    def error(penalty: float) -> float:
        guess_MP = (probe_MK / (values_K + penalty * unit)) @ right_KP + mean_P
        return squared_errors(as_records(guess_MP, view), view.validation.records).mean().item()

    errors = {penalty: error(penalty) for penalty in PENALTIES}
    penalty = min(errors, key=lambda tried: errors[tried])
    shifted_K = values_K + penalty * unit
    weights_FP = vectors_KK @ (right_KP / shifted_K[:, None])
    if few_features:
        leverage_N = ((x_NF @ vectors_KK).square() / shifted_K).sum(1)
    else:
        weights_FP = x_NF.T @ weights_FP
        leverage_N = 1 - penalty * unit * (vectors_KK.square() / shifted_K).sum(1)
    left_N = (1 - leverage_N - 1 / len(x_NF)).clamp_min(1e-9)  # 1 / N: the mean is fitted too
    return RidgeFit(
        left_out_NP=y_NP - (y_NP - x_NF @ weights_FP) / left_N[:, None] + mean_P,
        validation_NP=inputs.validation_NF @ weights_FP + mean_P,
        target_TP=inputs.target_TF @ weights_FP + mean_P,
        penalty=penalty,
        validation_error=errors[penalty],
    )


def best_ridge(view: View) -> tuple[Features, RidgeFit]:
    """The features, on one scale a block or by coordinate, that do better on validation pairs, and the fit on them."""
    by_block = features(view)
    fit = fit_ridge(view, by_block)
    by_coordinate = features(view, by_coordinate=True)
    other = fit_ridge(view, by_coordinate)
    return (by_coordinate, other) if other.validation_error < fit.validation_error else (by_block, fit)


@final
class Ridge(Attack):
    """Linear decoder in closed form. Exact on an identity cut, rotated or not, from as many pairs as dimensions."""

    name: ClassVar[str] = "ridge"
    paper: ClassVar[str] = "Hoerl and Kennard 1970"

    def __repr__(self) -> str:
        return "Ridge()"

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:  # noqa: ARG002
        """Rebuild by the linear map that fits the known pairs best."""
        start = time.perf_counter()
        _, fit = best_ridge(view)
        validation, target = as_records(fit.validation_NP, view), as_records(fit.target_TP, view)
        return Reconstruction(validation, target, time.perf_counter() - start)
