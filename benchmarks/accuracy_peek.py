"""Accuracy against peek: Fashion-MNIST, `cnn`, undefended and NoPeek at five weights with both estimators.

    python -m benchmarks.accuracy_peek --data DIR [--cells DIR] [--jobs 2] [--table FILE.md]

Every cell is a run of examples/fashion-mnist.toml by the ordinary commands, `milkglass train` and `milkglass audit
--quick` (fresh releases, attackers with pairs), one thread each. A cell that is finished is not made again; one that
was stopped goes on. The sweep has one seed, its ends (undefended, and the largest weight of each estimator) have three.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.setting import machine_line

RECIPE: Final = Path(__file__).parents[1] / "examples" / "fashion-mnist.toml"
WEIGHTS: Final = (0.5, 1.0, 2.0, 5.0, 10.0)
ESTIMATORS: Final = ("biased", "unbiased")
SEEDS: Final = (0, 1, 2)
ATTACKS: Final = "nearest neighbor,kernel ridge,decoder"


@dataclass(frozen=True)
class Cell:
    """One run: an estimator with its weight, or no defense, and a seed."""

    estimator: str | None
    weight: float
    seed: int

    @property
    def name(self) -> str:
        """The folder's name."""
        defense = "undefended" if self.estimator is None else f"{self.estimator}-{self.weight:g}"
        return f"{defense}-seed{self.seed}"


def cells() -> list[Cell]:
    """The sweep on one seed, then the ends on the others; the references first, since every audit needs one."""
    ends = [Cell(None, 0.0, seed) for seed in SEEDS]
    sweep = [Cell(estimator, weight, SEEDS[0]) for weight in WEIGHTS for estimator in ESTIMATORS]
    return [*ends, *sweep, *(Cell(estimator, WEIGHTS[-1], seed) for seed in SEEDS[1:] for estimator in ESTIMATORS)]


def main() -> None:
    """Make what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of fashion-mnist-{train,test}.npz")
    parser.add_argument("--cells", type=Path, default=Path("runs/accuracy-peek"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    references = [cell for cell in cells() if cell.estimator is None]
    others = [cell for cell in cells() if cell.estimator is not None]
    for stage in (references, others):
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for cell in pool.map(lambda cell: make(cell, arguments.data, arguments.cells), stage):
                print(f"{cell.name}: done", file=sys.stderr, flush=True)
    table = render(arguments.cells)
    print(table)
    if arguments.table:
        arguments.table.write_text(table)


def make(cell: Cell, data: Path, folder: Path) -> Cell:
    """Train and audit one cell, unless that is done."""
    out = folder / cell.name
    if not (out / "audit.json").exists():
        train_cell(cell, data, folder)
        reference = folder / Cell(None, 0.0, cell.seed).name
        _milkglass(out, "audit", str(out), "--quick", "--attacks", ATTACKS, "--reference", str(reference))
    return cell


def train_cell(cell: Cell, data: Path, folder: Path) -> None:
    """Train one cell, unless that is done."""
    if (folder / cell.name / "summary.json").exists():
        return
    if cell.estimator is None:
        defense = "defense={}"
    else:
        defense = f"defense={{ nopeek = {{ weight = {cell.weight}, estimator = '{cell.estimator}' }} }}"
    overrides = [
        f"seed={cell.seed}",
        defense,
        f"data.path={data / 'fashion-mnist-train.npz'}",
        f"data.test_path={data / 'fashion-mnist-test.npz'}",
    ]
    options = [word for override in overrides for word in ("--set", override)]
    out = folder / cell.name
    _milkglass(out, "train", str(RECIPE), *options, "--out", str(out), "--resume")


def render(folder: Path) -> str:
    """The table, in markdown: a row per defense, means and ranges over seeds where there are several."""
    rows: dict[tuple[str | None, float], list[dict[str, Any]]] = {}
    for cell in cells():
        if not (folder / cell.name / "audit.json").exists():
            continue  # not made yet: the table tells how many seeds a row has
        summary = json.loads((folder / cell.name / "summary.json").read_text())
        audit = json.loads((folder / cell.name / "audit.json").read_text())
        rows.setdefault((cell.estimator, cell.weight), []).append(
            {
                "accuracy": 100 * summary["accuracy"],
                "dependence": summary["distance_correlation"]["squared_unbiased"],
                "peek": audit["peek"]["value"],
                "interval": f"{audit['peek']['low']:.3f} to {audit['peek']['high']:.3f}",
                **{row["name"]: row["peek"] for row in audit["attacks"]},
                "match": 100 * max(row["match_top1"] for row in audit["attacks"]),
                "verdict": audit["verdict"],
            }
        )
    lines = [
        f"<!-- python -m benchmarks.accuracy_peek; {machine_line()} -->",
        "",
        "| defense | weight | seeds | accuracy, % | distance correlation² | peek (95 % interval, or range over seeds) "
        "| ridge | kernel ridge | decoder | top-1 match, % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (estimator, weight), found in rows.items():
        several = len(found) > 1
        spread = _range([row["peek"] for row in found]) if several else found[0]["interval"]
        flag = "" if all(row["verdict"] == "no budget set" for row in found) else " (inconclusive)"
        words = ("none", "") if estimator is None else (f"NoPeek, {estimator}", f"{weight:g}")
        lines.append(
            f"| {words[0]} | {words[1]} | {len(found)} "
            f"| {_mean(found, 'accuracy'):.1f} | {_mean(found, 'dependence'):.3f} "
            f"| **{_mean(found, 'peek'):.3f}** ({spread}){flag} | {_mean(found, 'ridge'):.3f} "
            f"| {_mean(found, 'kernel ridge'):.3f} | {_mean(found, 'decoder'):.3f} | {_mean(found, 'match'):.1f} |"
        )
    return "\n".join(lines) + "\n"


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return float(statistics.mean(row[key] for row in rows))


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def _milkglass(out: Path, *arguments: str) -> None:
    """Run a command with one thread; its words go to a log beside the cell."""
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with out.with_suffix(".log").open("a") as log:
        done = subprocess.run(
            [sys.executable, "-m", "milkglass", *arguments], stdout=log, stderr=log, env=environment, check=False
        )
    if done.returncode not in (0, 4):  # 4: an inconclusive audit is a result, and the table says so
        raise SystemExit(f"{out.name}: milkglass {arguments[0]} ended with {done.returncode}; see {log.name}")


if __name__ == "__main__":
    main()
