"""The frontier as a picture and as a page: geometry; words and look are in `frontier.svg.jinja`, `frontier.html.jinja`.

Both are made from what frontier.json holds. The picture stands alone, brings its own paper, and follows a dark screen;
neither has a script or fetches anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from milkglass.figures import number, ticks
from milkglass.frontier import FAMILY, Setting
from milkglass.sections import FAMILIES

Scale = Callable[[float], float]
WIDTH: Final = 760.0  # in SVG units of a CSS pixel, as all below
LEFT, RIGHT, TOP, BOTTOM = 58.0, 656.0, 58.0, 378.0
BITS_HEIGHT: Final = 110.0
GAP: Final = 92.0  # between the panels, for the numbers on the axis and its name
RADIUS: Final = 5.5
PEEKS: Final = (0.0, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
DEEPEST: Final = 0.15  # what is so far below the best in accuracy is drawn at the lower edge
COLUMNS: Final = 2  # of the legend


@dataclass(frozen=True)
class Dot:
    """One cell: its mark (an SVG path around its place), whiskers, and words for who points at it or cannot see it."""

    family: str
    x: float
    y: float
    mark: str
    whiskers: str
    words: str
    sound: bool
    chosen: bool


@dataclass(frozen=True)
class Panel:
    """Dots against peek, between its top and bottom. level: (y, words) of a line across, or None."""

    top: float
    bottom: float
    unit: str
    y_ticks: tuple[tuple[float, str], ...]
    dots: tuple[Dot, ...]
    front: str
    levels: tuple[tuple[float, str, str], ...]


def mark(family: str, x: float, y: float, r: float = RADIUS) -> str:
    """The path of a family's mark: each has a shape of its own, for who sees no colors."""
    corners: Mapping[str, tuple[int, float, float]] = {  # corners, turn in degrees, every other one at this share of r
        "noise": (4, 45, 1.0),
        "channel": (4, 0, 1.0),
        "channel_entropy": (3, 0, 1.0),
        "channel_nopeek": (3, 180, 1.0),
        "adversary": (8, 0, 0.38),
        "learned_noise": (6, 0, 1.0),
        "random_projection": (10, 0, 0.45),
        "pca": (8, 45, 0.38),
        "recipe": (5, 0, 1.0),
    }
    if family not in corners:  # a circle
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    count, turn, inner = corners[family]
    points = []
    for k in range(count):
        angle = math.radians(turn - 90 + 360 * k / count)
        far = 1.25 * r * (inner if k % 2 and inner < 1 else 1.0)
        points.append(f"{x + far * math.cos(angle):.1f} {y + far * math.sin(angle):.1f}")
    return "M" + "L".join(points) + "z"


def words_of(family: str) -> str:
    """A family's name for a reader."""
    return FAMILY[family].words if family in FAMILY else Setting(family).words


def picture(content: Mapping[str, Any]) -> str:
    """frontier.svg, of what frontier.json holds; with no cell finished yet, an empty frame."""
    rows: Sequence[Mapping[str, Any]] = [row for row in content["rows"] if math.isfinite(row["peek"]["value"])]
    budget = content["budget"] or {}
    highs = (row["peek"]["high"] for row in rows if math.isfinite(row["peek"]["high"]))
    most = min(1.0, max([0.1, budget.get("peek", 0.0), *highs]))
    end = next(peek for peek in PEEKS if peek >= most)

    def across(peek: float) -> float:
        share = math.sqrt(min(max(peek, 0.0), end) / end)
        return round(LEFT + share * (RIGHT - LEFT), 1)

    panels = [_accuracy_panel(content, rows, across)]
    certified = [row for row in rows if row["bits"] is not None]
    if certified:
        panels.append(_bits_panel(content, certified, across))
    bottom = panels[-1].bottom + 70
    legend = _legend(rows, bottom)
    lines = -(-len(legend) // COLUMNS)
    return _template("frontier.svg.jinja").render(
        width=WIDTH,
        height=bottom + 20 * lines + 52,
        left=LEFT,
        right=RIGHT,
        panels=panels,
        x_ticks=[(across(peek), f"{peek:g}") for peek in PEEKS if peek <= end],
        budget=None if "peek" not in budget else (across(budget["peek"]), f"{budget['peek']:g}"),
        legend=legend,
        notes_at=bottom + 20 * lines + 8,
        words=_told(content),
    )


def page(content: Mapping[str, Any], drawn: str) -> str:
    """frontier.html: the picture, every cell in a table, the finalists, and the notes."""
    rows = sorted(content["rows"], key=lambda row: (row["peek"]["value"], -row["accuracy"]["value"]))
    return _template("frontier.html.jinja").render(
        content=content,
        rows=rows,
        picture=Markup(drawn),
        chosen=_setting(content["chosen"]),
        nearest=_setting(content["nearest"]),
    )


def _accuracy_panel(content: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], across: Scale) -> Panel:
    best = max((row["accuracy"]["high"] for row in rows), default=1.0)
    lowest = max(min((row["accuracy"]["low"] for row in rows), default=0.0), best - DEEPEST, 0.0)
    marks = [mark for mark in ticks(100 * lowest, 100 * best) if mark <= 100]
    bottom, top = marks[0], max(marks[-1], 100 * best)

    def up(percent: float) -> float:
        return round(BOTTOM - (min(max(percent, bottom), top) - bottom) / (top - bottom) * (BOTTOM - TOP), 1)

    dots = [_dot(content, row, across, up, row["accuracy"], 100) for row in rows]
    on_front = sorted((row["peek"]["value"], up(100 * row["accuracy"]["value"])) for row in rows if row["on_front"])
    path = "".join(
        f"{'M' if k == 0 else 'H'}{across(x)}{' ' if k == 0 else 'V'}{y}" for k, (x, y) in enumerate(on_front)
    )
    reference = content["reference"]
    levels = []
    if reference is not None:
        percent = 100 * reference["value"]
        levels = [(up(percent), "undefended", f"{number(percent, 1)} %")]
    return Panel(
        TOP,
        BOTTOM,
        "accuracy, % of test records",
        tuple((up(value), f"{value:g}") for value in marks),
        tuple(dots),
        path + f"H{RIGHT}" if path else "",
        tuple(levels),
    )


