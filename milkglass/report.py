"""Run folders -> one self-contained HTML page, a strip of pictures for a README, and the command line's small table.

Files are read in `results`. The geometry of charts and pictures is in
`figures`; the page's words are in `report.html.jinja`, autoescape on. The page has no script and fetches nothing.

Legend: P records shown, C channels, H height, W width, F values of a flat record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from milkglass import figures
from milkglass.errors import RunError
from milkglass.figures import Row, number
from milkglass.results import AttackFigures, AuditFigures, Baseline, Epoch, ExchangeLine, RunResults, read_results
from milkglass.runs import write_beside

__all__ = ["attack_strip", "exchange_charts", "read_results", "render", "strip_png", "strips", "table", "write_report"]

_MOST_STEPS: Final = 200


def strips(results: Sequence[RunResults]) -> list[list[Row]]:
    """Rows of records, of each run's best reconstruction, of the entitled baseline; a strip per record set."""
    groups: dict[bytes, list[RunResults]] = {}
    for run in results:
        if _shown(run):
            groups.setdefault(run.pictures["records"].tobytes(), []).append(run)
    return [_rows(group) for group in groups.values()]


def _rows(group: Sequence[RunResults]) -> list[Row]:
    rows = [_raw(group[0])]
    baselines: list[Row] = []
    for run in group:
        best = _shown(run)[0]  # strips() keeps only runs that have one
        rows.append(Row(run.name, f"rebuilt by {best.name}", number(best.peek), run.pictures[best.name]))
        entitled = run.pictures.get("entitled")
        if entitled is not None and not any(np.allclose(entitled, row.records, atol=0.02) for row in baselines):
            detail = run.baseline.row + (f", {run.name}" if baselines else "")
            baselines.append(Row("entitled baseline", detail, "0", entitled))
    return rows + baselines


def _shown(run: RunResults) -> list[AttackFigures]:
    """The attacks that there are pictures of, on the exposure that these are of, best first."""
    if run.audit is None or "records" not in run.pictures:
        return []
    exposures = run.audit.exposures
    shown = run.audit.pictures_of or max(exposures, key=lambda name: exposures[name].high, default="")
    return [k for k in run.audit.ranked if k.exposure == shown and k.name in run.pictures]


def _raw(run: RunResults) -> Row:
    """The records themselves; of recorded ones it is not known what else was done with them."""
    label, detail = ("records", "held back") if run.is_recorded else ("test records", "never sent")
    return Row(label, detail, "1", run.pictures["records"])


def _exposed(exposure: str) -> str:
    """An exposure in words; contributions to an open collaboration are in words already."""
    return exposure if exposure.startswith("contribution") else f"{exposure} records"


def attack_strip(run: RunResults) -> list[Row]:
    """Rows of a run's records, of what each attack rebuilt, best first, and of the entitled baseline.

    The pictures and their peeks are of one exposure. Empty where there are no pictures.
    """
    if run.audit is None or "records" not in run.pictures:
        return []
    rows = [_raw(run)]
    rows += [Row(k.name, _exposed(k.exposure), number(k.peek), run.pictures[k.name]) for k in _shown(run)]
    if "entitled" in run.pictures:
        rows.append(Row("entitled baseline", run.baseline.row, "0", run.pictures["entitled"]))
    return rows


def strip_png(results: Sequence[RunResults]) -> bytes:
    """The strips as one PNG with row labels; the same bytes each time. RunError where no run has audited pictures."""
    shown = [strip for strip in strips(results) if strip[0].records.ndim == 4]
    if not shown:
        raise RunError("no strip to draw: no run has an audit and pictures of its records")
    return figures.png(figures.sheet([row for strip in shown for row in strip]))


def table(results: Sequence[RunResults]) -> Table:
    """What the command line prints: a line per run."""
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    shown.add_column("run", no_wrap=True)
    shown.add_column("defense")
    for figure in ("accuracy", "distance\ncorr.²", "peek\n(95 % interval)", "sent", "received", "time"):
        shown.add_column(figure, justify="right", no_wrap=True)
    for run in results:
        peek = run.audit and run.audit.peek
        interval = f"{number(peek.value)} [{number(peek.low)}, {number(peek.high)}]" if peek else "not audited"
        accuracy = correlation = sent = received = time = "–"
        if s := run.summary:
            accuracy, time = f"{100 * s.accuracy:.1f} %", f"{s.seconds:.1f} s"
            if s.distance_correlation is not None:
                correlation = number(s.distance_correlation.squared_unbiased)
            if s.bytes_sent is not None and s.bytes_received is not None:
                sent, received = decimal(s.bytes_sent), decimal(s.bytes_received)
        cells = (run.name, run.defense or "not known", accuracy, correlation, interval, sent, received, time)
        shown.add_row(*map(Text, cells))  # as Text, brackets in a name are no mark-up
    return shown


