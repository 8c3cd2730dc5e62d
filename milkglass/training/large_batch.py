"""Data-parallel training of one whole network: the processes that torchrun has started, each with its part of a batch.

    torchrun --nproc-per-node 4 -m milkglass train RECIPE          with parties.mode = "data_parallel"

Nothing is split and nothing is private between ranks: they are one owner's. What they send each other is what
`parallel.exchange` says (`parallel_ways.py`). All bytes are counted at the sockets, those of tests and starts too.

- `training.batch_size` is a rank's: P ranks take P times as many records a step. In an epoch the records come in one
  order, and step by step the next P batches go to rank 0, 1, ...; so 2 ranks of 16 see what 1 rank of 32 sees.
- The first weights follow from the seed, the order and dropout from a key that all ranks are given (or the seed).
- Every rank keeps its own state beside the others', for all have something of their own: what compression left over, or
  in local training the weights themselves. A resumed run ends in the same bits, with two exceptions: torch's state of
  PowerSGD is not kept, and its error memory begins anew; and `dense` sums in another order in the first step after a
  resume, where torch parts parameters into buckets anew, so with three ranks or more its last bits differ.
- After an epoch each rank tests its part of the test records with the network that it has. The last test, and what is
  kept, is of the network that all have in common. Statistics of BatchNorm are averaged before each test.

Legend: B records in a batch of a rank, P ranks.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.client import StepResult
from milkglass.cuts import flops_per_sample
from milkglass.data import Deal
from milkglass.errors import DataError, MilkglassError, RecipeError, RunError
from milkglass.networks import build
from milkglass.parties import Party
from milkglass.randomness import Source, drawing_from, public_source, rehearsal_source
from milkglass.recipe import Recipe
from milkglass.runs import Checkpoint, RunFolder, damaged
from milkglass.training.averaging import average_buffers
from milkglass.training.inputs import RECORDS, told
from milkglass.training.parallel_ways import Way, way_of
from milkglass.training.pulse import Pulse
from milkglass.training.setup import optimizer, rate
from milkglass.training.sharded import shared_out
from milkglass.training.shares import deal_records
from milkglass.training.split import Progress, Silence, computing_with, digest_of
from milkglass.training.tcp_traffic import TcpTraffic, tcp_traffic

NETWORK: Final = "network.safetensors"
EXCHANGE: Final = "exchange.jsonl"
_TEST_BATCH: Final = 256


@final
@dataclass(frozen=True)
class _Training:
    """What a rank trains with. party: the network, its optimizer and its dropout. x, y: all training records."""

    recipe: Recipe
    records: Deal
    x: Tensor
    y: Tensor
    party: Party
    way: Way
    pulse: Pulse
    order: Source
    rank: int
    ranks: int

    @property
    def steps(self) -> int:
        """In an epoch."""
        return len(self.y) // (self.recipe.training.batch_size * self.ranks)

    @property
    def network(self) -> nn.Module:
        """Without what the way has put around it."""
        return self.party.stage


def train(
    recipe: Recipe, out: Path, key: Source | None = None, *, resume: bool = False, progress: Progress | None = None
) -> dict[str, Any] | None:
    """Train a recipe with the other ranks into the run folder `out`; at rank 0 what summary.json holds, else None.

    key: the source of order and dropout, the same at all ranks. Without torchrun it is a training of one rank. `out`
    must be one folder for all ranks. Raises MilkglassError, one line, as `split.train`.
    """
    with computing_with(recipe.threads):
        records = deal_records(recipe)
        x, y = (torch.cat([getattr(part, name) for part in records.train.values()]) for name in ("x", "y"))
        with (
            _linked(recipe.parallel.patience_seconds) as (rank, ranks),
            Pulse.of_default_group().naming_the_missing(),
        ):
            training = _set_up(recipe, records, (x, y), key, rank, ranks)
            with _folder(training, out, resume=resume) as folder:
                if folder.finished:
                    return folder.read_json("summary.json") if rank == 0 else None
                lines, traffic = _train_epochs(training, folder, progress or Silence())
                return _finish(training, folder, lines, traffic, rehearsal=key is None)


@contextmanager
def _linked(patience_seconds: float) -> Iterator[tuple[int, int]]:
    """Inside, this process is connected with the others that torchrun has started: (rank, ranks).

    A process group that is there already is used, and left as it is.
    """
    if dist.is_initialized():
        yield dist.get_rank(), dist.get_world_size()
        return
    alone: dict[str, Any] = {}
    if not shared_out():
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    dist.init_process_group("gloo", timeout=timedelta(seconds=patience_seconds), **alone)
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def _set_up(
    recipe: Recipe, records: Deal, train: tuple[Tensor, Tensor], key: Source | None, rank: int, ranks: int
) -> _Training:
    size, section = recipe.training.batch_size, recipe.parallel
    steps = len(train[1]) // (size * ranks)
    if not steps:
        raise DataError(
            f"{len(train[1])} training records make no batch of {size} for each of {ranks} ranks; lower "
            "training.batch_size"
        )
    settings = recipe.network.settings
    generator = public_source(recipe.seed).generator("weights")
    network = build(recipe.network.name, records.record_shape, records.classes, settings, generator)
    moved = recipe
    if section.momentum_correction:
        moved = recipe.model_copy(update={"training": recipe.training.model_copy(update={"momentum": 0.0})})
    learning = optimizer(moved, network)
    if learning is None:
        raise RecipeError(f"network {recipe.network.name!r} has nothing to learn")
    source = key or rehearsal_source(recipe.seed, "ranks")
    party = Party(network, learning, source.derive("rank", rank), rate=rate(recipe))
    way = way_of(
        section,
        network,
        learning,
        momentum=recipe.training.momentum,
        steps_per_epoch=steps,
        epochs=recipe.training.epochs,
        seed=recipe.seed,
    )
    order = source.derive("order")
    return _Training(recipe, records, *train, party, way, Pulse.of_default_group(), order, rank, ranks)


@contextmanager
def _folder(training: _Training, out: Path, *, resume: bool) -> Iterator[RunFolder]:
    """The run folder, which rank 0 makes and locks; the others learn whether it could."""
    digest, failed = digest_of(training.records), torch.zeros(1)
    folder = RunFolder(out, training.recipe)
    if training.rank:
        dist.broadcast(failed, 0)
        if failed:
            raise MilkglassError(f"rank {training.rank}: rank 0 cannot use the run folder {out}")
        yield folder
        return
    with ExitStack() as locked:
        try:
            folder = (RunFolder.resume if resume else RunFolder.create)(out, training.recipe, digest)
            locked.enter_context(folder.locked())
        except RunError:
            dist.broadcast(failed + 1, 0)
            raise
        dist.broadcast(failed, 0)
        yield folder


def _train_epochs(
    training: _Training, folder: RunFolder, progress: Progress
) -> tuple[list[dict[str, Any]], TcpTraffic | None]:
    """From the newest checkpoint, or the start, to the last epoch: lines of metrics.jsonl, bytes of this rank."""
    before = tcp_traffic()
    lines, carried = _restore(training, folder)
    _check_all_begin_at(len(lines), training.ranks, folder.path)

    def traffic() -> TcpTraffic | None:
        now = tcp_traffic()
        return None if now is None or before is None or carried is None else carried + now - before

    for epoch in range(len(lines) + 1, training.recipe.training.epochs + 1):
        lines.append(_epoch(training, epoch, progress))
        _keep(training, folder, epoch, lines, traffic())
        progress.epoch(lines[-1])
    return lines, traffic()


def _check_all_begin_at(epoch: int, ranks: int, out: Path) -> None:
    """Raise RunError at all ranks where they have not all found the same checkpoint."""
    own = torch.tensor([epoch])
    epochs = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(epochs, own)
    found = [int(each) for each in epochs]
    if len(set(found)) > 1:
        raise RunError(
            f"run folder {out}: the ranks found checkpoints of epochs {', '.join(map(str, found))}; expected one "
            "folder that all of them share"
        )


def _epoch(training: _Training, epoch: int, progress: Progress) -> dict[str, Any]:
    began, first = time.perf_counter(), len(training.way.lines)
    loss_sum, right = 0.0, 0
    batches = _batches(training, epoch)
    for number, batch in enumerate(batches, start=1):
        step = (epoch - 1) * training.steps + number - 1
        loss, correct = _step(training, step, training.x[batch], training.y[batch])
        loss_sum, right = loss_sum + loss, right + correct
        progress.batch(epoch, number, len(batches), StepResult(loss, 0.0, correct / len(batch)))
    seconds = time.perf_counter() - began
    if epoch == training.recipe.training.epochs:
        training.way.end()
    average_buffers(training.network)
    seen, test = sum(map(len, batches)), training.records.test
    mine = torch.arange(len(test)).tensor_split(training.ranks)[training.rank]
    counted = torch.tensor([loss_sum * len(batches[0]), right, seen, _right(training, mine)], dtype=torch.float64)
    dist.all_reduce(counted)
    loss, trained, seen, tested = counted.tolist()
    if not math.isfinite(loss):
        raise MilkglassError(f"epoch {epoch}: the loss is not finite; training has diverged: lower the learning rate")
    line = {
        "epoch": epoch,
        "loss": loss / seen,
        "train_accuracy": trained / seen,
        "accuracy": tested / len(test),
        "distance_correlation": None,
        "seconds": seconds,
    }
    return line | _compressed(training.way.lines[first:])


def _batches(training: _Training, epoch: int) -> list[Tensor]:
    """The numbers (B,) of this rank's records in each batch of an epoch."""
    order = torch.randperm(len(training.y), generator=training.order.generator(epoch))
    size = training.recipe.training.batch_size
    whole = order[: training.steps * training.ranks * size].view(training.steps, training.ranks, size)
    return list(whole[:, training.rank])


