"""Hijack detection: the batch at which FSHA is caught, the peek it had by then, and false alarms over honest runs.

    python -m benchmarks.hijack_detection --runs DIR [--cells DIR] [--honest 60] [--hijacked 3] [--table FILE.md]

One thread, no defense, the guard with its defaults and active in all epochs. An honest cell trains one seed of
examples/digits.toml for 10 epochs with the guard, and once more without it: the difference is what it costs. A hijacked
cell takes a finished run of examples/fashion-mnist.toml, `undefended-seedN` in `--runs` (benchmarks.accuracy_peek makes
them; on digits FSHA rebuilds too little in this time to show what the guard saves), and lets FSHA drive the same client
twice: with the guard, and, to see what it was after, without. A cell is a JSON file; one that is there is not made
again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from scipy.stats import binomtest

from benchmarks.hijacking import answer_of
from benchmarks.setting import machine_line
from milkglass.attacks.base import Reconstruction
from milkglass.attacks.fsha import FsHijack, Plan
from milkglass.client import Guards, StepResult
from milkglass.errors import HijackError
from milkglass.leakage.estimate import Estimate
from milkglass.leakage.reconstruction import peek, squared_errors
from milkglass.messages import Responder
from milkglass.randomness import public_source
from milkglass.recipe import Recipe, load_recipe
from milkglass.replay import replay
from milkglass.runs import RunFolder
from milkglass.training.split import Setup, Silence, computing_with, evaluate_on_test, set_up, train_epoch
from milkglass.transcript import Driven, Trial

RECIPE: Final = Path(__file__).parents[1] / "examples" / "digits.toml"
HONEST_EPOCHS: Final = 10


def main() -> None:
    """Make what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of undefended-seed0, ...")
    parser.add_argument("--cells", type=Path, default=Path("runs/hijack-detection"))
    parser.add_argument("--honest", type=int, default=60)
    parser.add_argument("--hijacked", type=int, default=3)
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    cells: Path = arguments.cells
    cells.mkdir(parents=True, exist_ok=True)
    honest = [cell(cells / f"honest-{seed}.json", partial(honest_run, seed)) for seed in range(arguments.honest)]
    hijacked = [
        cell(cells / f"fsha-{seed}.json", partial(hijacked_run, seed, arguments.runs, cells))
        for seed in range(arguments.hijacked)
    ]
    table = render(honest, hijacked)
    print(table)
    if arguments.table:
        arguments.table.write_text(table)


