"""Fixed noise on what leaves the client: the Gaussian and the Laplace mechanism (Dwork and Roth 2014, sections 3.3 and
A) without their calibration.

By itself it promises nothing: the activations' norm is not bounded here, so training may grow it until the noise is
small beside it. Gaussian noise behind a clip is what `certificate.py` speaks of. The server never sees the numbers
drawn: they come from the client's private key. Do-nothing twin: leave it out.

Legend: B records in a batch.

Known and left alone: it is added in float32, and last bits of a sum of floats can betray what noise hides (Mironov, CCS
2012). `channel.py` rounds them away.
"""

from __future__ import annotations

import math
from typing import Final, Literal, final

from torch import Tensor

from milkglass.defenses.base import Defense, NoiseSource
from milkglass.errors import RecipeError, nearest

Kind = Literal["gaussian", "laplace"]
KINDS: Final = ("gaussian", "laplace")


def unit_noise(z: Tensor, kind: Kind, noise: NoiseSource, purpose: str) -> Tensor:
    """Noise of mean 0 and variance 1 in the shape of `z` (B, ...); `purpose` names what for."""
    return noise.gaussian_like(z, purpose) if kind == "gaussian" else noise.laplace_like(z, purpose)


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
        if not 0 < sigma < math.inf:
            raise RecipeError(f"noise: sigma is {sigma}; expected a positive number")
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
        return z + self.sigma * unit_noise(z, self.kind, noise, self.describe())
