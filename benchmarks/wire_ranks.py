"""The ranks of less_on_the_wire.py: processes of one gloo group, each of which does what it is told.

    with ranks_on(lan.hosts, task) as ranks:  # of shaped_lan.py; or only how many, then on the loopback
        ranks.do("prepare", "mine", Method(Parallel()), 100, 0)  # every rank calls that method of its `Trainer`
        ranks.do("block", "mine", 10)

Training is the loop of milkglass/training/large_batch.py with `parallel_ways.way_of`, and no run folder: the same order
of records, the same ways. Records and weights are made at each rank alike, so nothing of that is sent.

Legend: N records, B of a batch of a rank, F pixels.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, cast, final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.utils import average_parameters
from torch.nn import functional as F

from benchmarks.selection import PlainTopK
from benchmarks.shaped_lan import INTERFACE, Host, sent_bytes
from benchmarks.slow_link import enter
from milkglass.compression.vector import VectorCompressor
from milkglass.memory import keep_freed_memory
from milkglass.networks import mlp
from milkglass.parallel_section import Parallel
from milkglass.training.data_parallel import GradientState, gaussian_k_hook
from milkglass.training.parallel_ways import Gradients, Way, Weights, way_of
from milkglass.training.tcp_traffic import tcp_traffic

_SPAWN: Final = multiprocessing.get_context("spawn")
_SECONDS: Final = 1800.0
_PATIENCE: Final = timedelta(seconds=300)
_CLASSES: Final = 10
_MEAN: Final = 73.0  # of Fashion-MNIST's pixels
_SPREAD: Final = 90.0


@dataclass(frozen=True)
class Task:
    """What all methods learn, and how. batch: of a rank. data: a folder with Fashion-MNIST."""

    data: Path
    hidden: tuple[int, ...] = (2048, 2048, 2048)
    batch: int = 16
    learning_rate: float = 0.02
    momentum: float = 0.9
    test_records: int = 4_000


@dataclass(frozen=True)
class Method:
    """What crosses between ranks. plain: top-k by one call of torch.topk, in place of ours."""

    section: Parallel
    plain: bool = False


@dataclass(frozen=True)
class Block:
    """Some steps of one rank. seconds: of each step. met: whether the step ended with an average of weights.

    cpu_seconds: of all threads, per step. payload: bytes over TCP, per step. on_wire: bytes that the host's interface
    sent, headers included; None on the loopback, which all share.
    """

    seconds: tuple[float, ...]
    met: tuple[bool, ...]
    cpu_seconds: float
    payload: float
    on_wire: float | None


@final
class Ranks:
    """The processes, and a pipe to each."""

    def __init__(self, pipes: Sequence[Connection]) -> None:
        self._pipes = pipes

    def do(self, verb: str, *arguments: Any) -> list[Any]:
        """What that method of `Trainer` comes to, at every rank. Raises RuntimeError with what a rank raised."""
        for pipe in self._pipes:
            pipe.send((verb, arguments))
        return [_heard(pipe, rank) for rank, pipe in enumerate(self._pipes)]


@contextlib.contextmanager
def ranks_on(hosts: int | Sequence[Host], task: Task) -> Iterator[Ranks]:
    """As many processes as hosts, one thread each. They are ended at the end, whatever they do."""
    places = [None] * hosts if isinstance(hosts, int) else list(hosts)
    pipes, processes = [], []
    try:
        for rank, place in enumerate(places):
            ours, theirs = _SPAWN.Pipe()
            first = places[0].address if places[0] is not None else "127.0.0.1"
            work = (theirs, task, rank, len(places), place, first)
            processes.append(_SPAWN.Process(target=_work, args=work, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        port = _heard(pipes[0], 0)
        for pipe in pipes[1:]:
            pipe.send(port)
        for rank, pipe in enumerate(pipes):
            _heard(pipe, rank)
        yield Ranks(pipes)
    finally:
        for process in reversed(processes):  # rank 0 keeps the store
            process.kill()
            process.join()


def _heard(pipe: Connection, rank: int) -> Any:
    if not pipe.poll(_SECONDS):
        raise TimeoutError(f"rank {rank} has said nothing for {_SECONDS:g} seconds")
    fine, told = pipe.recv()
    if not fine:
        raise RuntimeError(f"rank {rank}: {told}")
    return told


def _work(pipe: Connection, task: Task, rank: int, ranks: int, host: Host | None, first: str) -> None:
    try:
        if host is not None:
            enter(host.namespace)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo" if host is None else INTERFACE
        torch.set_num_threads(1)
        keep_freed_memory()  # as `milkglass train` does
        port = 0 if rank == 0 else pipe.recv()
        store = dist.TCPStore(first, port, is_master=rank == 0, wait_for_workers=False)  # type: ignore[attr-defined]
        if rank == 0:
            pipe.send((True, store.port))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=_PATIENCE)
        trainer = Trainer(task, rank, ranks, alone=host is not None)
        pipe.send((True, None))
        while True:
            verb, arguments = pipe.recv()
            pipe.send((True, getattr(trainer, verb)(*arguments)))
    except EOFError:
        return
    except Exception:
        pipe.send((False, traceback.format_exc()))


@final
class PlainTopKState(GradientState):
    """Sends exactly the largest gradients, as one call of torch's finds them."""

    def compressor(self, density: float) -> VectorCompressor:
        return PlainTopK(density)


