"""A measured value and its 95 % interval: what every measure here gives."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A measured value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_finite(self) -> bool:
        """Whether value and ends are all numbers."""
        return all(map(math.isfinite, (self.value, self.low, self.high)))

    def to_dict(self) -> dict[str, float]:
        """As in audit.json."""
        return {"value": self.value, "low": self.low, "high": self.high}
