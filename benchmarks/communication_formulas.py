"""Bytes by formula, with the overheads that are stated, beside those counted on the wire.

    python -m benchmarks.communication_formulas [--clients 1,2,4] [--ranks 2,4] [--epochs 2] [--out FILE.json]
        [--figure FILE.svg]

Digits, the `cnn` cut after `block1`, Adam, batches of 16, one seed, one thread; ranks: an `mlp` of 50,826 numbers, gloo
on loopback. Split training is counted frame by frame; ranks at their sockets, where the kernel counts a packet that is
sent again as sent: received bytes are the ones to compare. Counted is of all clients together, the whole training.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.setting import command_line, machine_line, write_result
from milkglass.charts import svg
from milkglass.costs import BYTES_PER_SCALAR, Scale
from milkglass.costs_figure import formula_charts
from milkglass.costs_wire import Flows, Terms, Work, ring_bytes, split_bytes
from milkglass.recipe import Recipe, parse_recipe
from milkglass.training.split import Setup, computing_with, play_epoch, set_up

SPLIT_WAYS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "relay": ("relay", {}),
    "relay, U-shaped": ("relay", {"back_at": "hidden"}),
    "splitfed1": ("splitfed1", {}),
    "splitfed2": ("splitfed2", {}),
}
"""Mode, and what the recipe's `cut` table has beside `at`."""
_BATCH: Final = 16
_RECORDS, _TESTS = 512, 128
NUMBERS: Final = 64 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10
"""Of the ranks' network."""
_RANKS_RECIPE: Final = """\
[data]
name = "digits"
train_records = 512
test_records = 100
test_share = 0.1

[network]
name = "mlp"
settings = {{ hidden = [256, 128] }}

[training]
epochs = {epochs}
batch_size = 8
optimizer = "sgd"
learning_rate = 0.1

[parties]
mode = "data_parallel"

[attacker]
auxiliary_share = 0.1
validation_share = 0.1
"""


