"""Run folders -> one self-contained HTML page, a strip of pictures for a README, and the command line's small table.

Files are read through pydantic models, so a damaged one is one clear line. The geometry of charts and pictures is
computed here; the page's words are in `report.html.jinja`, autoescape on. The page has no script and fetches nothing.

Legend: P records shown, C channels, H height, W width, F values of a flat record.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import safetensors.numpy
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError

from milkglass.errors import RunError
from milkglass.runs import write_beside

Array = NDArray[np.float32]

SHOWN: Final = 10  # records in a strip: what fits a phone's width
PICTURE_BYTES: Final = 1_500_000  # all pictures together, before base64, so that the page stays under 3 MB
MOST_DOTS: Final = 30  # a line of more epochs is drawn without dots


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class DistanceCorrelation(_File):
    """Between records and activations: 0 = independent; the squared, bias-corrected value may be slightly negative."""

    squared_unbiased: float
    biased: float
    n: int
    permutation_floor: float


class Epoch(_File):
    """A line of `metrics.jsonl`, as far as it is drawn. Accuracy is 0..1."""

    epoch: int
    loss: float
    accuracy: float
    distance_correlation: DistanceCorrelation


class Wire(_File):
    """All messages of one kind in one direction, as counted on the wire."""

    direction: str
    kind: str
    messages: int
    bytes: int


class Summary(_File):
    """`summary.json`. Accuracy is 0..1 on test records; bytes are counted at the client's side."""

    accuracy: float
    distance_correlation: DistanceCorrelation
    bytes_sent: int
    bytes_received: int
    messages: int
    seconds: float
    seconds_per_epoch: float
    client_flops_per_sample: float
    seed: int
    defense: str
    keys: str
    wire: tuple[Wire, ...]
    records: dict[str, int | dict[str, int]]  # training records are counted by client


class Interval(_File):
    """A value with the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Control(_File):
    """One known-answer test of the attacks."""

    value: float
    limit: float
    passed: bool


class AttackFigures(_File):
    """What one attack reached on test records. Higher peek, PSNR, SSIM and top-1 match = more leakage."""

    name: str
    adversary: str
    knows: tuple[str, ...]
    exposure: str
    mse: float
    psnr_db: float
    ssim: float | None = None
    peek: float
    match_top1: float
    seconds: float
    undertrained: bool = False


class AuditFigures(_File):
    """`audit.json`. Peek: 1 = the raw record, 0 = nothing beyond the answer."""

    peek: Interval
    exposures: dict[str, Interval]
    verdict: str
    error_entitled: float
    controls: dict[str, Control]
    attacks: tuple[AttackFigures, ...]
    best_attack: str
    reference_accuracy: float | None = None
    budget: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunResults:
    """Everything that the report shows of one run. `pictures` are (P, C, H, W) or (P, F), by name; may be empty."""

    name: str
    recipe: str
    summary: Summary
    epochs: tuple[Epoch, ...]
    audit: AuditFigures | None
    pictures: dict[str, Array]


_Model = TypeVar("_Model", bound=_File)


def read_results(folder: Path) -> list[RunResults]:
    """The runs in `folder`: itself, or each direct subfolder with a summary, undefended first, then by name.

    Raises RunError where there is no finished run, or a file of one is missing or damaged.
    """
    if (folder / "summary.json").is_file():
        return [_read_run(folder)]
    runs = [_read_run(path.parent) for path in folder.glob("*/summary.json")]
    if not runs:
        raise RunError(f"{folder}: no finished run; expected summary.json in it or in a folder directly inside it")
    return sorted(runs, key=lambda run: (run.summary.defense != "none", run.name))


def _read_run(folder: Path) -> RunResults:
    metrics, audit = folder / "metrics.jsonl", folder / "audit.json"
    lines = enumerate(_read_text(metrics).splitlines(), start=1)
    epochs = tuple(_parse(Epoch, line, f"{metrics}, line {n}") for n, line in lines if line.strip())
    if not epochs:
        raise RunError(f"{metrics}: empty; expected a line for each epoch")
    return RunResults(
        name=folder.resolve().name,
        recipe=_read_text(folder / "recipe.toml"),
        summary=_parse(Summary, _read_text(folder / "summary.json"), str(folder / "summary.json")),
        epochs=epochs,
        audit=_parse(AuditFigures, _read_text(audit), str(audit)) if audit.exists() else None,
        pictures=_read_pictures(folder / "pictures.safetensors"),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: missing or damaged, expected UTF-8 text: {error}") from None


def _parse(model: type[_Model], text: str, where: str) -> _Model:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RunError(f"{where}: damaged: {place + ': ' if place else ''}{first['msg']}") from None


def _read_pictures(path: Path) -> dict[str, Array]:
    if not path.exists():
        return {}
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: damaged: {error}") from None
    shapes = {tensor.shape for tensor in tensors.values()}
    if "records" not in tensors or len(shapes) != 1 or len(next(iter(shapes))) not in (2, 4):
        raise RunError(f"{path}: damaged: expected 'records' and tensors of its shape, (P, C, H, W) or (P, F)")
    return {name: tensor[:SHOWN].astype(np.float32) for name, tensor in tensors.items()}


WIDTH, LEFT, RIGHT, TOP, BOTTOM = 360.0, 40.0, 350.0, 28.0, 192.0  # a chart's box, in SVG units of about a CSS pixel


Line = tuple[str, str, tuple[tuple[float, float, str], ...]]  # name, SVG path, dots (x, y, words)


@dataclass(frozen=True)
class Chart:
    """A line chart by epoch: where its ticks and lines go. `words` tell it to who cannot see it."""

    title: str
    unit: str
    words: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most about `count` + 1 round numbers, evenly spaced, from `low` or below to `high` or above."""
    span = (high - low) or abs(high) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


