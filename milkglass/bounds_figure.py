"""bounds.svg: gap, bounds and attacks against the number of training records. Words and look: `bounds.svg.jinja`.

Made from what bounds.json holds under `sizes`. The picture stands alone, brings its own paper, follows a dark screen,
has no script and fetches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, Final

from jinja2 import Environment, StrictUndefined, Template

from milkglass.figures import BOTTOM, LEFT, RIGHT, WIDTH, Points, chart

APART: Final = 40.0  # SVG units between the two charts, and of the paper around them
LINE: Final = 20.0  # of the legend


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
    charts = [each for each in drawn if each is not None]
    lines = max(len(each.lines) for each in charts)
    return _template().render(
        charts=charts,
        width=len(charts) * (WIDTH + APART) + APART,
        height=BOTTOM + 2 * APART + 70 + LINE * lines,
        step=WIDTH + APART,
        edge=APART,
        line=LINE,
        left=LEFT,
        right=RIGHT,
        bottom=BOTTOM,
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(resources.files("milkglass").joinpath("bounds.svg.jinja").read_text("utf-8"))
