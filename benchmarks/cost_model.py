"""What a step costs in seconds: computing, messages one after the other, and bytes. Fitted to measured steps.

    seconds = computing + rounds (P - 1) latency + bytes(P) 8 / (efficiency rate)

P ranks stand in a ring, as gloo has them. An all-reduce passes 2 (P - 1) messages one after the other, and a rank sends
2 (P - 1) / P times the vector. An all-gather passes P - 1, first of the sizes and then of the parts, and a rank sends
P - 1 times its part: so the parts of sparse gradients grow with P, and from some P on it is cheaper to send everything.
How many bytes there are was counted at one P, for each link: over a slow one each packet has its header. Computing is
taken as it was there; that it takes longer to add up more ranks' parts is not in it, nor are ranks that wait for the
slowest of many. All it says of other P is a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from scipy.optimize import nnls

from milkglass.charts import svg
from milkglass.figures import Chart, Points, chart, number

RANKS: Final = tuple(2**power for power in range(1, 11))
_MOST_RANKS: Final = 1 << 14
_LATENCY: Final = "latency"
_PER_RATE: Final = "1 / efficiency"


@dataclass(frozen=True)
class Steps:
    """How a method's steps go. computing: names of what is fitted, and how often a step has it.

    rounds: times (P - 1) messages, one after the other. sent: bytes that a rank's interface sent, at `ranks`. gathers:
    by all-gather.
    """

    computing: Mapping[str, float]
    rounds: float
    sent: float
    ranks: int
    gathers: bool = False

    def bytes_at(self, ranks: int) -> float:
        """What a rank sends with so many."""

        def scale(count: int) -> float:
            return count - 1 if self.gathers else 2 * (count - 1) / count

        return self.sent * scale(ranks) / scale(self.ranks)

    def amounts(self, ranks: int, rate: float) -> dict[str, float]:
        """What each fitted number is multiplied with. rate: bit/s."""
        return {
            **self.computing,
            _LATENCY: self.rounds * (ranks - 1),
            _PER_RATE: 8 * self.bytes_at(ranks) / rate,
        }


@dataclass(frozen=True)
class Model:
    """The fitted numbers by name, in seconds, and 1 / efficiency."""

    numbers: Mapping[str, float]

    def seconds(self, steps: Steps, ranks: int, rate: float) -> float:
        """Of a step."""
        return sum(self.numbers.get(name, 0.0) * amount for name, amount in steps.amounts(ranks, rate).items())

    @property
    def latency(self) -> float:
        """Seconds of a message, before its bytes."""
        return self.numbers[_LATENCY]

    @property
    def efficiency(self) -> float:
        """The share of a link's rate that bytes get."""
        return 1 / self.numbers[_PER_RATE]


def fit(measured: Sequence[tuple[Steps, float, float]]) -> Model:
    """Least squares of relative errors, no number below 0. measured: steps, the link's rate in bit/s, seconds."""
    rows = [steps.amounts(steps.ranks, rate) for steps, rate, _ in measured]
    names = sorted({name for row in rows for name in row})
    weighted = [
        [row.get(name, 0.0) / seconds for name in names] for row, (_, _, seconds) in zip(rows, measured, strict=True)
    ]
    found, _ = nnls(np.array(weighted), np.ones(len(rows)))
    return Model(dict(zip(names, found.tolist(), strict=True)))


def overtaken_at(model: Model, steps: Steps, dense: Steps, rate: float) -> int | None:
    """From how many ranks on a method is no faster than sending everything; None: not up to 16,384."""
    for ranks in range(2, _MOST_RANKS + 1):
        if model.seconds(steps, ranks, rate) >= model.seconds(dense, ranks, rate):
            return ranks
    return None


def picture(
    model: Model, methods: Mapping[str, Mapping[str, Steps]], rates: Mapping[str, float], dense: str, words: str
) -> str:
    """An SVG: for each link how many times as fast as `dense` each method steps, by ranks. words: below the charts."""
    drawn = []
    for link, rate in rates.items():
        whole = methods[link][dense]
        faster: dict[str, Points] = {}
        for name, steps in methods[link].items():
            if name != dense:
                faster[name] = [
                    (count, model.seconds(whole, count, rate) / model.seconds(steps, count, rate)) for count in RANKS
                ]
        drawn.append(_logarithmic(f"Prediction: steps over {link}", faster, dense))
    return svg(drawn, words)


def _logarithmic(title: str, faster: Mapping[str, Points], dense: str) -> Chart:
    """The chart of the logarithms to base 2, told in the numbers themselves."""
    logs = {name: [(count, math.log2(times)) for count, times in points] for name, points in faster.items()}
    made = chart(title, "times as fast as dense (log scale)", logs, across="ranks", log=True, level=(0.0, dense))
    assert made is not None
    lines = []
    for name, path, dots in made.lines:
        told = zip(dots, faster[name], strict=True)
        lines.append((name, path, tuple((x, y, f"{name}, {n:g} ranks: {number(t)}") for (x, y, _), (n, t) in told)))
    ends = (f"{name}: first {number(each[0][1])}, last {number(each[-1][1])}." for name, each in faster.items())
    return replace(
        made,
        words=f"Line chart of {title.lower()}, 2 to {RANKS[-1]:,} ranks, times as fast as dense. {' '.join(ends)}",
        y_ticks=tuple((y, _power_of_two(words)) for y, words in made.y_ticks),
        lines=tuple(lines),
    )


def _power_of_two(words: str) -> str:
    """What a tick of a logarithm stands for."""
    return f"1/{2 ** float(words[1:]):g}" if words.startswith("−") else f"{2 ** float(words):g}"