def chart(title: str, unit: str, runs: Sequence[RunResults], value: Callable[[Epoch], float]) -> Chart | None:
    """One line a run; None where no run has a finite value. The vertical axis holds 0 unless all values are near 1."""
    series = {run.name: [(e.epoch, value(e)) for e in run.epochs] for run in runs}
    finite = [y for points in series.values() for _, y in points if math.isfinite(y)]
    if not finite:
        return None
    bottom = min(finite) if 0.5 < min(finite) <= max(finite) <= 1 else min(0.0, *finite)
    y_values = ticks(bottom, max(finite))
    last = max(x for points in series.values() for x, _ in points)
    x_values = [1, *(int(x) for x in ticks(1, last) if 1 < x <= last and x == int(x))]

    def place(x: float, y: float) -> tuple[float, float]:
        along = (x - 1) / max(last - 1, 1)
        up = (y - y_values[0]) / (y_values[-1] - y_values[0])
        return round(LEFT + along * (RIGHT - LEFT), 1), round(BOTTOM - up * (BOTTOM - TOP), 1)

    return Chart(
        title=title,
        unit=unit,
        words=f"Line chart of {title.lower()} ({unit}), epochs 1 to {last}. "
        + " ".join(f"{name}: first {number(p[0][1])}, last {number(p[-1][1])}." for name, p in series.items() if p),
        x_ticks=tuple((place(x, y_values[0])[0], str(x)) for x in x_values),
        y_ticks=tuple((place(1, y)[1], f"{y:g}".replace("-", "−")) for y in y_values),
        lines=tuple(_line(name, points, place) for name, points in series.items()),
    )


def _line(name: str, points: Sequence[tuple[int, float]], place: Callable[[float, float], tuple[float, float]]) -> Line:
    path, pen = "", "M"  # the pen is lifted where a value is not finite
    for x, y in points:
        if math.isfinite(y):
            path += "{}{} {}".format(pen, *place(x, y))
        pen = "L" if math.isfinite(y) else "M"
    dots = [(*place(x, y), f"{name}, epoch {x}: {number(y, 3)}") for x, y in points if math.isfinite(y)]
    return name, path, tuple(dots if len(dots) <= MOST_DOTS else ())


@dataclass(frozen=True)
class Row:
    """A row of a strip: what it shows, who made it, its peek, and the records (P, ...) themselves."""

    label: str
    detail: str
    peek: str
    records: Array


def strips(results: Sequence[RunResults]) -> list[list[Row]]:
    """Rows of records, of each run's best reconstruction, of what the answer alone tells; a strip per record set."""
    groups: dict[bytes, list[RunResults]] = {}
    for run in results:
        if run.audit and run.audit.best_attack in run.pictures:
            groups.setdefault(run.pictures["records"].tobytes(), []).append(run)
    return [_rows(group) for group in groups.values()]


def _rows(group: Sequence[RunResults]) -> list[Row]:
    rows = [Row("test records", "never sent", "1", group[0].pictures["records"])]
    baselines: list[Row] = []
    for run in group:
        assert run.audit is not None  # strips() keeps audited runs only
        best = run.audit.best_attack
        rows.append(Row(run.name, f"rebuilt by {best}", number(run.audit.peek.value), run.pictures[best]))
        entitled = run.pictures.get("entitled")
        if entitled is not None and not any(np.allclose(entitled, row.records, atol=0.02) for row in baselines):
            detail = "from the answer alone" + (f", {run.name}" if baselines else "")
            baselines.append(Row("entitled baseline", detail, "0", entitled))
    return rows + baselines


