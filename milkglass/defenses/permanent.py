"""One release per record, kept and used again: noise that follows from the record, not from the moment.

After RAPPOR's permanent randomized response (Erlingsson, Pihur and Korolova, CCS 2014, arXiv 1407.6981, section 3.1),
which memoizes its first answer. Where we differ: nothing is stored. The noise of a record follows from the client's
key, from its stage's weights and from the record's bytes, so whoever asks a hundred times sees one release.

What it does not do: a record that differs in one value is another record, with noise of its own. And activations may
differ in their last bits where a record is computed beside others; releases are rounded to a grid (`noise.py`), so that
these differences stay below what is sent but for one value in some thousands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from milkglass.defenses.base import content_digest
from milkglass.randomness import Source


@final
class PermanentNoise:
    """The noise of one release of records `x` (B, ...), row by row. weights: a digest of what they pass through."""

    def __init__(self, source: Source, weights: str, x: Tensor) -> None:
        # + 0.0 makes 0 of -0: they are one value to the stage
        self._rows = [
            source.derive("permanent", weights, x.dtype, tuple(row.shape), content_digest(row + 0.0)) for row in x
        ]
        self._draws = 0

    def gaussian_like(self, z: Tensor, purpose: str, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers in the shape of `z` (B, ...): the same for the same record."""
        return self._drawn(z, purpose, lambda row: row.gaussian(z.shape[1:], 0, dtype or z.dtype))

    def laplace_like(self, z: Tensor, purpose: str, dtype: torch.dtype | None = None) -> Tensor:
        """Laplace numbers of variance 1, as above."""
        return self._drawn(z, purpose, lambda row: row.laplace(z.shape[1:], 0, dtype or z.dtype))

    def _drawn(self, z: Tensor, purpose: str, draw: Callable[[Source], Tensor]) -> Tensor:
        bound = [row.derive(self._draws, purpose, tuple(z.shape[1:])) for row in self._rows]
        self._draws += 1
        return torch.stack([draw(row) for row in bound])
