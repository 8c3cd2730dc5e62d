"""A training between machines, played on one: every party is a process of its own, over mutual TLS on loopback.

Processes are forked from one that has loaded everything already, so that starting one takes no time worth telling.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast, final

import torch
from safetensors.torch import load_file
from torch import Tensor

from milkglass.certificates import load_credentials
from milkglass.codec import decode, encode
from milkglass.errors import MilkglassError
from milkglass.messages import Message
from milkglass.recipe import Recipe, load_recipe
from milkglass.training.join import join
from milkglass.training.serve import Onward, serve
from milkglass.training.split import Setup, computing_with, play_epoch, set_up
from milkglass.training.summary import metrics_line
from milkglass.transports.exactly_once import Sender, Taker
from milkglass.transports.wrappers import PackingTransport, RecordingTransport

SECONDS = 300.0
"""So long a test waits for what takes a second or two here."""
Frames = dict[tuple[str, str, int], set[str]]
"""What was on the wire: (direction, party, number) -> digests of the different frames."""
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.network", "sklearn.datasets._base", "torch._dynamo"])  # all that is loaded late


@final
@dataclass(frozen=True)
class Ended:
    """What all parties hold at the end: weights by party and name; states of the clients, as checkpoints keep them."""

    weights: Mapping[str, Mapping[str, Tensor]]
    states: Mapping[str, Mapping[str, Tensor]]
    metrics: Mapping[str, list[dict[str, Any]]]
    summaries: Mapping[str, dict[str, Any]]


def in_one_process(recipe: Recipe) -> tuple[Ended, Frames]:
    """The same parties with the same keys in this process, and all that crossed."""
    with computing_with(recipe.threads):
        return play_to_end(set_up(recipe, wrap=RecordingTransport))


def play_to_end(setup: Setup) -> tuple[Ended, Frames]:
    """All epochs of parties whose clients have recording transports, and all that crossed."""
    recipe = setup.recipe
    with computing_with(recipe.threads):
        epochs = [play_epoch(setup, epoch) for epoch in range(1, recipe.training.epochs + 1)]
    weights: dict[str, Mapping[str, Tensor]] = {recipe.parties.server: setup.server.stage.state_dict()}
    metrics, summaries, frames = {}, {}, Frames()
    for place, seat in enumerate(setup.seats):
        client, name = seat.client, seat.client.name
        head = {} if client.head is None else client.head.state_dict()
        weights[name] = {**client.stage.state_dict(), **{f"head.{key}": tensor for key, tensor in head.items()}}
        metrics[name] = [metrics_line(epoch, results[place]) for epoch, results in enumerate(epochs, 1)]
        traffic, ledger = client.transport.traffic, client.guards.ledger
        summaries[name] = {
            "bytes_sent": traffic.wire_bytes("to server"),
            "bytes_received": traffic.wire_bytes("to client"),
            "messages": traffic.messages,
            "releases": {} if ledger is None else ledger.summary(),
        }
        transport = client.transport
        recording = cast(RecordingTransport, transport._inner if isinstance(transport, PackingTransport) else transport)
        for way in ("to server", "to client"):
            crossed = [crossing.message for crossing in recording.transcript if crossing.direction == way]
            frames |= {(way, name, number): {_digest(message)} for number, message in enumerate(crossed)}
    states = {seat.client.name: seat.client.state() for seat in setup.seats}
    return Ended(weights, states, metrics, summaries), frames


def assert_same(ended: Ended, expected: Ended) -> None:
    """In all that parties hold, but for seconds."""
    assert ended.weights.keys() == expected.weights.keys()
    for kind in ("weights", "states"):
        for party, tensors in getattr(expected, kind).items():
            found = getattr(ended, kind)[party]
            assert found.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(found[name], tensor), f"{kind} of {party}: {name}"
    for party, lines in expected.metrics.items():
        assert [line | {"seconds": 0} for line in ended.metrics[party]] == [line | {"seconds": 0} for line in lines]
    for party, summary in expected.summaries.items():
        assert {key: ended.summaries[party][key] for key in summary} == summary


def goodbyes(crossed: Frames) -> Frames:
    """What follows all that crossed in one process, where nobody need say goodbye."""
    numbers: dict[str, int] = {}
    for _, party, number in crossed:
        numbers[party] = max(numbers.get(party, 0), number + 1)
    said: Frames = {}
    for party, number in numbers.items():
        said["to server", party, number] = {_digest(Message("goodbye", party, 0))}
        said["to client", party, number] = {_digest(Message("receipt", "server", 0))}
    return said


@final
class Network:
    """The parties of a recipe, their folders below one, certificates, and the keys that `set_up` gives them.

    The server is dialed by the name localhost; a hop's name is the address under which it is dialed: 127.0.0.1.

    Ends all its processes with the context.
    """

    def __init__(self, folder: Path, recipe: Recipe, certificates: Path) -> None:
        self.folder, self.recipe, self._certificates = folder, recipe, certificates
        self._servers = [recipe.parties.server, *reversed(recipe.parties.hops)]  # each is dialed by the one after it
        self.names = [*self._servers, *recipe.parties.clients]
        self._ports: dict[str, int] = {}
        self._parties: list[Party] = []
        folder.mkdir(parents=True)
        self.write_recipe(recipe)
        for name in (*self.names, "shared by the clients"):
            key = hashlib.sha256(f"milkglass rehearsal {recipe.seed} {name}".encode()).digest()
            (folder / f"{name}.key").write_bytes(key)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for party in self._parties:
            party.end()

    def write_recipe(self, recipe: Recipe, name: str | None = None) -> None:
        """What a party that is started from now on reads, that one or all without their own: it may differ in what is
        the party's own.
        """
        (self.folder / f"{name or 'recipe'}.toml").write_text(recipe.to_toml())

    def hold(self, name: str, before: int) -> None:
        """Let a party send nothing from that number on, so that no machine is too fast for a test; begin before it."""
        (self.folder / f"{name}.hold").write_text(str(before))

    def release(self, name: str) -> None:
        """Let it go on."""
        (self.folder / f"{name}.hold").unlink()

    def seen(self, name: str) -> int:
        """How many different frames a party's process has seen, in all its lives."""
        path = self.folder / f"{name}.frames"
        lines = path.read_text().splitlines() if path.exists() else []
        return len({line.rpartition("|")[0] for line in lines})

    def start(self, name: str, *, resume: bool = False) -> Party:
        """Start a party; the server first: it keeps the port that it gets."""
        if name in self._servers:
            own = self._certificates / ("localhost" if name == self.recipe.parties.server else name)
            before = self._servers[: self._servers.index(name)]
            onward = self._ports[before[-1]] if before else None
            party = Party(_serve, self.folder, name, own, self._ports.get(name, 0), resume, onward)
        else:
            nearest = self._servers[-1]
            host = "localhost" if nearest == self.recipe.parties.server else nearest
            address = f"{host}:{self._ports[nearest]}"
            party = Party(_join, self.folder, name, self._certificates / name, address, resume)
        self._parties.append(party)
        if name in self._servers and name not in self._ports:
            self._ports[name] = party.port()
        return party

    def run(self) -> Ended:
        """All parties from the start to the end, undisturbed."""
        parties = [self.start(name) for name in self.names]
        for party in parties:
            party.result()
        return self.ended()

    def ended(self) -> Ended:
        """What the parties' folders hold at the end."""
        weights: dict[str, Mapping[str, Tensor]] = {}
        states, metrics, summaries = {}, {}, {}
        for name in self.names:
            folder = self.folder / name
            summaries[name] = json.loads((folder / "summary.json").read_text())
            if name in self._servers:
                weights[name] = load_file(folder / "top.safetensors")
                continue
            head = load_file(folder / "head.safetensors") if (folder / "head.safetensors").exists() else {}
            bottom = load_file(folder / "bottom.safetensors")
            weights[name] = bottom | {f"head.{key}": tensor for key, tensor in head.items()}
            metrics[name] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            # an older one stays where a kill came between the newest one's last file and its removal
            state = max(folder.glob(f"checkpoint/*/{name}.safetensors"), key=lambda file: int(file.parent.name))
            states[name] = load_file(state)
        return Ended(weights, states, metrics, summaries)

    def frames(self) -> Frames:
        """All that was on the wire, of all lives of all processes."""
        found = Frames()
        for name in self.names:
            for line in (self.folder / f"{name}.frames").read_text().splitlines():
                way, party, number, digest = line.split("|")
                found.setdefault((way, party, int(number)), set()).add(digest)
        return found


