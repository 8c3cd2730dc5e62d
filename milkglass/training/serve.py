"""One party as a process of its own: the server. It waits for its clients, trains with them, and keeps what it needs.

Its folder: recipe.toml, run.json (the run's number), checkpoint/ and journal/, at the end top.safetensors and
summary.json. Started again with `resume` it is where it was, and its clients notice a pause.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from milkglass.certificates import Credentials
from milkglass.errors import LinkError, RecipeError, RunError, StopError, first_line, nearest
from milkglass.formats import EMBEDDED
from milkglass.memory import keep_freed_memory
from milkglass.messages import Message
from milkglass.randomness import Source, public_source
from milkglass.recipe import Recipe
from milkglass.runs import Checkpoint, RunFolder
from milkglass.server import Server
from milkglass.training.evaluate import BATCH
from milkglass.training.party_folder import drawn_run, known_run, own_folder, private_source
from milkglass.training.setup import Shapes, compressor, crossing_shapes, make_desk, make_hop, network_parts
from milkglass.training.sharded import follow as follow_rank_0
from milkglass.training.sharded import sharing_out
from milkglass.training.shares import deal_records
from milkglass.training.split import computing_with, make_packings
from milkglass.transports.agreement import Agreement, Crossing
from milkglass.transports.door import Watch
from milkglass.transports.exactly_once import Sender, Taker
from milkglass.transports.grpc import GrpcTransport, Log, silent
from milkglass.transports.grpc_server import GrpcServer
from milkglass.transports.wrappers import PackingService, PackingTransport

NO_RECORDS: Final = "a server holds no records"
JOURNAL_BYTES: Final = 256 << 20
"""A party keeps its state anew before its journal takes more than this."""
_GRACE_SECONDS: Final = 2.0
_ANSWERS: Final = "~answers"  # no party's name
FAREWELL_SECONDS: Final = 10.0
MOST_FRAME_BYTES: Final = 2**31 - 2**20  # gRPC's own limit, less what it adds


@dataclass(frozen=True)
class Form:
    """What a party must know of records that it does not hold: the shape of one, how many classes, what crosses."""

    record_shape: tuple[int, ...]
    classes: int
    shapes: Shapes


def form_of(recipe: Recipe) -> Form:
    """From the recipe's words, or from a data set that everybody has. Raises RecipeError where neither is there."""
    data = recipe.data
    if data.record_shape is not None and data.classes is not None:
        shape, classes = data.record_shape, data.classes
    elif data.name in EMBEDDED:
        records = deal_records(recipe)
        shape, classes = records.record_shape, records.classes
    else:
        raise RecipeError(
            "a server holds no records, so its recipe must say what one looks like: data.record_shape, such as "
            "[1, 28, 28], and data.classes; `milkglass cuts RECIPE`, where the records are, prints both"
        )
    return Form(shape, classes, crossing_shapes(recipe, shape, classes))


def crossing(recipe: Recipe, form: Form, name: str) -> Crossing:
    """What crosses between a client and the server."""
    parties = recipe.parties
    several = len(parties.clients) > 1 and not parties.is_vertical
    relay = parties.mode == "relay"
    return Crossing(
        cut=form.shapes.cut[name],
        features=form.shapes.features if recipe.cut.back_at is not None else None,
        classes=form.classes,
        rows=max(_most_rows(recipe), BATCH),
        compressor=compressor(recipe),
        sends_labels=recipe.cut.back_at is None and (not parties.is_vertical or name == parties.clients[0]),
        sealed_bytes=_sealed_bytes(recipe, form) if several else 0,
        handed=(1 if relay else len(parties.clients)) if several else 0,
        vertical=parties.is_vertical,
    )


def _most_rows(recipe: Recipe) -> int:
    """Of a training batch; with dp it is drawn by chance, and may be larger than batch_size."""
    if recipe.dp is None:
        return recipe.training.batch_size
    from milkglass.private.dp import most_records

    return most_records(recipe.training.batch_size)


def agreement(recipe: Recipe, form: Form, name: str) -> Agreement:
    """What the handshake of that client compares."""
    return Agreement(recipe.agreed(), form.shapes.cut[name], form.classes, form.shapes.features)


@dataclass(frozen=True)
class Onward:
    """How a hop reaches the next party: its own name, where that listens (HOST:PORT), and as whom it dials."""

    hop: str
    address: str
    credentials: Credentials | None
    log: Log = silent


