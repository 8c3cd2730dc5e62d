"""A world for `Sender` and `Taker` in which everything goes wrong: on the wire, on the disk, and with both processes.

A client's messages follow from the answers that it got, and the service's answers from all that it took: whatever has
its effect twice, never, or in another order shows in the last state of everybody.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, final

import pytest
import torch
from torch import Tensor

from milkglass.codec import Allowed, Limits, peek_header
from milkglass.errors import MessageError
from milkglass.messages import Addressed, Message
from milkglass.transports import journal
from milkglass.transports.exactly_once import Sender, Taker

RUN = 2**63 + 5
_BYTES = Allowed((16,), frozenset({torch.uint8}))
LIMITS = Limits(4096, {"activations": {"z": _BYTES}, "gradients": {"g": _BYTES}}, 0)


class Killed(BaseException):
    """A process dies here: no line of it runs any more."""


def digest(*parts: object) -> bytes:
    """16 bytes that follow from all parts and their order."""
    return hashlib.sha256(repr(parts).encode()).digest()[:16]


def as_tensor(content: bytes) -> Tensor:
    """As it travels."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> bytes:
    """As it was."""
    return tensor.numpy().tobytes()


@final
class Disk:
    """What a journal asks of the operating system. One of its operations may be the last one of the process.

    fuse: so many operations are still done. way: what becomes of the next one: it is not begun, half done, or done.
    """

    def __init__(self) -> None:
        self.fuse: int | None = None
        self.way = "before"
        self.operations = 0
        self._open: dict[int, Path] = {}

    def open(self, path: Path, flags: int, mode: int) -> int:
        """Open a file, and remember whose it is."""
        file: int = self._one("open", path, flags, mode)
        self._open[file] = path
        return file

    def close(self, file: int) -> None:
        """Close it."""
        del self._open[file]
        os.close(file)

    def died(self, folder: Path) -> None:
        """Whoever worked in that folder is dead: the operating system closes what it had open."""
        for file in [file for file, path in self._open.items() if path.is_relative_to(folder)]:
            self.close(file)

    def __getattr__(self, name: str) -> Any:
        return partial(self._one, name) if name in ("pwrite", "ftruncate", "unlink", "rename") else getattr(os, name)

    def _one(self, name: str, *arguments: Any) -> Any:
        """One operation that changes what is on the disk."""
        self.operations += 1
        if self.fuse is None or self.fuse > 0:
            self.fuse = None if self.fuse is None else self.fuse - 1
            return getattr(os, name)(*arguments)
        self.fuse = None
        if self.way == "half" and name == "pwrite":
            file, content, offset = arguments
            os.pwrite(file, content[: len(content) // 2], offset)
        elif self.way == "after":
            done = getattr(os, name)(*arguments)
            if name == "open":
                os.close(done)
        raise Killed

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, journals use it."""
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(journal, "os", self)
            patched.setattr(Path, "unlink", lambda path, **_: self.unlink(path))
            yield


class Machine(Protocol):
    """A service whose state is small."""

    @property
    def resting(self) -> bool: ...

    def receive(self, message: Message) -> Sequence[Addressed]: ...

    def state(self) -> Any: ...

    def load_state(self, state: Any) -> None: ...


@final
class Apart:
    """Answers each message at once; each client has a state of its own. Between its pieces a step is half done."""

    def __init__(self, clients: Sequence[str]) -> None:
        self.states = dict.fromkeys(clients, b"")
        self.counts = dict.fromkeys(clients, 0)
        self._half: set[str] = set()

    @property
    def resting(self) -> bool:
        return not self._half

    def receive(self, message: Message) -> list[Addressed]:
        party = message.party
        if (party in self._half) != (message.piece > 0):
            raise MessageError(f"{party}: piece {message.piece} does not follow")
        self._half = self._half - {party} if message.piece + 1 == message.pieces else self._half | {party}
        place = (message.step, message.piece)
        self.states[party] = digest(self.states[party], place, as_bytes(message.tensors["z"]))
        self.counts[party] += 1
        answer = Message("gradients", "server", *place[:1], {"g": as_tensor(self.states[party])})
        return [(party, answer)]

    def state(self) -> Any:
        return dict(self.states), dict(self.counts)

    def load_state(self, state: Any) -> None:
        self.states, self.counts = dict(state[0]), dict(state[1])


@final
class Together:
    """Holds what came until every client has sent its next message; then all of them get an answer."""

    def __init__(self, clients: Sequence[str]) -> None:
        self._joint = b""
        self.counts = dict.fromkeys(clients, 0)
        self._waiting: dict[str, deque[Message]] = {client: deque() for client in clients}
        self._half = False

    @property
    def resting(self) -> bool:
        return not self._half

    def receive(self, message: Message) -> list[Addressed]:
        self._waiting[message.party].append(message)
        if not all(self._waiting.values()):
            return []
        messages = [waiting.popleft() for waiting in self._waiting.values()]
        self._joint = digest(self._joint, [(m.party, m.step, m.piece, as_bytes(m.tensors["z"])) for m in messages])
        self._half = message.piece + 1 < message.pieces
        for party in self.counts:
            self.counts[party] += 1
        answers = {m.party: as_tensor(digest(self._joint, m.party)) for m in messages}
        return [(party, Message("gradients", "server", message.step, {"g": g})) for party, g in answers.items()]

    def state(self) -> Any:
        return self._joint, dict(self.counts)

    def load_state(self, state: Any) -> None:
        self._joint, self.counts = state[0], dict(state[1])


@final
class _Server:
    """The server's process."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.machine = world.make(world.names)
        tensors, told, count, kept = world.server_checkpoint or ({}, None, 0, None)
        limits = dict.fromkeys(world.names, LIMITS)
        self.taker = Taker(
            self.machine, limits, run=RUN, window=world.pieces + 1, folder=world.folder / "server", count=count
        )
        if told is not None:
            self.machine.load_state(kept)
            self.taker.load_state(tensors, told)
        self.taker.replay()

    def receive(self, party: str, frame: bytes) -> list[tuple[str, bytes]]:
        """What it answers; nothing to a frame that it refuses."""
        try:
            message = self.taker.check(party, frame)
            answer = self.taker.again(party, message, frame)
        except MessageError:
            return []
        if answer is not None:
            return [(party, answer)] if answer else []
        return self.taker.take(party, message, frame)

    def keep(self) -> None:
        """A checkpoint; a process may die before it is there, and after it is."""
        if self.machine.resting:
            tensors, told = self.taker.state()
            kept = {name: tensor.clone() for name, tensor in tensors.items()}
            self._world.server_checkpoint = (kept, told, self.taker.count, self.machine.state())
            self.taker.rotate()


@final
class _Client:
    """A client's process: so many steps, each of some pieces that are sent before the first answer is awaited."""

    def __init__(self, world: World, name: str) -> None:
        self._world, self._name = world, name
        self.step, self.state, number = world.client_checkpoints.get(name, (0, b"", 0))
        self.sender = Sender(world.folder / name, number)
        self._sent, self._answers = 0, list[bytes]()

    @property
    def finished(self) -> bool:
        return self.step == self._world.steps

    def work(self) -> bytes | None:
        """One thing that it can do now: a frame that leaves, if one does."""
        pieces = self._world.pieces
        if self.finished:
            return None
        if self._sent < pieces:
            content = self._world.draw(self._name, self.step, self._sent, self.state)
            message = Message(
                "activations", self._name, self.step, {"z": as_tensor(content)}, piece=self._sent, pieces=pieces
            )
            frame, leaves = self.sender.send(message, RUN)
            self._sent += 1
            return frame if leaves else None
        found = self.sender.answer()
        if found is not None:
            assert found[0].step == self.step
            self._answers.append(as_bytes(found[0].tensors["g"]))
            if len(self._answers) == pieces:
                self.state = digest(self.state, self.step, self._answers)
                self.step, self._sent, self._answers = self.step + 1, 0, []
        return None

    def keep(self) -> None:
        """A checkpoint between two steps."""
        if self._sent == 0 and self.sender.caught_up:
            self._world.client_checkpoints[self._name] = (self.step, self.state, self.sender.number)
            self.sender.rotate()


def _drawn(name: str, step: int, piece: int, state: bytes) -> bytes:
    return digest(name, step, piece, state)


@final
class World:
    """One server, its clients, the wire between them, and what is on their disks."""

    def __init__(
        self,
        folder: Path,
        make: Callable[[Sequence[str]], Machine],
        names: Sequence[str],
        *,
        steps: int,
        pieces: int,
        draw: Callable[[str, int, int, bytes], bytes] = _drawn,
    ) -> None:
        self.folder, self.make, self.names = folder, make, names
        self.steps, self.pieces, self.draw = steps, pieces, draw
        self.server_checkpoint: Any = None
        self.client_checkpoints: dict[str, tuple[int, bytes, int]] = {}
        self.to_server: list[tuple[str, bytes]] = []
        self.to_clients: list[tuple[str, bytes]] = []
        self.seen: dict[tuple[str, str, int], set[bytes]] = {}  # all that was ever on the wire, by way, party, number
        self.killed = 0
        self.disk = Disk()
        self._made: dict[str, _Client] = {}
        self._serving: _Server | None = None

    def run(self, events: Iterator[str], most_events: int = 100_000) -> dict[str, Any]:
        """Let happen what `events` says, then only what is right, until every client is done; all last states."""
        with self.disk.at_work():
            try:
                for event in events:
                    self._happens(event)
                for _ in range(most_events):
                    if self._all_done():
                        return self._last_states()
                    self._goes_on()
            finally:
                self.disk.died(self.folder)
        raise AssertionError("they never come to an end")

    def _happens(self, event: str) -> None:
        what, _, detail = event.partition(" ")
        place = int(detail.split()[0]) if detail else 0
        getattr(self, f"_{what}")(place, *detail.split()[1:])

    def left_on_disk(self) -> dict[str, int]:
        """How many files there are in each party's folder once everybody was started again."""
        with self.disk.at_work():
            for party in (*self.names, "server"):
                self._die(party)
                self.disk.fuse = None
                _ = self._server() if party == "server" else self._client(party)
            self.disk.died(self.folder)
        return {folder.name: len(list(folder.iterdir())) for folder in self.folder.iterdir()}

    # What may happen: to the process, frame or client of some number.

    def _work(self, place: int) -> None:
        name = self.names[place % len(self.names)]
        frame = self._in(name, lambda: self._client(name).work())
        if frame is not None:
            self._put("to server", name, frame)

    def _arrive(self, place: int, way: str = "to_server", again: str = "") -> None:
        """A frame arrives, in any order; and perhaps another time later."""
        wire = getattr(self, way)
        if not wire:
            return
        party, frame = wire[place % len(wire)] if again else wire.pop(place % len(wire))
        if way == "to_clients":
            self._in(party, lambda: self._client(party).sender.received(frame, LIMITS, RUN))
            return
        for to, answer in self._in("server", lambda: self._server().receive(party, frame)) or ():
            self._put("to client", to, answer)

    def _lose(self, place: int, way: str = "to_server") -> None:
        wire = getattr(self, way)
        if wire:
            wire.pop(place % len(wire))

    def _retry(self, place: int) -> None:
        """A client's connection is new: it sends again what has no answer."""
        name = self.names[place % len(self.names)]
        for frame in self._in(name, lambda: self._client(name).sender.again()) or ():
            self._put("to server", name, frame)

    def _keep(self, place: int) -> None:
        party = [*self.names, "server"][place % (len(self.names) + 1)]
        self._in(party, lambda: self._server().keep() if party == "server" else self._client(party).keep())

    def _kill(self, place: int) -> None:
        self._die([*self.names, "server"][place % (len(self.names) + 1)])

    def _fuse(self, operations: int, way: str = "before") -> None:
        """Whoever does the disk's operation of that number from now dies of it."""
        self.disk.fuse, self.disk.way = operations, way

    # How.

    def _goes_on(self) -> None:
        for index, name in enumerate(self.names):
            before = self._client(name).step
            for _ in range(2 * self.pieces):
                self._work(index)
            if self._client(name).step == before and self._client(name).sender.awaited is not None:
                self._retry(index)
        for way in ("to_server", "to_clients"):
            while getattr(self, way):
                self._arrive(0, way)

    def _in(self, party: str, do: Callable[[], Any]) -> Any:
        """What a process does; None where it dies of it."""
        try:
            return do()
        except Killed:
            self._die(party)
            return None

    def _die(self, party: str) -> None:
        self.killed += 1
        self.disk.died(self.folder / party)
        if party == "server":
            self._serving = None
        else:
            self._made.pop(party, None)

    def _server(self) -> _Server:
        while self._serving is None:
            try:
                self._serving = _Server(self)
            except Killed:  # it dies as it starts again
                self._die("server")
        return self._serving

    def _client(self, name: str) -> _Client:
        while name not in self._made:
            try:
                self._made[name] = _Client(self, name)
            except Killed:
                self._die(name)
        return self._made[name]

    def _put(self, way: str, party: str, frame: bytes) -> None:
        (self.to_server if way == "to server" else self.to_clients).append((party, frame))
        self.seen.setdefault((way, party, peek_header(frame).number), set()).add(frame)

    def _all_done(self) -> bool:
        return all(self._client(name).finished for name in self.names)

    def _last_states(self) -> dict[str, Any]:
        machine = self._server().machine
        return {"server": machine.state(), **{name: self._client(name).state for name in self.names}}


def random_events(generator: random.Random, count: int) -> Iterator[str]:
    """Work and faults, mixed."""
    usual = ["work", "work", "arrive to_server", "arrive to_clients"]
    faults = ["arrive to_server again", "arrive to_clients again", "lose to_server", "lose to_clients", "retry"]
    rare = ["keep", "keep", "kill", "fuse before", "fuse half", "fuse after"]
    for _ in range(count):
        share = generator.random()
        what, *more = generator.choice(usual if share < 0.75 else faults if share < 0.9 else rare).split()
        yield " ".join([what, str(generator.randrange(6 if what == "fuse" else 1000)), *more])
