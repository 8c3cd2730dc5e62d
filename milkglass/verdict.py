"""Budgets, and what an audit says of them. A measure counts with the upper end of its interval."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal

from milkglass.errors import AuditError, nearest
from milkglass.leakage.estimate import Estimate

Verdict = Literal["within budget", "over budget", "inconclusive", "no budget set"]

RECONSTRUCTION_MEASURES: Final = ("peek", "match", "ssim", "psnr_db")
"""Of the best attack on the worst exposure. Higher = more leaks, in all of them."""
MATCHING: Final = "matching"
MEMBERSHIP_MEASURES: Final = ("membership.auc", "tpr@1%", "tpr@0.1%")
MEASURES: Final = (*RECONSTRUCTION_MEASURES, MATCHING, *MEMBERSHIP_MEASURES)
_ONE: Final = re.compile(r"\s*([A-Za-z][\w.@%-]*)\s*<=\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")


def parse_budget(text: str) -> Mapping[str, float]:
    """What "peek<=0.1, attribute.sex<=0.05, tpr@1%<=0.03" allows at most, by measure. Raises AuditError."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        match = _ONE.fullmatch(part)
        if match is None:
            raise AuditError(
                f"budget {part.strip()!r} is not understood; expected 'MEASURE<=NUMBER', such as 'peek<=0.3', "
                "several of them with commas between"
            )
        name, limit = match[1], float(match[2])
        if name not in MEASURES and not name.startswith("attribute."):
            raise AuditError(f"budget on {name!r}, which is no measure; {nearest(name, [*MEASURES, 'attribute.NAME'])}")
        most = 120.0 if name == "psnr_db" else 1.0
        if not 0.0 <= limit <= most:
            raise AuditError(f"budget {part.strip()!r}: {limit:g} is out of range; expected 0 to {most:g}")
        if name in limits:
            raise AuditError(f"budget {text!r}: {name} is there twice; expected each measure once")
        limits[name] = limit
    return MappingProxyType(limits)


def check_budget(budget: Mapping[str, float], measured: Sequence[str]) -> None:
    """Raise AuditError, with the nearest known name, if the budget names what this audit does not measure."""
    for name in budget:
        if name not in measured:
            raise AuditError(f"budget on {name!r}, which this audit does not measure; {nearest(name, measured)}")


def judge(measures: Mapping[str, Estimate], budget: Mapping[str, float] | None, *, sound: bool) -> Verdict:
    """Over the budget if the upper end of any measure is; never "within" where the attacks are not sound, or a measure
    in the budget could not be had.
    """
    if not sound:
        return "inconclusive"
    if budget is None:
        return "no budget set"
    found = {name: measures[name].high for name in budget if name in measures}
    if any(high > budget[name] for name, high in found.items()):
        return "over budget"
    return "within budget" if len(found) == len(budget) else "inconclusive"
