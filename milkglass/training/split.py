"""Split training in one process: one server and its clients, messages between them (Vepakomma et al. 2018, arXiv
1812.00564). Which way of training it is follows from the recipe: `desk.py` has the ways of several clients, `server.py`
those of the labels; `rounds.py` is what each client does. Between machines all is the same, with another transport.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from milkglass.client import Client, StepResult
from milkglass.compression.base import Identity
from milkglass.cuts import Caution
from milkglass.data import Deal
from milkglass.desk import Desk
from milkglass.errors import EgressError, HijackError
from milkglass.messages import Responder
from milkglass.randomness import Source, public_source, rehearsal_source
from milkglass.recipe import Recipe
from milkglass.runs import ALARM, Checkpoint, RunFolder, damaged
from milkglass.server import Server
from milkglass.training.evaluate import Evaluation, evaluate
from milkglass.training.inputs import RECORDS, told
from milkglass.training.party_folder import drawn_run
from milkglass.training.rounds import EpochResult, Position, Seat, play_together, playing_epoch
from milkglass.training.setup import Shapes, compressor, crossing_shapes, make_client, make_desk, make_hop
from milkglass.training.shares import deal_and_hash, share_of, shared_rehearsal_key
from milkglass.training.summary import (
    cautions_in_words,
    certificate_summary,
    client_flops,
    client_flops_share,
    metrics_line,
    privacy_summary,
    total_traffic,
    traffic_summary,
)
from milkglass.transports.base import Flow, Transport
from milkglass.transports.local import LocalHub, LocalTransport, Sole
from milkglass.transports.wrappers import Packing, PackingService, PackingTransport, packing


@dataclass(frozen=True)
class Setup:
    """Everything a recipe describes, in one process, ready to train."""

    recipe: Recipe
    records: Deal
    seats: tuple[Seat, ...]
    desks: Mapping[str, Desk]
    cautions: tuple[Caution, ...]

    @property
    def client(self) -> Client:
        """The first client."""
        return self.seats[0].client

    @property
    def server(self) -> Server:
        """The one that trains with the first client (at the end of all hops)."""
        return next(iter(self.desk.servers.values()))

    @property
    def desk(self) -> Desk:
        """The server's side."""
        return self.desks[self.recipe.parties.server]

    @property
    def transport(self) -> Transport:
        """The first client's."""
        return self.client.transport

    @property
    def defense(self) -> str:
        """The clients' defenses in words; "none" without any."""
        return " + ".join(defense.describe() for defense in self.client.defenses) or "none"


class Progress(Protocol):
    """Who watches a training."""

    def batch(self, epoch: int, step: int, steps: int, result: StepResult) -> None:
        """One batch is done."""

    def epoch(self, line: dict[str, Any]) -> None:
        """One epoch is done; `line` is its line of metrics.jsonl."""


class Silence:
    """Nobody watches."""

    def batch(self, epoch: int, step: int, steps: int, result: StepResult) -> None:
        """Do nothing."""

    def epoch(self, line: dict[str, Any]) -> None:
        """Do nothing."""


def set_up(
    recipe: Recipe,
    private: Source | None = None,
    *,
    records: Deal | None = None,
    wrap: Callable[[Transport], Transport] = lambda transport: transport,
) -> Setup:
    """Parties, data and transport as the recipe says.

    private: the client's source; by default it follows from the seed: a rehearsal. Several clients derive theirs from
    it. records: an earlier deal of the same recipe. wrap: puts a transport around a local one, such as a recording one.
    """
    names = recipe.parties.clients
    shared = shared_rehearsal_key(recipe) if private is None else private.derive("shared")
    hashes = None
    if records is None:
        records, hashes = deal_and_hash(recipe, shared=shared)
    shapes = crossing_shapes(recipe, records.record_shape, records.classes)
    packings = make_packings(recipe, shapes)
    desks, hub = _way_to_server(recipe, records, shapes, packings)
    seats, cautions = [], []
    for name in names:
        source = private or rehearsal_source(recipe.seed, name)
        transport = wrap(LocalTransport(hub, name))
        share = share_of(recipe, records, name, hashes)
        client, told = make_client(
            recipe,
            name,
            share,
            records.classes,
            source if private is None or len(names) == 1 else source.derive(name),
            PackingTransport(transport, packings[name]) if packings else transport,
        )
        seats.append(Seat(recipe, client, share, shared))
        cautions.append(told)
    return Setup(recipe, records, tuple(seats), desks, cautions[0])


def _way_to_server(
    recipe: Recipe, records: Deal, shapes: Shapes, packings: Mapping[str, Packing]
) -> tuple[dict[str, Desk], LocalHub]:
    """The desks of the server and of the hops before it, by party, the first on the way first; and the way to that."""
    parties, source = recipe.parties, rehearsal_source(recipe.seed, recipe.parties.server)
    form = (records.record_shape, records.classes, shapes)

    def hub_of(desk: Desk) -> LocalHub:
        return LocalHub(PackingService(desk, packings) if packings else desk)

    desks = {parties.server: make_desk(recipe, *form, source)}
    hub = hub_of(desks[parties.server])
    for name in reversed(parties.hops):
        onward: Transport = LocalTransport(hub, name)
        if packings:
            onward = PackingTransport(onward, packings[name])
        desk = make_hop(recipe, name, *form, rehearsal_source(recipe.seed, name), onward)
        desks, hub = {name: desk, **desks}, hub_of(desk)
    return desks, hub


