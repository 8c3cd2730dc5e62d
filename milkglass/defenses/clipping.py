"""Clipping: a bound on how long what is sent for a record can be (as in DP-SGD: Abadi et al. 2016, arXiv 1607.00133,
section 3.1, there of gradients; here of activations).

By itself it hides nothing. With Gaussian noise behind it, it is what the noise is measured against: see
`certificate.py`. Its do-nothing twin is a clip that nothing reaches.

Legend: B records in a batch, D values a record.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from milkglass.defenses.base import Defense, check_carried


def clip_norm(z: Tensor, clip: float) -> Tensor:
    """`z` (B, ...) with each record's values scaled down to a Euclidean norm of at most `clip`."""
    flat_BD = z.flatten(1)
    norm_B1 = torch.linalg.vector_norm(flat_BD, dim=1, keepdim=True, dtype=torch.float64)
    # a hair below: values are rounded to their own type again, and the norm must stay within what is promised
    hair = 4 * torch.finfo(z.dtype).eps
    factor_B1 = (clip * (1 - hair) / norm_B1.clamp_min(1e-30)).clamp_max(1.0)
    return torch.where(factor_B1 < 1, (flat_BD * factor_B1).to(z.dtype), flat_BD).reshape(z.shape)


@final
class Clipping(Defense):
    """What is sent for a record has a Euclidean norm of at most `clip`, in the activations' unit."""

    def __init__(self, clip: float) -> None:
        check_carried("clipping: clip", clip)
        self.clip = clip

    def __repr__(self) -> str:
        return f"Clipping(clip={self.clip})"

    def describe(self) -> str:
        return f"norm clipped to {self.clip:g}"

    def transform(self, z: Tensor) -> Tensor:
        return clip_norm(z, self.clip)
