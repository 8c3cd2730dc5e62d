"""Accuracy after a fixed number of epochs, and what it took on the wire: `milkglass train` under torchrun, 2 ranks.

The part `epochs` of less_on_the_wire.py. A perceptron of 0.67 M parameters on Fashion-MNIST, all 60,000 records, tested
on all 10,000; 64 records a step, SGD with momentum .9, a learning rate that falls to 0 by half a cosine. Runs are
ordinary run folders; what is finished is not made again.

Constant periods are compared with adaptive averaging at an equal mean period: that of each adaptive run is taken from
its own lines, and the two whole numbers beside it are run as constant periods. None begins with an epoch of averages
after every step, as published: that would be a third of these trainings.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

_RANKS: Final = 2
_EPOCHS: Final = 3
_BATCH: Final = 32
_STEPS: Final = 60_000 // (_BATCH * _RANKS)
_RECIPE: Final = f"""\
[data]
test_records = 10_000
[network]
name = "mlp"
settings = {{ hidden = [512, 512] }}
[training]
epochs = {_EPOCHS}
batch_size = {_BATCH}
optimizer = "sgd"
momentum = 0.9
learning_rate = 0.05
decay_steps = {_EPOCHS * _STEPS}
[parties]
mode = "data_parallel"
[attacker]
auxiliary_share = 0
validation_share = 0
"""
_DENSE: Final = "dense"
_ADAPTIVE: Final = "adaptive"
_WARM_UP: Final = "warmup=[0.015625, 0.004]"
WAYS: Final[dict[str, tuple[str, ...]]] = {
    _DENSE: ("exchange=dense",),
    "top-k, .01": ("exchange=topk", "density=0.01"),
    "Gaussian-k, .01": ("exchange=gaussian_k", "density=0.01"),
    "Gaussian-k, .01, warm-up": ("exchange=gaussian_k", "density=0.01", "warmup=[0.1]"),
    "top-k, .001": ("exchange=topk", "density=0.001"),
    "Gaussian-k, .001": ("exchange=gaussian_k", "density=0.001"),
    "Gaussian-k, .001, warm-up": ("exchange=gaussian_k", "density=0.001", _WARM_UP),
    "PowerSGD, rank 1": ("exchange=powersgd",),
    _ADAPTIVE: ("exchange=adaptive", "dense_epochs=0"),
    "adaptive, Gaussian-k, .1": ("exchange=adaptive", "dense_epochs=0", "compress_weights=true", "density=0.1"),
    "adaptive, Gaussian-k, .01": ("exchange=adaptive", "dense_epochs=0", "compress_weights=true", "density=0.01"),
}


def make(data: Path, cells: Path, seeds: Sequence[int]) -> None:
    """Train what is missing, one seed after the other; what fails is told, and left out. data: the folder."""
    for seed in seeds:
        for name in WAYS:
            run(data, cells, name, seed)
        adaptive = _folder(cells, _ADAPTIVE, seed)
        for period in _beside(adaptive) if _read(adaptive) else ():
            settings = ("exchange=periodic", "dense_epochs=0", f"period={period}")
            _train(data, _folder(cells, f"period {period}", seed), seed, settings)


def run(data: Path, cells: Path, name: str, seed: int) -> Path:
    """Train one of `WAYS`, unless it is there; its run folder."""
    folder = _folder(cells, name, seed)
    _train(data, folder, seed, WAYS[name])
    return folder


def table(cells: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Print what is finished; the rows."""
    rows = []
    for name in WAYS:
        found = {seed: _read(_folder(cells, name, seed)) for seed in seeds}
        rows += [_row(name, {seed: each for seed, each in found.items() if each}, cells)]
    rows = [row for row in rows if row["seeds"]]
    if not rows:
        return []
    print(f"\nAccuracy after {_EPOCHS} epochs, {_RANKS} ranks, mlp 512-512, batch {_BATCH} a rank:\n")
    print("| method | seeds | accuracy, % | less dense, points, by seed | MB sent a rank | left over, share |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        less = ", ".join(f"{each:+.2f}" for each in row["less_dense"])
        left = "" if row["left_share"] is None else f"{row['left_share']:.3f}"
        print(
            f"| {row['way']} | {len(row['seeds'])} | {_spread(row['accuracy'])} | {less} | {row['mb']:.1f} | {left} |"
        )
    return rows + _compared(cells, seeds)


def _compared(cells: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Print adaptive averaging beside constant periods."""
    rows = []
    for seed in seeds:
        adaptive = _read(_folder(cells, _ADAPTIVE, seed))
        if adaptive is None:
            continue
        names = [_ADAPTIVE] + [f"period {period}" for period in _beside(_folder(cells, _ADAPTIVE, seed))]
        for name in names:
            told = _read(_folder(cells, name, seed))
            if told is not None:
                period = _mean_period(_folder(cells, name, seed))
                rows.append({"seed": seed, "way": name, "mean_period": period, "accuracy": 100 * told["accuracy"]})
                rows[-1] |= {"mb": told["bytes_sent"] / _RANKS / 1e6, "loss": told["loss"]}
    if rows:
        print("\nAdaptive averaging beside constant periods:\n")
        print("| seed | method | mean period | accuracy, % | training loss, last epoch | MB sent a rank |")
        print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['seed']} | {row['way']} | {row['mean_period']:.2f} | {row['accuracy']:.2f} | {row['loss']:.4f} "
            f"| {row['mb']:.1f} |"
        )
    return rows


def _row(name: str, found: Mapping[int, Mapping[str, Any]], cells: Path) -> dict[str, Any]:
    dense = {seed: _read(_folder(cells, _DENSE, seed)) for seed in found}
    accuracy = {seed: 100 * told["accuracy"] for seed, told in found.items()}
    less = [accuracy[seed] - 100 * other["accuracy"] for seed, other in dense.items() if other is not None]
    left = [told["left_share"] for told in found.values() if told["left_share"] is not None]
    sent = [told["bytes_sent"] / _RANKS / 1e6 for told in found.values()]
    return {
        "way": name,
        "seeds": list(found),
        "accuracy": list(accuracy.values()),
        "less_dense": less,
        "mb": statistics.mean(sent) if sent else 0.0,
        "left_share": statistics.mean(left) if left else None,
    }


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def _folder(cells: Path, name: str, seed: int) -> Path:
    return cells / f"{name.replace(',', '').replace(' ', '-')}-seed{seed}"


def _read(folder: Path) -> dict[str, Any] | None:
    """What a finished run says of itself."""
    if not (folder / "summary.json").exists():
        return None
    summary = json.loads((folder / "summary.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "accuracy": summary["accuracy"],
        "bytes_sent": summary["bytes_sent"],
        "loss": last["loss"],
        "left_share": last.get("left_share"),
    }


def _mean_period(folder: Path) -> float:
    """Steps between two averages; the first one, after the first step, ends no period."""
    lines = [json.loads(line) for line in (folder / "exchange.jsonl").read_text().splitlines()]
    return statistics.fmean(line["period"] for line in lines[1:])


def _beside(folder: Path) -> list[int]:
    mean = _mean_period(folder)
    return sorted({max(1, math.floor(mean)), max(1, math.ceil(mean))})


def _train(data: Path, out: Path, seed: int, settings: Sequence[str]) -> None:
    """Run the command with two ranks; its words go to a log beside the run."""
    if (out / "summary.json").exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = out.parent / "recipe.toml"
    recipe.write_text(_RECIPE)
    told = [f"seed={seed}", *(f"data.{key}={data / f'fashion-mnist-{which}.npz'}" for key, which in _FILES.items())]
    told += [f"parallel.{setting}" for setting in settings]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(_RANKS)]
    train = ["-m", "milkglass", "train", str(recipe), "--out", str(out), "--resume"]
    with out.with_name(out.name + ".log").open("a") as log:
        command = [*torchrun, *train, *(f"--set={each}" for each in told)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode:
        print(f"{out.name}: milkglass train ended with {done.returncode}; see {log.name}", file=sys.stderr)


_FILES: Final = {"path": "train", "test_path": "test"}
