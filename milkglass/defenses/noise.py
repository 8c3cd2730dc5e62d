"""Fixed Gaussian noise on what leaves the client: the Gaussian mechanism (Dwork and Roth 2014) without its calibration.

By itself it promises nothing: the activations' norm is not bounded here, so training may grow it until the noise is
small beside it. The server never sees the numbers drawn: they come from the client's private key.
"""

from __future__ import annotations

import math
from typing import final

from torch import Tensor

from milkglass.defenses.base import Defense, NoiseStream
from milkglass.errors import RecipeError


@final
class Noise(Defense):
    """Adds normal noise of standard deviation `sigma` (in the activations' unit) to every coordinate sent."""

    def __init__(self, sigma: float) -> None:
        if not 0 < sigma < math.inf:
            raise RecipeError(f"noise: sigma is {sigma}; expected a positive number")
        self.sigma = sigma

    def __repr__(self) -> str:
        return f"Noise(sigma={self.sigma})"

    def describe(self) -> str:
        return f"Gaussian noise, sigma {self.sigma:g}"

    @property
    def random(self) -> bool:
        return True

    def release(self, z: Tensor, noise: NoiseStream) -> Tensor:
        return z + self.sigma * noise.gaussian_like(z, self.describe())
