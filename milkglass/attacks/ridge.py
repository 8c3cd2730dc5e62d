"""Ridge regression from (activations, entitled) to records, in closed form: the attack that no other may lose to.

Legend: N known pairs, M validation pairs, T targets, B batch, F features, K = min(N, F), P values a record.

Hoerl and Kennard 1970; penalty and scaling of the features do best on validation pairs. Leave-one-out
predictions come in closed form as well (Allen 1974): what is fitted on top of ridge regression must see the known
records as badly rebuilt as new ones will be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Final, TypeVar, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.features import Features, as_records, features, flat
from milkglass.leakage.reconstruction import squared_errors
from milkglass.transcript import View

PENALTIES: Final = tuple(10.0**power for power in range(1, -13, -1))
"""What is tried, largest first, in units of the mean eigenvalue of the features' second moments. All of them: where the
record crosses at a small scale, the error over penalties has two valleys, and the deep one comes last."""
FIRST_ROWS: Final = 256
"""Settings are compared on so many validation pairs first, and on all of them if they are near the best there."""
NEAR: Final = 1.25
"""Near the best: an error at most so many times the least one."""
TILES: Final = 4

Setting = TypeVar("Setting")


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """Ridge regression on `inputs`. Predictions are (rows, P), float64, not yet held within the records' range.

    weights_FP, mean_P: the fit. values_K: the system's eigenvalues, penalty added. vectors_KK: its eigenvectors.
    records_NP: the known records less their mean. penalty: in units of the mean eigenvalue. validation_error: mean
    squared error per value.
    """

    inputs: Features
    records_NP: Tensor
    mean_P: Tensor
    weights_FP: Tensor
    values_K: Tensor
    vectors_KK: Tensor
    shift: float
    penalty: float
    validation_error: float

    @cached_property
    def validation_NP(self) -> Tensor:  # noqa: N802
        """Of the validation pairs."""
        return self.inputs.validation_NF @ self.weights_FP + self.mean_P

    @cached_property
    def target_TP(self) -> Tensor:  # noqa: N802
        """Of the target."""
        return self.inputs.target_TF @ self.weights_FP + self.mean_P

    @cached_property
    def left_out_NP(self) -> Tensor:  # noqa: N802
        """Of each known pair, by the fit on all the others."""
        return self.records_NP - self._left_out_errors_NP + self.mean_P

    def left_out_again(self, rows_B: Tensor, seen_BF: Tensor) -> Tensor:
        """(B, P): of further releases `seen_BF` of the known records `rows_B`, by the fits without that record's pair.

        Sherman and Morrison 1950: leaving a pair out takes a product of two vectors away from the weights.
        """
        reach_B = (seen_BF * self._influence_NF[rows_B]).sum(1) + 1 / len(self.records_NP)
        plain_BP = seen_BF @ self.weights_FP + self.mean_P
        return plain_BP - reach_B[:, None] * self._left_out_errors_NP[rows_B]

    @cached_property
    def _left_out_errors_NP(self) -> Tensor:  # noqa: N802
        x_NF = self.inputs.known_NF
        if len(self.values_K) == x_NF.shape[1]:
            leverage_N = ((x_NF @ self.vectors_KK).square() / self.values_K).sum(1)
        else:
            leverage_N = 1 - self.shift * (self.vectors_KK.square() / self.values_K).sum(1)
        left_N = (1 - leverage_N - 1 / len(x_NF)).clamp_min(1e-9)  # 1 / N: the mean is fitted too
        return (self.records_NP - x_NF @ self.weights_FP) / left_N[:, None]

    @cached_property
    def _influence_NF(self) -> Tensor:  # noqa: N802
        """The inverse of the features' shifted second moments, times each known pair's features."""
        x_NF, over_KK = self.inputs.known_NF, (self.vectors_KK / self.values_K) @ self.vectors_KK.T
        return x_NF @ over_KK if len(over_KK) == x_NF.shape[1] else over_KK @ x_NF


def fit_ridge(view: View, inputs: Features, system: tuple[Tensor, Tensor] | None = None) -> RidgeFit:
    """Ridge regression of the known records on `inputs`, through the smaller of the two systems (F, F) and (N, N).

    One eigendecomposition of the system serves all penalties. system: the one of `_system`, where it is known.
    """
    x_NF = inputs.known_NF
    mean_P = flat(view.known.records).mean(0)
    y_NP = flat(view.known.records) - mean_P
    few_features = x_NF.shape[1] <= len(x_NF)
    system_KK, side_KP = system or _system(x_NF, y_NP)
    values_K, vectors_KK = torch.linalg.eigh(system_KK)
    values_K = values_K.clamp_min(0)  # rounding
    unit = values_K.mean().item() or 1.0
    right_KP = vectors_KK.T @ side_KP
    probe_MK = (inputs.validation_NF if few_features else inputs.validation_NF @ x_NF.T) @ vectors_KK

    def error(penalty: float, rows: slice) -> float:
        guess_MP = (probe_MK[rows] / (values_K + penalty * unit)) @ right_KP + mean_P
        return squared_errors(as_records(guess_MP, view), view.validation.records[rows]).mean().item()

    penalty, validation_error = least_error(PENALTIES, error, len(probe_MK))
    values_K = values_K + penalty * unit
    weights_FP = vectors_KK @ (right_KP / values_K[:, None])
    weights_FP = weights_FP if few_features else x_NF.T @ weights_FP
    return RidgeFit(inputs, y_NP, mean_P, weights_FP, values_K, vectors_KK, penalty * unit, penalty, validation_error)


def best_ridge(view: View) -> RidgeFit:
    """The fit on features scaled by block or by coordinate, whichever does better on validation pairs.

    That of the last view is kept for as long as the view lives: several attacks start from it.
    """
    if view not in _LAST:
        _LAST.clear()
        _LAST[view] = _best_ridge(view)
    return _LAST[view]


_LAST: Final[WeakKeyDictionary[View, RidgeFit]] = WeakKeyDictionary()


def _best_ridge(view: View) -> RidgeFit:
    """One pass over the known pairs serves both scalings, where there are more pairs than features."""
    by_block, by_coordinate = features(view), features(view, by_coordinate=True)
    other_system = block_system = None
    x_NF = by_coordinate.known_NF
    if x_NF.shape[1] <= len(x_NF):
        y_NP = flat(view.known.records)
        other_system = _system(x_NF, y_NP - y_NP.mean(0))
        ratio_F = (by_coordinate.scaling.scale_F / by_block.scaling.scale_F).nan_to_num(nan=0.0)  # infinite over same
        block_system = (other_system[0] * ratio_F[:, None] * ratio_F, other_system[1] * ratio_F[:, None])
    fit = fit_ridge(view, by_block, block_system)
    other = fit_ridge(view, by_coordinate, other_system)
    return other if other.validation_error < fit.validation_error else fit


def _system(x_NF: Tensor, y_NP: Tensor) -> tuple[Tensor, Tensor]:
    """x'x (F, F) with x'y (F, P), or, where there are more features than pairs, xx' (N, N) with y (N, P)."""
    if x_NF.shape[1] <= len(x_NF):
        return second_moments(x_NF), x_NF.T @ y_NP
    return second_moments(x_NF.T), y_NP


