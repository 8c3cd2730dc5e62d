"""Trials whose answer is known: an attack that fails on an open door is no strong lock.

Legend: N rows, P values a record, D activation values a record.

Each control keeps the records and the entitled values of the trial it is made from and replaces what crossed the cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from milkglass.transcript import Pairs, Release, Trial, View

IDENTITY_AT_LEAST: Final = 0.95
INDEPENDENT_AT_MOST: Final = 0.05
GAUSSIAN_WITHIN: Final = 0.10

GAUSSIAN_VALUES: Final = 64
GAUSSIAN_SENT: Final = 32
GAUSSIAN_NOISE: Final = 0.3
GAUSSIAN_PAIRS: Final = 4000
GAUSSIAN_VALIDATION: Final = 500
GAUSSIAN_TARGETS: Final = 1000


@dataclass(frozen=True)
class ControlResult:
    """What the suite's best attack reached on a control, the limit, and whether it kept to it.

    identity, identity_rotated: peek, at least 0.95. independent: peek, at most 0.05. gaussian: the error over the
    least possible one, from 0.90 to 1.10.
    """

    value: float
    limit: float
    passed: bool

    def to_dict(self) -> dict[str, float | bool]:
        """As in audit.json."""
        return {"value": self.value, "limit": self.limit, "passed": self.passed}


def identity(trial: Trial) -> Trial:
    """The raw records cross the cut."""
    return _replaced(trial, lambda _, records: records)


def identity_rotated(trial: Trial, generator: torch.Generator) -> Trial:
    """The raw records cross the cut, flattened, under a random rotation (Haar measure)."""
    width = trial.truth[0].numel()
    gaussian_PP = torch.randn(width, width, generator=generator, dtype=torch.float64)
    rotation_PP, triangle_PP = torch.linalg.qr(gaussian_PP)
    rotation_PP *= triangle_PP.diagonal().sign()  # without it QR does not draw evenly

    def rotate(_: Tensor, records: Tensor) -> Tensor:
        rotated_NP: Tensor = records.flatten(1).to(torch.float64) @ rotation_PP
        return rotated_NP

    return _replaced(trial, rotate)


def independent(trial: Trial, generator: torch.Generator) -> Trial:
    """Releases of *other* records of the same part cross the cut: shapes and marginals kept, no row with its own."""

    def of_others(activations: Tensor, _: Tensor) -> Tensor:
        order_N = torch.randperm(len(activations), generator=generator)
        other_N = torch.empty_like(order_N)
        other_N[order_N] = order_N.roll(1)  # one cycle through all rows: nobody keeps their own
        return activations[other_N]

    return _replaced(trial, of_others)


def gaussian(generator: torch.Generator) -> tuple[Trial, float]:
    """64 independent standard normal values through a random 32 x 64 projection with noise, and the least error.

    That is the mean squared error per value of the conditional mean, which no attack can beat: trace(I - A' (A A' +
    s^2 I)^-1 A) / 64. The number of pairs is fixed, so that the control tests the attacks and not the auxiliary data.
    """
    projection_DP = torch.randn(GAUSSIAN_SENT, GAUSSIAN_VALUES, generator=generator, dtype=torch.float64)
    projection_DP /= GAUSSIAN_VALUES**0.5
    noise_DD = GAUSSIAN_NOISE**2 * torch.eye(GAUSSIAN_SENT, dtype=torch.float64)
    explained = torch.linalg.solve(projection_DP @ projection_DP.T + noise_DD, projection_DP @ projection_DP.T).trace()
    least_error = 1 - explained.item() / GAUSSIAN_VALUES

    def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
        records_NP = torch.randn(count, GAUSSIAN_VALUES, generator=generator, dtype=torch.float64)
        noise_ND = torch.randn(count, GAUSSIAN_SENT, generator=generator, dtype=torch.float64)
        sent_ND = records_NP @ projection_DP.T + GAUSSIAN_NOISE * noise_ND
        return sent_ND.float(), records_NP.float(), torch.zeros(count, 0)

    known, validation = Pairs(*draw(GAUSSIAN_PAIRS)), Pairs(*draw(GAUSSIAN_VALIDATION))
    sent, records, entitled = draw(GAUSSIAN_TARGETS)
    return Trial(View(known, validation, Release(sent, entitled)), records), least_error


def _replaced(trial: Trial, sent: Callable[[Tensor, Tensor], Tensor]) -> Trial:
    """The trial with what (activations, records) -> activations makes of each part, and nothing to ask for."""
    view = trial.view
    known, validation = (
        replace(pairs, activations=sent(pairs.activations, pairs.records)) for pairs in (view.known, view.validation)
    )
    target = replace(view.target, activations=sent(view.target.activations, trial.truth))
    return Trial(replace(view, known=known, validation=validation, target=target, release=None), trial.truth)
