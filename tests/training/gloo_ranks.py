"""Real processes of a gloo group on 127.0.0.1 that run what a test tells them, one thing after the other.

A test calls `ranks.run(function, *arguments)`: every rank calls `function(rank, *arguments)`, a function of a module,
and the results come back in the order of the ranks. The store by which they find each other is the test's own.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Final, final

import torch
import torch.distributed as dist

_SPAWN: Final = multiprocessing.get_context("spawn")
_SECONDS: Final = 120.0


class RankError(Exception):
    """What a rank raised, as text: `kind` is its type's name."""

    def __init__(self, rank: int, kind: str, words: str, trace: str) -> None:
        super().__init__(f"rank {rank}: {kind}: {words}\n{trace}")
        self.rank, self.kind, self.words = rank, kind, words


@final
class Ranks:
    """`count` processes, each a rank. timeout_seconds: of their collective operations."""

    def __init__(self, count: int, timeout_seconds: float = 60.0) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(count):
            ours, theirs = _SPAWN.Pipe()
            process = _SPAWN.Process(
                target=_work, args=(theirs, rank, count, self._store.port, timeout_seconds), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def pid(self, rank: int) -> int:
        """The process's id."""
        found = self._processes[rank].pid
        assert found is not None
        return found

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Let all ranks begin with something."""
        for pipe in self._pipes:
            pipe.send((function, arguments))

    def end(self, rank: int, seconds: float = _SECONDS) -> Any:
        """What it came to at one rank. Raises RankError, or TimeoutError, or EOFError where the process is gone."""
        if not self._pipes[rank].poll(seconds):
            raise TimeoutError(f"rank {rank} has said nothing for {seconds:g} seconds")
        fine, result = self._pipes[rank].recv()
        if not fine:
            raise RankError(rank, *result)
        return result

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What a function comes to at all ranks; raises what the first of them raised that did."""
        self.begin(function, *arguments)
        results, errors = [], []
        for rank in range(len(self._pipes)):
            try:
                results.append(self.end(rank))
            except RankError as error:  # the others' results must not wait for whoever asks next
                errors.append(error)
        if errors:
            raise errors[0]
        return results

    def close(self) -> None:
        """End all processes, whatever they do."""
        for process in self._processes:
            process.kill()
            process.join()


def _work(pipe: Connection, rank: int, count: int, port: int, timeout_seconds: float) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    seconds = timedelta(seconds=timeout_seconds)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=seconds)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, *arguments)))
        except Exception as error:
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))