@final
class Party:
    """A party's process."""

    def __init__(self, work: Callable[..., None], folder: Path, name: str, *arguments: Any) -> None:
        self.name = name
        self._told, theirs = _FORKS.Pipe(duplex=False)
        self._process = _FORKS.Process(target=work, args=(theirs, folder, name, *arguments), name=name)
        self._process.start()
        theirs.close()

    @property
    def alive(self) -> bool:
        """Whether it still works."""
        return self._process.is_alive()

    def port(self) -> int:
        """Where a server listens, once it does."""
        return int(self._next("port"))

    def result(self) -> dict[str, Any]:
        """Its summary, once it is done."""
        return cast(dict[str, Any], self._next("done"))

    def failure(self) -> str:
        """The line that it ends with."""
        return str(self._next("failed"))

    def kill(self) -> None:
        """`kill -9`; returns when it is dead."""
        self._process.kill()
        self._process.join(SECONDS)
        assert self._process.exitcode in (-signal.SIGKILL, 0)

    def stop(self) -> None:
        """Ask it to end (SIGTERM)."""
        self._process.terminate()

    def end(self) -> None:
        """It does not outlive the test."""
        self._process.kill()
        self._process.join(SECONDS)
        self._told.close()

    def _next(self, wanted: str) -> Any:
        while self._told.poll(SECONDS):
            try:
                what, value = self._told.recv()
            except EOFError:
                raise AssertionError(f"{self.name} ended without a word") from None
            if what == wanted:
                return value
            assert what == "port", f"{self.name}: {what}: {value}"
        raise AssertionError(f"{self.name} does not come to {wanted!r}")


