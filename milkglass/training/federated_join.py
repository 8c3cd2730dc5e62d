"""A client of federated rounds between machines (FedAvg, McMahan et al. 2017, arXiv 1602.05629), on Flower's engine.

A SuperNode in a process of its own speaks with the server; this process has the records. What is not Flower's: the code
that answers is this client's own, whatever the server sends (`federated_tasks.py`); and it answers nothing before the
server has said what its recipe is, and that is this client's too.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from milkglass.certificates import load_credentials
from milkglass.errors import EgressError, LinkError, RecipeError, first_line, foreign_line, nearest
from milkglass.recipe import Recipe
from milkglass.runs import ALARM
from milkglass.training import flower_parts as flower
from milkglass.training.federated import NETWORK, Member, local_batches, member
from milkglass.training.federated_ledger import Ledger
from milkglass.training.federated_serve import check_federated
from milkglass.training.federated_tasks import (
    CLIENT_TASK,
    GOODBYE,
    GREETING,
    App,
    await_task,
    check_bundle,
    kept_alive,
    linked,
    runtime_client,
    saying,
    words,
)
from milkglass.training.flower_apps import client_app
from milkglass.training.flower_processes import GREETING_PATH, FlowerProcess, Traffic, client_context, supernode
from milkglass.training.inputs import RECORDS, told
from milkglass.training.party_folder import own_folder, private_source
from milkglass.training.shares import deal_records
from milkglass.training.split import Progress, Silence, computing_with, digest_of
from milkglass.transports.agreement import Agreement
from milkglass.transports.grpc import Log, silent

_LAST_REPLY_SECONDS: Final = 2.0  # a SuperNode looks every half second whether there is an answer to send
_DIAL_SECONDS: Final = 10.0
_PAUSE_SECONDS: Final = 1.0
_HUNG_UP: Final = 3
_MOST_WORDS: Final = 1 << 20


@dataclass(frozen=True)
class Joined:
    """What a client has done. traffic: bytes of its HTTP within TLS. answered: messages that its app answered."""

    traffic: Traffic
    answered: int
    seconds: float


def federated_join(
    recipe: Recipe,
    name: str,
    address: str,
    tls: Path,
    out: Path,
    *,
    key: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    log: Log = silent,
) -> dict[str, Any]:
    """Train as the recipe's client of that name with the server at `address` (HOST:PORT); what summary.json holds.

    tls: the client's folder of certificates (`certificates.py`). key: the client's private key; where None is named,
    one is made in the run folder `out`. resume: go on in a folder of a run that was stopped. Raises MilkglassError, one
    line: before anything leaves where the recipe cannot be run or the certificate is another's; and as `join_rounds`.
    """
    check_federated(recipe)
    if name not in recipe.parties.clients:
        raise RecipeError(f"{name!r} is not among the recipe's clients; {nearest(name, recipe.parties.clients)}")
    holder = load_credentials(tls, "client").name
    if holder != name:
        raise RecipeError(f"--name {name}: the certificate is {holder}'s; a party has its certificate's name")
    progress = progress or Silence()
    with computing_with(recipe.threads):
        records = deal_records(recipe, own=name if recipe.client.own_records else None)
        folder = own_folder(out, recipe, digest_of(records), resume=resume)
        with folder.locked():
            folder.check_alarm()
            if folder.finished:
                return folder.read_json("summary.json")
            own = member(recipe, name, records, private_source(folder, key))
            batches = len(local_batches(recipe, own.records, own.source, 1))
            ledger = Ledger(recipe, folder, own.network, progress, batches)
            app = _guarded(client_app(recipe, lambda _: own, ledger.on_batch), ledger)
            try:
                joined = join_rounds(recipe, name, address, tls, app, log=log)
            except EgressError as error:
                folder.write(ALARM, str(error).encode())
                raise
            folder.write_tensors(NETWORK, own.network.state_dict())  # what was tested last: the last weights
            folder.write_json(RECORDS, told(records))
            summary = _summary(recipe, own, ledger, joined, made_key=key is None)
            folder.write_json("summary.json", summary)
    return summary


def join_rounds(recipe: Recipe, name: str, address: str, tls: Path, app: App, *, log: Log = silent) -> Joined:
    """Answer the server at `address` (HOST:PORT) with `app` (message, context) until it says goodbye.

    tls: the client's folder of certificates. Raises LinkError, one line, where the server cannot be reached for
    client.patience_seconds, is not of the CA, refuses, has another recipe, sends code, or ends the run early; and what
    `app` raises, of which the server learns only that it came to nothing.
    """
    _ask_to_come(address, tls, recipe.client.patience_seconds)
    began = time.monotonic()
    with supernode(address, tls, name, recipe.client.patience_seconds) as node:
        answering = _Answering(recipe, name, node, node.start()["private"], app, log)
        try:
            answering.until_goodbye()
        except LinkError:
            if not node.alive:
                raise LinkError(
                    f"the server at {address} was away for more than {recipe.client.patience_seconds:g} seconds, or "
                    f"let this client no longer in; {node.last_words()}"
                ) from None
            raise
        finally:
            answering.close()
        node.end()
        return Joined(node.traffic().get(name, Traffic()), answering.answered, time.monotonic() - began)


class _LostMessageError(Exception):
    """A message broke off: wait for another, or for the SuperNode to lose its patience with the server."""


@final
class _Answering:
    """A client's answers, one message after the other."""

    def __init__(self, recipe: Recipe, name: str, node: FlowerProcess, private: str, app: App, log: Log) -> None:
        self._recipe, self._name, self._node, self._private = recipe, name, node, private
        self._app, self._log = app, log
        self._taker = runtime_client(private, secret=node.secret)
        self._agreed = self._over = False
        self._differs: LinkError | None = None
        self.answered = 0

    def until_goodbye(self) -> None:
        """Answer, and return when the server has said goodbye."""
        while not self._over:
            self._answer(await_task(self._taker, CLIENT_TASK, self._node))
        time.sleep(_LAST_REPLY_SECONDS)

    def close(self) -> None:
        """Hang up."""
        self._taker.close()

    def _answer(self, token: str) -> None:
        client = runtime_client(self._private, token=token)
        try:
            with kept_alive(client):
                try:
                    with linked(self._node):
                        message, context, _, bundle = self._pull(client)
                except _LostMessageError:
                    self._log("a message did not come whole")
                    return
                failed: BaseException | None = None
                try:
                    check_bundle(bundle.content)
                    context.run_config, context.node_config = {}, {}  # the recipe says what to do, and it alone
                    reply = self._reply(message, context)
                    failed = self._differs
                except BaseException as error:  # the server is told that, not why: it might tell of the records
                    failed = error
                    code = flower.ErrorCode.CLIENT_APP_RAISED_EXCEPTION
                    reply = flower.Message(flower.Error(code, "the client gave up"), reply_to=message)
                with linked(self._node):
                    flower.push_message(client, reply, context)
                    status = flower.SubStatus.COMPLETED if failed is None else flower.SubStatus.FAILED
                    flower.push_task_output(client, context, status, "")
        finally:
            client.close()
        if failed is not None:
            time.sleep(_LAST_REPLY_SECONDS)
            raise failed

    def _pull(self, client: Any) -> Any:
        try:
            return flower.pull_task_input(client)
        except flower.httpx.HTTPStatusError:  # the SuperNode has given the task up: the server stopped as it sent
            raise _LostMessageError from None

    def _reply(self, message: Any, context: Any) -> Any:
        kind = message.metadata.message_type
        if kind == GREETING:
            difference = self._difference(words(message, "told"))
            if difference is None:
                self._agreed = True
                self._log("the server has the same recipe", digest=self._recipe.digest())
            else:
                self._differs = LinkError(f"the server has another recipe: {difference}")
            return flower.Message(saying(party=self._name, difference=difference or ""), reply_to=message)
        if kind == GOODBYE:
            why = words(message, "why")
            if why:
                raise LinkError(f"the server ended the run: {foreign_line(why)}")
            self._over = True
            return flower.Message(saying(party=self._name), reply_to=message)
        if not self._agreed:
            raise LinkError(f"the server sent {foreign_line(kind, 40)!r} before it said what its recipe is")
        reply = self._app(message, context)
        self.answered += 1
        return reply

    def _difference(self, told: str) -> str | None:
        try:
            theirs = json.loads(told) if len(told) <= _MOST_WORDS else None
        except (ValueError, RecursionError):
            theirs = None
        if not isinstance(theirs, dict):
            return "it said none that can be read"
        difference = Agreement(self._recipe.agreed(), ()).difference(theirs)
        return None if difference is None else foreign_line(difference)


