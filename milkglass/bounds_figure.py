"""bounds.svg: gap, bounds and attacks against the number of training records. The look: `charts.svg.jinja`.

Made from what bounds.json holds under `sizes`. The picture stands alone, brings its own paper, follows a dark screen,
has no script and fetches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from milkglass.charts import svg
from milkglass.figures import Points, chart

_WORDS: Final = "Bounds are lower bounds: what some attacker surely can do. A small gap does not certify privacy."


def picture(sizes: Sequence[Mapping[str, Any]]) -> str:
    """The two charts side by side: the gaps, and what they prove beside what attacks reach."""

    def series(kind: str, name: str, only: str | None = None) -> dict[str, Points]:
        lines: dict[str, list[tuple[float, float]]] = {}
        for size in sizes:
            for row in size[kind]:
                if only is None or row["measure"] == only:
                    lines.setdefault(row[name], []).append((size["records"], row["value"]))
        return dict(lines)

    across = "training records"
    bounds = {f"bound: {name}": points for name, points in series("bounds", "name").items()}
    attacks = {f"attack: {name}": points for name, points in series("attacks", "attack", "balanced accuracy").items()}
    gaps = {"Brier score": series("gaps", "loss")["Brier score"]}  # the other loss is clipped elsewhere at each size
    drawn = [
        chart("Generalization gap", "loss of others less loss of members", gaps, across=across, log=True),
        chart(
            "Members told from others",
            "share of fair coins; .5 = a coin toss",
            attacks | bounds,
            across=across,
            log=True,
            foot=0.5,
        ),
    ]
    return svg([each for each in drawn if each is not None], _WORDS)
