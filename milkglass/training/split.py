"""Split training in one process: one client, one server, messages between them (vanilla split learning, Vepakomma et
al. 2018, arXiv 1812.00564).

The client's first weights, batch order, dropout and noise come from its private source; dealing and the server's first
weights from the recipe's seed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from milkglass.cuts import Caution, Stages, check_stages, couples_records, cut, flops_per_sample
from milkglass.data import Deal, deal, load
from milkglass.defenses.base import Defense
from milkglass.defenses.noise import Noise
from milkglass.defenses.nopeek import NoPeek
from milkglass.errors import DataError, HijackError, RunError
from milkglass.guards import HijackGuard
from milkglass.networks import build
from milkglass.parties import Client, Server, StepResult
from milkglass.randomness import Source, public_source, rehearsal_source
from milkglass.recipe import SMALLEST_PENALIZED_BATCH, Recipe
from milkglass.runs import ALARM, Checkpoint, RunFolder
from milkglass.training.evaluate import Evaluation, evaluate
from milkglass.transports.base import Flow, Transport
from milkglass.transports.local import LocalTransport


@dataclass(frozen=True)
class Setup:
    """Everything a recipe describes, ready to train."""

    recipe: Recipe
    records: Deal
    client: Client
    server: Server
    transport: Transport
    cautions: tuple[Caution, ...]

    @property
    def defense(self) -> str:
        """The client's defenses in words; "none" without any."""
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


def deal_records(recipe: Recipe) -> Deal:
    """The recipe's records, dealt to its clients, the attacker and the audit: public, from the seed."""
    data = recipe.data
    train = load(name=data.name, path=_path(data.path), hub=data.hub, sensitive=data.sensitive)
    test = None
    if data.test_path is not None:
        test = load(path=_path(data.test_path), sensitive=data.sensitive)
    elif data.test_split is not None:
        test = load(hub=data.hub, split=data.test_split, sensitive=data.sensitive)
    return deal(
        train,
        test,
        clients=recipe.parties.clients,
        train_records=data.train_records,
        test_records=data.test_records,
        auxiliary_share=recipe.attacker.auxiliary_share,
        validation_share=recipe.attacker.validation_share,
        test_share=data.test_share,
        source=public_source(recipe.seed).derive("deal"),
    )


def defenses(recipe: Recipe) -> list[Defense]:
    """The client's defenses, in the order in which they act."""
    chosen: list[Defense] = []
    if recipe.defense.noise is not None:
        chosen.append(Noise(recipe.defense.noise.sigma))
    if recipe.defense.nopeek is not None:
        chosen.append(NoPeek(recipe.defense.nopeek.weight, recipe.defense.nopeek.estimator))
    return chosen


def stages(recipe: Recipe, records: Deal, private: Source) -> tuple[Stages, tuple[Caution, ...]]:
    """The client's stage, drawn from its private source, and the server's, drawn from the recipe's seed; and cautions.

    Raises CutError where the two would share weights: each party draws, holds and trains its own.
    """

    def drawn_from(source: Source) -> Stages:
        network = recipe.network
        model = build(
            network.name, records.record_shape, records.classes, network.settings, source.generator("weights")
        )
        halves = cut(model, at=recipe.cut.at)
        check_stages(*halves)  # before one half of each is taken: afterwards nothing is shared any more
        return halves

    private_bottom, _ = drawn_from(private)
    public_bottom, top = drawn_from(public_source(recipe.seed))
    cautions = check_stages(private_bottom, top)
    pairs = list(zip(private_bottom.parameters(), public_bottom.parameters(), strict=True))
    if pairs and all(torch.equal(*pair) for pair in pairs):
        cautions.append(
            Caution(
                recipe.network.name,
                "draws the same first weights under every key, so the server knows the client's",
                "leave it to milkglass to seed torch (fine for weights that are public and pretrained)",
            )
        )
    return Stages(private_bottom, top), tuple(cautions)