def cell(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a cell holds, made unless it is there."""
    if not file.exists():
        content = make()
        file.write_text(json.dumps(content, indent=2) + "\n")
        print(f"{file.stem}: {content}", file=sys.stderr, flush=True)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def recipe_of(seed: int, *, guarded: bool) -> Recipe:
    """The digits recipe without a defense."""
    overrides = [f"seed={seed}", "defense={}", f"training.epochs={HONEST_EPOCHS}"]
    return load_recipe(RECIPE, [*overrides, "guard.hijack={}"] if guarded else overrides)


class _Scores(Silence):
    """Keeps what the guard judged after each mislabeled batch."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.judged: list[float] = []

    def batch(self, epoch: int, step: int, steps: int, result: StepResult) -> None:  # noqa: ARG002
        """Look at the guard."""
        guard = self._setup.client.guards.hijack
        if result.mislabeled and guard is not None and guard.score is not None:
            self.judged.append(guard.score)


def honest_run(seed: int) -> dict[str, Any]:
    """An honest training with the guard, and the same without: alarms, the least score judged, accuracies."""
    accuracy: dict[str, float] = {}
    judged: list[float] = []
    alarm = None
    for guarded in (True, False):
        recipe = recipe_of(seed, guarded=guarded)
        with computing_with(recipe.threads):
            setup = set_up(recipe)
            watch = _Scores(setup)
            try:
                for epoch in range(1, HONEST_EPOCHS + 1):
                    train_epoch(setup, epoch, watch)
            except HijackError:
                alarm = setup.client.steps
                setup.client.guards = Guards()  # else nothing more is sent, not to be evaluated either
            judged += watch.judged
            accuracy["guarded" if guarded else "plain"] = evaluate_on_test(setup, HONEST_EPOCHS).accuracy
    return {"seed": seed, "alarm_at": alarm, "judged": len(judged), "least_score": min(judged), "accuracy": accuracy}


def hijacked_run(seed: int, folder: Path, cells: Path) -> dict[str, Any]:
    """FSHA against the client, guarded and not: batches until it was stopped, and its peek then."""
    reference = RunFolder.open_finished(folder / f"undefended-seed{seed}")
    content: dict[str, Any] = {"seed": seed}
    for guarded in (True, False):
        guard: dict[str, Any] = {"guard": {"hijack": {}}} if guarded else {}
        recipe = Recipe.model_validate(reference.recipe.model_dump() | guard)
        (trial,) = replay(RunFolder(reference.path, recipe), reference).trials
        with computing_with(recipe.threads):
            entitled = answer_of(trial.view, cells / f"entitled-{seed}.safetensors")
            driven, found = hijack(trial, entitled, seed)
        content["guarded" if guarded else "plain"] = {
            "batches": driven.steps,
            "stopped": driven.stopped,
            "peek": found.value,
            "low": found.low,
            "high": found.high,
        }
    return content


def hijack(trial: Trial, entitled: Reconstruction, seed: int) -> tuple[Driven, Estimate]:
    """Run FSHA on a trial: (how far it drove the client, its peek on the test records)."""
    view = trial.view
    drive, drives = view.knowledge.train, list[Driven]()
    assert drive is not None

    def watched(server: Responder, steps: int) -> Driven:
        drives.append(drive(server, steps))
        return drives[-1]

    made = FsHijack(Plan(seed=seed)).attack(replace(view, knowledge=replace(view.knowledge, train=watched)))
    count = len(made.target)
    errors = [squared_errors(guess.target[:count], trial.truth[:count]) for guess in (made, entitled)]
    return drives[-1], peek(errors[0], errors[1], public_source(seed).generator("bootstrap"))


def render(honest: Sequence[dict[str, Any]], hijacked: Sequence[dict[str, Any]]) -> str:
    """Two tables in markdown."""
    alarms = sum(run["alarm_at"] is not None for run in honest)
    interval = binomtest(alarms, len(honest)).proportion_ci(0.95, method="exact")
    cost = [100 * (run["accuracy"]["plain"] - run["accuracy"]["guarded"]) for run in honest]
    plain = [100 * run["accuracy"]["plain"] for run in honest]
    error = statistics.stdev(cost) / len(cost) ** 0.5
    lines = [
        f"<!-- python -m benchmarks.hijack_detection; {machine_line()} -->",
        "",
        "| honest runs | judgements | false alarms (95 % Clopper-Pearson) | least score judged | accuracy, % "
        "| lost to the guard, points (standard error) |",
        "|---|---|---|---|---|---|",
        f"| {len(honest)} | {sum(run['judged'] for run in honest)} | {alarms} ({100 * interval.low:.1f} to "
        f"{100 * interval.high:.1f} %) | {min(run['least_score'] for run in honest):.3f} "
        f"| {statistics.mean(plain):.1f} | {statistics.mean(cost):.2f} ({error:.2f}) |",
        "",
        "| FSHA, seed | caught after batches | peek by then (95 % interval) | peek without the guard | after batches |",
        "|---|---|---|---|---|",
    ]
    for run in hijacked:
        caught, free = run["guarded"], run["plain"]
        when = str(caught["batches"]) if caught["stopped"] else f"not in {caught['batches']}"
        lines.append(
            f"| {run['seed']} | {when} | {caught['peek']:.3f} ({caught['low']:.3f} to {caught['high']:.3f}) "
            f"| {free['peek']:.3f} ({free['low']:.3f} to {free['high']:.3f}) | {free['batches']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
