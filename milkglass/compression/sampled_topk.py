"""About the k largest numbers by a threshold from a sample: deep gradient compression (Lin et al. 2018, arXiv
1712.01887), without its momentum correction and warm-up, which are `error_feedback.py` and the density's own.

Where we differ: a sample of one in a hundred is too small for short vectors and low densities. Ours is so large that at
least 64 of it are expected above the threshold, so that the count's standard deviation is 1/8 of it or less. The
density is applied to the sample, not the count k itself, which is another method.

Legend: D numbers of a vector, S of them in the sample.
"""

from __future__ import annotations

import math
from typing import Final, final

import torch
from torch import Tensor

from milkglass.compression.gaussian_k import too_many
from milkglass.compression.peaks import Peaks, largest, pays
from milkglass.compression.vector import Selected, Selector, check_density, count_of

_SHARE: Final = 0.01
_EXPECTED: Final = 64
_MOST_BLOCKS: Final = 4


@final
class SampledTopK(Selector):
    """Sends about `density` * D numbers: those not smaller than the `density` * S-th of a random sample.

    Where over 4/3 of max(1, int(`density` * D)) pass, exact top-k among those; where few pass, few are sent. A zero is
    never sent. generator: on any device; each call draws from it.
    """

    def __init__(self, density: float, generator: torch.Generator) -> None:
        self.density = check_density(density)
        self._generator = generator

    def __repr__(self) -> str:
        return f"SampledTopK(density={self.density})"

    def describe(self) -> str:
        return f"top-k by a sample (DGC), density {self.density:g}"

    def _select(self, u_D: Tensor, plus_D: Tensor | None, hint: float | None) -> Selected:  # noqa: ARG002
        count = count_of(self.density, len(u_D))
        if count < _EXPECTED or not pays(u_D, count):
            return Selected(*largest(u_D, plus_D, count))
        peaks, draws = Peaks(u_D, plus_D), self._generator
        size = max(math.ceil(_SHARE * len(u_D)), math.ceil(_EXPECTED / self.density))
        places_S = torch.randint(len(u_D), (size,), generator=draws, device=draws.device).to(u_D.device)
        sizes_S = u_D[places_S].abs_()
        threshold = float(sizes_S.topk(round(self.density * size), sorted=False).values.min())
        found = peaks.above(threshold, _MOST_BLOCKS * count)
        if found is None:
            found = peaks.largest(count)
        elif too_many(len(found.indexes_C), count):
            found = found.largest(count)
        return Selected(found.indexes_C, peaks.before)
