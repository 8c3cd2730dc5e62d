"""Processes that take turns: each works only when it is told to, so that contenders alternate in short blocks.

A machine whose speed drifts, or that others work on, then slows all of them alike, and their ratios stand.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final, final

_SPAWN: Final = multiprocessing.get_context("spawn")
_START_SECONDS: Final = 180.0
_BLOCK_SECONDS: Final = 600.0


class OverError(Exception):
    """Nobody wants this worker any more."""


@final
class Worker:
    """A process that runs `target(pipe, *arguments)`."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=target, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.reported: Any = None

    def told(self, seconds: float = _START_SECONDS) -> Any:
        """The next thing that it says."""
        if not self._pipe.poll(seconds):
            raise TimeoutError(f"{self.process.name} has said nothing for {seconds:g} seconds")
        return self._pipe.recv()

    def work(self, count: int) -> float:
        """Let it work so many times; seconds by the clock."""
        self._pipe.send(count)
        seconds, self.reported = self.told(_BLOCK_SECONDS)
        return float(seconds)

    @property
    def cpu_seconds(self) -> float:
        """User and system time of all its threads so far."""
        assert self.process.pid is not None
        return time.clock_gettime((~self.process.pid << 3) | 2)  # what clock_getcpuclockid(3) makes of a process id

    def end(self) -> None:
        """Tell it that it is over, and see that it ends."""
        with contextlib.suppress(OSError):
            self._pipe.send(0)
        self.process.join(1.0)
        self.process.terminate()
        self.process.join(5.0)
        self.process.kill()
        self.process.join()


@final
class Turn:
    """In a worker: how many times it may still work. It begins with `warm_up` times, that nobody counts.

    report: what the worker says of itself after each turn.
    """

    def __init__(self, pipe: Connection, warm_up: int, report: Callable[[], Any] = lambda: None) -> None:
        self._pipe = pipe
        self._left = warm_up
        self._report = report
        self._began = time.perf_counter()

    def done(self) -> None:
        """Once more; waits for the next turn where it was the last time. Raises OverError where there is none."""
        self._left -= 1
        if self._left:
            return
        self._pipe.send((time.perf_counter() - self._began, self._report()))
        try:
            self._left = self._pipe.recv()
        except EOFError:
            self._left = 0
        if not self._left:
            raise OverError
        self._began = time.perf_counter()


@dataclass(frozen=True)
class Block:
    """What one contender needed for one block, per piece of work. cpu: of all its processes."""

    seconds: float
    cpu_seconds: float


def alternate(
    contenders: Mapping[str, Sequence[Worker]], blocks: int, count: int, *, untimed: int = 0
) -> dict[str, list[Block]]:
    """Let each contender's first worker work `count` times, then the next one's, and so on, for so many blocks.

    untimed: so many times more before each block, for what has forgotten its pace meanwhile, as TCP has.
    """
    found: dict[str, list[Block]] = {name: [] for name in contenders}
    names = list(contenders)
    for block in range(blocks):
        shift = block % len(names)  # nobody is always behind the same one
        for name in names[shift:] + names[:shift]:
            workers = contenders[name]
            if untimed:
                workers[0].work(untimed)
            before = sum(worker.cpu_seconds for worker in workers)
            seconds = workers[0].work(count)
            cpu_seconds = sum(worker.cpu_seconds for worker in workers) - before
            found[name].append(Block(seconds / count, cpu_seconds / count))
    return found


@dataclass(frozen=True)
class Ratio:
    """Of two contenders, block by block: the median, the middle half, and that of the sums."""

    median: float
    low: float
    high: float
    total: float

    def words(self) -> str:
        """For a table."""
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Block by block above / below."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    low, median, high = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(median, low, high, sum(above) / sum(below))