@final
class Training:
    """One method's network, optimizer and way, and how far it is."""

    def __init__(self, task: Task, pixels: int, records: int, method: Method, steps: int, seed: int) -> None:
        """steps: of the whole training. `way_of` takes it for one epoch, and adapts a period after a quarter of it."""
        torch.manual_seed(seed)
        section = Parallel() if method.plain else method.section
        self.network: nn.Module = mlp((pixels,), _CLASSES, task.hidden)
        self.optimizer = torch.optim.SGD(self.network.parameters(), task.learning_rate, task.momentum)
        self.way: Way = way_of(
            section,
            self.network,
            self.optimizer,
            momentum=task.momentum,
            steps_per_epoch=steps,
            epochs=1,
            seed=seed,
        )
        if method.plain:
            ddp = cast(nn.parallel.DistributedDataParallel, self.way.module)
            ddp.register_comm_hook(PlainTopKState(method.section.density, flat=True), gaussian_k_hook)
        self.step = 0
        self._order = torch.Generator().manual_seed(seed)
        self._records = records
        self._left: list[Tensor] = []

    def batch(self, size: int, rank: int, ranks: int) -> Tensor:
        """The numbers (B,) of the records of a rank's next batch: an order for each epoch, dealt out step by step."""
        if not self._left:
            whole = self._records // (size * ranks) * size * ranks
            order = torch.randperm(self._records, generator=self._order)[:whole]
            self._left = list(order.view(-1, ranks, size).flip(0))
        return self._left.pop()[rank]


