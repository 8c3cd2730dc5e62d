"""What compression leaves over, ||u - C(u)||^2 / ||u||^2, over a training, beside (1 - k/d)^2 and 1 - k/d: the figure
of Shi et al. (2019, arXiv 1911.08772), drawn from what `milkglass train` logs.

    python -m benchmarks.bound_over_training --data DIR [--figure FILE.svg] [--out FILE.json]

Two ranks under torchrun, the network and the training of large_batch_accuracy.py, exact top-k and Gaussian-k, with
densities .001 and .01; rank 0 is shown. u is the gradient and what was left over before. Runs that are there are not
made again. `milkglass report RUN` draws the same of any run of your own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import large_batch_accuracy
from benchmarks.setting import command_line, machine_line, write_result
from milkglass.charts import svg
from milkglass.figures import chart

_WAYS: Final = ("top-k, .001", "Gaussian-k, .001", "top-k, .01", "Gaussian-k, .01")
_POINTS: Final = 150
_BOUNDS: Final = {"(1 - k/d)²": "bound", "1 - k/d": "old_bound"}


def main() -> None:
    """Train what is missing, print a table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with fashion-mnist-{train,test}.npz")
    parser.add_argument("--runs", type=Path, default=Path("runs/less-on-the-wire"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = {name: _lines(arguments.data.resolve(), arguments.runs, name) for name in _WAYS}
    print(f"<!-- {command_line()}; {machine_line()} -->\n")
    print("| method | steps | left over: mean | least | most | mean (1 - k/d)² | mean 1 - k/d | steps below it, % |")
    print("|---|---|---|---|---|---|---|---|")
    rows = [_row(name, told) for name, told in lines.items()]
    for row in rows:
        figures = " | ".join(f"{row[key]:.5f}" for key in ("mean", "least", "most", "bound", "old_bound"))
        print(f"| {row['way']} | {row['steps']} | {figures} | {row['within']:.1f} |")
    if arguments.figure:
        arguments.figure.write_text(_picture(lines))
    if arguments.out:
        write_result(arguments.out, rows)


def _lines(data: Path, runs: Path, name: str) -> list[dict[str, Any]]:
    folder = large_batch_accuracy.run(data, runs, name, seed=0)
    return [json.loads(line) for line in (folder / "exchange.jsonl").read_text().splitlines()]


def _row(name: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    left = [line["left_share"] for line in lines]
    return {
        "way": name,
        "steps": len(lines),
        "mean": statistics.fmean(left),
        "least": min(left),
        "most": max(left),
        "bound": statistics.fmean(line["bound"] for line in lines),
        "old_bound": statistics.fmean(line["old_bound"] for line in lines),
        "within": 100 * statistics.fmean(line["left_share"] <= line["bound"] for line in lines),
    }


def _picture(lines: dict[str, list[dict[str, Any]]]) -> str:
    """A chart for each density: both methods and the bounds."""
    charts = []
    for density in (".001", ".01"):
        drawn = {name: told for name, told in lines.items() if name.endswith(f" {density}")}
        series = {name.split(",")[0]: _points(told, "left_share") for name, told in drawn.items()}
        exact = next(iter(drawn.values()))
        series |= {words: _points(exact, key) for words, key in _BOUNDS.items()}
        charts.append(chart(f"Left over, density {density}", "||u − C(u)||² / ||u||²", series, across="step"))
    return svg([each for each in charts if each is not None], machine_line())


def _points(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"] + 1, line[key]) for line in lines[:: -(-len(lines) // _POINTS)]]


if __name__ == "__main__":
    main()
