"""What a peer's claim of records may count for: no claim above so many times the typical one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final

from milkglass.errors import RecipeError

ROBUST_CAP: Final = 2.0
"""In medians, in robust mode: nearly a third of liars have less than half of the weight, whatever they claim."""


def cap_weights(weights_N: Sequence[float], cap: float) -> list[float]:
    """Claims of sample counts, in order, none above `cap` times the (lower) median of the positive ones.

    Nobody can check a claim: the cap bounds what one is worth. Negative and non-finite claims count as 0, and zeros as
    no claim; all zeros stay zeros. Where a share d of the positive claims are lies, they have at most the share
    cap d / (cap d + 1 - d) of the weight if the honest claims are alike. A robust mean needs that below half:
    cap < (1 - d) / d, so 4 stands a fifth of liars, barely, and 2 a third. Raises RecipeError for a cap below 1.
    """
    if not cap >= 1:
        raise RecipeError(f"cap of weights: {cap}; expected 1 or more, in medians")
    claims = [float(weight) if 0 < weight < math.inf else 0.0 for weight in weights_N]
    positive = [claim for claim in claims if claim]
    if not positive:
        return claims
    most = cap * statistics.median_low(positive)
    return [min(claim, most) for claim in claims]
