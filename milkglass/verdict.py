"""Budgets, and what an audit says of them. A measure counts with the upper end of its interval."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal

from milkglass.errors import AuditError, nearest
from milkglass.leakage.estimate import Estimate

Verdict = Literal["within budget", "over budget", "inconclusive", "no budget set"]

RECONSTRUCTION_MEASURES: Final = ("peek", "match", "ssim", "psnr_db")
"""Of the best attack on the worst exposure. Higher = more leaks, in all of them."""
MATCHING: Final = "matching"
MEMBERSHIP_MEASURES: Final = ("membership.auc", "tpr@1%", "tpr@0.1%")
BITS: Final = "bits"
"""What one release tells at most, by its certificate."""
MEASURES: Final = (*RECONSTRUCTION_MEASURES, MATCHING, *MEMBERSHIP_MEASURES, BITS)
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
        if not 0.0 <= limit <= _most(name):
            raise AuditError(f"budget {part.strip()!r}: {limit:g} is out of range; expected 0 to {_most(name):g}")
        if name in limits:
            raise AuditError(f"budget {text!r}: {name} is there twice; expected each measure once")
        limits[name] = limit
    return MappingProxyType(limits)


def _most(name: str) -> float:
    return {"psnr_db": 120.0, BITS: 1e6}.get(name, 1.0)


def check_budget(budget: Mapping[str, float], measured: Sequence[str]) -> None:
    """Raise AuditError, with the nearest known name, if the budget names what this audit does not measure."""
    for name, limit in budget.items():
        if not 0 <= limit <= _most(name):
            raise AuditError(f"budget {name}<={limit:g} is out of range; expected 0 to {_most(name):g}")
        if name not in measured:
            raise AuditError(f"budget on {name!r}, which this audit does not measure; {nearest(name, measured)}")


def judge(
    measures: Mapping[str, Estimate],
    budget: Mapping[str, float] | None,
    *,
    sound: bool,
    failed: Collection[str] = (),
) -> Verdict:
    """Over the budget if the upper end of any measure is.

    Never "within" where the attacks are not sound, or where a measure in the budget could not be had, is not a number,
    or has `failed` in one of the ways in which it was to be measured.
    """
    if not sound:
        return "inconclusive"
    if not budget:
        return "no budget set"
    if any(name in measures and measures[name].high > limit for name, limit in budget.items()):
        return "over budget"
    had = all(name in measures and measures[name].is_finite and name not in failed for name in budget)
    return "within budget" if had else "inconclusive"