def _curves(audit: AuditFigures, baseline: Baseline) -> list[figures.Chart]:
    """Error against number of pairs, a chart per exposure, with the error of the baseline."""
    charts: list[figures.Chart | None] = []
    for exposure in dict.fromkeys(curve.exposure for curve in audit.curves):
        curves = [curve for curve in audit.curves if curve.exposure == exposure]
        # peek = 1 - error / error of the baseline
        alone = (mse / (1 - peek) for c in curves for mse, peek in zip(c.mse, c.peek, strict=False) if peek < 1)
        level = next(((error, baseline.name.removeprefix("the ")) for error in alone if math.isfinite(error)), None)
        lines = {curve.attack: list(zip(curve.pairs, curve.mse, strict=False)) for curve in curves}
        title, unit = f"Error, {exposure} records", "mean squared error; lower = more was rebuilt"
        charts.append(figures.chart(title, unit, lines, across="number of pairs", log=True, level=level))
    return [chart for chart in charts if chart]


def _bars(audit: AuditFigures, baseline: Baseline) -> figures.Bars | None:
    measured = [figures.Measured(k.name, k.exposure, k.peek, k.interval) for k in audit.attacks]
    return figures.bars(measured, audit.budget.get("peek"), baseline.name)


def _epoch_charts(results: Sequence[RunResults]) -> list[figures.Chart]:
    def chart(title: str, unit: str, value: Callable[[Epoch], float | None]) -> figures.Chart | None:
        lines = {run.name: [(e.epoch, y) for e in run.epochs if (y := value(e)) is not None] for run in results}
        return figures.chart(title, unit, {name: points for name, points in lines.items() if points})

    charts = (
        chart("Loss", "in training; lower = a closer fit", lambda e: e.loss),
        chart("Accuracy", "share of test records", lambda e: e.accuracy),
        chart(
            "Distance correlation",
            "squared, unbiased",
            lambda e: None if e.distance_correlation is None else e.distance_correlation.squared_unbiased,
        ),
    )
    return [drawn for drawn in charts if drawn]


def exchange_charts(run: RunResults) -> list[figures.Chart]:
    """By step: what compression left over beside its bounds, or the period of averages and what it follows.

    Of many steps those at even distances are drawn.
    """
    shown = run.exchange[:: -(-len(run.exchange) // _MOST_STEPS) or 1]

    def drawn(title: str, unit: str, **lines: Callable[[ExchangeLine], float | None]) -> figures.Chart | None:
        found = {
            name: [(line.step + 1, y) for line in shown if (y := value(line)) is not None]
            for name, value in lines.items()
        }
        return figures.chart(title, unit, {n: points for n, points in found.items() if points}, across="step")

    if not any(line.variance is not None for line in shown):
        charts = [
            drawn(
                "Left over by compression",
                "||u - C(u)||² / ||u||², at rank 0; lower = more was sent",
                **{"measured": lambda line: line.left_share, "(1 - k/d)²": lambda line: line.bound},
                **{"1 - k/d": lambda line: line.old_bound},
            ),
            drawn(
                "Gradients sent",
                "percent of all, at rank 0",
                sent=lambda line: 100 * line.sent / line.numbers if line.sent is not None and line.numbers else None,
            ),
        ]
    else:
        charts = [
            drawn("Steps between two averages", "the period", period=lambda line: line.period),
            drawn(
                "How far the ranks' weights lie apart",
                "S, and γ C₂ that it is compared with",
                **{"S": lambda line: line.variance, "γ C₂": lambda line: line.bound},
            ),
        ]
    return [each for each in charts if each]


@cache
def _page() -> Template:
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters.update(number=number, png=figures.png_base64, exposed=_exposed)
    return page.from_string(resources.files("milkglass").joinpath("report.html.jinja").read_text("utf-8"))


def render(results: Sequence[RunResults]) -> str:
    """The page: one HTML file without scripts, that fetches nothing."""
    side_by_side = strips(results) if len(results) > 1 else []
    by_run = {run.name: strip for run in results if (strip := attack_strip(run))}
    shown, longest = figures.fit([*side_by_side, *by_run.values()])
    audits = {run.name: run.audit for run in results if run.audit}
    baselines = {run.name: run.baseline for run in results}
    return _page().render(
        runs=results,
        trained=[run for run in results if run.summary],
        audits=audits,
        strips=side_by_side,
        by_run=by_run,
        shown=shown,
        longest=longest,
        charts=_epoch_charts(results),
        exchanges={run.name: charts for run in results if (charts := exchange_charts(run))},
        bars={name: _bars(audit, baselines[name]) for name, audit in audits.items()},
        curves={name: _curves(audit, baselines[name]) for name, audit in audits.items()},
        box={"width": figures.WIDTH, "left": figures.LEFT, "right": figures.RIGHT, "bottom": figures.BOTTOM},
    )


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html, whole or not at all. Raises RunError, also on a full disk."""
    path = folder / "report.html"
    write_beside(path, render(read_results(folder)).encode())
    return path
