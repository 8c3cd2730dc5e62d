"""How much of the vector each member reduces: hivemind's linear program over bandwidths, solved by hand.

A member of N with bandwidth b that reduces the share w of a vector sends, and receives, 1 + (N - 2) w vectors, which
takes (1 + (N - 2) w) / b. The program minimizes the longest of these times over shares that add up to 1 (DeDLOC:
Diskin et al. 2021, arXiv 2106.10207; hivemind's `load_balancing.py`). hivemind has scipy's interior point solve it,
which scipy is about to remove; where several solutions are best, which one it finds follows from each machine's own
linear algebra, and members who cut the vector differently cannot average. Here it is the same on all, in a few
divisions.
"""

from __future__ import annotations

from collections.abc import Sequence


def shares(bandwidths: Sequence[float]) -> list[float]:
    """Shares that add up to 1. bandwidths: in any unit; 0 for who reduces nothing. One of them is above 0."""
    able = [each for each in bandwidths if each > 0]
    beyond = len(bandwidths) - 2
    if beyond <= 0:
        return [each / sum(bandwidths) for each in bandwidths]
    least = 1 / min(able)  # what the slowest needs for its own vector, if it reduces nothing
    slack = [max(least * each - 1, 0.0) / beyond for each in bandwidths]
    if sum(slack) >= 1:  # the others can do it all in that time
        return [each / sum(slack) for each in slack]
    longest = (beyond + len(able)) / sum(able)
    return [max(longest * each - 1, 0.0) / beyond for each in bandwidths]


def seconds(bandwidths: Sequence[float], parts: Sequence[float]) -> float:
    """How long the slowest takes for a vector of 1, with those shares of it."""
    beyond = len(bandwidths) - 2
    return max((1 + beyond * part) / each for each, part in zip(bandwidths, parts, strict=True) if each > 0)


def sizes(numbers: int, bandwidths: Sequence[float]) -> list[int]:
    """Shares of a vector in whole numbers, which add up to `numbers`."""
    found, taken, upto = [], 0, 0.0
    parts = shares(bandwidths)
    for part in parts:
        upto += part
        end = min(round(upto * numbers), numbers)
        found.append(end - taken)
        taken = end
    last = max(range(len(parts)), key=lambda index: parts[index])
    found[last] += numbers - taken
    return found
