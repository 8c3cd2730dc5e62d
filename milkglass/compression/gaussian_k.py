"""Gaussian-k: a threshold from the moments of a bell curve in place of a search (Shi et al. 2019, arXiv 1911.08772).

`PublishedGaussianK` is theirs, to compare with. What breaks it: it tries three thresholds and sends what the last one
lets through, wanted or not. Uniform numbers end at nothing. What error feedback leaves over is no bell curve (its tails
are what was sent), and counts run away within a few steps: to 13 times what was asked in one of ours. The mean is added
to the threshold of absolute values, so that a mean that is not small counts twice.

`GaussianK` keeps the idea, a threshold that costs no search, as a guess, and checks it. Its unit is the root of the
mean square, which holds the mean too: a mean that is not small makes the first guess too high, and that is noticed.
After the first step the guess is the threshold of the step before in that unit, moved a little toward the wanted count.
A guess that lets through what is not within a third of the wanted count, for whatever reason, is given up, and the
numbers are chosen exactly: among what it found, or among the blocks with the largest values (`peaks.py`). So a guess
can be slow, but not wrong.

Legend: D numbers of a vector, K of them sent.
"""

from __future__ import annotations

import math
from typing import Final, final

import torch
from scipy.special import ndtri
from torch import Tensor

from milkglass.compression.peaks import SHORT_EXACT, Peaks, largest, pays
from milkglass.compression.vector import Selected, Selector, add, check_density, count_of, squares

_MASKS: Final = 3
_MOST_BLOCKS: Final = 4  # for each number wanted: what a guess that is far too low may cost in memory
_STEP: Final = 0.015  # 0.1 fits a bell curve; what is left over ends more steeply, and there it overshoots


@final
class GaussianK(Selector):
    """Sends about max(1, int(`density` * D)) numbers, those above a threshold.

    Their count is always from 2/3 to 4/3 of that, and less only where others are zero; a zero is never sent. The hint
    is a threshold over the root of the mean square. Short vectors and densities above 1/32: exact top-k.
    """

    def __init__(self, density: float) -> None:
        self.density = check_density(density)
        self._first = _quantile(density)

    def __repr__(self) -> str:
        return f"GaussianK(density={self.density})"

    def describe(self) -> str:
        return f"Gaussian-k, density {self.density:g}"

    def _select(self, u_D: Tensor, plus_D: Tensor | None, hint: float | None) -> Selected:
        count = count_of(self.density, len(u_D))
        if not pays(u_D, count):
            return Selected(*largest(u_D, plus_D, count))
        if hint is None and len(u_D) < SHORT_EXACT:  # a first guess is seldom right, and a second look costs more there
            indexes_C, before = largest(u_D, plus_D, count)
            return Selected(indexes_C, before, _in_unit(u_D[indexes_C].abs(), before, len(u_D)))
        peaks = Peaks(u_D, plus_D)
        guess = hint if hint is not None and 0 < hint < math.inf else self._first
        unit = math.sqrt(peaks.before / len(u_D))
        found = peaks.above(guess * unit, _MOST_BLOCKS * count)
        passed = 0 if found is None else len(found.indexes_C)
        if found is None or too_few(passed, count):
            found = peaks.largest(count)
        elif too_many(passed, count):
            found = found.largest(count)
        else:
            return Selected(found.indexes_C, peaks.before, guess * (passed / count) ** _STEP)
        return Selected(found.indexes_C, peaks.before, _in_unit(found.sizes_C, peaks.before, len(u_D)))


@final
class PublishedGaussianK(Selector):
    """Sends what the last of at most three thresholds lets through: it may be nothing, and it may be far too much.

    The standard deviation is that of the numbers, not an estimate of one from a sample (D in place of D - 1).
    """

    def __init__(self, density: float) -> None:
        self.density = check_density(density)
        self._first = _quantile(density)

    def __repr__(self) -> str:
        return f"PublishedGaussianK(density={self.density})"

    def describe(self) -> str:
        return f"Gaussian-k as published, density {self.density:g}"

    def _select(self, u_D: Tensor, plus_D: Tensor | None, hint: float | None) -> Selected:  # noqa: ARG002
        add(u_D, plus_D)
        count = count_of(self.density, len(u_D))
        std, mean = torch.std_mean(u_D, correction=0)
        threshold, sizes_D = float(mean) + float(std) * self._first, u_D.abs()
        for _ in range(_MASKS):
            mask_D = sizes_D > threshold
            passed = int(mask_D.count_nonzero())
            if too_few(passed, count):
                threshold *= 0.5
            elif too_many(passed, count):
                threshold *= 1.5
            else:
                break
        return Selected(mask_D.nonzero().squeeze(1), squares(u_D))


def _in_unit(sizes_C: Tensor, before: float, length: int) -> float | None:
    """The smallest that is sent, over the root of the mean square: the next guess. None where nothing is to be said."""
    unit = math.sqrt(before / length)
    return float(sizes_C.min()) / unit if len(sizes_C) and 0 < unit < math.inf else None


def _quantile(density: float) -> float:
    """What a standard normal number's absolute value is above with this probability: 3.29 for .001."""
    return -float(ndtri(density / 2))


def too_few(passed: int, count: int) -> bool:
    """Fewer than 2/3 of the count wanted."""
    return 3 * passed < 2 * count


def too_many(passed: int, count: int) -> bool:
    """More than 4/3 of the count wanted."""
    return 3 * passed > 4 * count