def main() -> None:
    """Train, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,2,4")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path, help="an SVG of the formulas, with what was counted on top")
    arguments = parser.parse_args()
    print(f"<!-- {command_line()}; {machine_line()} -->\n")
    clients, ranks = ([int(each) for each in told.split(",") if each] for told in (arguments.clients, arguments.ranks))
    rows = [*split_rows(clients, arguments.epochs), *ring_rows(ranks, arguments.epochs)]
    print_table(rows)
    print_terms(rows)
    if arguments.out:
        write_result(arguments.out, rows)
    if arguments.figure:
        arguments.figure.write_text(_figure(rows, arguments.epochs))


def recipe_of(mode: str, clients: int, cut: dict[str, Any], epochs: int) -> Recipe:
    """The split trainings of the table."""
    tables: dict[str, Any] = {
        "data": {"name": "digits", "train_records": _RECORDS, "test_records": _TESTS, "test_share": 0.1},
        "network": {"name": "cnn", "settings": {"width": 8, "hidden": 32}},
        "cut": {"at": "block1", **cut},
        "training": {"epochs": epochs, "batch_size": _BATCH, "learning_rate": 1e-2},
        "parties": {"clients": [f"client{number}" for number in range(1, clients + 1)], "mode": mode},
        "attacker": {"auxiliary_share": 0.1, "validation_share": 0.1},
    }
    return parse_recipe(tables)


def work_of(setup: Setup) -> Work:
    """The numbers of a training that is set up: the formula needs no more of it."""
    recipe, training = setup.recipe, setup.recipe.training
    parts = {"stage": setup.client.stage, "head": setup.client.head}
    held = [
        (f"{part}.{name}", tuple(parameter.shape))
        for part, module in parts.items()
        if module is not None
        for name, parameter in module.named_parameters()
    ]
    z_1 = setup.client.noise_free(setup.seats[0].share.train.x[:1])
    features = tuple(setup.server.stage(z_1).shape[1:]) if recipe.cut.back_at is not None else None
    mode = recipe.parties.mode
    if mode not in ("relay", "splitfed1", "splitfed2"):
        raise ValueError(f"mode {mode}: no formula")
    return Work(
        clients=recipe.parties.clients,
        cut=tuple(z_1.shape[1:]),
        classes=setup.records.classes,
        records=sum(len(seat.share.train) for seat in setup.seats),
        test_records=sum(len(seat.share.test) for seat in setup.seats),
        client_parameters=sum(math.prod(shape) for _, shape in held),
        client_tensors=len(held),
        epochs=training.epochs,
        batch_size=training.batch_size,
        features=features,
        mode=mode,
        optimizer=training.optimizer,
        momentum=training.momentum,
        drop_last_batch=training.drop_last_batch,
        server=recipe.parties.server,
        stage=tuple(held),
    )


def played(recipe: Recipe) -> tuple[Work, list[tuple[int, int]]]:
    """Train: the numbers of it, and (bytes up, bytes down) of each client as they were counted."""
    with computing_with(1):
        setup = set_up(recipe)
        work = work_of(setup)
        for epoch in range(1, recipe.training.epochs + 1):
            play_epoch(setup, epoch)
    flows = [seat.client.transport.traffic for seat in setup.seats]
    return work, [(each.wire_bytes("to server"), each.wire_bytes("to client")) for each in flows]


def split_rows(counts: Sequence[int], epochs: int) -> Iterator[dict[str, Any]]:
    """A row for each way and number of clients."""
    for way, (mode, cut) in SPLIT_WAYS.items():
        for count in counts:
            if mode != "relay" and count < 2:
                continue
            work, counted = played(recipe_of(mode, count, cut, epochs))
            yield _row(way, count, split_bytes(work), [sum(each) for each in zip(*counted, strict=True)])


def ring_rows(counts: Sequence[int], epochs: int) -> Iterator[dict[str, Any]]:
    """A row for each number of ranks, by torchrun, as users start them."""
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder) / "recipe.toml"
            told.write_text(_RANKS_RECIPE.format(epochs=epochs))
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            command += ["-m", "milkglass", "train", str(told), "--out", f"{folder}/run"]
            done = subprocess.run(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"data_parallel with {count} ranks ended with {done.returncode}: {done.stderr}")
            summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
        flows = [ring_bytes(NUMBERS, count, summary["steps"], epochs=epochs)] * count
        yield _row("large-batch", count, flows, [summary["bytes_sent"], summary["bytes_received"]])


def _row(way: str, count: int, flows: Sequence[Flows], counted: Sequence[int]) -> dict[str, Any]:
    up = sum((each.up for each in flows), Terms())
    down = sum((each.down for each in flows), Terms())
    return {
        "way": way,
        "clients": count,
        "up": asdict(up),
        "down": asdict(down),
        "formula": up.formula + down.formula,
        "stated": [up.total, down.total],
        "counted": list(counted),
        "ratio": [number / told for number, told in zip(counted, (up.total, down.total), strict=True)],
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Formula, overheads, counted; ratios are counted / (formula and overheads)."""
    print("Bytes of all clients, both ways:\n")
    print("| way | clients | formula | with stated overheads | counted | counted / stated, up | down | both |")
    print(f"|{'---|' * 8}")
    for row in rows:
        stated, counted = sum(row["stated"]), sum(row["counted"])
        print(
            f"| {row['way']} | {row['clients']} | {row['formula']:,.0f} | {stated:,.0f} | {counted:,} "
            f"| {row['ratio'][0]:.4f} | {row['ratio'][1]:.4f} | {counted / stated:.4f} |"
        )


def print_terms(rows: Sequence[dict[str, Any]]) -> None:
    """What the stated bytes are made of."""
    names = list(asdict(Terms()))
    print(f"\nTerms, in bytes, up / down:\n\n| way | clients | {' | '.join(names)} |\n|{'---|' * (2 + len(names))}")
    for row in rows:
        told = [f"{row['up'][name]:,.0f} / {row['down'][name]:,.0f}" for name in names]
        print(f"| {row['way']} | {row['clients']} | {' | '.join(told)} |")


def _figure(rows: Sequence[dict[str, Any]], epochs: int) -> str:
    """The formulas at the scale of the split trainings, and what was counted of them, a client and epoch."""
    setup = set_up(recipe_of("relay", 1, {}, epochs))
    work = work_of(setup)
    whole = sum(p.numel() for part in (setup.client.stage, setup.server.stage) for p in part.parameters())
    q = split_bytes(replace(work, tested=False))[0].up.payload / (BYTES_PER_SCALAR * work.records * epochs)
    scale = Scale(1, whole, work.records, q, work.client_parameters / whole, _BATCH)
    measured = {
        way: [
            (row["clients"], sum(row["counted"]) / row["clients"] / epochs)
            for row in rows
            if (row["way"], row["clients"] > 1) == (told, True)
        ]
        for way, told in (("split, weights handed on", "relay"),)
    }
    words = "Digits, a small network. Lines are formulas; dots were counted, with labels, tests and optimizers' state."
    return svg(formula_charts(scale, measured), words)


if __name__ == "__main__":
    main()
