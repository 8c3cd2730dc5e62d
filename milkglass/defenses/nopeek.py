"""NoPeek (Vepakomma, Singh, Gupta, Raskar 2020, arXiv 2008.09161): a penalty on the distance correlation between the
records and what the client sends for them.

Where we differ from the authors' code: distances are exact on the diagonal, the gradient is in closed form, and next
to their biased estimate there is the bias-corrected one. The loss is the server's, with weight 1, plus `weight` times
the penalty (theirs weights both). The penalty is computed by the client alone, on exactly what it sends.

It is a regularizer and certifies nothing: audit what it leaves. Do-nothing twin: a weight of 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Literal, final

from torch import Tensor

from milkglass.defenses.base import Defense
from milkglass.errors import RecipeError, nearest
from milkglass.leakage.distance_correlation import (
    distance_correlation,
    linear_distance_correlation,
    u_distance_correlation_sqr,
)

Estimator = Literal["biased", "unbiased", "linear"]
_MEASURES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "biased": distance_correlation,
    "unbiased": u_distance_correlation_sqr,
    "linear": linear_distance_correlation,
}


@final
class NoPeek(Defense):
    """`weight` times a distance correlation of records and activations, added to the client's loss.

    estimator: "biased" (the paper's: the V-statistic, not squared), "unbiased" (the bias-corrected square, which may
    be slightly negative) or "linear" (squared distances, a baseline that is blind to non-linear dependence).
    """

    def __init__(self, weight: float = 1.0, estimator: Estimator = "biased") -> None:
        if not 0 <= weight < math.inf:
            raise RecipeError(f"NoPeek: weight is {weight}; expected a number from 0 on")
        if estimator not in _MEASURES:
            raise RecipeError(f"NoPeek: estimator {estimator!r} is not known; {nearest(estimator, _MEASURES)}")
        self.weight = weight
        self.estimator: Estimator = estimator
        self._measure = _MEASURES[estimator]

    def __repr__(self) -> str:
        return f"NoPeek(weight={self.weight}, estimator={self.estimator!r})"

    def describe(self) -> str:
        return f"NoPeek, weight {self.weight:g}, {self.estimator} estimator"

    def penalty(self, x: Tensor, z: Tensor, y_B: Tensor | None = None) -> Tensor | None:  # noqa: ARG002
        if self.weight == 0:
            return None
        return self.weight * self._measure(x, z)
