"""What crossing a cut costs: split training in one process against the same network trained whole, step by step.

    python benchmarks/split_overhead.py [--steps 60] [--threads 1 2] [--out FILE.json]

Wanted: at most 1.1 x, one thread. Steps are timed in turn (split, whole, split, whole, ...), so that a machine whose
speed drifts slows both; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Final

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.setting import machine_line, write_result
from milkglass.client import Client
from milkglass.cuts import cut
from milkglass.networks import build
from milkglass.randomness import public_source
from milkglass.server import Server
from milkglass.transports.local import LocalTransport

BATCH: Final = 64
CASES: Final[tuple[tuple[str, tuple[int, ...], dict[str, object], str], ...]] = (
    ("cnn", (1, 28, 28), {"width": 32}, "block2"),
    ("cnn", (1, 28, 28), {"width": 32}, "block1"),
    ("resnet", (3, 32, 32), {"depth": 8}, "block1"),
    ("mlp", (1, 28, 28), {"hidden": (512, 256)}, "hidden1"),
)


def main() -> None:
    """Measure every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print(machine_line())
    rows = []
    print("| network | cut | threads | split / whole |\n|---|---|---|---|")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for network, shape, settings, at in CASES:
            ratio = measure(network, shape, settings, at, arguments.steps)
            rows.append({"network": network, "at": at, "threads": threads, "ratio": ratio})
            print(f"| {network} {'x'.join(map(str, shape))} | {at} | {threads} | {ratio:.3f} |", flush=True)
    if arguments.out:
        write_result(arguments.out, rows)


def measure(network: str, shape: tuple[int, ...], settings: dict[str, object], at: str, steps: int) -> float:
    """Median seconds of a split step over those of a whole one."""
    model = build(network, shape, 10, settings, public_source(0).generator("weights"))
    whole = copy.deepcopy(model)
    bottom, top = cut(model, at)
    server = Server(top, _optimizer(top))
    client = Client(bottom, _optimizer(bottom), LocalTransport(server))
    optimizer = _optimizer(whole)
    generator = public_source(0).generator("records")
    x = torch.rand(BATCH, *shape, generator=generator)
    y = torch.randint(0, 10, (BATCH,), generator=generator)
    seconds: dict[str, list[float]] = {"split": [], "whole": []}
    for step in range(steps + 5):
        for name in ("split", "whole"):
            started = time.perf_counter()
            if name == "split":
                client.step(x, y)
            else:
                _whole_step(whole, optimizer, x, y)
            if step >= 5:
                seconds[name].append(time.perf_counter() - started)
    return statistics.median(seconds["split"]) / statistics.median(seconds["whole"])


def _whole_step(whole: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    logits = whole(x)
    loss = F.cross_entropy(logits, y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    loss.item()
    (logits.detach().argmax(dim=1) == y).sum().item()  # an ordinary loop logs these as well


def _optimizer(stage: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(stage.parameters(), lr=1e-3)


if __name__ == "__main__":
    main()
