"""A finished server answers its clients' questions: the server's half of inference, for as long as it is wanted.

It serves the stage that a training left in its folder to the clients of that training alone, and takes nothing but
questions: nobody can train it any more. It keeps no journal, for an answer changes nothing. When it is stopped it
writes answered.json: how many messages and records of each client it has answered.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, final

from torch.nn import functional as F

from milkglass.certificates import Credentials
from milkglass.codec import Limits
from milkglass.errors import MessageError, RecipeError, RunError
from milkglass.messages import Addressed, Message
from milkglass.randomness import KEY_BYTES, Source, public_source
from milkglass.recipe import Recipe, first_difference
from milkglass.runs import RunFolder
from milkglass.server import Server
from milkglass.training.party_folder import known_run
from milkglass.training.serve import Form, agreement, crossing, form_of
from milkglass.training.setup import network_parts
from milkglass.training.split import computing_with, make_packings
from milkglass.transports.door import Watch
from milkglass.transports.grpc import RUN_UNKNOWN, Log, silent
from milkglass.transports.grpc_server import GrpcServer
from milkglass.transports.queries import QueryTaker
from milkglass.transports.wrappers import PackingService

TOP: Final = "top.safetensors"
_GRACE_SECONDS: Final = 2.0


def check_way(recipe: Recipe) -> None:
    """Raise RecipeError for a way of training whose inference needs more parties than a client and a server."""
    if recipe.parties.is_vertical:
        raise RecipeError("mode vertical: a prediction needs all owners at once; that is not built yet")
    if recipe.parties.hops:
        raise RecipeError("parties.hops: a prediction across several hops is not built yet")


def read_stage(folder: RunFolder, name: str, stage: Any) -> None:
    """Fill a stage with what a folder holds of it. Raises RunError where it does not fit."""
    try:
        stage.load_state_dict(folder.read_tensors(name))
    except RuntimeError as error:
        words = " ".join(str(error).split())[:200]
        raise RunError(f"{folder.path / name}: does not fit the recipe's network: {words}") from None


def only(limits: Limits, *kinds: str) -> Limits:
    """The same, for these kinds of message alone."""
    return Limits(limits.frame_bytes, {kind: limits.kinds[kind] for kind in kinds}, limits.rows)


@final
class Answering:
    """Answers questions with a finished server's stage; counts them by client."""

    def __init__(self, recipe: Recipe, form: Form, folder: RunFolder) -> None:
        stage = network_parts(recipe, form.record_shape, form.classes, public_source(recipe.seed)).middle
        read_stage(folder, TOP, stage)
        self._server = Server(
            stage,
            None,
            loss=F.cross_entropy if recipe.cut.back_at is None else None,
            cut_shape=form.shapes.cut[recipe.parties.clients[0]],
            name=recipe.parties.server,
            source=Source(os.urandom(KEY_BYTES)),  # nothing is drawn from it: dropout rests
        )
        self.counts = {name: {"messages": 0, "records": 0} for name in recipe.parties.clients}

    def receive(self, message: Message) -> list[Addressed]:
        """The answer, at once. Raises MessageError for anything but a question of one of the clients."""
        if message.kind != "queries" or message.party not in self.counts:
            raise MessageError(f"{message.kind!r} of {message.party!r}: here only clients' questions are answered")
        answer = self._server.reply(message)
        count = self.counts[message.party]
        count["messages"] += 1
        count["records"] += len(answer.tensors["logits"])
        return [(message.party, answer)]


def answer(
    recipe: Recipe,
    listen: str,
    credentials: Credentials | None,
    out: Path,
    *,
    log: Log = silent,
    watch: Watch | None = None,
    ready: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Answer the clients' questions until SIGTERM or Ctrl-C; returns what answered.json holds.

    out: the folder of a server that has finished training this recipe. listen: HOST:PORT. ready: called with the port
    once clients can come. Raises MilkglassError, one line, for what cannot be served.
    """

    async def until_stopped() -> dict[str, Any]:
        over, loop = asyncio.Event(), asyncio.get_running_loop()
        with suppress(ValueError, RuntimeError):  # not in the main thread: whoever runs it there stops it otherwise
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, over.set)
        return await answering(recipe, listen, credentials, out, over, log=log, watch=watch, ready=ready)

    with computing_with(recipe.threads):
        return asyncio.run(until_stopped())


async def answering(
    recipe: Recipe,
    listen: str,
    credentials: Credentials | None,
    out: Path,
    over: asyncio.Event,
    *,
    log: Log = silent,
    watch: Watch | None = None,
    ready: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """`answer`, in a loop that runs already, until `over` is set."""
    check_way(recipe)
    folder = RunFolder.open_finished(out, (TOP, "summary.json", "run.json"))
    difference = first_difference(recipe, folder.recipe)
    if difference is not None:
        raise RunError(f"run folder {out}: belongs to another recipe: {difference}")
    run, form = known_run(folder, "run.json"), form_of(recipe)
    if run == RUN_UNKNOWN:
        raise RunError(f"{out / 'run.json'}: damaged; expected a number")
    service, packings = Answering(recipe, form, folder), make_packings(recipe, form.shapes)
    clients = recipe.parties.clients
    limits = {name: only(crossing(recipe, form, name).to_server(), "queries") for name in clients}
    server = GrpcServer(
        QueryTaker(PackingService(service, packings) if packings else service, limits, run=run),
        {name: agreement(recipe, form, name) for name in clients},
        name=recipe.parties.server,
        run=run,
        frame_bytes=max(each.frame_bytes for each in limits.values()),
        heartbeat_seconds=recipe.server.heartbeat_seconds,
        watch=watch,
        log=log,
    )
    ready(await server.start(listen, credentials))
    try:
        await server.run_until(over)
    finally:
        await server.stop(_GRACE_SECONDS, unfinished=True)
    total = {key: sum(count[key] for count in service.counts.values()) for key in ("messages", "records")}
    summary = {"party": recipe.parties.server, **total, "clients": service.counts, "run": f"{run:016x}"}
    folder.write_json("answered.json", summary)
    return summary
