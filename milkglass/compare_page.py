"""compare.html: recommendation, table and pictures of what compare.json holds. Geometry; the rest is in the template.

One file, autoescape on, no script, nothing fetched; it follows a dark screen. Words and look: `compare.html.jinja`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final, final

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from milkglass.compare import MEASURED, MODELLED, PROTECTIONS, WAYS, Cell
from milkglass.compare_advice import belongs
from milkglass.compare_section import CompareSection
from milkglass.figures import amount, duration, number, ticks

Content = Mapping[str, Any]
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 440.0, 40.0, 424.0, 30.0, 262.0  # of a scatter, in SVG units
RADIUS: Final = 5.0
PEEKS: Final = (0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
DEEPEST: Final = 0.3  # what is so far below the best in accuracy is drawn at the lower edge
DECADES: Final = 50.0  # figures that differ by more than this factor get a logarithmic scale
LETTERS: Final[Mapping[str, str]] = {"nopeek": "N", "channel": "C", "dp": "D", "secure_aggregation": "S"}
"""Of a protection, beside its mark."""
CORNERS: Final[Mapping[str, tuple[int, float, float]]] = {  # corners, turn in degrees, every other one at this share
    "whole": (4, 45, 1.0),
    "u_shaped": (4, 0, 1.0),
    "splitfed": (3, 0, 1.0),
    "federated": (4, 45, 1.0),
    "large_batch": (3, 180, 1.0),
    "adaptive": (10, 0, 0.45),
    "collaboration": (8, 0, 0.38),
}
"""Each way of training has a mark of its own, for who sees no colors; those without corners are circles."""


@final
@dataclass(frozen=True)
class Dot:
    """One row: the path of its mark, whiskers, its letter and the place of that, and words for who points at it."""

    training: str
    x: float
    y: float
    mark: str
    whiskers: str
    letter: str
    letter_at: tuple[float, float]
    words: str
    hollow: bool
    chosen: bool


@final
@dataclass(frozen=True)
class Scatter:
    """Accuracy against peek for one number of clients. missing: rows that lack one of the two, in words."""

    title: str
    words: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    dots: tuple[Dot, ...]
    peek_limit: tuple[float, str] | None
    accuracy_limit: tuple[float, str] | None
    missing: tuple[str, ...]


@final
@dataclass(frozen=True)
class Bars:
    """A figure of every row on one scale. bars: the right end in percent of the track, or None; and the value."""

    title: str
    unit: str
    log: bool
    ticks: tuple[tuple[float, str], ...]
    bars: tuple[tuple[float | None, str], ...]


def page(content: Content) -> str:
    """The page, of what compare.json holds. `formulas` and `survey` may be missing; so is then their section.

    `formulas.svg` (one, or a list) is drawn by `charts.svg`, which escapes names: it goes in as it is.
    """
    needs = CompareSection.model_validate(dict(content["needs"]))
    rows = ordered(content["rows"], content["sort"])
    figures = [row for row in rows if row["status"] in (MEASURED, MODELLED)]
    trained = [row for row in figures if not row["inference"]]
    chosen = {_key(each["chosen"]) for each in content["advice"] if each["chosen"] is not None}
    formulas = content.get("formulas")
    drawn = [] if not formulas else formulas.get("svg") or []
    return _template().render(
        content=content,
        trained=trained,
        answers=[row for row in figures if row["inference"]],
        unrun=[row for row in rows if row["status"] not in (MEASURED, MODELLED)],
        by_key={_key(row): row for row in rows},
        chosen=chosen,
        scatters=scatters(content, trained, needs, chosen),
        panels=panels(trained),
        legend=_legend(trained),
        formulas=formulas,
        drawn=[Markup(each) for each in ([drawn] if isinstance(drawn, str) else drawn)],
        survey=_tables(content.get("survey") or ()),
        recipe=json.dumps(content["recipe"], indent=2, ensure_ascii=False, default=str),
        box={"width": WIDTH, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
    )


def ordered(rows: Iterable[Mapping[str, Any]], by: str) -> list[Mapping[str, Any]]:
    """Best first: accuracy falls, all else rises; rows that lack the figure come last. `training`: as they are."""

    def key(row: Mapping[str, Any]) -> tuple[bool, float]:
        value = 0.0 if by == "training" else row[by]
        if value is None or not math.isfinite(value):
            return True, 0.0
        return False, -value if by == "accuracy" else value

    return sorted(rows, key=key)


def panels(rows: Sequence[Mapping[str, Any]]) -> list[Bars]:
    """What a training costs, a panel for each figure, all in the order of the rows; those that no row has are left out.

    bytes up: of one client. FLOPs: of one client. seconds: of all parties on one machine.
    """
    made = (
        _bars("Sent by a client", "bytes up, on the wire", [row["bytes_up"] for row in rows], _bytes, "B"),
        _bars("Computed by a client", "FLOPs", [row["client_flops"] for row in rows], _flops, ""),
        _bars("Time on this machine", "all parties together", [row["seconds"] for row in rows], duration, "s"),
    )
    return [each for each in made if each is not None]


def scatters(
    content: Content, rows: Sequence[Mapping[str, Any]], needs: CompareSection, chosen: set[tuple[str, str, int]]
) -> list[Scatter]:
    """One for each number of clients that there is advice for, all on the same axes; none where none can be drawn."""
    rows = [row for row in rows if row["status"] == MEASURED]
    placed = [row for row in rows if _has(row, "accuracy") and _has(row, "peek")]
    if not placed:
        return []
    best: float = max(row["accuracy"] for row in rows if _has(row, "accuracy"))
    lowest = max(min(_ends(row, "accuracy")[0] for row in placed), best - DEEPEST)
    highest = max(best, *(_ends(row, "accuracy")[1] for row in placed))
    percents = [value for value in ticks(100 * lowest, 100 * highest) if 0 <= value <= 100]
    foot, head = percents[0], max(percents[-1], min(100.0, 100 * highest))
    most = max(needs.peek_at_most or 0.0, 0.1, *(_ends(row, "peek")[1] for row in placed))
    end = next((peek for peek in PEEKS if peek >= most), 1.0)

    def across(peek: float) -> float:
        return round(LEFT + math.sqrt(min(max(peek, 0.0), end) / end) * (RIGHT - LEFT), 1)

    def up(accuracy: float) -> float:
        share: float = (min(max(100 * accuracy, foot), head) - foot) / ((head - foot) or 1.0)
        return round(BOTTOM - share * (BOTTOM - TOP), 1)

    limit, lost = needs.peek_at_most, best - needs.accuracy_lost_at_most
    found = []
    for clients in (each["clients"] for each in content["advice"]):
        group = [row for row in rows if belongs(_cell(row), clients, needs)]
        drawn = [row for row in group if row in placed]
        found.append(
            Scatter(
                title=f"{clients} client{'' if clients == 1 else 's'}",
                words=f"Accuracy against peek with {clients} clients: {'; '.join(map(_told, drawn)) or 'none'}.",
                x_ticks=tuple((across(peek), f"{peek:g}") for peek in PEEKS if peek <= end),
                y_ticks=tuple((up(value / 100), f"{value:g}") for value in percents),
                dots=_dots(drawn, across, up, chosen),
                peek_limit=None if limit is None else (across(limit), f"peek ≤ {limit:g}"),
                accuracy_limit=None if 100 * lost < foot else (up(lost), f"{number(100 * lost, 1)} %"),
                missing=tuple(row["words"] for row in group if row not in placed),
            )
        )
    return found


def mark(training: str, x: float, y: float, r: float = RADIUS) -> str:
    """The path of a way's mark around (x, y)."""
    if training not in CORNERS:
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    count, turn, inner = CORNERS[training]
    points = []
    for k in range(count):
        angle, far = math.radians(turn - 90 + 360 * k / count), 1.25 * r * (inner if k % 2 and inner < 1 else 1.0)
        points.append(f"{x + far * math.cos(angle):.1f} {y + far * math.sin(angle):.1f}")
    return "M" + "L".join(points) + "z"


