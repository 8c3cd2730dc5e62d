"""SDAR on CIFAR-10: `resnet` of depth 8, defenses off and NoPeek at three weights.

    python -m benchmarks.sdar --data DIR [--cells DIR] [--iterations 1100] [--jobs 2] [--table FILE.md]

Setting: cut after `block2` (32 x 16 x 16), 10,000 private and 10,000 auxiliary records, batch 128, Adam 1e-3, one seed;
the attacker watches all of the training, which ends after `--iterations` batches. A cell is one process of one thread
and leaves one JSON file; a cell that is there is not made again.

The published figures (CIFAR-100, ResNet-20 cut after its seventh block, batch 128, 20,000 iterations: MSE .0214 to
.0432, SSIM .516 to .329, flat from .4 on) are of another data set and a much longer training: only the trend over the
weights is comparable. Published weights are shares: loss = (1 - a) * cross-entropy + a * distance correlation. With the
cross-entropy at weight 1, as here, that is a weight of a / (1 - a). As published, the attacker knows the defense.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.setting import machine_line
from milkglass.attacks.sdar import Sdar
from milkglass.cuts import cut
from milkglass.data import Deal, Records
from milkglass.leakage.reconstruction import squared_errors, ssim
from milkglass.messages import Responder
from milkglass.networks import build
from milkglass.randomness import rehearsal_source
from milkglass.recipe import Recipe, parse_recipe
from milkglass.replay import drive
from milkglass.server import Server
from milkglass.training.shares import deal_records
from milkglass.training.split import set_up
from milkglass.transcript import Driven, HonestServer, Knowledge, Pairs, Release, View

SHARES: Final = (0.0, 0.2, 0.4, 0.8)
CLIENT: Final = "hospital-a"
CUT: Final = "block2"
SSIM_AT_ONCE: Final = 100


def main() -> None:
    """Make what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10-{train,test}.parquet")
    parser.add_argument("--cells", type=Path, default=Path("runs/sdar"))
    parser.add_argument("--iterations", type=int, default=1100)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    arguments.cells.mkdir(parents=True, exist_ok=True)
    paths = [arguments.cells / f"share-{share:g}-{arguments.iterations}.json" for share in SHARES]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        made = [
            pool.submit(make, share, arguments.data, arguments.iterations, path)
            for share, path in zip(SHARES, paths, strict=True)
            if not path.exists()
        ]
        for cell in made:
            print(cell.result(), file=sys.stderr, flush=True)
    table = render([json.loads(path.read_text()) for path in paths])
    print(table)
    if arguments.table:
        arguments.table.write_text(table)


def recipe_of(data: Path, weight: float) -> Recipe:
    """The victim's recipe; weight 0: no defense."""
    return parse_recipe(
        {
            "data": {
                "path": str(data / "cifar10-train.parquet"),
                "test_path": str(data / "cifar10-test.parquet"),
                "train_records": 10_000,
                "test_records": 2_000,
            },
            "network": {"name": "resnet", "settings": {"depth": 8}},
            "cut": {"at": CUT},
            "defense": {"nopeek": {"weight": weight}} if weight else {},
            "training": {"batch_size": 128, "optimizer": "adam", "learning_rate": 1e-3},
            "parties": {"clients": [CLIENT]},
            "attacker": {"auxiliary_share": 0.2, "validation_share": 0.01},
        }
    )


