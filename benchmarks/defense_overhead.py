"""What each defense costs in time: a training batch with it over one without, side by side.

    python -m benchmarks.defense_overhead --data DIR [--rounds 30]

The recipe is examples/fashion-mnist.toml (`cnn` of width 32 cut after `block2`, batches of 128), all parties in one
process, one thread. In every round each defense trains four batches, in an order drawn anew; the ratio is of the
round's own undefended time. Printed: the median over rounds, and their middle half.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.setting import command_line, machine_line
from milkglass.recipe import load_recipe, parse_recipe
from milkglass.training.split import Setup, batches_of, set_up

RECIPE: Final = Path(__file__).parents[1] / "examples" / "fashion-mnist.toml"
BATCHES: Final = 4
WARM_UP: Final = 2
CHANNEL: Final[dict[str, Any]] = {"width": 8, "sigma": 0.3}
DEFENSES: Final[dict[str, dict[str, Any]]] = {
    "none": {},
    "channel": {"channel": CHANNEL},
    "channel, linear projection": {"channel": CHANNEL | {"projection": "linear"}},
    "channel and entropy": {"channel": CHANNEL, "entropy": {"weight": 0.02}},
    "clipping and Gaussian noise": {"clipping": {"clip": 20.0}, "noise": {"sigma": 0.5}},
    "Laplace noise": {"noise": {"sigma": 0.5, "kind": "laplace"}},
    "learned noise": {"learned_noise": {}},
    "NoPeek": {"nopeek": {}},
    "adversary": {"adversary": {}},
}


def main() -> None:
    """Time all of them, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of fashion-mnist-{train,test}.npz")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setups = {name: _setup(arguments.data, table) for name, table in DEFENSES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in setups}
    shuffle = random.Random(0)
    for number in range(WARM_UP + arguments.rounds):
        for name in shuffle.sample(list(setups), len(setups)):
            took = _train(setups[name], number)
            if number >= WARM_UP:
                seconds[name].append(took)
    print(f"<!-- {command_line()}; {machine_line()} -->\n")
    print("| defense | time of a batch over undefended (middle half of rounds) |\n|---|---|")
    for name, taken in seconds.items():
        ratios = [one / other for one, other in zip(taken, seconds["none"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) |")


def _setup(data: Path, table: dict[str, Any]) -> Setup:
    paths = [
        f"data.{key}={data / f'fashion-mnist-{part}.npz'}" for key, part in (("path", "train"), ("test_path", "test"))
    ]
    recipe = load_recipe(RECIPE, paths)
    return set_up(parse_recipe(recipe.model_dump(exclude={"defense"}) | {"defense": table}))


def _train(setup: Setup, number: int) -> float:
    """Seconds of a few batches."""
    train = setup.seats[0].share.train
    batches = [train.take(rows) for rows in batches_of(setup, 1 + number)[:BATCHES]]
    start = time.perf_counter()
    for batch in batches:
        setup.client.step(batch.x, batch.y)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