def set_up(
    recipe: Recipe,
    private: Source | None = None,
    *,
    records: Deal | None = None,
    wrap: Callable[[Transport], Transport] = lambda transport: transport,
) -> Setup:
    """Parties, data and transport as the recipe says.

    private: the client's source; by default it follows from the seed: a rehearsal. records: an earlier deal of the
    same recipe. wrap: puts a transport around the local one, such as a recording one.
    """
    name = recipe.parties.clients[0]
    private = private or rehearsal_source(recipe.seed, name)
    records = records or deal_records(recipe)
    (bottom, top), cautions = stages(recipe, records, private)
    _check_batches(recipe, len(records.train[name]), coupled=[*couples_records(bottom), *couples_records(top)])
    guard = _hijack_guard(recipe, len(records.train[name]), records.classes, private)
    server = Server(
        top,
        _optimizer(recipe, top),
        name=recipe.parties.server,
        source=rehearsal_source(recipe.seed, recipe.parties.server),
    )
    transport = wrap(LocalTransport(server))
    client = Client(
        bottom,
        _optimizer(recipe, bottom),
        transport,
        defenses=defenses(recipe),
        hijack_guard=guard,
        name=name,
        source=private,
    )
    return Setup(recipe, records, client, server, transport, cautions)


def batches_of(setup: Setup, epoch: int) -> list[torch.Tensor]:
    """The numbers (B,) of the private records of each batch of an epoch, in the client's own secret order."""
    client, training = setup.client, setup.recipe.training
    order = torch.randperm(len(setup.records.train[client.name]), generator=client.source.generator("order", epoch))
    batches = list(torch.split(order, training.batch_size))
    if training.drop_last_batch and len(batches[-1]) < training.batch_size:
        batches.pop()
    return batches


def train_epoch(setup: Setup, epoch: int, progress: Progress | None = None) -> tuple[float, float]:
    """Every private record once, in the client's own secret order: (mean loss, accuracy on the way).

    Batches that went out mislabeled count in neither.
    """
    client, batches = setup.client, batches_of(setup, epoch)
    records = setup.records.train[client.name]
    loss = accuracy = seen = 0.0
    for step, rows in enumerate(batches, start=1):
        result = client.step(records.x[rows], records.y[rows])
        if not result.mislabeled:
            loss += result.loss * len(rows)
            accuracy += result.accuracy * len(rows)
            seen += len(rows)
        if progress is not None:
            progress.batch(epoch, step, len(batches), result)
    return loss / seen, accuracy / seen


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
        setup.client.check_egress(setup.records.train[setup.client.name].x[:8])
        digest = digest_of(setup.records)
        folder = RunFolder.resume(out, recipe, digest) if resume else RunFolder.create(out, recipe, digest)
        with folder.locked():
            if folder.finished:
                return folder.read_json("summary.json")
            folder.check_alarm()
            try:
                lines = _train_epochs(setup, folder, progress)
            except HijackError as error:
                folder.write(ALARM, str(error).encode())
                raise
            folder.write_tensors("bottom.safetensors", setup.client.stage.state_dict())
            folder.write_tensors("top.safetensors", setup.server.stage.state_dict())
            folder.write_metrics(lines)
            summary = summarize(setup, lines, rehearsal=key is None)
            folder.write_json("summary.json", summary)
    return summary


def _train_epochs(setup: Setup, folder: RunFolder, progress: Progress) -> list[dict[str, Any]]:
    """From the newest checkpoint, or the start, to the last epoch: the lines of metrics.jsonl."""
    checkpoint = folder.load_checkpoint()
    lines = [] if checkpoint is None else _restore(setup, checkpoint)
    for epoch in range(len(lines) + 1, setup.recipe.training.epochs + 1):
        started = time.perf_counter()
        loss, accuracy = train_epoch(setup, epoch, progress)
        seconds = time.perf_counter() - started
        found = evaluate_on_test(setup, epoch)
        lines.append(
            {
                "epoch": epoch,
                "loss": loss,
                "train_accuracy": accuracy,
                "accuracy": found.accuracy,
                "distance_correlation": asdict(found.dependence),
                "seconds": seconds,
            }
        )
        folder.write_metrics(lines)
        folder.save_checkpoint(_checkpoint(setup, epoch, lines))
        progress.epoch(lines[-1])
    return lines


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
    test = setup.records.test
    return evaluate(setup.client, test.x, test.y, public_source(setup.recipe.seed).generator("permutations", epoch))