def _step(training: _Training, step: int, x: Tensor, y_B: Tensor) -> tuple[float, int]:
    """A step of this rank: its loss and how many records it classified right."""
    way, party = training.way, training.party
    training.pulse.mark()
    learning = cast(torch.optim.Optimizer, party.optimizer)
    learning.zero_grad(set_to_none=True)
    way.module.train()
    with drawing_from(party.generator):
        logits_BK = way.module(x)
    loss = F.cross_entropy(logits_BK, y_B)
    loss.backward()  # type: ignore[no-untyped-call]
    way.check(step)
    party.take_step(step)
    way.stepped()
    return float(loss.detach()), int((logits_BK.detach().argmax(dim=1) == y_B).sum())


@torch.no_grad()
def _right(training: _Training, mine: Tensor) -> int:
    """How many of those test records this rank's network classifies right."""
    test = training.records.test
    training.network.eval()
    parts = torch.split(mine, _TEST_BATCH) if len(mine) else ()
    return sum(int((training.network(test.x[part]).argmax(dim=1) == test.y[part]).sum()) for part in parts)


def _compressed(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over an epoch's steps, or averages, of what exchange.jsonl says of each."""
    told = {}
    for key in ("left_share", "bound", "old_bound", "period", "variance"):
        values = [line[key] for line in lines if line.get(key) is not None]
        if values and not (key == "bound" and "variance" in lines[0]):
            told[key] = sum(values) / len(values)
    return told


def _name(rank: int) -> str:
    return f"rank-{rank}"


def _keep(
    training: _Training, folder: RunFolder, epoch: int, lines: list[dict[str, Any]], traffic: TcpTraffic | None
) -> None:
    """A checkpoint of all ranks, which is there as a whole or not at all."""
    state = training.party.state() | {f"way.{name}": t for name, t in training.way.state().items()}
    if traffic is not None:
        state["traffic"] = torch.tensor([traffic.sent, traffic.received])
    if training.rank:
        folder.write_tensors(f"checkpoint/{epoch:04d}/{_name(training.rank)}.safetensors", state)
    dist.barrier()
    if training.rank == 0:
        folder.write(EXCHANGE, "".join(json.dumps(line) + "\n" for line in training.way.lines).encode())
        folder.write_metrics(lines)
        progress = {"metrics": lines, "exchange": training.way.lines, "ranks": training.ranks}
        folder.save_checkpoint(Checkpoint(epoch, {_name(0): state}, progress))


def _restore(training: _Training, folder: RunFolder) -> tuple[list[dict[str, Any]], TcpTraffic | None]:
    """The lines so far, and this rank's bytes."""
    checkpoint = folder.load_checkpoint()
    if checkpoint is None:
        return [], TcpTraffic(0, 0)
    if checkpoint.progress.get("ranks") != training.ranks:
        raise RunError(
            f"run folder {folder.path}: its {checkpoint.progress.get('ranks')} ranks cannot go on as {training.ranks}: "
            "each has a state of its own; start as many"
        )
    try:
        state = checkpoint.parties[_name(training.rank)]
        training.party.load_state(state)
        training.way.load_state(_below("way.", state))
        training.way.lines.extend(checkpoint.progress["exchange"])
        lines: list[dict[str, Any]] = checkpoint.progress["metrics"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise damaged(checkpoint, error) from None
    return lines, TcpTraffic(*state["traffic"].tolist()) if "traffic" in state else None


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _finish(
    training: _Training, folder: RunFolder, lines: list[dict[str, Any]], traffic: TcpTraffic | None, *, rehearsal: bool
) -> dict[str, Any] | None:
    """Write what is left to write, at rank 0; the bytes are those of all ranks."""
    counted = torch.tensor([-1, -1] if traffic is None else [traffic.sent, traffic.received])
    by_rank = [torch.empty_like(counted) for _ in range(training.ranks)]
    dist.all_gather(by_rank, counted)
    if training.rank:
        return None
    known = all(int(each[0]) >= 0 for each in by_rank)
    sent, received = torch.stack(by_rank).sum(dim=0).tolist() if known else (None, None)
    recipe, records = training.recipe, training.records
    folder.write_tensors(NETWORK, training.network.state_dict())
    folder.write_json(RECORDS, told(records))
    seconds = sum(line["seconds"] for line in lines)
    summary = {
        "accuracy": lines[-1]["accuracy"],
        "distance_correlation": None,
        "defense": "none",
        "exchange": recipe.parallel.exchange,
        "ranks": training.ranks,
        "steps": training.steps * recipe.training.epochs,
        "bytes_sent": sent,
        "bytes_received": received,
        "bytes_by_rank": [each.tolist() for each in by_rank] if known else None,
        "messages": 0,
        "wire": [],
        "seconds": seconds,
        "seconds_per_epoch": seconds / len(lines),
        "client_flops_per_sample": flops_per_sample(training.network, training.x[:1]),
        "certificate": None,
        "seed": recipe.seed,
        "keys": "keys derived from the seed: a rehearsal" if rehearsal else "the ranks' key came from a file",
        "records": {
            "train": len(training.y),
            "auxiliary": len(records.auxiliary),
            "validation": len(records.validation),
            "test": len(records.test),
        },
        "cautions": [],
        "recipe_digest": recipe.digest(),
    }
    folder.write_json("summary.json", summary)
    return summary
