"""Who reduces which part of the vector in a round: the same at all members, who compute it from what all were told.

Parts are as large as a linear program over bandwidths says (`shares.py`); in robust mode each has two reducers, one
after the other in a ring that each round draws anew.
"""

from __future__ import annotations

import hashlib
import statistics
from dataclasses import dataclass
from typing import Final, final

from milkglass.collaboration.group import Group
from milkglass.collaboration.shares import sizes

_EQUAL: Final = 1.0
_WIDEST: Final = 1000.0
"""A bandwidth counts for so many medians at most, and one over that at least: it is only claimed."""


class RoundFailedError(Exception):
    """An averaging that came to nothing: try again. caught: peer ids that were seen to lie in it."""

    def __init__(self, why: str, caught: frozenset[bytes] = frozenset()) -> None:
        super().__init__(why)
        self.caught = caught


@final
@dataclass(frozen=True)
class Part:
    """A slice of the vector, start:stop, and the members who reduce it: one, or in robust mode two."""

    start: int
    stop: int
    reducers: tuple[int, ...]


def plan(group: Group, numbers: int, *, robust: bool) -> list[Part]:
    """Who reduces what, the same at all members: they compute it from what all were told."""
    able = [index for index, member in enumerate(group.members) if member.reachable]
    if not able or (robust and len(able) < 2):
        raise RoundFailedError("too few in the group can be reached")
    lengths = sizes(numbers, _bandwidths(group))
    if robust:  # who reduces with whom cannot be foreseen: two that conspire meet now and then, not always
        able.sort(key=lambda index: hashlib.sha256(group.round_id + group.members[index].peer_id).digest())
    parts, start = [], 0
    for place, index in enumerate(able):
        stop = start + lengths[index]
        if stop > start:
            second = (able[(place + 1) % len(able)],) if robust else ()
            parts.append(Part(start, stop, (index, *second)))
        start = stop
    return parts


def _bandwidths(group: Group) -> list[float]:
    """Of each member, in medians: 0 for who is not reachable, 1 where not measured."""
    measured = [member.bandwidth for member in group.members if member.reachable and member.bandwidth is not None]
    if not measured:
        return [_EQUAL if member.reachable else 0.0 for member in group.members]
    middle = statistics.median_low(measured)
    found = [(each.bandwidth or middle) / middle if each.reachable else 0.0 for each in group.members]
    return [min(max(each, 1 / _WIDEST), _WIDEST) if each else 0.0 for each in found]