def make(share: float, data: Path, iterations: int, path: Path) -> str:
    """One cell: train the victim with the attacker in the server's seat, write what it rebuilt of the test records."""
    torch.set_num_threads(1)
    weight = share / (1 - share)
    recipe = recipe_of(data, weight)
    records = deal_records(recipe)
    stage = _Watched(recipe, records)
    attack = Sdar(iterations=iterations)
    started, cpu = time.perf_counter(), _cpu_seconds()

    def tick(done: int, total: int) -> None:
        if done % 50 == 0:
            print(f"share {share:g}: {done} of {total}, {_cpu_seconds() - cpu:.0f} s", file=sys.stderr, flush=True)

    made = attack.attack(stage.view(), tick)
    test = records.test
    mean = records.auxiliary.x.mean(0).expand_as(test.x)
    result = {
        "share": share,
        "weight": weight,
        "iterations": iterations,
        "attack": repr(attack),
        "accuracy": stage.accuracy(),
        "mse": squared_errors(made.target, test.x).mean().item(),
        "ssim": _ssim(made.target, test.x),
        "mse_mean_record": squared_errors(mean, test.x).mean().item(),
        "mse_class_mean": _class_mean_error(records.auxiliary, test),
        "cpu_seconds": _cpu_seconds() - cpu,
        "seconds": time.perf_counter() - started,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
    return f"{path.stem}: done"


class _Watched:
    """A training from its first weights, as a view gives it to an attacker, and how well the victim did."""

    def __init__(self, recipe: Recipe, records: Deal) -> None:
        self._recipe, self._records = recipe, records
        self._private = rehearsal_source(recipe.seed, CLIENT)
        self._penalty = set_up(recipe, self._private, records=records).client.penalty
        self._server: Server | None = None
        self._driven: Driven | None = None

    def view(self) -> View:
        """Auxiliary records and labels, the architecture, and the training."""
        records = self._records
        return View(
            known=_pairs(records.auxiliary),
            validation=_pairs(records.validation),
            target=Release(_nothing(records.test), _nothing(records.test), records.test.y),
            knowledge=Knowledge(
                penalty=self._penalty,
                architecture=self._architecture,
                train=self._train,
                honest_server=self._honest_server,
            ),
        )

    def accuracy(self) -> float:
        """Share (0..1) of test records that the victim's two halves classify right together."""
        assert self._driven is not None
        assert self._server is not None
        self._server.stage.eval()
        with torch.no_grad():
            logits_NK = self._server.stage(self._driven.target)
        return float((logits_NK.argmax(1) == self._records.test.y).double().mean())

    def _architecture(self, generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
        network, records = self._recipe.network, self._records
        model = build(network.name, records.record_shape, records.classes, network.settings, generator)
        halves = cut(model, at=self._recipe.cut.at)
        return halves.bottom, halves.top

    def _honest_server(self) -> HonestServer:
        self._server = set_up(self._recipe, self._private, records=self._records).server
        return self._server

    def _train(self, server: Responder, steps: int) -> Driven:
        self._driven = drive(self._recipe, self._records, self._private, server, steps)
        return self._driven


def _pairs(part: Records) -> Pairs:
    return Pairs(_nothing(part), part.x, _nothing(part), labels=part.y)


def _nothing(part: Records) -> torch.Tensor:
    return torch.zeros(len(part), 0)


def _ssim(made: torch.Tensor, x: torch.Tensor) -> float:
    """Mean over the pictures, 100 at a time: for thousands at once it takes many gigabytes."""
    parts = zip(torch.split(made, SSIM_AT_ONCE), torch.split(x, SSIM_AT_ONCE), strict=True)
    return sum((ssim(*part) or 0.0) * len(part[0]) for part in parts) / len(x)


def _class_mean_error(auxiliary: Records, test: Records) -> float:
    """Of guessing the mean auxiliary record of the label's class: what the label alone tells."""
    one_of_NK = F.one_hot(auxiliary.y).to(auxiliary.x.dtype)
    means_KP = (one_of_NK.T @ auxiliary.x.flatten(1)) / one_of_NK.sum(0)[:, None]
    return squared_errors(means_KP[test.y], test.x.flatten(1)).mean().item()


def render(cells: Sequence[dict[str, Any]]) -> str:
    """The table, in markdown: a row per weight. Peek over the mean record: 1 - MSE / MSE of the mean record."""
    lines = [
        f"<!-- python -m benchmarks.sdar; {machine_line()} -->",
        "",
        f"Cut after `{CUT}`, batch 128, {cells[0]['iterations']} iterations, `{cells[0]['attack']}`.",
        f"Always guessing the mean record: MSE {cells[0]['mse_mean_record']:.4f}; the mean of the label's class: "
        f"{cells[0]['mse_class_mean']:.4f}.",
        "",
        "| NoPeek: share | weight | victim's accuracy, % | MSE | SSIM | peek over the mean record | CPU, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        lines.append(
            f"| {cell['share']:g} | {cell['weight']:.2f} | {100 * cell['accuracy']:.1f} | {cell['mse']:.4f} "
            f"| {cell['ssim']:.3f} | {1 - cell['mse'] / cell['mse_mean_record']:.3f} | {cell['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
