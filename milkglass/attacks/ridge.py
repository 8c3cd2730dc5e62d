"""Ridge regression from (activations, entitled) to records, in closed form: the attack no other may lose to.

Legend: N known pairs, F features, P values a record.

Hoerl and Kennard 1970. The penalty is chosen on validation pairs. Leave-one-out predictions come in closed form too
(Allen 1974): what is fitted on top of ridge must see known pairs as badly rebuilt as new ones.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from milkglass.attacks.base import Adversary, Attack, Reconstruction
from milkglass.attacks.features import Features, as_records, features, flat
from milkglass.transcript import View

PENALTIES: Final = tuple(10.0**power for power in (1, 0, -1, -2, -3, -4, -5, -6, -7))
"""Penalties to choose from, largest first, in units of the mean eigenvalue of what is inverted."""


@dataclass(frozen=True)
class Fit:
    """Predictions (rows, P) in float64: of each known pair by the fit without it, of validation and target rows."""

    left_out_NP: Tensor
    validation_NP: Tensor
    target_TP: Tensor
    penalty: float


@dataclass(frozen=True)
class Solution:
    """Dual coefficients (N, P), residuals of the fit (N, P), and 1 - leverage of each pair (N,)."""

    coefficients_NP: Tensor
    left_out_residuals_NP: Tensor
