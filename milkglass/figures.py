"""Where the marks of a chart go, and records as pictures: geometry and pixels, no words of the page and no files.

Legend: P records shown, C channels, H height, W width, F values of a flat record.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[np.float32]
Points = Sequence[tuple[float, float]]

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 360.0, 40.0, 350.0, 28.0, 192.0  # a chart's box, in SVG units of about a CSS pixel
MOST_DOTS: Final = 30  # a line of more points is drawn without dots
APART: Final = 38.0  # SVG units between two numbers on a log axis
MOST_ACROSS: Final = 10  # records in a strip: what fits a phone's width
PICTURES: Final = 1_200  # about the most on a page: of many runs, fewer records each are shown
PAGE_BYTES: Final = 2_300_000  # for all pictures, so that a page stays under 3 MB
MARKUP_BYTES: Final = 260  # around each of them
LOWEST: Final = -0.25  # a peek below this is drawn at the edge: how far below says nothing more


def number(value: float, digits: int = 2) -> str:
    """Fixed decimals, none from 1,000 on; a true minus sign, never "-0.00"."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    digits = digits if abs(value) < 1000 else 0
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most about `count` + 1 round numbers, evenly spaced, from `low` or below to `high` or above."""
    span = (high - low) or abs(high) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


Line = tuple[str, str, tuple[tuple[float, float, str], ...]]  # name, SVG path, dots (x, y, words)


@dataclass(frozen=True)
class Chart:
    """A line chart: where its ticks and lines go. `words` tell it to who cannot see it; `level`: (y, words) or None."""

    title: str
    unit: str
    across: str
    words: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]
    level: tuple[float, str] | None


def chart(
    title: str,
    unit: str,
    series: Mapping[str, Points],
    *,
    across: str = "epoch",
    log: bool = False,
    level: tuple[float, str] | None = None,
    foot: float | None = None,
) -> Chart | None:
    """Lines by name, of points (x >= 1, y); None where no y is finite. `level`: a height to compare with, and its name.

    The vertical axis holds `foot`; by default 0 unless all values are near 1.
    """
    finite = [y for points in series.values() for _, y in points if math.isfinite(y)]
    if not finite:
        return None
    finite += [level[0]] if level else []
    if foot is None:
        foot = min(finite) if 0.5 < min(finite) <= max(finite) <= 1 else 0.0
    bottom = min([foot, *finite])
    y_values = ticks(bottom, max(finite))
    xs = sorted({x for points in series.values() for x, _ in points})
    first, last = xs[0], xs[-1]
    scale: Callable[[float], float] = math.log if log else float

    def place(x: float, y: float) -> tuple[float, float]:
        along = (scale(x) - scale(first)) / ((scale(last) - scale(first)) or 1.0)
        up = (y - y_values[0]) / (y_values[-1] - y_values[0])
        return round(LEFT + along * (RIGHT - LEFT), 1), round(BOTTOM - up * (BOTTOM - TOP), 1)

    round_ones = [first, *(x for x in ticks(first, last) if first < x <= last and x == int(x))]
    x_ticks = [(place(x, y_values[0])[0], f"{x:,.0f}") for x in (xs if log else round_ones)]
    told = (f"{name}: first {number(p[0][1], 3)}, last {number(p[-1][1], 3)}." for name, p in series.items() if p)
    compared = f" {level[1]}: {number(level[0], 3)}." if level else ""
    return Chart(
        title=title,
        unit=unit,
        across=across + (" (log scale)" if log else ""),
        words=f"Line chart of {title.lower()} ({unit}), {across} {first:,.0f} to {last:,.0f}. "
        + " ".join(told)
        + compared,
        x_ticks=tuple(_spread(x_ticks) if log else x_ticks),
        y_ticks=tuple((place(first, y)[1], f"{y:g}".replace("-", "−")) for y in y_values),
        lines=tuple(_line(name, points, across, place) for name, points in series.items()),
        level=(place(first, level[0])[1], level[1]) if level else None,
    )


def _spread(marks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The marks that leave each other room; the last one always stays."""
    kept = [marks[-1]]
    for mark in reversed(marks):
        if kept[-1][0] - mark[0] >= APART:
            kept.append(mark)
    return kept[::-1]


