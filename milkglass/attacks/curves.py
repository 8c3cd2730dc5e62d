"""An attack curve: the same attack on ever more known pairs. An audit calls the attack on each `subview`."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from milkglass.errors import AuditError
from milkglass.transcript import MINIMUM_PAIRS, Pairs, View

FEWEST: Final = 50
MOST_COUNTS: Final = 6


def pair_counts(total: int) -> list[int]:
    """How many pairs a curve is measured at: from 50 to all, evenly on a log scale, at most 6, each at least twice the
    one before. All alone, where there are fewer than 100.
    """
    steps = min(MOST_COUNTS - 1, max(0, (total // FEWEST).bit_length() - 1))
    if not steps:
        return [total]
    return [round(FEWEST * (total / FEWEST) ** (step / steps)) for step in range(steps + 1)]


def subview(view: View, pairs: int) -> View:
    """The view of an attacker who knows only the first `pairs` of the known pairs; validation and target stay.

    Raises AuditError for fewer pairs than an audit needs, or more than there are.
    """
    if not MINIMUM_PAIRS <= pairs <= len(view.known):
        raise AuditError(
            f"subview: pairs = {pairs}; expected from {MINIMUM_PAIRS} to {len(view.known)}, all known ones"
        )
    known = view.known
    first = Pairs(
        known.activations[:pairs],
        known.records[:pairs],
        known.entitled[:pairs],
        labels=None if known.labels is None else known.labels[:pairs],
        attributes={name: column[:pairs] for name, column in known.attributes.items()},
        repeats=None if known.repeats is None else known.repeats[:, :pairs],
    )
    return replace(view, known=first)
