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

ROTATED_AT_ONCE: Final = 2048
"""Records of more values are rotated in blocks of at most this many: a whole rotation grows with their square."""
FAINT_SCALE: Final = 1e-8
"""The spread of the faint records over that of the loud coordinates. A float keeps its digits at any scale."""
LOUD_AT_MOST: Final = 512

GAUSSIAN_VALUES: Final = 64
GAUSSIAN_SENT: Final = 32
GAUSSIAN_NOISE: Final = 0.3
GAUSSIAN_PAIRS: Final = 4000
GAUSSIAN_VALIDATION: Final = 500
GAUSSIAN_TARGETS: Final = 1000


@dataclass(frozen=True)
class ControlResult:
    """What the suite's best attack reached on a control, the limit, and whether it kept to it.

    identity, identity_rotated, faint: peek, at least 0.95. independent: peek, at most 0.05. gaussian: the error over
    the least possible one, from 0.90 to 1.10.
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
    """The raw records cross the cut, flattened, under a random rotation (Haar measure).

    Above 2,048 values a record they are put in a random order, and equal blocks of at most so many are rotated.
    """
    width = trial.truth[0].numel()
    blocks = -(-width // ROTATED_AT_ONCE)
    order_P = torch.randperm(width, generator=generator) if blocks > 1 else torch.arange(width)
    turns = [(block_Q, _rotation(len(block_Q), generator)) for block_Q in order_P.tensor_split(blocks)]

    def rotate(_: Tensor, records: Tensor) -> Tensor:
        records_NP = _flat(records)
        return torch.cat([records_NP[:, block_Q] @ rotation_QQ for block_Q, rotation_QQ in turns], dim=1)

    return _replaced(trial, rotate)


def _rotation(width: int, generator: torch.Generator) -> Tensor:
    gaussian_QQ = torch.randn(width, width, generator=generator, dtype=torch.float64)
    rotation_QQ, triangle_QQ = torch.linalg.qr(gaussian_QQ)
    evenly_QQ: Tensor = rotation_QQ * triangle_QQ.diagonal().sign()  # without it QR does not draw evenly
    return evenly_QQ


def faint(trial: Trial, generator: torch.Generator) -> Trial:
    """The raw records cross the cut, flattened, at a tiny scale, beside loud releases of *other* records.

    Who looks at all coordinates on one scale sees noise alone. The loud coordinates are those that move most, and so
    few of them that the door can be walked through: at most 512, and at most half of the known pairs that the records'
    values leave over (one at least), for a linear map is pinned down only by as many pairs as there are coordinates.
    With fewer pairs than a record has values the door may stay shut, and nothing can then be told of faint coordinates.
    """
    known_ND, known_NP = _flat(trial.view.known.activations), _flat(trial.view.known.records)
    count = min(LOUD_AT_MOST, max(1, (len(known_NP) - known_NP.shape[1]) // 2), known_ND.shape[1])
    spread_D, loud_L = _spread(known_ND).topk(count)
    loudness = spread_D.norm().item() / max(1, count) ** 0.5 or 1.0
    scale = FAINT_SCALE * loudness / (_spread(known_NP).square().mean().sqrt().item() or 1.0)

    def append(activations: Tensor, records: Tensor) -> Tensor:
        return torch.cat([_flat(activations)[:, loud_L], scale * _flat(records)], dim=1)

    return _replaced(independent(trial, generator), append)


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


def _flat(tensor: Tensor) -> Tensor:
    """(N, ...) -> (N, P) in float64; P may be 0."""
    flat_NP: Tensor = tensor.reshape(len(tensor), tensor.shape[1:].numel())
    return flat_NP.to(torch.float64)


def _spread(values_NP: Tensor) -> Tensor:
    """Standard deviation of each coordinate, (P,); P may be 0."""
    return (values_NP - values_NP.mean(0)).square().mean(0).sqrt()


def _replaced(trial: Trial, sent: Callable[[Tensor, Tensor], Tensor]) -> Trial:
    """The trial with what (activations, records) -> activations makes of each part, and nothing to ask for."""
    view = trial.view
    known, validation = (
        replace(pairs, activations=sent(pairs.activations, pairs.records), repeats=None)
        for pairs in (view.known, view.validation)
    )
    target = replace(view.target, activations=sent(view.target.activations, trial.truth), repeats=None)
    return replace(trial, view=View(known, validation, target, view.exposure))