def _guarded(app: App, ledger: Ledger) -> App:
    """The same app, which answers no more than the ledger allows; a server that asks for more is left."""

    def answer(message: Any, context: Any) -> Any:
        ledger.asked()
        if message.metadata.message_type.partition(".")[0] == "evaluate":
            ledger.test()
        reply = app(message, context)
        if ledger.refusal is not None:  # an app makes an answer even of that
            raise ledger.refusal
        return reply

    return answer


def _summary(recipe: Recipe, own: Member, ledger: Ledger, joined: Joined, *, made_key: bool) -> dict[str, Any]:
    return {
        "party": own.name,
        "accuracy": own.right(own.network.state_dict()) / len(own.share.test) if len(own.share.test) else None,
        "rounds": ledger.rounds,
        "messages": joined.answered,
        "bytes_sent": joined.traffic.sent,
        "bytes_received": joined.traffic.received,
        "seconds": joined.seconds,
        "privacy": own.privacy,
        "seed": recipe.seed,
        "keys": f"the client's key {'was made for this run' if made_key else 'came from a file'}",
        "records": {"train": own.records, "test": len(own.share.test)},
        "recipe_digest": recipe.digest(),
    }


def _ask_to_come(address: str, tls: Path, patience_seconds: float) -> None:
    """Return once the server is there and lets this client in. Raises LinkError, which says what is wrong."""
    end, hung_up = time.monotonic() + patience_seconds, 0
    with flower.httpx.Client(verify=client_context(tls), timeout=_DIAL_SECONDS) as client:
        while True:
            try:
                answer = client.get(f"https://{address}{GREETING_PATH}")
            except flower.httpx.HTTPError as error:
                why = first_line(error)
                _check_trust(address, tls, why)
                hung_up += isinstance(error, flower.httpx.RemoteProtocolError | flower.httpx.ReadError)
            else:
                if answer.status_code == 200:
                    return
                said = foreign_line(answer.text) or f"status {answer.status_code}; is it `federated-serve`?"
                raise LinkError(f"the server at {address} refuses this client: {said}")
            if hung_up == _HUNG_UP:  # asyncio sends no alert, so a server that lacks our CA hangs up without a word
                raise LinkError(
                    f"the server at {address} hung up {_HUNG_UP} times as soon as it had seen this client's "
                    f"certificate; expected one of its CA in {tls / 'client.crt'}"
                )
            if time.monotonic() + _PAUSE_SECONDS > end:
                raise LinkError(f"the server at {address} could not be reached for {patience_seconds:g} seconds: {why}")
            time.sleep(_PAUSE_SECONDS)


def _check_trust(address: str, tls: Path, why: str) -> None:
    """Raise LinkError where a connection failed for a certificate: there is nothing to wait for."""
    if "CERTIFICATE_VERIFY_FAILED" in why:
        raise LinkError(
            f"the server at {address} is not who this client trusts ({_core(why)}); expected a certificate for that "
            f"name, of the CA in {tls / 'rootCA.pem'}"
        )
    if "ALERT" in why.upper() and "SSL" in why:
        raise LinkError(f"the server at {address} refuses this client's certificate ({_core(why)})")


def _core(why: str) -> str:
    """Without OpenSSL's brackets."""
    return why.rpartition("] ")[2].partition(" (_ssl")[0]
