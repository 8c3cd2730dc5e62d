"""Feature-space hijacking against NoPeek: Fashion-MNIST, `cnn`, a hostile server in the place of the honest one.

    python -m benchmarks.hijacking --runs DIR [--cells DIR] [--iterations 1000] [--table FILE.md]

DIR holds two finished runs of examples/fashion-mnist.toml, as `python -m benchmarks.accuracy_peek` leaves them:
`undefended-seed0`, whose answers are what the server is entitled to, and `biased-10-seed0`, whose accuracy tells what
NoPeek of weight 10 costs. A cell trains the real client anew from its first weights, its defense on, and leaves one
JSON file; a cell that is there is not made again.

Two peeks: of what the hijacked client's activations give alone, and stacked with what the answer gives (both attackers
have it; `combine` of attacks/stack.py, weights from validation records).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.setting import machine_line
from milkglass.attacks.base import Attack, Reconstruction
from milkglass.attacks.decoder import Decoder
from milkglass.attacks.features import answer_alone
from milkglass.attacks.fsha import FsHijack, Plan
from milkglass.attacks.kernel_ridge import KernelRidge
from milkglass.attacks.mean_record import MeanRecord
from milkglass.attacks.ridge import Ridge
from milkglass.attacks.stack import combine
from milkglass.leakage.reconstruction import peek, squared_errors, ssim
from milkglass.randomness import public_source, rehearsal_source
from milkglass.recipe import Recipe
from milkglass.replay import drive, replay
from milkglass.runs import RunFolder
from milkglass.training.shares import deal_records
from milkglass.transcript import Trial, View

REFERENCE: Final = "undefended-seed0"
DEFENDED: Final = "biased-10-seed0"
CELLS: Final = ((0.0, 1.0), (10.0, 25.0), (1e4, 1.0), (1e4, 1e5))
"""(NoPeek's weight, loss scale)."""
ENTITLED: Final[tuple[Attack, ...]] = (MeanRecord(), Ridge(), KernelRidge(), Decoder())


def main() -> None:
    """Make what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help=f"folder of {REFERENCE} and {DEFENDED}")
    parser.add_argument("--cells", type=Path, default=Path("runs/hijacking"))
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.cells.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in CELLS if not path_of(arguments.cells, cell, arguments.iterations).exists()]
    if missing:
        reference = RunFolder.open_finished(arguments.runs / REFERENCE)
        (trial,) = replay(reference, reference).trials
        entitled = answer_of(trial.view, arguments.cells / "entitled.safetensors")
        for cell in missing:
            row = make(reference.recipe, trial, entitled, cell, arguments.iterations)
            path_of(arguments.cells, cell, arguments.iterations).write_text(json.dumps(row, indent=2) + "\n")
            print(row, file=sys.stderr, flush=True)
    rows = [json.loads(path_of(arguments.cells, cell, arguments.iterations).read_text()) for cell in CELLS]
    table = render(rows, arguments.runs)
    print(table)
    if arguments.table:
        arguments.table.write_text(table)


def path_of(folder: Path, cell: tuple[float, float], iterations: int) -> Path:
    """Where a cell is kept."""
    weight, scale = cell
    return folder / f"nopeek-{weight:g}-scale-{scale:g}-{iterations}.json"


def answer_of(view: View, path: Path) -> Reconstruction:
    """The best that the answer alone gives, on validation records; kept in `path`."""
    if path.exists():
        kept = load_file(path)
        return Reconstruction(kept["validation"], kept["target"], 0.0)
    alone = answer_alone(view)
    made = [attack.attack(alone) for attack in ENTITLED]
    made.append(combine(alone, made))
    best = min(made, key=lambda each: squared_errors(each.validation, view.validation.records).mean().item())
    save_file({"validation": best.validation.contiguous(), "target": best.target.contiguous()}, path)
    return best


def defended(recipe: Recipe, weight: float) -> Recipe:
    """The recipe with NoPeek of that weight; 0: without any defense."""
    if not weight:
        return recipe.undefended()
    tables = recipe.model_dump() | {"defense": {"nopeek": {"weight": weight, "estimator": "biased"}}}
    return Recipe.model_validate(tables)


def make(
    recipe: Recipe, trial: Trial, entitled: Reconstruction, cell: tuple[float, float], iterations: int
) -> dict[str, Any]:
    """Hijack one client."""
    weight, scale = cell
    own, private = defended(recipe, weight), rehearsal_source(recipe.seed, recipe.parties.clients[0])
    records = deal_records(own)
    knowledge = replace(trial.view.knowledge, train=lambda server, steps: drive(own, records, private, server, steps))
    view = replace(trial.view, knowledge=knowledge)
    start = time.process_time()
    made = FsHijack(Plan(iterations=iterations, loss_scale=scale)).attack(view)
    cpu_seconds = time.process_time() - start
    stacked = combine(view, [made, entitled])
    return {
        "weight": weight,
        "scale": scale,
        "iterations": iterations,
        "error_entitled": squared_errors(entitled.target, trial.truth).mean().item(),
        "mse": squared_errors(made.target, trial.truth).mean().item(),
        "ssim": ssim(made.target, trial.truth),
        "peek": peek_of(made.target, entitled, trial.truth),
        "peek_stacked": peek_of(stacked.target, entitled, trial.truth),
        "seconds": made.seconds,
        "cpu_seconds": cpu_seconds,
        "machine": machine_line(),
    }


def peek_of(target: Tensor, entitled: Reconstruction, truth: Tensor) -> dict[str, float]:
    """Peek with its interval."""
    errors = squared_errors(target, truth), squared_errors(entitled.target, truth)
    return peek(*errors, public_source(0).generator("hijacking", "bootstrap")).to_dict()


def render(rows: list[dict[str, Any]], runs: Path) -> str:
    """The table, in markdown."""
    honest, guarded = (RunFolder.open_finished(runs / name).accuracy for name in (REFERENCE, DEFENDED))
    lines = [
        f"<!-- python -m benchmarks.hijacking; {rows[0]['machine']} -->",
        "",
        f"Accuracy of an honest training: undefended {100 * honest:.1f} %, NoPeek of weight 10 {100 * guarded:.1f} %.",
        f"Entitled error {rows[0]['error_entitled']:.4f}.",
        "",
        "| defense | loss scale | iterations | peek (95 % interval) | with the answer | SSIM | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        defense = f"NoPeek, weight {row['weight']:g}" if row["weight"] else "none"
        lines.append(
            f"| {defense} | {row['scale']:g} | {row['iterations']} | {_interval(row['peek'])} "
            f"| {_interval(row['peek_stacked'])} | {row['ssim']:.3f} | {row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _interval(found: dict[str, float]) -> str:
    return f"**{found['value']:.3f}** ({found['low']:.3f} to {found['high']:.3f})"


if __name__ == "__main__":
    main()