def _dots(
    rows: Sequence[Mapping[str, Any]],
    across: Callable[[float], float],
    up: Callable[[float], float],
    chosen: set[tuple[str, str, int]],
) -> tuple[Dot, ...]:
    places = [(across(row["peek"]), up(row["accuracy"])) for row in rows]
    taken = list(places)
    dots = []
    for row, (x, y) in zip(rows, places, strict=True):
        letter = LETTERS.get(row["protection"], "")
        at = (x, y)
        if letter:
            at = _free(x, y, taken)
            taken.append(at)
        left, right = map(across, _ends(row, "peek"))
        low, high = map(up, _ends(row, "accuracy"))
        hollow = not row["sound"] or row["training"] == "whole"
        path = f"M{left} {y}H{right}M{x} {low}V{high}"
        dots.append(
            Dot(_way(row), x, y, mark(row["training"], x, y), path, letter, at, _told(row), hollow, _key(row) in chosen)
        )
    return tuple(dots)


def _free(x: float, y: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where a letter beside (x, y) is farthest from marks and other letters, inside the box."""
    around = [(x + right, y + down) for right, down in ((10, -7), (10, 8), (-10, -7), (-10, 8), (0, -13), (0, 14))]
    inside = [(a, b) for a, b in around if LEFT < a < RIGHT + 12 and TOP - 8 < b < BOTTOM - 2] or around

    def room(at: tuple[float, float]) -> float:
        return min([30.0, *(math.dist(at, other) for other in taken if other != (x, y))])

    return max(inside, key=room)


def _bars(
    title: str,
    unit: str,
    values: Sequence[float | None],
    told: Callable[[float | None], str],
    tick_unit: str,
) -> Bars | None:
    """On a log scale a bar starts a little left of the least value, for there is no zero."""
    found = [value for value in values if value is not None and math.isfinite(value) and value >= 0]
    above = [value for value in found if value > 0]
    if not above:
        return None
    log = max(above) / min(above) > DECADES
    if log:
        first, last = math.floor(math.log10(min(above))), math.ceil(math.log10(max(above)))
        step = -(-(last - first) // 3)
        marks = [10.0**power for power in range(last, first - 1, -step)][::-1]
        start, end = first - 0.04 * (last - first), last + 0.04 * (last - first)
    else:
        marks = ticks(0.0, max(above), 3)
        start, end = 0.0, max(marks[-1], max(above))

    def along(value: float) -> float:
        return round(100 * ((math.log10(value) if log else value) - start) / (end - start), 2)

    shown = [value if value is not None and value in found else None for value in values]
    bars = ((along(value) if value is not None and (value > 0 or not log) else None, told(value)) for value in shown)
    return Bars(title, unit, log, tuple((along(each), _round(each, tick_unit)) for each in marks), tuple(bars))


def _bytes(value: float | None) -> str:
    return amount(value, "B")


def _flops(value: float | None) -> str:
    return amount(value, "FLOP")


def _round(value: float, unit: str) -> str:
    """A round number on an axis: 100 kB, 5,000 s."""
    if unit == "s":
        return f"{value:,g} s"
    words, _, prefixed = amount(value, unit).partition(" ")
    return f"{words.rstrip('0').rstrip('.') if '.' in words else words} {prefixed}".strip()


def _told(row: Mapping[str, Any]) -> str:
    return f"{row['words']}: accuracy {number(100 * row['accuracy'], 1)} %, peek {number(row['peek'], 3)}"


def _has(row: Mapping[str, Any], name: str) -> bool:
    return row[name] is not None and math.isfinite(row[name])


def _ends(row: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Of the interval; the value itself where that is not finite."""
    low, high = row[f"{name}_interval"] or (row[name], row[name])
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (row[name], row[name])


def _cell(row: Mapping[str, Any]) -> Cell:
    return Cell(row["training"], row["protection"], row["clients"])


def _key(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["training"], row["protection"], row["clients"]


def _way(row: Mapping[str, Any]) -> str:
    """A name that a style sheet knows."""
    return row["training"] if row["training"] in WAYS else "other"


def _training(row: Mapping[str, Any]) -> str:
    name: str = row["training"]
    return WAYS[name].words if name in WAYS else name


def _protection(row: Mapping[str, Any]) -> str:
    name: str = row["protection"]
    return PROTECTIONS[name].words if name in PROTECTIONS else name


def _legend(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(way, path of its mark, words) of what is shown."""
    present = {row["training"] for row in rows}
    return [(name, mark(name, 9.0, 9.0), way.words) for name, way in WAYS.items() if name in present]


def _tables(entries: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The survey's entries by the table that they are of."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        found.setdefault(str(entry["table"]), []).append(entry)
    return found


def _plain(value: Any) -> str:
    """A figure of the survey: numbers with three digits, ranges by their ends, words as they are."""
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return " to ".join(map(_plain, value))
    if isinstance(value, bool | str):
        return str(value)
    digits = 2 - math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0
    text = number(float(value), max(0, digits))
    return text.rstrip("0").rstrip(".") if "." in text else text


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, bytes=_bytes, flops=_flops, duration=duration, plain=_plain)
    environment.filters.update(key=_key, way=_way, training=_training, protection=_protection)
    environment.globals["letters"] = {PROTECTIONS[name].words: letter for name, letter in LETTERS.items()}
    return environment.from_string(resources.files("milkglass").joinpath("compare.html.jinja").read_text("utf-8"))