def summarize(setup: Setup, lines: list[dict[str, Any]], *, rehearsal: bool) -> dict[str, Any]:
    """What summary.json says of a finished training."""
    records, traffic = setup.records, setup.transport.traffic
    seconds = sum(line["seconds"] for line in lines)
    example = records.test.x[:1]
    return {
        "accuracy": lines[-1]["accuracy"],
        "distance_correlation": lines[-1]["distance_correlation"],
        "defense": setup.defense,
        "bytes_sent": traffic.wire_bytes("to server"),
        "bytes_received": traffic.wire_bytes("to client"),
        "messages": traffic.messages,
        "wire": [
            {"direction": direction, "kind": kind, "messages": flow.messages, "bytes": flow.wire_bytes}
            for (direction, kind), flow in traffic.flows.items()
        ],
        "seconds": seconds,
        "seconds_per_epoch": seconds / len(lines),
        "client_flops_per_sample": flops_per_sample(setup.client.stage, example),
        "seed": setup.recipe.seed,
        "keys": "keys derived from the seed: a rehearsal" if rehearsal else "the client's key came from a file",
        "records": {
            "train": {name: len(part) for name, part in records.train.items()},
            "auxiliary": len(records.auxiliary),
            "validation": len(records.validation),
            "test": len(records.test),
        },
        "cautions": [f"{caution.layer}: {caution.reason}; {caution.way_out}" for caution in setup.cautions],
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


def _check_batches(recipe: Recipe, records: int, coupled: list[str]) -> None:
    """Refuse what would fail on the way: no batch at all, or a last one too short for a penalty."""
    size, rest = recipe.training.batch_size, records % recipe.training.batch_size
    if recipe.training.drop_last_batch:
        if records < size:
            raise DataError(f"{records} training records make no batch of {size}; lower training.batch_size")
    elif recipe.defense.nopeek is not None and 0 < rest < SMALLEST_PENALIZED_BATCH:
        raise DataError(
            f"the last batch has {rest} records; NoPeek's penalty needs at least {SMALLEST_PENALIZED_BATCH}: "
            "set training.drop_last_batch = true, or another batch_size"
        )
    elif rest == 1 and coupled:
        raise DataError(
            f"the last batch has one record, and BatchNorm ({coupled[0]}) needs two: "
            "set training.drop_last_batch = true, or another batch_size"
        )


def _hijack_guard(recipe: Recipe, records: int, classes: int, private: Source) -> HijackGuard | None:
    """The client's guard, or None. Raises DataError where it could not do its work in so few batches."""
    settings = recipe.guard.hijack
    if settings is None:
        return None
    guard = HijackGuard(private.derive("guard"), classes, **settings.model_dump())
    size, training = recipe.training.batch_size, recipe.training
    batches = records // size if training.drop_last_batch else -(-records // size)
    if batches < 2:
        raise DataError("guard.hijack needs at least 2 batches an epoch: one may be mislabeled; lower batch_size")
    if batches * training.epochs < guard.steps_to_judge:
        raise DataError(
            f"guard.hijack judges the server after {guard.steps_to_judge} batches, and {training.epochs} epochs have "
            f"{batches * training.epochs}: lower its warm_up, or raise its fake_share or training.epochs"
        )
    return guard


def _optimizer(recipe: Recipe, stage: nn.Module) -> torch.optim.Optimizer | None:
    parameters = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    if not parameters:
        return None
    training = recipe.training
    if training.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    return torch.optim.SGD(
        parameters, lr=training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay
    )


def _checkpoint(setup: Setup, epoch: int, lines: list[dict[str, Any]]) -> Checkpoint:
    flows = [
        [direction, kind, flow.messages, flow.wire_bytes]
        for (direction, kind), flow in setup.transport.traffic.flows.items()
    ]
    parties = {party.name: party.state() for party in (setup.client, setup.server)}
    return Checkpoint(epoch, parties, {"metrics": lines, "traffic": flows})


def _restore(setup: Setup, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    try:
        for party in (setup.client, setup.server):
            party.load_state(checkpoint.parties[party.name])
        for direction, kind, messages, wire_bytes in checkpoint.progress["traffic"]:
            setup.transport.traffic.flows[(direction, kind)] = Flow(messages, wire_bytes)
        lines: list[dict[str, Any]] = checkpoint.progress["metrics"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        words = str(error).splitlines()[0]
        raise RunError(
            f"checkpoint of epoch {checkpoint.epoch}: damaged or half-written ({words}); "
            "remove the checkpoint folder to begin anew"
        ) from None
    return lines


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
