"""One party as a process of its own: a client. It dials out to the server, and trains with its own records.

Its folder: recipe.toml, records.sha256, run.json (the server's number of the run), key (its private key, where none was
named), checkpoint/ and journal/, at the end bottom.safetensors, metrics.jsonl and summary.json. Started again with
`resume` it computes again what came after its checkpoint, from its journal, and goes on where it was.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from milkglass.certificates import Credentials
from milkglass.client import StepResult
from milkglass.errors import EgressError, HijackError, LinkError, RecipeError, RunError, first_line, nearest
from milkglass.memory import keep_freed_memory
from milkglass.parties import run_to_end
from milkglass.randomness import KEY_BYTES, Source, read_key
from milkglass.recipe import Recipe
from milkglass.runs import ALARM, Checkpoint, RunFolder
from milkglass.training.inputs import RECORDS, told
from milkglass.training.party_folder import known_run, own_folder, private_source
from milkglass.training.rounds import Position, Seat, playing_epoch
from milkglass.training.serve import (
    FAREWELL_SECONDS,
    JOURNAL_BYTES,
    Form,
    agreement,
    crossing,
    refuse_at_home,
)
from milkglass.training.setup import crossing_shapes, make_client
from milkglass.training.shares import Share, deal_and_hash, owner_shapes, share_of
from milkglass.training.split import (
    Progress,
    Silence,
    computing_with,
    digest_of,
    make_packings,
)
from milkglass.training.summary import (
    cautions_in_words,
    certificate_summary,
    client_flops,
    client_flops_share,
    metrics_line,
    privacy_summary,
    traffic_summary,
)
from milkglass.transports.base import Flow
from milkglass.transports.exactly_once import Sender
from milkglass.transports.grpc import GrpcTransport, Log, silent
from milkglass.transports.wrappers import PackingTransport


@dataclass(frozen=True)
class _Material:
    """A client's records, what they hash to, what is kept of their form, and what follows from it."""

    share: Share
    form: Form
    digest: str
    told: dict[str, Any]


def join(
    recipe: Recipe,
    name: str,
    address: str,
    credentials: Credentials | None,
    out: Path,
    *,
    key: Path | None = None,
    shared_key: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    log: Log = silent,
) -> dict[str, Any]:
    """Train as the recipe's client of that name with the server at `address`; returns what summary.json holds.

    key: the client's private key; where None is named, one is made in the run folder. shared_key: what several clients
    share and the server lacks. Raises MilkglassError, one line, before anything leaves where the recipe cannot be run.
    """
    refuse_at_home(recipe)
    if name not in recipe.parties.clients:
        raise RecipeError(f"{name!r} is not among the recipe's clients; {nearest(name, recipe.parties.clients)}")
    if len(recipe.parties.clients) > 1 and shared_key is None:
        raise RecipeError(
            f"mode {recipe.parties.mode} needs a key that the clients share and the server lacks: --shared-key FILE, "
            "32 raw bytes (head -c 32 /dev/urandom), the same for every client"
        )
    keep_freed_memory()
    with computing_with(recipe.threads):
        shared = Source(bytes(KEY_BYTES)) if shared_key is None else read_key(shared_key)
        material = _material(recipe, name, shared)
        folder = own_folder(out, recipe, material.digest, resume=resume)
        with folder.locked():
            folder.check_alarm()
            if folder.finished and not (folder.path / "journal").exists():
                return folder.read_json("summary.json")
            private = private_source(folder, key)
            if private.derive("check").read(16) == shared.derive("check").read(16):
                raise RecipeError("--key and --shared-key hold the same bytes; a private key is one client's alone")
            joining = Joining(recipe, folder, name, address, credentials, private, shared, material, log)
            try:
                joining.train(progress or Silence())
                summary = joining.finish(made_key=key is None)
                heard = joining.say_goodbye(log)
            except (HijackError, EgressError) as error:
                folder.write(ALARM, str(error).encode())
                raise
            finally:
                joining.transport.close()
            if heard:
                shutil.rmtree(folder.path / "journal")
    return summary


def _material(recipe: Recipe, name: str, shared: Source) -> _Material:
    own = name if recipe.client.own_records else None
    records, hashes = deal_and_hash(recipe, own=own, shared=shared)
    data, shape = recipe.data, records.record_shape
    if own is not None and recipe.parties.is_vertical:
        if data.record_shape is None:
            raise RecipeError("data.record_shape is missing: an owner's own file does not tell what a whole record is")
        shape = data.record_shape
    if data.record_shape is not None and data.record_shape != shape:
        raise RecipeError(f"data.record_shape is {data.record_shape} in the recipe; the records have {shape}")
    share = share_of(recipe, records, name, hashes)
    expected = owner_shapes(recipe, shape)[name]
    if tuple(share.train.x.shape[1:]) != expected:
        raise RecipeError(
            f"{name}'s part of a record is {tuple(share.train.x.shape[1:])} in its file; expected {expected}: say how "
            "many columns each owner has in parties.vertical.parts"
        )
    form = Form(shape, records.classes, crossing_shapes(recipe, shape, records.classes))
    return _Material(share, form, digest_of(records), told(records))