@final
class Serving:
    """A server's training: its desk, what it has taken, and its checkpoints."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        private: Source,
        onward: Onward | None = None,
        share: Callable[[Server], None] = lambda _: None,
    ) -> None:
        self.form = form_of(recipe)
        self.recipe, self.folder = recipe, folder
        self.name = recipe.parties.server if onward is None else onward.hop
        packings = make_packings(recipe, self.form.shapes)
        checkpoint = folder.load_checkpoint()
        form = (self.form.record_shape, self.form.classes, self.form.shapes)
        self.onward: GrpcTransport | None = None
        if onward is None:
            self.desk = make_desk(recipe, *form, private)
        else:
            self.onward = _dial_on(recipe, self.form, folder, onward, checkpoint)
            packed = PackingTransport(self.onward, packings[self.name]) if packings else self.onward
            self.desk = make_hop(recipe, self.name, *form, private, packed)
        share(self.desk.servers[self.desk.clients[0]])
        self.limits = {name: crossing(recipe, self.form, name).to_server() for name in self.desk.clients}
        self.run = drawn_run(folder)
        self._kept_at = 0 if checkpoint is None else checkpoint.number
        self.taker = Taker(
            PackingService(self.desk, packings) if packings else self.desk,
            self.limits,
            run=self.run,
            window=recipe.training.micro_batches + 1,
            folder=folder.path / "journal",
            count=self._kept_at,
        )
        if checkpoint is not None:
            self._restore(checkpoint)
        self.taker.replay()
        self._kept_seconds = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the state should be kept anew as soon as no step is half done."""
        if self.taker.count == self._kept_at:
            return False
        waited = time.monotonic() - self._kept_seconds
        return waited >= self.recipe.server.checkpoint_seconds or self.taker.size_bytes >= JOURNAL_BYTES

    def may_begin(self) -> bool:
        """Whether a new step may begin: not while a checkpoint waits for the ones that are half done."""
        return self.desk.resting or not self.due

    def keep_if_due(self) -> None:
        """A checkpoint, where it is time for one and no step is half done."""
        if self.due and self.desk.resting:
            self.keep()

    def keep(self) -> None:
        """A checkpoint, and a new journal; nothing where nothing came since the last one."""
        if self.taker.count == self._kept_at or (self.onward is not None and not self.onward.sender.caught_up):
            return
        tensors, told = self.taker.state()
        parties = {self.name: self.desk.state(), _ANSWERS: tensors}
        progress: dict[str, Any] = {"lines": told}
        if self.onward is not None:
            progress["onward"] = self.onward.sender.number
        self.folder.save_checkpoint(Checkpoint(self.taker.count, parties, progress))
        self.taker.rotate()
        if self.onward is not None:
            self.onward.sender.rotate()
        self._kept_at, self._kept_seconds = self.taker.count, time.monotonic()

    def finish(self) -> dict[str, Any]:
        """The trained stage and a summary, once every client has said goodbye."""
        self.folder.write_tensors(
            "top.safetensors", self.desk.servers[self.desk.clients[0]].snapshot().stage.state_dict()
        )
        summary = {
            "party": self.name,
            "clients": self.desk.clients,
            "messages": self.taker.messages,
            "run": f"{self.run:016x}",
            "recipe_digest": self.recipe.digest(),
        }
        self.folder.write_json("summary.json", summary)
        return summary

    def say_goodbye(self, log: Log) -> None:
        """A hop tells the next party that the training is over; nothing hangs on it."""
        if self.onward is None:
            return
        self.onward.patience_seconds = FAREWELL_SECONDS
        try:
            self.onward.exchange(Message("goodbye", self.name, 0))
        except (LinkError, InterruptedError) as error:  # a signal may come while the last client says its own
            log("goodbye was not heard", reason=str(error))

    def close(self) -> None:
        """Close what is open."""
        self.taker.close()
        if self.onward is not None:
            self.onward.close()

    def _restore(self, checkpoint: Checkpoint) -> None:
        try:
            self.desk.load_state(checkpoint.parties[self.name])
            self.taker.load_state(checkpoint.parties[_ANSWERS], checkpoint.progress["lines"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RunError(
                f"{self.folder.path}: its checkpoint is damaged ({first_line(error)}); expected an untouched one"
            ) from None


def serve(
    recipe: Recipe,
    listen: str,
    credentials: Credentials | None,
    out: Path,
    *,
    onward: Onward | None = None,
    key: Path | None = None,
    resume: bool = False,
    log: Log = silent,
    watch: Watch | None = None,
    ready: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Train with the recipe's clients until each has said goodbye; returns what summary.json holds.

    listen: HOST:PORT. onward: for a party in the middle of the way, where the rest of it is. ready: called with the
    port once clients can come. SIGTERM and Ctrl-C end it with its state kept.
    Raises MilkglassError, one line, for what cannot be served.
    """
    refuse_at_home(recipe)
    keep_freed_memory()
    with computing_with(recipe.threads):
        form = form_of(recipe)  # before the folder: what cannot be served leaves no trace
        hop = None if onward is None else onward.hop
        with (
            sharing_out(recipe, form.record_shape, form.classes, hop, log) as share,
            (folder := own_folder(out, recipe, NO_RECORDS, resume=resume)).locked(),
        ):
            serving = Serving(recipe, folder, private_source(folder, key), onward, share)
            try:
                summary = asyncio.run(_serve(serving, listen, credentials, log, watch, ready))
                serving.say_goodbye(log)
            finally:
                serving.close()
            return summary


def refuse_at_home(recipe: Recipe) -> None:
    """Raise RecipeError for a recipe that is trained in one place."""
    if recipe.training.at_home:
        raise RecipeError(
            "training.at_home: `milkglass train` trains it; `serve --predict` and `predict` then part its two halves"
        )


def follow(recipe: Recipe) -> None:
    """Under torchrun, be another process than the first: share the computing of the stage that that one serves."""
    with computing_with(recipe.threads):
        form = form_of(recipe)
        follow_rank_0(recipe, form.record_shape, form.classes)


async def _serve(
    serving: Serving,
    listen: str,
    credentials: Credentials | None,
    log: Log,
    watch: Watch | None,
    ready: Callable[[int], None],
) -> dict[str, Any]:
    recipe, over = serving.recipe, asyncio.Event()

    def taken() -> None:
        serving.keep_if_due()
        if serving.desk.finished:
            over.set()

    server = GrpcServer(
        serving.taker,
        {name: agreement(recipe, serving.form, name) for name in serving.desk.clients},
        name=serving.name,
        in_thread=serving.onward is not None,
        run=serving.run,
        frame_bytes=max(limits.frame_bytes for limits in serving.limits.values()),
        taken=taken,
        may_begin=serving.may_begin,
        waits_for=serving.desk.awaited,
        heartbeat_seconds=recipe.server.heartbeat_seconds,
        watch=watch,
        log=log,
    )
    stopped: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        stopped.append(number)
        over.set()
        if serving.onward is not None:  # the next party may be away, and patience with it is long
            loop.call_later(_GRACE_SECONDS, serving.onward.interrupt)

    loop = asyncio.get_running_loop()
    with suppress(ValueError, RuntimeError):  # not in the main thread: whoever runs it there stops it otherwise
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number)
    port = await server.start(listen, credentials)
    ready(port)
    if serving.desk.finished:
        over.set()
    try:
        await server.run_until(over)
    finally:
        await server.stop(_GRACE_SECONDS, unfinished=not serving.desk.finished)
    if stopped and not serving.desk.finished:
        if serving.desk.resting:
            serving.keep()
        raise StopError(stopped[0])
    return serving.finish()


def _dial_on(
    recipe: Recipe, form: Form, folder: RunFolder, onward: Onward, checkpoint: Checkpoint | None
) -> GrpcTransport:
    """A hop's way to the next party, with journals of its own."""
    if onward.hop not in recipe.parties.hops:
        raise RecipeError(f"{onward.hop!r} is not among the recipe's hops; {nearest(onward.hop, recipe.parties.hops)}")
    number = 0 if checkpoint is None else int(checkpoint.progress["onward"])
    return GrpcTransport(
        onward.address,
        onward.credentials,
        Sender(folder.path / "onward", number),
        party=onward.hop,
        agreement=agreement(recipe, form, onward.hop),
        limits=crossing(recipe, form, onward.hop).to_client(),
        run=known_run(folder, "onward.json"),
        entered=lambda run: folder.write_json("onward.json", {"run": run}),
        patience_seconds=recipe.client.patience_seconds,
        answer_seconds=recipe.client.answer_seconds,
        log=onward.log,
    )


def _sealed_bytes(recipe: Recipe, form: Form) -> int:
    """At most so long are a client's sealed weights, with names; in a relay with two values of the optimizer each.

    Raises RecipeError where they do not fit in a frame.
    """
    parts = network_parts(recipe, form.record_shape, form.classes, public_source(recipe.seed))
    modules = [parts.bottom] if parts.head is None else [parts.bottom, parts.head]
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    weights_bytes: int = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    copies, handed = (3, 1) if recipe.parties.mode == "relay" else (1, len(recipe.parties.clients))
    most = copies * weights_bytes + 1024 * (3 * len(tensors) + 16)
    if handed * most > MOST_FRAME_BYTES:
        raise RecipeError(
            f"mode {recipe.parties.mode}: weights of {handed} clients come to {handed * most:,} bytes in one message; "
            f"at most {MOST_FRAME_BYTES:,}: cut earlier, or let fewer clients take part"
        )
    return most
