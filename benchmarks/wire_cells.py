"""What less_on_the_wire.py compares, and what it has measured: cells in a file, and what follows from them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

from benchmarks.wire_ranks import Method
from milkglass.parallel_section import Parallel

DENSE: Final = "dense"
ADAPTIVE: Final = "adaptive"
GAUSSIAN: Final = "Gaussian-k, .001"
METHODS: Final[dict[str, Method]] = {
    DENSE: Method(Parallel()),
    "PowerSGD, rank 1": Method(Parallel(exchange="powersgd")),
    "top-k, .001": Method(Parallel(exchange="topk", density=0.001)),
    GAUSSIAN: Method(Parallel(exchange="gaussian_k", density=0.001)),
    "top-k, .01": Method(Parallel(exchange="topk", density=0.01)),
    "Gaussian-k, .01": Method(Parallel(exchange="gaussian_k", density=0.01)),
    "period 4": Method(Parallel(exchange="periodic", period=4, dense_epochs=0)),
    "period 8": Method(Parallel(exchange="periodic", period=8, dense_epochs=0)),
    "period 16": Method(Parallel(exchange="periodic", period=16, dense_epochs=0)),
    ADAPTIVE: Method(Parallel(exchange="adaptive", dense_epochs=0)),
}
TIMED_ONLY: Final = {"torch.topk, .001": Method(Parallel(exchange="topk", density=0.001), plain=True)}
ALL_SEEDS: Final = (DENSE, "top-k, .001", GAUSSIAN, ADAPTIVE)
DRAWN: Final = (
    DENSE,
    "PowerSGD, rank 1",
    GAUSSIAN,
    "Gaussian-k, .01",
    "period 8",
    "period 16",
    ADAPTIVE,
)
TEST_EVERY: Final = 20  # steps
LINKS: Final = {"100mbit": 100e6, "1gbit": 1e9}


@final
class Cells:
    """What is measured already, by name, in a file; refuses one of other settings."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path, self._settings = path, json.loads(json.dumps(settings))
        self._found: dict[str, Any] = {}
        if path.exists():
            told = json.loads(path.read_text())
            if told["settings"] != self._settings:
                raise SystemExit(f"{path} is of other settings: {told['settings']}; expected {self._settings}")
            self._found = told["cells"]

    def get(self, name: str) -> Any:
        """The cell, or None."""
        return self._found.get(name)

    def below(self, prefix: str) -> dict[str, Any]:
        """The cells whose names begin so, by the rest of the name."""
        return {name.removeprefix(prefix): cell for name, cell in self._found.items() if name.startswith(prefix)}

    def make(self, name: str, work: Callable[[], Any]) -> None:
        """Make the cell, unless it is there, and keep it."""
        if name in self._found:
            return
        self._found[name] = work()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"settings": self._settings, "cells": self._found}) + "\n")


@final
class Timed:
    """One method's blocks over one link."""

    def __init__(self, blocks: Sequence[Mapping[str, Any]]) -> None:
        self._blocks = blocks
        self.by_block: list[float] = [statistics.fmean(block["seconds"]) for block in blocks]
        each = [pair for block in blocks for pair in zip(block["seconds"], block["met"], strict=True)]
        self.steps, self.averages = len(each), sum(met for _, met in each)
        apart, meeting = ([seconds for seconds, met in each if met == which] for which in (False, True))
        self.local: float = statistics.median(apart or [0.0])
        self.meeting: float = statistics.median(meeting or [self.local]) - self.local

    @property
    def seconds(self) -> float:
        """Of a step: the median of the blocks' means."""
        return statistics.median(self.by_block)

    def mean(self, what: str) -> float:
        """Of `payload`, `on_wire` or `cpu_seconds`: per step, over all blocks."""
        counts = [len(block["seconds"]) for block in self._blocks]
        return float(sum(block[what] * n for block, n in zip(self._blocks, counts, strict=True)) / sum(counts))

    def training_seconds(self, told: Mapping[str, Any]) -> float:
        """Of a training that took so many steps and averages: the product. Averages are added where there are some."""
        if told["averages"] is None:
            return float(told["reached"] * self.seconds)
        return float(told["reached"] * self.local + told["averages"] * self.meeting)


def timed(ranks: int, cells: Cells, link: str) -> dict[str, Timed]:
    """By method; empty where nothing is measured."""
    cell = cells.get(f"steps/{ranks}")
    return {} if cell is None else {name: Timed(blocks) for name, blocks in cell["links"][link]["blocks"].items()}


def products(ranks: int, cells: Cells, link: str) -> dict[str, dict[str, float]]:
    """Seconds to the accuracy over that link by method, and by seed where it was reached."""
    found: dict[str, dict[str, float]] = {}
    for name, each in timed(ranks, cells, link).items():
        if name in METHODS:
            trained = cells.below(f"accuracy/{ranks}/{name}/")
            found[name] = {seed: each.training_seconds(told) for seed, told in trained.items() if told["reached"]}
    return found


def over(above: Mapping[str, float], below: Mapping[str, float]) -> float | None:
    """The ratio of two methods' seconds, over the seeds that both have; None without such."""
    both = above.keys() & below.keys()
    return sum(above[seed] for seed in both) / sum(below[seed] for seed in both) if both else None
