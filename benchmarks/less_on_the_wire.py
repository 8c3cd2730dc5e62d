"""Data-parallel training over a shaped link: what GaussianK-SGD and adaptive averaging save, against what sends more.

    python -m benchmarks.less_on_the_wire --data DIR [--parts steps accuracy check epochs] [--seeds 0 1 2] [--out FILE]

Steps per link: Linux and root, elsewhere it says why they are skipped. Parts, each of which may run by itself; what is
finished is in a file of cells and is not made again, so a run that was stopped goes on:

- `steps`: seconds of a step over each link, all methods and links in alternating blocks of one run, and the bytes of a
  step, as the kernel counts them for the sockets, and beside that for the interface. A block ends with a whole period.
  One more contender, `torch.topk`, sends what exact top-k sends and finds it by torch's own call.
- `accuracy`: steps to a fixed accuracy, for each method and seed, over the loopback.
- `check`: the fastest method per link, and Gaussian-k, trained to that accuracy over that link. The others' time is a
  product.
- `epochs`: accuracy after a fixed number of epochs with a smaller network on 2 ranks, by `milkglass train` (see
  large_batch_accuracy.py).

What is there is printed, the cost model (cost_model.py) with it; --figure draws that. All methods have one learning
rate and plain momentum, which is the optimizer's: sparse gradients have no momentum correction, as published, and each
rank keeps its own in local training. No epoch at full density or period 1 comes before: the trainings are shorter.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks import large_batch_accuracy, wire_tables
from benchmarks.setting import command_line, machine_line, write_result
from benchmarks.shaped_lan import shaped_lan, why_not
from benchmarks.wire_cells import ALL_SEEDS, DENSE, GAUSSIAN, LINKS, METHODS, TEST_EVERY, TIMED_ONLY, Cells, products
from benchmarks.wire_ranks import Block, Ranks, Task, ranks_on

PARTS: Final = ("steps", "accuracy", "check", "epochs")
_BLOCKS: Final = 10
_WARM_UP: Final = 3  # PowerSGD sends everything in two
_SMALLEST: Final = 50  # all-reduces of one number, each time
_ADAPTED_IN: Final = 40  # steps; in `steps` the period is to adapt soon


def main() -> None:
    """Make what is missing, then print the tables."""
    arguments = _arguments()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d: a namespace has no names for its hosts
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that ranks are ended
    task = Task(arguments.data.resolve(), tuple(arguments.hidden), arguments.batch, arguments.learning_rate)
    aim = {"data": None, "target": arguments.target, "most_steps": arguments.most_steps}
    cells = Cells(arguments.cells / "cells.json", asdict(task) | aim)
    reason = why_not()
    for part in arguments.parts:
        if part in ("steps", "check") and reason is not None:
            print(f"{part}: skipped: {reason}")
        elif part == "steps":
            cells.make(f"steps/{arguments.ranks}", partial(time_steps, task, arguments))
        elif part == "accuracy":
            reach_accuracy(task, arguments, cells)
        elif part == "check":
            for link in LINKS:
                check(task, arguments, cells, link)
        else:
            large_batch_accuracy.make(arguments.data.resolve(), arguments.cells, arguments.seeds)
    print(f"<!-- {command_line()}; {machine_line()} -->")
    rows = wire_tables.print_all(arguments, cells)
    if arguments.out:
        write_result(arguments.out, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with fashion-mnist-{train,test}.npz")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 2048, 2048])
    parser.add_argument("--batch", type=int, default=16, help="records of a rank's step")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--target", type=float, default=0.83, help="the accuracy to be reached")
    parser.add_argument("--most-steps", type=int, default=600, help="and in how many steps at most")
    parser.add_argument("--steps", type=int, default=50, help="timed, of each method and link")
    parser.add_argument("--steps-slow", type=int, default=20, help="of those that send everything, at 100 Mbit/s")
    parser.add_argument("--cells", type=Path, default=Path("runs/less-on-the-wire"))
    parser.add_argument("--figure", type=Path, help="an .svg: the cost model up to 1,024 ranks")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def time_steps(task: Task, arguments: argparse.Namespace) -> dict[str, Any]:
    """Blocks of steps of every method over every link, in turns."""
    methods = METHODS | TIMED_ONLY
    names = list(methods)
    smallest: dict[str, list[float]] = {link: [] for link in LINKS}
    blocks: dict[str, dict[str, list[Any]]] = {link: {name: [] for name in names} for link in LINKS}
    with shaped_lan(arguments.ranks, None) as lan, ranks_on(lan.hosts, task) as ranks:
        for name, method in methods.items():
            ranks.do("prepare", name, method, _ADAPTED_IN, 0)
            ranks.do("block", name, _WARM_UP)
        (numbers, *_) = ranks.do("parameters", DENSE)
        for turn in range(_BLOCKS):
            first = turn % len(names)  # nobody is always behind the same one
            for link, rate in LINKS.items():
                lan.shape(link)
                smallest[link] += ranks.do("smallest", _SMALLEST)
                for name in names[first:] + names[:first]:
                    slow = rate < 1e9 and methods[name].section.exchange in (DENSE, "periodic", "adaptive")
                    count = arguments.steps_slow if slow else arguments.steps
                    blocks[link][name].append(asdict(_together(ranks, name, -(-count // _BLOCKS))))
    links = {link: {"smallest": statistics.median(smallest[link]), "blocks": blocks[link]} for link in LINKS}
    return {"parameters": numbers, "links": links}


def _together(ranks: Ranks, name: str, steps: int) -> Block:
    """Rank 0's times, for no rank is ahead of another by more than a step, and the mean of all ranks' bytes and CPU."""
    found: list[Block] = ranks.do("block", name, steps)
    wires = [block.on_wire for block in found if block.on_wire is not None]
    return Block(
        found[0].seconds,
        found[0].met,
        statistics.mean(block.cpu_seconds for block in found),
        statistics.mean(block.payload for block in found),
        statistics.mean(wires) if wires else None,
    )


def reach_accuracy(task: Task, arguments: argparse.Namespace, cells: Cells) -> None:
    """Train every method to the accuracy, the first seed of all before the others of some."""
    first, *others = arguments.seeds
    wanted = [(name, first) for name in METHODS] + [(name, seed) for seed in others for name in ALL_SEEDS]
    missing = [(name, seed) for name, seed in wanted if cells.get(f"accuracy/{arguments.ranks}/{name}/{seed}") is None]
    if not missing:
        return
    with ranks_on(arguments.ranks, task) as ranks:
        for name, seed in missing:
            cells.make(f"accuracy/{arguments.ranks}/{name}/{seed}", partial(_learn, ranks, name, seed, arguments))


def _learn(ranks: Ranks, name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    ranks.do("prepare", name, METHODS[name], arguments.most_steps, seed)
    told: dict[str, Any] = ranks.do("learn", name, arguments.target, TEST_EVERY, arguments.most_steps)[0]
    ranks.do("forget", name)
    return told


def check(task: Task, arguments: argparse.Namespace, cells: Cells, link: str) -> None:
    """Train over the link itself: the method whose product is smallest, and Gaussian-k."""
    seed = str(arguments.seeds[0])
    found = {name: each[seed] for name, each in products(arguments.ranks, cells, link).items() if seed in each}
    if not found:
        print(f"check, {link}: skipped: `steps` and `accuracy` come first")
        return

    def learn(name: str) -> dict[str, Any]:
        with shaped_lan(arguments.ranks, None) as lan, ranks_on(lan.hosts, task) as ranks:
            ranks.do("prepare", "before", METHODS[name], _ADAPTED_IN, 0)
            ranks.do("block", "before", _WARM_UP)  # connections are made, memory is there
            ranks.do("forget", "before")
            lan.shape(link)
            return {"seed": seed} | _learn(ranks, name, int(seed), arguments)

    for name in dict.fromkeys((min(found, key=lambda name: found[name]), GAUSSIAN)):
        if name in found:
            cells.make(f"check/{arguments.ranks}/{link}/{name}", partial(learn, name))


if __name__ == "__main__":
    main()