def picture(record_CHW: Array, longest: int) -> Image.Image:
    """A record in [0, 1] as a picture of at most `longest` pixels a side; one channel is grey, others first three."""
    bytes_CHW = (np.nan_to_num(record_CHW).clip(0, 1) * 255).round().astype(np.uint8)
    rgb = len(bytes_CHW) >= 3
    image = Image.fromarray(np.ascontiguousarray(bytes_CHW[:3].transpose(1, 2, 0)) if rgb else bytes_CHW[0])
    image.thumbnail((longest, longest), Image.Resampling.BOX)  # never enlarges
    return image


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def strip_png(results: Sequence[RunResults]) -> bytes:
    """The strips as one PNG with row labels; the same bytes each time. RunError where no run has audited pictures."""
    shown = [strip for strip in strips(results) if strip[0].records.ndim == 4]
    if not shown:
        raise RunError("no strip to draw: no run has an audit and pictures of its records")
    rows = [row for strip in shown for row in strip]
    cell, gap, edge = 72, 8, 16
    font, small = ImageFont.load_default(18), ImageFont.load_default(14)
    captions = [f"peek {row.peek}, {row.detail}".replace("−", "-") for row in rows]
    labels = [font.getlength(row.label) for row in rows] + [small.getlength(caption) for caption in captions]
    left = edge + math.ceil(max(labels)) + 2 * gap
    across = max(len(row.records) for row in rows)
    size = (left + across * (cell + gap) - gap + edge, 2 * edge + len(rows) * (cell + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        y = edge + index * (cell + gap)
        draw.text((edge, y + cell // 2 - 2), row.label, fill="#14202b", font=font, anchor="ls")
        draw.text((edge, y + cell // 2 + 18), caption, fill="#55636e", font=small, anchor="ls")
        for column, record_CHW in enumerate(row.records):
            image = picture(record_CHW, cell).convert("RGB")
            scale = cell / max(image.size)
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.NEAREST)
            sheet.paste(image, (left + column * (cell + gap), y))
    return _png(sheet)


def number(value: float, digits: int = 2) -> str:
    """Fixed decimals, none from 1,000 on; a true minus sign, never "-0.00"."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    digits = digits if abs(value) < 1000 else 0
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")


def table(results: Sequence[RunResults]) -> Table:
    """What the command line prints: a line per run."""
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    shown.add_column("run", no_wrap=True)
    shown.add_column("defense")
    for figure in ("accuracy", "distance\ncorr.²", "peek\n(95 % interval)", "sent", "received", "time"):
        shown.add_column(figure, justify="right", no_wrap=True)
    for run in results:
        s, peek = run.summary, run.audit and run.audit.peek
        interval = f"{number(peek.value)} [{number(peek.low)}, {number(peek.high)}]" if peek else "not audited"
        correlation, sent, received = s.distance_correlation, decimal(s.bytes_sent), decimal(s.bytes_received)
        cells = (run.name, s.defense, f"{100 * s.accuracy:.1f} %", number(correlation.squared_unbiased), interval)
        # As Text, brackets in a name are no mark-up.
        shown.add_row(*map(Text, (*cells, sent, received, f"{s.seconds:.1f} s")))
    return shown


def render(results: Sequence[RunResults]) -> str:
    """The page: one HTML file without scripts, that fetches nothing."""
    shown = strips(results)
    count = sum(len(row.records) for strip in shown for row in strip)
    longest = min(96, max(8, math.isqrt(PICTURE_BYTES // (4 * max(count, 1)))))  # 4 bytes a pixel: colors, PNG's own
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["number"] = number
    page.filters["png"] = lambda record_CHW: base64.b64encode(_png(picture(record_CHW, longest))).decode()
    charts = (
        chart("Loss", "in training; lower = a closer fit", results, lambda e: e.loss),
        chart("Accuracy", "share of test records", results, lambda e: e.accuracy),
        chart("Distance correlation", "squared, unbiased", results, lambda e: e.distance_correlation.squared_unbiased),
    )
    source = resources.files("milkglass").joinpath("report.html.jinja").read_text("utf-8")
    box = {"width": WIDTH, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
    return page.from_string(source).render(runs=results, strips=shown, charts=[c for c in charts if c], box=box)


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html, whole or not at all. Raises RunError, also on a full disk."""
    path = folder / "report.html"
    write_beside(path, render(read_results(folder)).encode())
    return path
