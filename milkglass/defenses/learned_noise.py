"""Noise whose scale is learned for each value that is sent, in the manner of Shredder (Mireshghallah, Taram,
Ramrakhyani, Jalali, Tullsen and Esmaeilzadeh, ASPLOS 2020, arXiv 1905.11814).

Legend: B records in a batch; `...` the shape of what is sent for one record, D values in all.

The client's loss gets, for each value, the most that its noise lets through, were it sent alone with Gaussian noise:
1/2 log(1 + S / s^2) nats, S the variance of the activation over the batch, s the learned scale. Training thus makes
noise loud where the task does not mind it. What is sent has the variance S + s^2, so the penalty is read off it, and
it cannot run away: it is never below 0, and its pull on a scale fades once noise is loud. Louder activations, which
would buy the same accuracy at the same noise, are charged as much as quieter noise.

Where we differ from Shredder (known from its abstract, from a later public training file, and in part recalled): it
freezes a trained network and, many times over, fits one whole noise tensor to it, that is used for all records, with a
reward for loud noise; a release then adds a draw from what was collected or from distributions fitted to it. Here
scales alone are learned, together with both stages of the network (or with nothing else, where those are frozen), and
each release draws afresh. So there is no file of noise tensors that whoever steals it could subtract. Their reward has
no bound and knows no activations; ours is the ratio.

By itself it promises nothing: the activations' norm is not bounded here. Audit what it leaves. With a weight of 0 the
task alone sets the scales, and makes noise small; the do-nothing twin is to leave it out.
"""

from __future__ import annotations

import math
from typing import Final, final

import torch
from torch import Tensor, nn

from milkglass.defenses.base import Defense, NoiseSource
from milkglass.defenses.noise import Kind, check_kind, unit_noise
from milkglass.errors import MilkglassError, RecipeError

SPEED: Final = 10.0
"""A scale is exp(SPEED * what the optimizer sees). Adam at 0.001 then moves a scale by up to 1 % a step: noise finds
its size in an epoch or two, as weights do; without it, where it starts would be where it stays."""


@final
class LearnedNoise(Defense):
    """Adds noise of a learned standard deviation to each value sent, and rewards it.

    weight: of the penalty, the mean over values of 1/2 log(1 + signal-to-noise), in nats. start: the scale that all
    values begin with, in the activations' unit. kind: "gaussian" or "laplace", of the same standard deviation.
    """

    def __init__(self, weight: float = 0.1, start: float = 0.1, kind: Kind = "gaussian") -> None:
        if not 0 <= weight < math.inf:
            raise RecipeError(f"learned noise: weight is {weight}; expected a number from 0 on")
        if not 0 < start < math.inf:
            raise RecipeError(f"learned noise: start is {start}; expected a positive number")
        check_kind(kind, "learned noise")
        self.weight = weight
        self.start = start
        self.kind: Kind = kind
        self._end: Scales | None = None

    def __repr__(self) -> str:
        return f"LearnedNoise(weight={self.weight}, start={self.start}, kind={self.kind!r})"

    def describe(self) -> str:
        return f"learned {self.kind.capitalize()} noise, weight {self.weight:g}, start {self.start:g}"

    @property
    def random(self) -> bool:
        return True

    @property
    def noise_sigma(self) -> float:
        """Root mean square of the present scales; 0 before there is an end of the stage."""
        if self._end is None:
            return 0.0
        return float(self._end.scales().detach().double().square().mean().sqrt())

    def client_end(self, cut_shape: tuple[int, ...]) -> nn.Module | None:
        self._end = Scales(cut_shape, self.start)
        return self._end

    def release(self, z: Tensor, noise: NoiseSource) -> Tensor:
        return z + self._scales(z) * unit_noise(z, self.kind, noise, self.describe())

    def penalty(self, x: Tensor, z: Tensor, y_B: Tensor | None = None) -> Tensor | None:  # noqa: ARG002
        if self.weight == 0:
            return None
        return self.weight * nats_per_value(z, self._scales(z))

    def _scales(self, z: Tensor) -> Tensor:
        if self._end is None:
            raise MilkglassError("learned noise: its scales are not in the client's stage; expected client_end first")
        scales = self._end.scales()
        if z.shape[1:] != scales.shape:
            raise RecipeError(
                f"learned noise: activations of shape {tuple(z.shape[1:])} a record; expected {tuple(scales.shape)}"
            )
        return scales


def nats_per_value(z: Tensor, scales: Tensor) -> Tensor:
    """1/2 log(1 + signal-to-noise) of values sent `z` (B, ...), noise of `scales` (...) in them: the mean over values.

    A scalar, 0 or more; lower = more private. The gradient reaches the scales through the noise in `z`, too.
    """
    sent = z.var(dim=0, correction=0)
    return 0.5 * (sent / scales.square()).clamp_min(1.0).log().mean()  # below 1: by chance alone


@final
class Scales(nn.Module):
    """Passes activations (B, ...) on as they are, and holds the scale of each value's noise."""

    def __init__(self, cut_shape: tuple[int, ...], start: float) -> None:
        super().__init__()
        self.exponents = nn.Parameter(torch.full(cut_shape, math.log(start) / SPEED))

    def scales(self) -> Tensor:
        """Standard deviations (...), in the activations' unit."""
        return (SPEED * self.exponents).exp()

    def forward(self, z: Tensor) -> Tensor:
        return z
