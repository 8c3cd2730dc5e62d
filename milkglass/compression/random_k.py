"""Random numbers of a vector, whatever they are: random-k (Stich, Cordonnier, Jaggi 2018, arXiv 1809.07599).

They are sent as they are, not scaled by D/K: error feedback brings what is left, and a scaled one would not contract.

Legend: D numbers of a vector, K of them sent.
"""

from __future__ import annotations

from typing import Final, final

import torch
from torch import Tensor

from milkglass.compression.vector import Selected, Selector, add, check_density, count_of, squares

_SHUFFLE: Final = 4  # from one number in four on, shuffling all of them is cheaper


@final
class RandomK(Selector):
    """Sends max(1, int(`density` * D)) numbers; each set of so many is equally likely.

    generator: on any device; each call draws from it. With the same state at every rank, all send the same places.
    """

    def __init__(self, density: float, generator: torch.Generator) -> None:
        self.density = check_density(density)
        self._generator = generator

    def __repr__(self) -> str:
        return f"RandomK(density={self.density})"

    def describe(self) -> str:
        return f"random-k, density {self.density:g}"

    def _select(self, u_D: Tensor, plus_D: Tensor | None, hint: float | None) -> Selected:  # noqa: ARG002
        add(u_D, plus_D)
        places_K = _subset(len(u_D), count_of(self.density, len(u_D)), self._generator)
        return Selected(places_K.to(u_D.device), squares(u_D))


def _subset(length: int, count: int, generator: torch.Generator) -> Tensor:
    """So many different numbers (K,) below `length`, in order, in time that follows `count`."""
    if _SHUFFLE * count >= length:
        return torch.randperm(length, generator=generator, device=generator.device)[:count].sort().values
    drawn = torch.empty(0, dtype=torch.int64, device=generator.device)
    while len(drawn) < count:
        more = torch.randint(length, (count - len(drawn) + 16,), generator=generator, device=generator.device)
        drawn = torch.unique(torch.cat([drawn, more]))
    kept = torch.randperm(len(drawn), generator=generator, device=generator.device)[:count]
    return drawn[kept.sort().values]
