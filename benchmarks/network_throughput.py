"""Split training between two processes of one thread each, over loopback with mutual TLS, against one process.

    python -m benchmarks.network_throughput [--data DIR] [--blocks 12] [--batch 64 256] [--out FILE.json]

The parties are what users run: `serve` and `join`, with their journals and checkpoints. Against them the whole network
in a plain loop, same records, same optimizer, on one thread and on two; with freed memory kept, as our parties keep it,
and on one thread also as glibc does by itself. All take turns, in blocks of about a second.
Throughput, as a share of one thread's: wanted is 0.85 of the plain schedule and 1.0 with micro-batches in flight.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from benchmarks.setting import command_line, machine_line, write_result
from benchmarks.turns import Block, OverError, Turn, Worker, alternate, ratio
from benchmarks.two_parties import (
    CASES,
    CLIENT,
    WARM_UP_STEPS,
    Case,
    Place,
    place,
    recipe_of,
    records_file,
    two_parties,
)
from milkglass.memory import keep_freed_memory
from milkglass.recipe import Recipe

_BLOCK_SECONDS: Final = 1.0
_ONE, _TWO, _ORDINARY = "one thread", "two threads", "one thread, memory given back"


def main() -> None:
    """Measure every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with the data sets; without it random records")
    parser.add_argument("--blocks", type=int, default=12, help="of about a second, of each contender")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--pieces", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print(f"{command_line()}\n{machine_line()}; {'data sets' if arguments.data else 'random records'}\n")
    heads = ["plain" if pieces == 1 else f"{pieces} pieces" for pieces in arguments.pieces]
    print(f"| network | cut | batch | {' | '.join(heads)} | {_TWO} | {_ORDINARY} |\n|{'---|' * (len(heads) + 5)}")
    rows = []
    for case in (CASES[number] for number in arguments.cases):
        for batch in arguments.batch:
            row = measure(case, batch, arguments.pieces, arguments.data, arguments.blocks)
            rows.append(row)
            cells = [f"{each['median']:.2f} ({each['low']:.2f}-{each['high']:.2f})" for each in row["ratios"].values()]
            print(f"| {case.name} | {case.at} | {batch} | {' | '.join(cells)} |", flush=True)
    if arguments.out:
        write_result(arguments.out, rows)


def measure(case: Case, batch: int, pieces: list[int], data: Path | None, blocks: int) -> dict[str, Any]:
    """Throughput of each contender as a share of one thread's, and what CPU it takes."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as ends:
        folder = Path(name)
        records, where = records_file(case.shape, data, folder), place(folder)
        contenders: dict[str, list[Worker]] = {}
        for label, threads, keeps in ((_ONE, 1, True), (_TWO, 2, True), (_ORDINARY, 1, False)):
            worker = Worker(_whole, recipe_of(case, records, batch_size=batch), threads, keeps)
            ends.callback(worker.end)
            worker.told()
            contenders[label] = [worker]
        for count in pieces:
            recipe = recipe_of(case, records, batch_size=batch, micro_batches=count)
            contenders[str(count)] = _split(ends, recipe, where, folder / str(count))
        step_seconds = contenders[_ONE][0].work(5) / 5
        steps = max(4, math.ceil(_BLOCK_SECONDS / step_seconds))
        found = alternate(contenders, blocks, steps)
    return {"network": case.name, "at": case.at, "batch": batch, "steps_in_a_block": steps, **_told(found, pieces)}


def _split(ends: contextlib.ExitStack, recipe: Recipe, where: Place, out: Path) -> list[Worker]:
    return list(ends.enter_context(two_parties(recipe, where, out)))


def _told(found: Mapping[str, list[Block]], pieces: list[int]) -> dict[str, Any]:
    names = [*map(str, pieces), _TWO, _ORDINARY]
    one = found[_ONE]
    return {
        "ratios": {n: asdict(ratio([b.seconds for b in one], [b.seconds for b in found[n]])) for n in names},
        "cpu": {n: ratio([b.cpu_seconds for b in found[n]], [b.cpu_seconds for b in one]).median for n in names},
        "milliseconds": {n: [round(1000 * b.seconds, 3) for b in each] for n, each in found.items()},
    }


def _whole(pipe: Connection, recipe: Recipe, threads: int, keeps: bool) -> None:
    """The whole network in this process: an ordinary loop. keeps: it keeps freed memory, as `serve` and `join` do."""
    import torch
    from torch.nn import functional as F

    from milkglass.networks import build
    from milkglass.randomness import public_source
    from milkglass.training.setup import optimizer
    from milkglass.training.shares import deal_records

    if keeps:
        keep_freed_memory()
    torch.set_num_threads(threads)
    records = deal_records(recipe).train[CLIENT]
    generator = public_source(0).generator("weights")
    model = build(recipe.network.name, records.x.shape[1:], 10, recipe.network.settings, generator)
    steps_of = optimizer(recipe, model)
    assert steps_of is not None
    turn = Turn(pipe, WARM_UP_STEPS)
    with contextlib.suppress(OverError):
        while True:
            order = torch.randperm(len(records), generator=generator)
            for rows in torch.split(order, recipe.training.batch_size)[:-1]:
                x, y_B = records.x[rows], records.y[rows]
                logits_BK = model(x)
                loss = F.cross_entropy(logits_BK, y_B)
                steps_of.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                steps_of.step()
                loss.item()
                (logits_BK.detach().argmax(dim=1) == y_B).sum().item()  # an ordinary loop logs these as well
                turn.done()


if __name__ == "__main__":
    main()
