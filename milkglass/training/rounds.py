"""One client's way through a training, whatever the way: batches, what it leaves and takes between epochs, its test.

Everything here is a generator that pauses where the client waits for the server. One process that plays all clients
lets them go on in turn (`play_together`); between machines each goes on by itself (`run_to_end`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast, final

import torch
from torch import Tensor

from milkglass.client import Client, StepResult
from milkglass.errors import MessageError, MilkglassError
from milkglass.guards import finite
from milkglass.handover import average, seal, unseal
from milkglass.private.dp import poisson_batches
from milkglass.randomness import Source, public_source
from milkglass.recipe import Recipe
from milkglass.training.evaluate import Evaluation, evaluating
from milkglass.training.shares import Share

Result = TypeVar("Result")


@dataclass
class Position:
    """How far a client has come: batches done in this epoch, and what they cost so far."""

    epoch: int = 1
    batch: int = 0
    loss: float = 0.0
    right: float = 0.0
    seen: float = 0.0

    def count(self, result: StepResult, records: int) -> None:
        """One batch more. One that went out mislabeled counts in no mean."""
        self.batch += 1
        if not result.mislabeled:
            self.loss += result.loss * records
            self.right += result.accuracy * records
            self.seen += records


@dataclass(frozen=True)
class EpochResult:
    """What an epoch came to at one client: mean loss and accuracy (0..1) on the way, of `seen` records; then its test.

    seconds: of the training alone. tested: how many records the evaluation is of. told: False for an owner of columns
    that has no labels, who is told no loss.
    """

    loss: float
    accuracy: float
    seen: float
    seconds: float
    tested: int = 0
    evaluation: Evaluation | None = None
    told: bool = True


OnBatch = Callable[[Position, int, StepResult], None]
"""(position, batches in the epoch, what the batch cost): called after each batch."""


def nothing(position: Position, batches: int, result: StepResult) -> None:
    """Nobody watches."""


@final
@dataclass(frozen=True)
class Seat:
    """One client's place in a training: itself, its records, and the key that it shares with the other clients."""

    recipe: Recipe
    client: Client
    share: Share
    shared: Source
    position: Position = field(default_factory=Position)

    @property
    def index(self) -> int:
        """Its number among the clients, from 0."""
        return self.recipe.parties.clients.index(self.client.name)

    @property
    def hands_over(self) -> bool:
        """Whether weights go from client to client after an epoch."""
        return len(self.recipe.parties.clients) > 1 and not self.recipe.parties.is_vertical

    @property
    def has_labels(self) -> bool:
        """Whether this client has the labels: in vertical training the first owner alone."""
        return self.index == 0 or not self.recipe.parties.is_vertical

    def batches(self, epoch: int) -> list[Tensor]:
        """The row numbers (B,) of each batch of an epoch, in an order secret from the server; owners have the same.

        With differential privacy each record is in each batch by chance: B differs, and may be 0.
        """
        source = self.shared if self.recipe.parties.is_vertical else self.client.source
        training, records = self.recipe.training, len(self.share.train)
        generator = source.generator("order", epoch)
        if self.recipe.dp is not None:
            return poisson_batches(records, training.batch_size / records, records // training.batch_size, generator)
        order = torch.randperm(records, generator=generator)
        batches = list(torch.split(order, training.batch_size))
        if training.drop_last_batch and len(batches[-1]) < training.batch_size:
            batches.pop()
        return batches


def playing_epoch(seat: Seat, on_batch: OnBatch = nothing, *, test: bool = True) -> Generator[None, None, EpochResult]:
    """The epoch that the seat's position is in, from there to its end; then the position is the next epoch's start."""
    position, records = seat.position, seat.share.train
    epoch, batches = position.epoch, seat.batches(position.epoch)
    started = time.perf_counter()
    if epoch == 1 and position.batch == 0:
        yield from _entering(seat, len(batches))
    if position.batch == 0 and seat.hands_over and seat.recipe.parties.mode == "relay" and seat.index > 0:
        yield from _taking(seat, epoch, [seat.index - 1])
    for rows in batches[position.batch :]:
        y_B = records.y[rows] if seat.has_labels else None
        result = yield from seat.client.stepping(records.x[rows], y_B, rows)
        position.count(result, len(rows))
        on_batch(position, len(batches), result)
    if seat.hands_over:
        yield from _handing_over(seat, epoch)
    seen, seconds = max(position.seen, 1.0), time.perf_counter() - started
    epoch_result = EpochResult(position.loss / seen, position.right / seen, seen, seconds, told=seat.has_labels)
    if test and len(seat.share.test):
        generator = public_source(seat.recipe.seed).generator("permutations", epoch)
        part = seat.share.test
        found = yield from evaluating(seat.client, part.x, part.y, generator)
        epoch_result = replace(epoch_result, tested=len(part), evaluation=found)
    position.epoch, position.batch = epoch + 1, 0
    position.loss = position.right = position.seen = 0.0
    return epoch_result


def play_together(
    players: Sequence[tuple[Client, Generator[None, None, Result]]],
) -> list[Result]:
    """Let several clients in one process go on in turn, each when its answer is there; what each returns."""
    results: dict[int, Result] = {}
    started: set[int] = set()
    while len(results) < len(players):
        moved = False
        for number, (client, player) in enumerate(players):
            if number in results or (number in started and not client.transport.ready):
                continue
            started.add(number)
            moved = True
            try:
                next(player)
            except StopIteration as end:
                results[number] = cast(Result, end.value)
        if not moved:
            waiting = ", ".join(client.name for i, (client, _) in enumerate(players) if i not in results)
            raise MilkglassError(f"every client waits for another one: {waiting}")
    return [results[number] for number in range(len(players))]


def _entering(seat: Seat, batches: int) -> Generator[None, None, None]:
    """What the server must know first: how many batches come, or whether the owners' records match."""
    if seat.hands_over:
        seat.client.leave("enters", 0, {"batches": torch.tensor([batches])})
    elif seat.share.hashes is not None:
        seat.client.leave("hashes", 0, {"hashes": seat.share.hashes})
    else:
        return
    yield
    seat.client.take("receipt", 0)


def _handing_over(seat: Seat, epoch: int) -> Generator[None, None, None]:
    """Leave one's own weights, sealed; take the last one's (relay), or the mean of all (SplitFed)."""
    relay = seat.recipe.parties.mode == "relay"
    # with differential privacy how many were drawn is secret; how many there are is not
    records = seat.position.seen if seat.recipe.dp is None else float(len(seat.share.train))
    left = seat.client.weights(with_optimizer=relay) | {"records": torch.tensor(records)}
    sealed = seal(left, sealing_key(seat), seat.client.name, epoch)
    seat.client.leave("weights", epoch, {"sealed": sealed})
    yield
    seat.client.take("receipt", epoch)
    everyone = range(len(seat.recipe.parties.clients))
    yield from _taking(seat, epoch, everyone[-1:] if relay else everyone)


def sealing_key(seat: Seat) -> Source:
    """Another one for every recipe: what was sealed under one cannot be handed out under another."""
    return seat.shared.derive("sealing", seat.recipe.digest())


def _taking(seat: Seat, epoch: int, of: Sequence[int]) -> Generator[None, None, None]:
    """Take over what the clients of these numbers left in this epoch: their mean, if there are several."""
    seat.client.leave("collect", epoch, {"of": torch.tensor(list(of))})
    yield
    answer = seat.client.take("handed", epoch)
    names = [seat.recipe.parties.clients[index] for index in of]
    if list(answer.tensors) != [str(place) for place in range(len(names))]:
        raise MessageError(f"expected the weights of {', '.join(names)}; the server sent {len(answer.tensors)} of them")
    key = sealing_key(seat)
    opened = [unseal(sealed, key, name, epoch) for name, sealed in zip(names, answer.tensors.values(), strict=True)]
    for name, weights in zip(names, opened, strict=True):
        _check_handed(seat, name, weights)
    counts = [float(weights.pop("records")) for weights in opened]
    # what only the optimizer remembers stays with its own client, but in a relay
    taken = opened[0] if len(opened) == 1 else average(opened, counts)
    seat.client.load_weights(taken, with_optimizer=len(opened) == 1)


def _check_handed(seat: Seat, name: str, weights: Mapping[str, Tensor]) -> None:
    """Raise MessageError, which names the client that left them, for weights that do not fit this client's."""
    own = seat.client.weights()
    records = weights.get("records", torch.zeros(0))
    learned = {key: (t.shape, t.dtype) for key, t in weights.items() if key.partition(".")[0] in ("stage", "head")}
    remembered = {key: t for key, t in weights.items() if key.startswith("optimizer.")}
    parameters = [t.shape for group in _groups(seat.client) for t in group["params"]]
    fits = (
        learned == {key: (t.shape, t.dtype) for key, t in own.items()}
        and len(learned) + len(remembered) + 1 == len(weights)
        and records.numel() == 1
        and 0 < float(records) < 2**40
    )
    for key, tensor in remembered.items():
        index = key.split(".")[1]
        known = index.isdecimal() and int(index) < len(parameters)
        fits = fits and known and (tensor.dim() == 0 or tensor.shape == parameters[int(index)])
    if not fits:
        raise MessageError(f"what {name} has left does not fit this client's stage, or says no number of records")
    if not all(finite(tensor) for tensor in weights.values() if tensor.is_floating_point()):
        raise MessageError(f"the weights that {name} has left are not finite (NaN or infinity)")


def _groups(client: Client) -> list[dict[str, Any]]:
    return [] if client.optimizer is None else client.optimizer.param_groups