def transport_to(responder: Responder, recipe: Recipe, shapes: Shapes, name: str) -> Transport:
    """The way of the client of that name to one that stands in the server's place, compressed as the recipe says."""
    packings = make_packings(recipe, shapes)
    if not packings:
        return LocalTransport(responder)
    hub = LocalHub(PackingService(Sole(responder, name), packings))
    return PackingTransport(LocalTransport(hub, name), packings[name])


def make_packings(recipe: Recipe, shapes: Shapes) -> dict[str, Packing]:
    """How each client's messages are compressed; nobody's where they are not."""
    with_ = compressor(recipe)
    if isinstance(with_, Identity):
        return {}
    return {name: packing(with_, cut, shapes.features) for name, cut in shapes.cut.items()}


def batches_of(setup: Setup, epoch: int) -> list[Tensor]:
    """The numbers (B,) of the first client's records in each batch of an epoch, in its own secret order."""
    return setup.seats[0].batches(epoch)


def train_epoch(setup: Setup, epoch: int, progress: Progress | None = None) -> tuple[float, float]:
    """Every private record once, in the clients' own secret order: (mean loss, accuracy on the way).

    Batches that went out mislabeled count in neither.
    """
    result = _combined(play_epoch(setup, epoch, progress, test=False))
    return result.loss, result.accuracy


def play_epoch(setup: Setup, epoch: int, progress: Progress | None = None, *, test: bool = True) -> list[EpochResult]:
    """One epoch of all clients, and their tests: what it came to at each."""
    done, total = 0, sum(len(seat.batches(epoch)) for seat in setup.seats)

    def on_batch(_: Position, __: int, result: StepResult) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress.batch(epoch, done, total, result)

    for seat in setup.seats:
        seat.position.epoch, seat.position.batch = epoch, 0
    return play_together([(seat.client, playing_epoch(seat, on_batch, test=test)) for seat in setup.seats])


def _combined(results: list[EpochResult]) -> EpochResult:
    """One result of all clients, each counting by its records. Owners of columns without labels count for nothing."""
    told = [result for result in results if result.told]
    seen, tested = sum(result.seen for result in told), sum(result.tested for result in told)
    found = None
    evaluations = [(result.tested, result.evaluation) for result in told if result.evaluation is not None]
    if evaluations:
        accuracy = sum(count * each.accuracy for count, each in evaluations) / tested
        found = Evaluation(accuracy, evaluations[0][1].dependence)
    return EpochResult(
        sum(result.loss * result.seen for result in told) / seen,
        sum(result.accuracy * result.seen for result in told) / seen,
        seen,
        max(result.seconds for result in results),
        tested,
        found,
    )


