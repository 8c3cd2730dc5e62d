"""Clipping: a bound on how long what is sent for a record can be (as in DP-SGD: Abadi et al. 2016, arXiv 1607.00133,
section 3.1, there of gradients; here of activations).

By itself it hides nothing. With Gaussian noise behind it, it is what the noise is measured against: see
`certificate.py`. Its do-nothing twin is a clip that nothing reaches.

Legend: B records in a batch, D values a record.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from milkglass.defenses.base import Defense
from milkglass.errors import RecipeError


def clip_norm(z: Tensor, clip: float) -> Tensor:
    """`z` (B, ...) with each record's values scaled down to a Euclidean norm of at most `clip`."""
    norm_B1 = torch.linalg.vector_norm(z.flatten(1), dim=1, keepdim=True)
    # a hair below: float32 would round some norms above the clip that a certificate promises
    factor_B1 = (clip * (1 - 1e-5) / norm_B1.clamp_min(1e-12)).clamp_max(1.0)
    clipped: Tensor = z.flatten(1) * factor_B1
    return clipped.reshape(z.shape)


@final
class Clipping(Defense):
    """What is sent for a record has a Euclidean norm of at most `clip`, in the activations' unit."""

    def __init__(self, clip: float) -> None:
        if not 0 < clip < math.inf:
            raise RecipeError(f"clipping: clip is {clip}; expected a positive number")
        self.clip = clip

    def __repr__(self) -> str:
        return f"Clipping(clip={self.clip})"

    def describe(self) -> str:
        return f"norm clipped to {self.clip:g}"

    def transform(self, z: Tensor) -> Tensor:
        return clip_norm(z, self.clip)
