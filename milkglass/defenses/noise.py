"""Fixed noise on what leaves the client: the Gaussian and the Laplace mechanism (Dwork and Roth 2014, sections 3.3 and
A) without their calibration.

By itself it promises nothing: the activations' norm is not bounded here, so training may grow it until the noise is
small beside it. Gaussian noise behind a clip is what `certificate.py` speaks of. The server never sees the numbers
drawn: they come from the client's private key. Do-nothing twin: leave it out.

Legend: B records in a batch.

Floating-point noise can betray what it hides by its last bits (Mironov, CCS 2012; Jin et al., arXiv 2112.05307): some
sums can come of some values alone. So the sum is computed in float64 and rounded to a grid of sigma / 2^12 that does
not depend on the record: what can be sent for one can be sent for any. Left as it is: tails end (the Gaussian at 8.6
sigma, Laplace further out), and how long it takes is not hidden.
"""

from __future__ import annotations

import math
from typing import Final, Literal, final

import torch
from torch import Tensor

from milkglass.defenses.base import Defense, NoiseSource, check_carried
from milkglass.errors import RecipeError, nearest

Kind = Literal["gaussian", "laplace"]
KINDS: Final = ("gaussian", "laplace")
GRID: Final = 2.0**12
"""Releases are multiples of sigma over this, rounded down to a power of two: float32 holds them exactly."""


def unit_noise(z: Tensor, kind: Kind, noise: NoiseSource, purpose: str, dtype: torch.dtype | None = None) -> Tensor:
    """Noise of mean 0 and variance 1 in the shape of `z` (B, ...) and its dtype or another; `purpose`: what for."""
    draw = noise.gaussian_like if kind == "gaussian" else noise.laplace_like
    return draw(z, purpose, dtype)


def noisy(z: Tensor, sigma: float, kind: Kind, noise: NoiseSource, purpose: str) -> Tensor:
    """`z` (B, ...) plus noise of standard deviation `sigma`, on the grid; the gradient is that of `z`."""
    drawn = unit_noise(z, kind, noise, purpose, torch.float64)
    with torch.no_grad():
        step = 2.0 ** math.floor(math.log2(sigma / GRID))
        summed = ((z.double() + sigma * drawn) / step).round_() * step
    return summed.to(z.dtype) + (z - z.detach())  # plus 0: the noisy values exactly, with a gradient


def check_kind(kind: str, where: str) -> None:
    """Raise RecipeError, which begins with `where`, for a kind that is not known."""
    if kind not in KINDS:
        raise RecipeError(f"{where}: kind {kind!r} is not known; {nearest(kind, KINDS)}")


@final
class Noise(Defense):
    """Adds noise of standard deviation `sigma` (in the activations' unit) to every coordinate sent.

    kind: "gaussian" or "laplace"; Laplace's scale parameter is then sigma / sqrt(2).
    """

    def __init__(self, sigma: float, kind: Kind = "gaussian") -> None:
        check_carried("noise: sigma", sigma)
        check_kind(kind, "noise")
        self.sigma = sigma
        self.kind: Kind = kind

    def __repr__(self) -> str:
        return f"Noise(sigma={self.sigma}, kind={self.kind!r})"

    def describe(self) -> str:
        return f"{self.kind.capitalize()} noise, sigma {self.sigma:g}"

    @property
    def random(self) -> bool:
        return True

    @property
    def noise_sigma(self) -> float:
        return self.sigma

    def release(self, z: Tensor, noise: NoiseSource) -> Tensor:
        return noisy(z, self.sigma, self.kind, noise, repr(self))