def second_moments(x_NF: Tensor) -> Tensor:
    """x'x, (F, F): tile by tile, those below the diagonal copied from above."""
    tiles = torch.arange(x_NF.shape[1]).tensor_split(TILES)
    moments_FF = x_NF.new_zeros(x_NF.shape[1], x_NF.shape[1])
    for tile in (tile for tile in tiles if len(tile)):
        here, rest = slice(int(tile[0]), int(tile[-1]) + 1), slice(int(tile[0]), None)
        moments_FF[here, rest] = x_NF[:, here].T @ x_NF[:, rest]
        moments_FF[rest, here] = moments_FF[here, rest].T.clone()  # they overlap in the tile on the diagonal
    return moments_FF


def least_error(
    settings: Sequence[Setting], error: Callable[[Setting, slice], float], rows: int
) -> tuple[Setting, float]:
    """The setting with the least error over all validation rows, and that error; the earlier one of two alike.

    error: of a setting, over a slice of the rows. A setting clearly worse on the first rows is not tried on the others.
    """
    left = list(settings)
    if rows > FIRST_ROWS:
        first = [error(setting, slice(FIRST_ROWS)) for setting in left]
        left = [setting for setting, value in zip(left, first, strict=True) if value <= NEAR * min(first)]
    errors = [error(setting, slice(rows)) for setting in left]
    return min(zip(left, errors, strict=True), key=lambda tried: tried[1])


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
        fit = best_ridge(view)
        validation, target = as_records(fit.validation_NP, view), as_records(fit.target_TP, view)
        return Reconstruction(validation, target, time.perf_counter() - start)