def _bits_panel(content: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], across: Scale) -> Panel:
    limit = (content["budget"] or {}).get("bits")
    most = max(row["bits"] for row in rows)
    limit = None if limit is None or limit > 2 * most else limit  # one far beyond all is not drawn
    marks = ticks(0.0, max(most, limit or 0.0), 3)
    top = BOTTOM + GAP
    bottom = top + BITS_HEIGHT

    def up(bits: float) -> float:
        return round(bottom - min(bits, marks[-1]) / marks[-1] * (bottom - top), 1)

    levels = () if limit is None else ((up(limit), "budget", f"{limit:g} bits"),)
    dots = [_dot(content, row, across, up, {"value": row["bits"]}, 1) for row in rows]
    unit = "certificate: bits that one release tells at most"
    return Panel(top, bottom, unit, tuple((up(value), f"{value:g}") for value in marks), tuple(dots), "", levels)


def _dot(
    content: Mapping[str, Any],
    row: Mapping[str, Any],
    across: Scale,
    up: Scale,
    height: Mapping[str, float],
    scale: float,
) -> Dot:
    peek = row["peek"]
    x, y = across(peek["value"]), up(scale * height["value"])
    ends = [peek["low"], peek["high"]]
    whiskers = f"M{across(ends[0])} {y}H{across(ends[1])}" if all(map(math.isfinite, ends)) else ""
    if "low" in height:
        whiskers += f"M{x} {up(scale * height['low'])}V{up(scale * height['high'])}"
    bits = "" if row["bits"] is None else f", {number(row['bits'], 1)} bits"
    chosen = content["chosen"]
    return Dot(
        family=row["family"],
        x=x,
        y=y,
        mark=mark(row["family"], x, y),
        whiskers=whiskers,
        words=f"{_figures(row)} ({number(peek['low'], 3)} to {number(peek['high'], 3)}){bits}",
        sound=row["sound"],
        chosen=chosen is not None and (chosen["family"], chosen["strength"]) == (row["family"], row["strength"]),
    )


def _figures(row: Mapping[str, Any]) -> str:
    accuracy, peek = number(100 * row["accuracy"]["value"], 1), number(row["peek"]["value"], 3)
    return f"{_setting(row)}: accuracy {accuracy} %, peek {peek}"


def _setting(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else Setting(row["family"], row["strength"]).words


def _legend(rows: Sequence[Mapping[str, Any]], top: float) -> list[tuple[str, str, float, float, str]]:
    """(family, mark, x and y of the words, words), line by line."""
    entries = []
    for index, family in enumerate(name for name in FAMILIES if any(row["family"] == name for row in rows)):
        x, y = LEFT + 18 + 342 * (index % COLUMNS), top + 20 * (index // COLUMNS)
        strengths = [row["strength"] for row in rows if row["family"] == family]
        swept = ""
        if family in FAMILY:
            ends = sorted({f"{min(strengths):g}": 0, f"{max(strengths):g}": 0}, key=float)
            swept = f", {FAMILY[family].knob} {' to '.join(ends)}"
        entries.append((family, mark(family, x - 14, y - 4), x, y, words_of(family) + swept))
    return entries


def _told(content: Mapping[str, Any]) -> str:
    on_front = sorted((row for row in content["rows"] if row["on_front"]), key=lambda row: float(row["peek"]["value"]))
    told = "; ".join(map(_figures, on_front))
    return f"Accuracy against peek of {len(content['rows'])} defenses. On the Pareto front: {told or 'none yet'}."


@cache
def _template(name: str) -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, setting=_setting, family=words_of)
    return environment.from_string(resources.files("milkglass").joinpath(name).read_text("utf-8"))
