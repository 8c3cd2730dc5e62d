"""The server of federated rounds between machines (FedAvg, McMahan et al. 2017, arXiv 1602.05629), on Flower's engine.

A SuperLink in a process of its own has the port; this process has the rounds. What is not Flower's: a client is let in
by its certificate (`flower_processes.py`), and takes part only once its recipe is known to be the server's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from milkglass.certificates import load_credentials
from milkglass.errors import LinkError, MilkglassError, RecipeError, first_line, foreign_line
from milkglass.formats import EMBEDDED
from milkglass.recipe import Recipe
from milkglass.training import flower_parts as flower
from milkglass.training.federated import NETWORK, first_network
from milkglass.training.federated_rounds import Rounds
from milkglass.training.federated_tasks import (
    GOODBYE,
    GREETING,
    SERVER_TASK,
    App,
    await_task,
    check_bundle,
    direct,
    kept_alive,
    linked,
    runtime_client,
    saying,
    words,
)
from milkglass.training.flower_apps import server_app
from milkglass.training.flower_processes import FlowerProcess, Traffic, superlink
from milkglass.training.party_folder import PARTY, own_folder
from milkglass.training.serve import NO_RECORDS
from milkglass.training.shares import deal_records
from milkglass.training.split import Progress, Silence, computing_with
from milkglass.transports.agreement import Agreement
from milkglass.transports.grpc import Log, silent

_PAUSE_SECONDS: Final = 0.3
_GREETING_SECONDS: Final = 60.0
_FAREWELL_SECONDS: Final = 10.0
_STOP_SECONDS: Final = 3.0  # whoever stops a server does not wait for long


def agreed_words(recipe: Recipe) -> str:
    """What the server tells a client, and the client compares: JSON."""
    return Agreement(recipe.agreed(), ()).told().numpy().tobytes().decode()


@final
class ClientsGrid(flower.HttpGrid):  # type: ignore[misc, unused-ignore]
    """Flower's way to the nodes, of which it shows those alone that are clients of the recipe, and agreed to it.

    A client that comes back is greeted again before it is shown.
    """

    def __init__(self, private: str, token: str, link: FlowerProcess, recipe: Recipe, log: Log) -> None:
        super().__init__(private, True, None, token=token)
        self._retry_invoker: Any = None  # on loopback there is nothing to try again, and Flower's ends this process
        self._link, self._recipe, self._log = link, recipe, log
        self._lives: dict[int, str] = {}
        self.names: dict[int, str] = {}
        """Of the nodes that were ever shown."""

    def get_nodes(self) -> Iterable[Any]:
        """The nodes that are there, and agreed."""
        with linked(self._link):
            there = [node for node in super().get_nodes() if node.name in self._recipe.parties.clients]
        lives = {node.node_id: node.last_activated_at for node in there}
        newcomers = [node for node in there if self._lives.get(node.node_id) != lives[node.node_id]]
        for node in newcomers:
            self.names.pop(node.node_id, None)
        for node_id, name in self._greet({node.node_id: node.name for node in newcomers}):
            self._lives[node_id] = lives[node_id]  # who has not answered is greeted again
            if name is not None:
                self.names[node_id] = name
        return [node for node in there if node.node_id in self.names]

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> Iterable[Any]:
        """The nodes' answers, for which Flower would look every three seconds; after `timeout` seconds those there are.

        A node that is gone answers with an error, as does one that calls itself by a name that its certificate lacks.
        """
        with linked(self._link):
            waits = set(self.push_messages(messages))
        answers: list[Any] = []
        end = None if timeout is None else time.monotonic() + timeout
        while waits and (end is None or time.monotonic() < end):
            with linked(self._link):
                came = list(self.pull_messages(waits))
            answers += [self._in_own_name(answer) for answer in came]
            waits -= {answer.metadata.reply_to_message_id for answer in came}
            if waits:
                time.sleep(_PAUSE_SECONDS)
        return answers

    def await_clients(self) -> None:
        """Wait until every client of the recipe is there and agreed."""
        seen: set[str] = set()
        while missing := set(self._recipe.parties.clients) - seen:
            here = {node.name for node in self.get_nodes()}
            for name in sorted(here - seen):
                self._log("a client came", party=name)
            if here != seen:
                missing = set(self._recipe.parties.clients) - here
                self._log("waits for clients", missing=", ".join(sorted(missing)) or "none")
            seen = here
            if missing:
                time.sleep(_PAUSE_SECONDS)

    def say_goodbye(self, why: str = "", seconds: float = _FAREWELL_SECONDS) -> None:
        """Tell all that are there that the run is over; nothing hangs on whether they heard within `seconds`."""
        try:
            nodes = [node.node_id for node in super().get_nodes() if node.node_id in self.names]
            goodbyes = [flower.Message(saying(why=why), node_id, GOODBYE) for node_id in nodes]
            heard = self.send_and_receive(goodbyes, timeout=seconds) if goodbyes else ()
            deaf = set(nodes) - {answer.metadata.src_node_id for answer in heard if not answer.has_error()}
        except (LinkError, flower.httpx.HTTPError) as error:
            self._log("goodbye was not said", reason=first_line(error))
            return
        for node_id in deaf:
            self._log("goodbye was not heard", party=self.names[node_id])

    def _in_own_name(self, answer: Any) -> Any:
        said = answer.content.config_records.get("config", {}).get("name") if answer.has_content() else None
        name = self.names.get(answer.metadata.src_node_id)
        if said is None or name is None or said == name:
            return answer
        reason = f"{name} calls itself {foreign_line(str(said), 100)!r}; its certificate says who it is"
        return flower.make_message(answer.metadata, error=flower.Error(flower.ErrorCode.UNKNOWN, reason))

    def _greet(self, names: dict[int, str]) -> Iterator[tuple[int, str | None]]:
        """Those who answered, by node; with their name where they agreed."""
        told = agreed_words(self._recipe)
        greetings = [flower.Message(saying(told=told), node_id, GREETING) for node_id in names]
        for answer in self.send_and_receive(greetings, timeout=_GREETING_SECONDS) if greetings else ():
            node_id = answer.metadata.src_node_id
            if node_id not in names:
                continue
            difference = "it gave up" if answer.has_error() else foreign_line(words(answer, "difference"))
            if difference:
                self._log("a client does not agree", party=names[node_id], reason=difference)
            yield node_id, None if difference else names[node_id]


@dataclass(frozen=True)
class Served:
    """What a SuperLink counted: bytes of each client's HTTP within TLS, from the client's side."""

    traffic: dict[str, Traffic]
    seconds: float

    def told(self) -> dict[str, Any]:
        """As summary.json has it."""
        return {
            "bytes_sent": sum(each.sent for each in self.traffic.values()),
            "bytes_received": sum(each.received for each in self.traffic.values()),
            "by_client": {name: [each.sent, each.received] for name, each in self.traffic.items()},
            "what": "all that crossed, from the clients' side: HTTP with its heads and idle polls, within TLS",
        }


def federated_serve(
    recipe: Recipe,
    listen: str,
    tls: Path,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    log: Log = silent,
    ready: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Train with the recipe's clients into the run folder `out`; returns what summary.json holds.

    listen: HOST:PORT, port 0 for a free one. tls: the server's folder of certificates (`certificates.py`). ready:
    called with the port once clients can come. Raises MilkglassError, one line: for a recipe that is not federated or
    does not say what a record is, for certificates, for a round that too few clients finish (the last one is kept, and
    `resume` goes on from it).
    """
    check_federated(recipe)
    load_credentials(tls, "server")
    with computing_with(recipe.threads):
        weights = first_network(recipe, *_form(recipe)).state_dict()
        folder = own_folder(out, recipe, NO_RECORDS, resume=resume)
        with folder.locked():
            if folder.finished:
                return folder.read_json("summary.json")
            folder.write_json(PARTY, {"made_key": False})  # a start that comes to nothing makes way for another
            rounds = Rounds(recipe, weights, folder, progress or Silence())
            served = serve_rounds(recipe, listen, tls, server_app(rounds), log=log, ready=ready)
            folder.write_tensors(NETWORK, rounds.weights)
            summary = {"party": recipe.parties.server, **rounds.summary(), "http_bytes": served.told()}
            folder.write_json("summary.json", summary)
    return summary


