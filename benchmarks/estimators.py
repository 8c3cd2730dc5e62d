"""NoPeek's estimators at matched accuracy, against four attackers: Fashion-MNIST, `cnn`.

    python -m benchmarks.estimators --data DIR [--cells DIR] [--seeds 0] [--only undefended,biased-10]
        [--attackers decoder,sdar] [--table FILE.md]

{none, Euclidean, squared distances, bias-corrected} x {decoder, defense-aware decoder, FSHA, SDAR}. A cell is a run of
examples/fashion-mnist.toml, shared with benchmarks.accuracy_peek, and `attackers.json` in its folder. The weights are
those at which the three estimators cost about as much accuracy. The stack is of those attackers that know pairs. What
is finished is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.accuracy_peek import Cell, train_cell
from benchmarks.setting import machine_line
from milkglass.attacks.base import Attack, Reconstruction
from milkglass.attacks.decoder import Decoder
from milkglass.attacks.defense_aware import DefenseAware
from milkglass.attacks.fsha import FsHijack, Plan
from milkglass.attacks.kernel_ridge import KernelRidge
from milkglass.attacks.mean_record import MeanRecord
from milkglass.attacks.ridge import Ridge
from milkglass.attacks.sdar import Sdar
from milkglass.attacks.stack import Stack
from milkglass.findings import find
from milkglass.kept import Kept
from milkglass.randomness import public_source
from milkglass.replay import replay
from milkglass.runs import RunFolder
from milkglass.transcript import View

MATCHED: Final = ((None, 0.0), ("biased", 10.0), ("linear", 10.0), ("unbiased", 10.0))
WORDS: Final = {None: "none", "biased": "Euclidean", "linear": "squared distances", "unbiased": "bias-corrected"}
NAMES: Final = ("decoder", "defense-aware decoder", "fsha", "sdar")
RESULT: Final = "attackers.json"


def suite() -> tuple[Attack, ...]:
    """The four attackers, after those that the entitled baseline needs.

    FSHA's gradient is scaled over the penalty's, and SDAR's simulator has the penalty; its critics weigh more than the
    authors', as its training is short.
    """
    fsha = FsHijack(Plan(iterations=600, loss_scale=100.0))
    sdar = Sdar(iterations=400, simulator_weight=0.5, decoder_weight=0.1)
    return MeanRecord(), Ridge(), KernelRidge(), Decoder(), DefenseAware(), fsha, sdar


def attack(cell: Cell, folder: Path, attackers: list[str]) -> None:
    """Attack one trained cell, unless that is done; interrupted, it goes on at the next attack."""
    run = folder / cell.name
    if (run / RESULT).exists():
        return
    reference = RunFolder.open_finished(folder / Cell(None, 0.0, cell.seed).name)
    replayed = replay(RunFolder.open_finished(run), reference)
    kept = Kept(run / "attacks")

    def runner(attack: Attack, view: View) -> Reconstruction:
        made = kept.reconstruction(view, attack)
        if made is None:
            print(f"{cell.name}: {attack.name}", file=sys.stderr, flush=True)
            made = attack.attack(view)
            kept.keep_reconstruction(view, attack, made)
        return made

    chosen = [attack for attack in suite() if attack.name not in NAMES or attack.name in attackers]
    found = find(replayed.trials[0], chosen, public_source(cell.seed), lambda _: runner)
    if found.skipped:
        raise SystemExit(f"{cell.name}: left out: {found.skipped}")
    content = {score.name: score.to_dict() for score in found.scores}
    (run / RESULT).write_text(json.dumps(content, indent=2))


def render(folder: Path, seeds: list[int]) -> str:
    """The table, in markdown: peek of each attacker, its interval, or the range over seeds where there are several."""
    names = [*NAMES, Stack.name]
    lines = [
        f"<!-- python -m benchmarks.estimators; {machine_line()} -->",
        "",
        f"| estimator | weight | seeds | accuracy, % | distance correlation² | {' | '.join(names)} |",
        "|---" * (5 + len(names)) + "|",
    ]
    for estimator, weight in MATCHED:
        done = [folder / Cell(estimator, weight, seed).name for seed in seeds]
        done = [run for run in done if (run / RESULT).exists()]
        if not done:
            continue
        summaries = [json.loads((run / "summary.json").read_text()) for run in done]
        accuracy = statistics.mean(100 * summary["accuracy"] for summary in summaries)
        dependence = statistics.mean(summary["distance_correlation"]["squared_unbiased"] for summary in summaries)
        attackers = [json.loads((run / RESULT).read_text()) for run in done]
        cells = " | ".join(_cell([found[name] for found in attackers if name in found]) for name in names)
        strength = f"{weight:g}" if weight else ""
        lines.append(f"| {WORDS[estimator]} | {strength} | {len(done)} | {accuracy:.1f} | {dependence:.3f} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "not run"
    peeks = [row["peek"] for row in rows]
    if len(rows) == 1:
        return f"{peeks[0]:.3f} ({rows[0]['peek_low']:.3f} to {rows[0]['peek_high']:.3f})"
    return f"{statistics.mean(peeks):.3f} ({min(peeks):.3f} to {max(peeks):.3f})"


def main() -> None:
    """Make what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of fashion-mnist-{train,test}.npz")
    parser.add_argument("--cells", type=Path, default=Path("runs/accuracy-peek"))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", default="", help="names of cells without their seed; default all")
    parser.add_argument("--attackers", default=",".join(NAMES))
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    cells = [Cell(estimator, weight, seed) for seed in seeds for estimator, weight in MATCHED]
    for cell in cells:
        if arguments.only and cell.name.rsplit("-seed", 1)[0] not in arguments.only.split(","):
            continue
        train_cell(cell, arguments.data, arguments.cells)
        attack(cell, arguments.cells, arguments.attackers.split(","))
    table = render(arguments.cells, seeds)
    print(table)
    if arguments.table:
        arguments.table.write_text(table)


if __name__ == "__main__":
    main()