def _line(name: str, points: Points, across: str, place: Callable[[float, float], tuple[float, float]]) -> Line:
    path, pen = "", "M"  # the pen is lifted where a value is not finite
    for x, y in points:
        if math.isfinite(y):
            path += "{}{} {}".format(pen, *place(x, y))
        pen = "L" if math.isfinite(y) else "M"
    dots = [(*place(x, y), f"{name}, {across} {x:,.0f}: {number(y, 3)}") for x, y in points if math.isfinite(y)]
    return name, path, tuple(dots if len(dots) <= MOST_DOTS else ())


@dataclass(frozen=True)
class Measured:
    """A peek to be drawn: whose it is, and the ends of its 95 % interval, if known. Higher = more leakage."""

    label: str
    detail: str
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Bar:
    """One bar, from 0 to its value, and its interval: left ends and widths in percent of the track's width.

    beyond: the value lies left of the track. A value that is not finite has no bar.
    """

    label: str
    detail: str
    value: str
    interval: str
    bar: tuple[float, float] | None
    whisker: tuple[float, float] | None
    beyond: bool


@dataclass(frozen=True)
class Bars:
    """Peeks as horizontal bars, highest first. `zero`, `budget` and the ticks: percent of the track's width."""

    words: str
    rows: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    zero: float
    budget: float | None


def bars(measured: Sequence[Measured], budget: float | None = None, baseline: str = "the answer alone") -> Bars | None:
    """The bars of all peeks on one scale that ends at 1, the raw record; None where there is no peek.

    baseline: what 0 is, in words.
    """
    if not measured:
        return None
    ranked = sorted(measured, key=lambda m: -math.inf if math.isnan(m.value) else m.value, reverse=True)
    lows = (min(m.value, *(m.interval or (m.value,))) for m in ranked)
    left = math.floor(20 * max(LOWEST, min([0.0, *filter(math.isfinite, lows)]))) / 20

    def along(value: float) -> float:
        return round(100 * (min(max(value, left), 1.0) - left) / (1.0 - left), 2)

    def stretch(start: float, end: float) -> tuple[float, float]:
        return along(start), round(along(end) - along(start), 2)

    def draw(m: Measured) -> Bar:
        ends = m.interval if m.interval and all(map(math.isfinite, m.interval)) else None
        return Bar(
            label=m.label,
            detail=m.detail,
            value=number(m.value),
            interval=" to ".join(map(number, m.interval or ())),
            bar=stretch(min(m.value, 0.0), max(m.value, 0.0)) if math.isfinite(m.value) else None,
            whisker=stretch(*ends) if ends and ends[1] > left else None,
            beyond=m.value < left,
        )

    told = " to ".join(f"{m.label}, {m.detail}, {number(m.value)}" for m in dict.fromkeys((ranked[0], ranked[-1])))
    return Bars(
        words=f"Bar chart of {len(ranked)} peeks, highest first: {told}. 0 is {baseline}, 1 the raw record."
        + (f" The budget is {number(budget)}." if budget is not None else ""),
        rows=tuple(map(draw, ranked)),
        ticks=tuple((along(mark), number(mark)) for mark in (LOWEST, 0.0, 0.25, 0.5, 0.75, 1.0) if mark >= left),
        zero=along(0.0),
        budget=along(budget) if budget is not None else None,
    )


@dataclass(frozen=True)
class Row:
    """A row of a strip: what it shows, who made it, its peek, and the records (P, C, H, W) or (P, F) themselves."""

    label: str
    detail: str
    peek: str
    records: Array


