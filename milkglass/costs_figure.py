"""The formulas of `costs.py` as curves over the number of clients, with counted bytes on top. Both axes logarithmic.

The look: `charts.svg.jinja`, by `charts.svg`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from milkglass.costs import WAYS, Scale, break_even_clients, federated
from milkglass.errors import RecipeError, nearest
from milkglass.figures import LEFT, RIGHT, Chart, Points, chart

FEWEST, MOST = 2, 1000
"""Clients that a chart spans."""
_POINTS: Final = 60  # more than figures.MOST_DOTS: a formula is a line, what was counted has dots
_MARKS: Final = (2, 10, 50, 200, 1000)
_FORMULA_LINES: Final = 3  # beside as many counted ones: a chart has six colours
_UNIT: Final = "per client and epoch (log scale)"


def formula_charts(scale: Scale, measured: Mapping[str, Points] | None = None) -> list[Chart]:
    """Bytes of a client and epoch against K, 2 to 1,000, for each way; then the counted ways beside their formulas.

    scale: of the user's training; its K is not read. measured: way of `costs.WAYS` -> points (K, bytes counted of a
    client and epoch, above 0). The first chart marks K* = pq/N, above which split training sends less than a federated
    round, where it lies on the axis; its words say it in any case. Raises RecipeError for a way that is not known, or
    a point off the axis.
    """
    curves = {name: _curve(scale, name) for name in WAYS}
    even = break_even_clients(scale)
    told = f"Split and federated are even at K* = pq/N = {even:,.4g} clients"
    if FEWEST <= even <= MOST:
        foot = min(y for points in curves.values() for _, y in points)
        both = federated(scale).total_bytes
        curves[f"even at {even:,.4g} clients"] = [(even, foot), (even, both)]
        told += "."
    else:
        told += ", which is not on the axis."
    charts = [_logarithmic("Bytes by formula", curves, told)]
    counted = {name: points for name, points in (measured or {}).items() if points}
    for name, points in counted.items():
        _check(name, points)
    names = list(counted)
    for first in range(0, len(names), _FORMULA_LINES):
        beside: dict[str, Points] = {}
        for name in names[first : first + _FORMULA_LINES]:
            beside |= {f"formula: {name}": _curve(scale, name), f"counted: {name}": counted[name]}
        charts.append(_logarithmic("Bytes counted beside formula", beside, ""))
    return charts


def bytes_in_words(amount: float) -> str:
    """Two digits and a unit: 1.2 kB is 1,200 bytes."""
    power = min(5, max(0, math.floor(math.log10(amount) / 3))) if amount > 0 else 0
    unit = ("B", "kB", "MB", "GB", "TB", "PB")[power]
    return f"{float(f'{amount / 1000**power:.2g}'):g} {unit}"


def _curve(scale: Scale, name: str) -> list[tuple[float, float]]:
    """Large-batch training needs a step an epoch: where K B > p, the formula's part of one is drawn all the same."""
    steps = [FEWEST * (MOST / FEWEST) ** (index / (_POINTS - 1)) for index in range(_POINTS)]
    return [(count, WAYS[name](replace(scale, clients=count)).total_bytes) for count in steps]


def _check(name: str, points: Points) -> None:
    if name not in WAYS:
        raise RecipeError(f"measured {name!r} is no way that has a formula; {nearest(name, WAYS)}")
    for count, amount in points:
        if not (FEWEST <= count <= MOST and 0 < amount < math.inf):
            raise RecipeError(
                f"measured {name!r}: {amount:g} bytes of {count:g} clients; expected more than 0, of {FEWEST} to {MOST}"
            )


def _logarithmic(title: str, series: Mapping[str, Points], more: str) -> Chart:
    """The chart of the logarithms to base 10, told in bytes."""
    logs = {name: [(count, math.log10(y)) for count, y in points] for name, points in series.items()}
    foot = math.floor(min(y for points in logs.values() for _, y in points))
    made = chart(title, _UNIT, logs, across="clients", log=True, foot=foot)
    assert made is not None  # every y is finite
    lines = []
    for name, path, dots in made.lines:
        words = zip(dots, series[name], strict=False)  # a line of many points has no dots
        lines.append((name, path, tuple((x, y, f"{name}, {n:g} clients: {bytes_in_words(b)}") for (x, y, _), (n, b)
                                        in words)))  # fmt: skip
    ends = (f"{n}: first {bytes_in_words(p[0][1])}, last {bytes_in_words(p[-1][1])}." for n, p in series.items())
    span = math.log(MOST / FEWEST)
    return replace(
        made,
        words=f"Line chart of {title.lower()}, {_UNIT}, {FEWEST} to {MOST:,} clients. {' '.join(ends)} {more}".strip(),
        x_ticks=tuple((round(LEFT + math.log(k / FEWEST) / span * (RIGHT - LEFT), 1), f"{k:,}") for k in _MARKS),
        y_ticks=tuple((y, bytes_in_words(10 ** float(words.replace("−", "-")))) for y, words in made.y_ticks),
        lines=tuple(lines),
    )