# In a party's process.


def _recipe_of(folder: Path, name: str) -> Recipe:
    own = folder / f"{name}.toml"
    return load_recipe(own if own.exists() else folder / "recipe.toml")


def _serve(
    told: Connection, folder: Path, name: str, certificates: Path, port: int, resume: bool, onward: int | None
) -> None:
    recipe = _recipe_of(folder, name)
    credentials = load_credentials(certificates, "server")
    _watch_frames(folder / f"{name}.frames")
    _tell(
        told,
        lambda: serve(
            recipe,
            f"{'localhost' if onward is None else name}:{port}",
            credentials,
            folder / name,
            onward=None if onward is None else Onward(name, f"localhost:{onward}", credentials),
            key=folder / f"{name}.key",
            resume=resume,
            log=_log(folder / f"{name}.log"),
            ready=lambda port: told.send(("port", port)),
        ),
    )


def _join(told: Connection, folder: Path, name: str, certificates: Path, address: str, resume: bool) -> None:
    recipe = _recipe_of(folder, name)
    _watch_frames(folder / f"{name}.frames")
    _tell(
        told,
        lambda: join(
            recipe,
            name,
            address,
            load_credentials(certificates, "client"),
            folder / name,
            key=folder / f"{name}.key",
            shared_key=folder / "shared by the clients.key",
            resume=resume,
            log=_log(folder / f"{name}.log"),
        ),
    )


def _tell(told: Connection, work: Callable[[], dict[str, Any]]) -> None:
    try:
        told.send(("done", work()))
    except MilkglassError as error:
        told.send(("failed", str(error)))


def _log(path: Path) -> Callable[..., None]:
    def log(event: str, **values: object) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"at": time.monotonic(), "event": event, **values}) + "\n")

    return log


def _digest(message: Message) -> str:
    """Of a message's frame, without what differs between runs and between lives: the run, and its number."""
    return hashlib.sha256(encode(replace(message, number=0))).hexdigest()


def _held(hold: Path, number: int) -> bool:
    try:
        return number >= int(hold.read_text())
    except FileNotFoundError:
        return False


def _watch_frames(path: Path) -> None:
    """Write down, in one write each, every frame that leaves a client, and every one that arrives at either end."""
    hold = path.with_suffix(".hold")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(way: str, frame: bytes, party: str | None = None) -> None:
        message = decode(frame)
        os.write(file, f"{way}|{party or message.party}|{message.number}|{_digest(message)}\n".encode())

    send, received, check = Sender.send, Sender.received, Taker.check
    names: dict[Sender, str] = {}

    def watched_send(sender: Sender, message: Message, run: int) -> tuple[bytes, bool]:
        names[sender] = message.party
        while _held(hold, sender.number):
            time.sleep(0.005)
        frame, leaves = send(sender, message, run)
        note("to server", frame)
        return frame, leaves

    def watched_received(sender: Sender, frame: bytes, *more: Any) -> None:
        note("to client", frame, names[sender])
        received(sender, frame, *more)

    def watched_check(taker: Taker, party: str, frame: bytes) -> Message:
        note("to server", frame)
        return check(taker, party, frame)

    for owner, name, watched in (
        (Sender, "send", watched_send),
        (Sender, "received", watched_received),
        (Taker, "check", watched_check),
    ):
        setattr(owner, name, watched)