def picture(record_CHW: Array, longest: int) -> Image.Image:
    """A record in [0, 1] as a picture of at most `longest` pixels a side; one channel is grey, others first three."""
    bytes_CHW = (np.nan_to_num(record_CHW).clip(0, 1) * 255).round().astype(np.uint8)
    rgb = len(bytes_CHW) >= 3
    image = Image.fromarray(np.ascontiguousarray(bytes_CHW[:3].transpose(1, 2, 0)) if rgb else bytes_CHW[0])
    image.thumbnail((longest, longest), Image.Resampling.BOX)  # never enlarges
    return image


def png(image: Image.Image) -> bytes:
    """The picture as a small PNG; the same bytes each time."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def png_base64(record_CHW: Array, longest: int) -> str:
    """A record in [0, 1] as a PNG in base64, as a page holds it."""
    return base64.b64encode(png(picture(record_CHW, longest))).decode()


def fit(strips: Sequence[Sequence[Row]]) -> tuple[int, int]:
    """(most records in a row, longest side in pixels): what keeps a page of these strips small."""
    shown = max(2, min(MOST_ACROSS, PICTURES // max(1, sum(map(len, strips)))))
    counts = [min(shown, len(row.records)) for strip in strips for row in strip]
    each = PAGE_BYTES / max(1, sum(counts)) - MARKUP_BYTES
    colors = 3 if any(row.records.shape[1] >= 3 for strip in strips for row in strip) else 1
    values = (
        each * 3 / 4 - 100
    ) / colors  # base64 takes 4 bytes for 3; a PNG at most a byte a value and 100 of its own
    return shown, min(96, max(8, math.isqrt(max(0, int(values)))))


def sheet(rows: Sequence[Row]) -> Image.Image:
    """Rows of pictures (P, C, H, W), each with its label, on one white sheet."""
    cell, gap, edge = 72, 8, 16
    font, small = ImageFont.load_default(18), ImageFont.load_default(14)
    captions = [f"peek {row.peek}, {row.detail}".replace("−", "-") for row in rows]
    labels = [font.getlength(row.label) for row in rows] + [small.getlength(caption) for caption in captions]
    left = edge + math.ceil(max(labels)) + 2 * gap
    across = max(len(row.records) for row in rows)
    size = (left + across * (cell + gap) - gap + edge, 2 * edge + len(rows) * (cell + gap) - gap)
    paper = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(paper)
    for index, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        y = edge + index * (cell + gap)
        draw.text((edge, y + cell // 2 - 2), row.label, fill="#14202b", font=font, anchor="ls")
        draw.text((edge, y + cell // 2 + 18), caption, fill="#55636e", font=small, anchor="ls")
        for column, record_CHW in enumerate(row.records):
            image = picture(record_CHW, cell).convert("RGB")
            scale = cell / max(image.size)
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.NEAREST)
            paper.paste(image, (left + column * (cell + gap), y))
    return paper


_PREFIXES: Final = ("", "k", "M", "G", "T", "P", "E")


def amount(value: float | None, unit: str) -> str:
    """Three digits and a unit with its prefix: 1.23 kB is 1,230 bytes. A dash where there is no value."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return number(value)
    power = 0 if value == 0 else min(len(_PREFIXES) - 1, max(0, math.floor(math.log10(abs(value)) / 3 + 1e-12)))
    if abs(float(f"{value / 1000**power:.3g}")) >= 1000 and power + 1 < len(_PREFIXES):
        power += 1  # 999,999 is 1 M
    scaled = value / 1000**power
    digits = 0 if power == 0 and value == round(value) else max(0, 2 - math.floor(math.log10(max(abs(scaled), 1))))
    return f"{number(scaled, digits)} {_PREFIXES[power]}{unit}"


def duration(seconds: float | None) -> str:
    """Seconds, from ten minutes on minutes, from ten hours on hours. A dash where there is no value."""
    if seconds is None:
        return "–"
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 10 * size:
            return f"{number(seconds / size, 1)} {unit}"
    return f"{number(seconds, 1 if seconds >= 1 else 3)} s"
