"""How long an audit takes, and what it says: `--quick` on digits, the default strength on Fashion-MNIST with `cnn`.

    python -m benchmarks.audit_time --data DIR [--cells DIR]

Wanted: quick on digits in under a minute; the default on Fashion-MNIST (6,000 auxiliary pairs) in under ten, on two
cores. Both are the ordinary commands, on the recipes' one thread; a run trained before is kept, what its audit kept is
removed. Seconds of this machine, once: bounds to hold, not figures to compare.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from benchmarks.accuracy_peek import Cell, train_cell
from benchmarks.setting import machine_line

RECIPE: Final = Path(__file__).parents[1] / "examples" / "digits.toml"


def main() -> None:
    """Train what is missing, audit, print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of fashion-mnist-{train,test}.npz")
    parser.add_argument("--cells", type=Path, default=Path("runs/audit-time"))
    arguments = parser.parse_args()
    digits = arguments.cells / "digits"
    if not (digits / "summary.json").exists():
        _milkglass("train", str(RECIPE), "--set", "defense={}", "--out", str(digits))
    fashion = Cell(None, 0.0, 0)
    train_cell(fashion, arguments.data, arguments.cells)
    print(f"<!-- python -m benchmarks.audit_time; {machine_line()} -->\n")
    print("| audit | seconds | processor seconds | wanted | peek (95 % interval) | best attack | verdict |")
    print("|---|---|---|---|---|---|---|")
    for what, run, options, wanted in (
        ("digits, `--quick`", digits, ["--quick"], 60),
        ("Fashion-MNIST, default", arguments.cells / fashion.name, [], 600),
    ):
        shutil.rmtree(run / "attacks", ignore_errors=True)
        wall, cpu = time.perf_counter(), _cpu_seconds()
        _milkglass("audit", str(run), *options)
        wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
        found = json.loads((run / "audit.json").read_text())
        peek = found["peek"]
        print(
            f"| {what} | {wall:.0f} | {cpu:.0f} | under {wanted} | {peek['value']:.3f} ({peek['low']:.3f} to "
            f"{peek['high']:.3f}) | {found['best_attack']} | {found['verdict']} |"
        )


def _milkglass(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "milkglass", *arguments], stdout=sys.stderr, check=False)
    if done.returncode not in (0, 4):  # 4: an inconclusive audit is a result, and the table says so
        raise SystemExit(f"milkglass {' '.join(arguments)} ended with {done.returncode}")


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