def train(
    recipe: Recipe, out: Path, key: Source | None = None, *, resume: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Train a recipe into the run folder `out`; returns what summary.json holds.

    Ends in the same bits whether it ran through or was stopped and resumed any number of times. Raises
    MilkglassError, one line, before anything is written, if the recipe cannot be run.
    """
    progress = progress or Silence()
    with computing_with(recipe.threads):
        setup = set_up(recipe, key)  # before the folder: a recipe that cannot run leaves no trace
        for seat in setup.seats:
            seat.client.check_egress(seat.share.train.x[:8])
        digest = digest_of(setup.records)
        setup = replace(setup, cautions=(*setup.cautions, *_of_other_records(recipe.network.start, digest)))
        folder = RunFolder.resume(out, recipe, digest) if resume else RunFolder.create(out, recipe, digest)
        with folder.locked():
            if folder.finished:
                return folder.read_json("summary.json")
            folder.check_alarm()
            try:
                lines = _train_epochs(setup, folder, progress)
            except (HijackError, EgressError) as error:
                folder.write(ALARM, str(error).encode())
                raise
            write_stages(setup, folder)
            if recipe.training.at_home:
                drawn_run(folder)  # its halves will meet again between machines, and know each other by this
            folder.write_json(RECORDS, told(setup.records))
            folder.write_metrics(lines)
            summary = summarize(setup, lines, rehearsal=key is None)
            folder.write_json("summary.json", summary)
    return summary


def _of_other_records(start: str | None, digest: str) -> list[Caution]:
    """A caution where the run that this one begins with had its records dealt otherwise: from another seed, say."""
    if start is None or RunFolder.open_finished(Path(start), ("records.sha256",)).records_digest == digest:
        return []
    return [
        Caution(
            "network.start",
            f"{start} was trained on another deal of records, so test and auxiliary records of this run may have "
            "taught it: accuracy and audit then flatter",
            "begin with a run of the same data and seed, or see that its records are none of these",
        )
    ]


def _train_epochs(setup: Setup, folder: RunFolder, progress: Progress) -> list[dict[str, Any]]:
    """From the newest checkpoint, or the start, to the last epoch: the lines of metrics.jsonl."""
    checkpoint = folder.load_checkpoint()
    lines = [] if checkpoint is None else _restore(setup, checkpoint)
    for epoch in range(len(lines) + 1, setup.recipe.training.epochs + 1):
        lines.append(metrics_line(epoch, _combined(play_epoch(setup, epoch, progress))))
        folder.write_metrics(lines)
        folder.save_checkpoint(_checkpoint(setup, epoch, lines))
        progress.epoch(lines[-1])
    return lines


def write_stages(setup: Setup, folder: RunFolder) -> None:
    """The trained stages, a file each; owners of columns beside the first have a file of their own."""
    folder.write_tensors("bottom.safetensors", setup.client.stage.state_dict())
    if setup.client.head is not None:
        folder.write_tensors("head.safetensors", setup.client.head.state_dict())
    folder.write_tensors("top.safetensors", setup.server.stage.state_dict())
    for name in setup.recipe.parties.hops:
        (hop,) = setup.desks[name].servers.values()
        folder.write_tensors(f"hop-{name}.safetensors", hop.stage.state_dict())
    if setup.recipe.parties.is_vertical:
        for seat in setup.seats[1:]:
            folder.write_tensors(f"bottom-{seat.client.name}.safetensors", seat.client.stage.state_dict())


def digest_of(records: Deal) -> str:
    """SHA-256 over all dealt records, labels and sensitive columns, in hexadecimal.

    It stays in the run folder: records are private.
    """
    content = hashlib.sha256()
    for part in (*records.train.values(), records.auxiliary, records.validation, records.test):
        for tensor in (part.x, part.y, *(part.attributes[name] for name in sorted(part.attributes))):
            content.update(tensor.contiguous().numpy().data)
    return content.hexdigest()


def evaluate_on_test(setup: Setup, epoch: int) -> Evaluation:
    """Accuracy and distance correlation on the test records, across the cut."""
    test = setup.seats[0].share.test
    return evaluate(setup.client, test.x, test.y, public_source(setup.recipe.seed).generator("permutations", epoch))


def summarize(setup: Setup, lines: list[dict[str, Any]], *, rehearsal: bool) -> dict[str, Any]:
    """What summary.json says of a finished training."""
    records = setup.records
    traffic = total_traffic([seat.client.transport.traffic for seat in setup.seats])
    return {
        "accuracy": lines[-1]["accuracy"],
        "distance_correlation": lines[-1]["distance_correlation"],
        "defense": setup.defense,
        **traffic_summary(traffic),
        "seconds": (seconds := sum(line["seconds"] for line in lines)),
        "seconds_per_epoch": seconds / len(lines),
        "client_flops_per_sample": client_flops(setup.seats[0]),
        "client_flops_share": client_flops_share(setup.recipe, records.record_shape, records.classes),
        "certificate": certificate_summary(setup.recipe, setup.client, setup.seats[0].share, records.classes),
        "privacy": privacy_summary(setup.recipe, [seat.client for seat in setup.seats]),
        "seed": setup.recipe.seed,
        "keys": "keys derived from the seed: a rehearsal" if rehearsal else "the client's key came from a file",
        "records": {
            "train": {name: len(part) for name, part in records.train.items()},
            "auxiliary": len(records.auxiliary),
            "validation": len(records.validation),
            "test": len(records.test),
        },
        "releases": {
            seat.client.name: seat.client.guards.ledger.summary()
            for seat in setup.seats
            if seat.client.guards.ledger is not None
        },
        "cautions": cautions_in_words(setup.cautions),
        "recipe_digest": setup.recipe.digest(),
    }


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Inside, torch computes with so many threads: the sum's order, and so its last bits, depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _checkpoint(setup: Setup, epoch: int, lines: list[dict[str, Any]]) -> Checkpoint:
    flows = {
        seat.client.name: [
            [direction, kind, flow.messages, flow.wire_bytes]
            for (direction, kind), flow in seat.client.transport.traffic.flows.items()
        ]
        for seat in setup.seats
    }
    parties: dict[str, Mapping[str, Tensor]] = {seat.client.name: seat.client.state() for seat in setup.seats}
    parties |= {name: desk.state() for name, desk in setup.desks.items()}
    return Checkpoint(epoch, parties, {"metrics": lines, "traffic": flows})


def _restore(setup: Setup, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    try:
        for seat in setup.seats:
            seat.client.load_state(checkpoint.parties[seat.client.name])
            for direction, kind, messages, wire_bytes in checkpoint.progress["traffic"][seat.client.name]:
                seat.client.transport.traffic.flows[(direction, kind)] = Flow(messages, wire_bytes)
        for name, desk in setup.desks.items():
            desk.load_state(checkpoint.parties[name])
        lines: list[dict[str, Any]] = checkpoint.progress["metrics"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise damaged(checkpoint, error) from None
    return lines