@final
class Joining:
    """A client's training: its seat, its connection, and its checkpoints."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        name: str,
        address: str,
        credentials: Credentials | None,
        private: Source,
        shared: Source,
        material: _Material,
        log: Log,
    ) -> None:
        self.recipe, self.folder, self.name = recipe, folder, name
        self._material = material
        checkpoint = folder.load_checkpoint()
        self.transport = GrpcTransport(
            address,
            credentials,
            Sender(folder.path / "journal", 0 if checkpoint is None else checkpoint.number),
            party=name,
            agreement=agreement(recipe, material.form, name),
            limits=crossing(recipe, material.form, name).to_client(),
            run=known_run(folder, "run.json"),
            entered=lambda run: folder.write_json("run.json", {"run": run}),
            patience_seconds=recipe.client.patience_seconds,
            answer_seconds=recipe.client.answer_seconds,
            log=log,
        )
        packings = make_packings(recipe, material.form.shapes)
        transport = PackingTransport(self.transport, packings[name]) if packings else self.transport
        client, self.cautions = make_client(recipe, name, material.share, material.form.classes, private, transport)
        client.check_egress(material.share.train.x[:8])
        self.seat = Seat(recipe, client, material.share, shared)
        self.lines: list[dict[str, Any]] = []
        self._kept_at, self._kept_seconds = self.transport.sender.number, time.monotonic()
        if checkpoint is not None:
            self._restore(checkpoint)

    def train(self, progress: Progress) -> None:
        """From where it is to the last epoch."""

        def on_batch(position: Position, batches: int, result: StepResult) -> None:
            progress.batch(position.epoch, position.batch, batches, result)
            self._keep_if_due()

        while self.seat.position.epoch <= self.recipe.training.epochs:
            result = run_to_end(playing_epoch(self.seat, on_batch))
            self.lines.append(metrics_line(self.seat.position.epoch - 1, result))
            self.folder.write_metrics(self.lines)
            progress.epoch(self.lines[-1])
        self._keep()

    def finish(self, *, made_key: bool) -> dict[str, Any]:
        """The trained stage and a summary."""
        client, form = self.seat.client, self._material.form
        self.folder.write_tensors("bottom.safetensors", client.stage.state_dict())
        if client.head is not None:
            self.folder.write_tensors("head.safetensors", client.head.state_dict())
        self.folder.write_json(RECORDS, self._material.told)
        seconds = sum(line["seconds"] for line in self.lines)
        ledger = client.guards.ledger
        summary = {
            "party": self.name,
            "accuracy": self.lines[-1]["accuracy"],
            "distance_correlation": self.lines[-1]["distance_correlation"],
            "defense": " + ".join(defense.describe() for defense in client.defenses) or "none",
            **traffic_summary(self.transport.traffic),
            "seconds": seconds,
            "seconds_per_epoch": seconds / len(self.lines),
            "client_flops_per_sample": client_flops(self.seat),
            "client_flops_share": client_flops_share(self.recipe, form.record_shape, form.classes),
            "certificate": certificate_summary(self.recipe, client, self.seat.share, form.classes),
            "seed": self.recipe.seed,
            "keys": f"the client's key {'was made for this run' if made_key else 'came from a file'}",
            "records": {"train": len(self.seat.share.train), "test": len(self.seat.share.test)},
            "releases": {} if ledger is None else ledger.summary(),
            "privacy": privacy_summary(self.recipe, [client]),
            "cautions": cautions_in_words(self.cautions),
            "recipe_digest": self.recipe.digest(),
        }
        self.folder.write_json("summary.json", summary)
        return summary

    def say_goodbye(self, log: Log) -> bool:
        """Tell the server that this client is done; whether it heard. The training does not hang on it."""
        self.transport.patience_seconds = FAREWELL_SECONDS
        try:
            self.seat.client.leave("goodbye", 0, {})
            self.seat.client.take("receipt", 0)
        except LinkError as error:
            log("goodbye was not heard", reason=str(error))
            return False
        return True

    def _keep_if_due(self) -> None:
        sender = self.transport.sender
        waited = time.monotonic() - self._kept_seconds
        if waited < self.recipe.client.checkpoint_seconds and sender.size_bytes < JOURNAL_BYTES:
            return
        self._keep()

    def _keep(self) -> None:
        """A checkpoint, and new journals; nothing where nothing was sent since the last one.

        Nor while a resumed client still says again what it said before: the journals hold more than it has done.
        """
        sender = self.transport.sender
        if sender.number == self._kept_at or not sender.caught_up:
            return
        flows = [[*way, flow.messages, flow.wire_bytes] for way, flow in self.transport.traffic.flows.items()]
        progress = {"position": asdict(self.seat.position), "metrics": self.lines, "traffic": flows}
        self.folder.save_checkpoint(Checkpoint(sender.number, {self.name: self.seat.client.state()}, progress))
        sender.rotate()
        self._kept_at, self._kept_seconds = sender.number, time.monotonic()

    def _restore(self, checkpoint: Checkpoint) -> None:
        try:
            self.seat.client.load_state(checkpoint.parties[self.name])
            for name, value in checkpoint.progress["position"].items():
                setattr(self.seat.position, name, value)
            for direction, kind, messages, wire_bytes in checkpoint.progress["traffic"]:
                self.transport.traffic.flows[(direction, kind)] = Flow(messages, wire_bytes)
            self.lines = list(checkpoint.progress["metrics"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RunError(
                f"{self.folder.path}: its checkpoint is damaged ({first_line(error)}); expected an untouched one"
            ) from None