def check_federated(recipe: Recipe) -> None:
    """Raise RecipeError for a recipe of another way of training."""
    if not recipe.parties.is_federated:
        raise RecipeError(f"parties.mode is {recipe.parties.mode!r}; expected 'federated'")


def serve_rounds(
    recipe: Recipe,
    listen: str,
    tls: Path,
    app: App,
    *,
    log: Log = silent,
    ready: Callable[[int], None] = lambda _: None,
) -> Served:
    """Wait for the recipe's clients, let `app` (grid, context) play its rounds with them, say goodbye.

    listen: HOST:PORT. tls: the server's folder of certificates. ready: called with the port once clients can come.
    Raises LinkError where nobody can listen there or the SuperLink ends, and what `app` raises.
    """
    with superlink(listen, tls, list(recipe.parties.clients)) as link:
        said = link.start()
        ready(said["port"])
        began = time.monotonic()
        with _grid(said["private"], link, recipe, log) as (grid, context):
            try:
                grid.await_clients()
                app(grid, context)
            except MilkglassError as error:
                grid.say_goodbye(first_line(error))
                raise
            except KeyboardInterrupt:
                grid.say_goodbye("the server was stopped", _STOP_SECONDS)
                raise
            grid.say_goodbye()
        seconds = time.monotonic() - began
        link.end()
        return Served(link.traffic(), seconds)


def _form(recipe: Recipe) -> tuple[tuple[int, ...], int]:
    """The shape of a record, and how many classes there are, for one who has no records."""
    data = recipe.data
    if data.record_shape is not None and data.classes is not None:
        return tuple(data.record_shape), data.classes
    if data.name in EMBEDDED:
        records = deal_records(recipe)
        return tuple(records.record_shape), records.classes
    raise RecipeError(
        "a server holds no records, so its recipe must say what one looks like: data.record_shape, such as "
        "[1, 28, 28], and data.classes"
    )


@contextmanager
def _grid(private: str, link: FlowerProcess, recipe: Recipe, log: Log) -> Iterator[tuple[ClientsGrid, Any]]:
    taker = runtime_client(private, secret=link.secret)
    try:
        token = await_task(taker, SERVER_TASK, link)
    finally:
        taker.close()
    grid = ClientsGrid(private, token, link, recipe, log)
    client = direct(grid._runtime_client)
    try:
        with kept_alive(client):
            with linked(link):
                task = client.PullTaskInput(flower.PullTaskInputRequest())
            check_bundle(task.fab.content)
            flower.TaskIdentity.task_id = task.task_id
            flower.TaskIdentity.run_id = task.run.run_id
            flower.TaskIdentity.node_id = task.context.node_id
            grid.set_run(flower.run_from_proto(task.run))
            yield grid, flower.context_from_proto(task.context)
            with linked(link):
                client.PushTaskOutput(flower.PushTaskOutputRequest(sub_status=flower.SubStatus.COMPLETED, details=""))
    finally:
        grid.close()