@final
class Trainer:
    """What a rank can do. All ranks are told the same. alone: nobody else uses this host's interface."""

    def __init__(self, task: Task, rank: int, ranks: int, *, alone: bool) -> None:
        self._task, self._rank, self._ranks, self._alone = task, rank, ranks, alone
        self._x, self._y = _records(task.data, "train")
        self._test_x, self._test_y = (part[: task.test_records] for part in _records(task.data, "test"))
        self._trainings: dict[str, Training] = {}

    def prepare(self, name: str, method: Method, steps: int, seed: int) -> None:
        """Begin a training of that name."""
        records, pixels = self._x.shape
        self._trainings[name] = Training(self._task, pixels, records, method, steps, seed)

    def forget(self, name: str) -> None:
        """End it."""
        del self._trainings[name]

    def parameters(self, name: str) -> int:
        """How many numbers the network has."""
        return sum(parameter.numel() for parameter in self._trainings[name].network.parameters())

    def block(self, name: str, steps: int) -> Block:
        """At least so many steps, to the end of a period where there are such. Each is timed; bytes are counted."""
        training = self._trainings[name]
        seconds: list[float] = []
        met: list[bool] = []
        dist.barrier()
        (before, wire_before), cpu_before = self._bytes(), time.process_time()
        while len(seconds) < steps or not (met[-1] or isinstance(training.way, Gradients)):
            lines, began = len(training.way.lines), time.perf_counter()
            self._one(training)
            seconds.append(time.perf_counter() - began)
            met.append(isinstance(training.way, Weights) and len(training.way.lines) > lines)
        began = time.perf_counter()
        dist.barrier()  # a block is over where the last rank is
        seconds[-1] += time.perf_counter() - began
        (after, wire_after), cpu_seconds = self._bytes(), time.process_time() - cpu_before
        training.optimizer.zero_grad(set_to_none=True)  # room for the others
        count = len(seconds)
        wire = (wire_after - wire_before) / count if self._alone else None
        return Block(tuple(seconds), tuple(met), cpu_seconds / count, (after - before) / count, wire)

    def smallest(self, times: int) -> float:
        """Seconds of an all-reduce of one number, the median of so many."""
        found, number = [], torch.zeros(1)
        for _ in range(times):
            began = time.perf_counter()
            dist.all_reduce(number)
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    def learn(self, name: str, target: float, every: int, most: int) -> dict[str, Any]:
        """Train until the test, after each `every` steps, finds that accuracy, or for `most` steps.

        What is tested is the mean of the ranks' networks. Tests are neither in the seconds nor in the bytes.
        """
        training = self._trainings[name]
        curve: list[tuple[int, float]] = []
        seconds, payload, reached = 0.0, 0, None
        while training.step < most and reached is None:
            dist.barrier()
            (before, _), began = self._bytes(), time.perf_counter()
            for _ in range(min(every, most - training.step)):
                self._one(training)
            dist.barrier()
            seconds += time.perf_counter() - began
            payload += self._bytes()[0] - before
            curve.append((training.step, self._accuracy(training)))
            if curve[-1][1] >= target:
                reached = training.step
        averages = len(training.way.lines) if isinstance(training.way, Weights) else None
        told = {"reached": reached, "steps": training.step, "seconds": seconds, "payload": payload}
        return told | {"averages": averages, "curve": curve, "lines": training.way.lines[-1:]}

    def _one(self, training: Training) -> None:
        batch = training.batch(self._task.batch, self._rank, self._ranks)
        training.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(training.way.module(self._x[batch].float().sub(_MEAN).div(_SPREAD)), self._y[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        training.way.check(training.step)
        training.optimizer.step()
        training.way.stepped()
        training.step += 1

    def _bytes(self) -> tuple[int, int]:
        traffic = tcp_traffic()
        if traffic is None:
            raise OSError("this system does not count the bytes of TCP connections")
        return traffic.sent, sent_bytes(INTERFACE) if self._alone else 0

    @torch.no_grad()
    def _accuracy(self, training: Training) -> float:
        """Of the mean network; each rank tests its part of the records. Weights are as before afterwards."""
        network, own = training.network, []
        if isinstance(training.way, Weights):
            own = [parameter.clone() for parameter in network.parameters()]
            average_parameters(network.parameters(), cast(dist.ProcessGroup, dist.group.WORLD))
        mine = torch.arange(len(self._test_y)).tensor_split(self._ranks)[self._rank]
        right = (network(self._test_x[mine].float().sub(_MEAN).div(_SPREAD)).argmax(dim=1) == self._test_y[mine]).sum()
        dist.all_reduce(right)
        for parameter, before in zip(network.parameters(), own, strict=False):
            parameter.copy_(before)
        return int(right) / len(self._test_y)


def _records(data: Path, which: str) -> tuple[Tensor, Tensor]:
    """Pixels (N, F) as bytes, and labels (N,)."""
    with np.load(data / f"fashion-mnist-{which}.npz", allow_pickle=False) as file:
        return torch.from_numpy(file["images"]).flatten(1), torch.from_numpy(file["labels"])
