"""A small server of the wire, and clients to it: in a thread of this process, or as a process of its own.

python -m tests.wire_server CERTIFICATES FOLDER HANDSHAKE_SECONDS
                    prints its port, serves until it is ended, logs to stderr
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, final

import grpc
import pytest
import torch

from milkglass.certificates import Credentials, load_credentials
from milkglass.codec import Allowed, Limits, decode, encode
from milkglass.logs import party_log
from milkglass.messages import Addressed, Kind, Message, Service
from milkglass.transports.agreement import Agreement
from milkglass.transports.door import Unwatched, Watch
from milkglass.transports.exactly_once import Sender, Taker
from milkglass.transports.grpc import METHOD, GrpcTransport, Log
from milkglass.transports.grpc_server import GrpcServer

CLIENTS: Final = ("hospital-a", "hospital-b")
RUN: Final = 0x1234
AGREEMENT: Final = Agreement({"seed": 0, "training": {"batch_size": 64}}, (3,))
FRAME_BYTES: Final = 4 << 20
GREETING_SECONDS: Final = 4.0
"""How long an impatient server awaits a greeting: a pause of its process is shorter."""
_FLOAT: Final = frozenset({torch.float32})
_VALUES: Final = Allowed((None, 3), _FLOAT)
TO_SERVER: Final = Limits(FRAME_BYTES, {"activations": {"activations": _VALUES}, "goodbye": {}}, 200_000)
TO_CLIENT: Final = Limits(FRAME_BYTES, {"gradients": {"gradient": _VALUES}, "receipt": {}}, 200_000)


@final
class Doubling:
    """Answers each message at once, with twice its values; computing takes so many seconds."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.steps: list[int] = []

    def receive(self, message: Message) -> list[Addressed]:
        """The answer."""
        time.sleep(self.seconds)
        self.steps.append(message.step)
        return [(message.party, doubled(message))]


@final
class Computing:
    """Doubles as well; each message takes until the test lets it end."""

    def __init__(self) -> None:
        self.begun, self.end = threading.Semaphore(0), threading.Semaphore(0)
        self.steps: list[int] = []

    def receive(self, message: Message) -> list[Addressed]:
        """The answer."""
        self.begun.release()
        self.end.acquire(timeout=30)
        self.steps.append(message.step)
        return [(message.party, doubled(message))]


@final
class Holding:
    """Answers all parties together, once each has sent something: so each waits for the others."""

    def __init__(self, parties: Sequence[str] = CLIENTS) -> None:
        self._waiting: dict[str, Message | None] = dict.fromkeys(parties)

    def missing(self) -> list[str]:
        """Those for whom the others wait."""
        return [party for party, message in self._waiting.items() if message is None]

    def receive(self, message: Message) -> list[Addressed]:
        """Nothing, or the answers to all."""
        self._waiting[message.party] = message
        messages = [message for message in self._waiting.values() if message is not None]
        if len(messages) < len(self._waiting):
            return []
        self._waiting = dict.fromkeys(self._waiting)
        return [(each.party, doubled(each)) for each in messages]


def doubled(message: Message) -> Message:
    """The answer to a message."""
    if message.kind == "goodbye":
        return Message("receipt", "server", message.step)
    tensors = {"gradient": message.tensors["activations"] * 2}
    return Message("gradients", "server", message.step, tensors, message.piece, message.pieces)


@final
class Counting:
    """Counts at the door, for a test to read."""

    def __init__(self) -> None:
        self.refusals: Counter[str] = Counter()
        self.there = 0
        self.taken: Counter[str] = Counter()

    def connected(self, parties: int) -> None:
        """So many are there."""
        self.there = parties

    def refused(self, reason: str, times: int = 1) -> None:
        """Some were turned away."""
        self.refusals[reason] += times

    def message(self, party: str, kind: str, wire_bytes: int, seconds: float) -> None:
        """A message was taken."""
        self.taken[party] += 1


@final
class ServerThread:
    """A `GrpcServer` that runs in a thread of its own while the context lasts; a failure of it is in `failure`."""

    def __init__(
        self,
        credentials: Credentials | None,
        folder: Path,
        service: Service,
        *,
        port: int = 0,
        run: int = RUN,
        window: int = 2,
        limits: Limits = TO_SERVER,
        clients: Sequence[str] = CLIENTS,
        grace_seconds: float = 0.5,
        **options: Any,
    ) -> None:
        self.watch, self.lines = Counting(), list[dict[str, Any]]()
        self._grace_seconds = grace_seconds
        self.failure: BaseException | None = None
        self._credentials, self._folder, self._service = credentials, folder, service
        self._run, self._window, self._limits, self._clients = run, window, limits, clients
        self._options: dict[str, Any] = {
            "heartbeat_seconds": 10.0,
            "waits_for": getattr(service, "missing", list),
        } | options
        self.port = port
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="server")

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(60)
        if self.failure is not None:
            self._thread.join()
            raise self.failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop, as a process does that is told to."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(60)
        assert not self._thread.is_alive()

    def said(self, event: str, **values: Any) -> list[dict[str, Any]]:
        """The lines of the log that say so."""
        wanted = {"event": event, **values}
        return [line for line in self.lines if all(line.get(key) == value for key, value in wanted.items())]

    def _serve(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self.failure = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self.taker = Taker(
            self._service,
            dict.fromkeys(self._clients, self._limits),
            run=self._run,
            window=self._window,
            folder=self._folder,
        )
        self.taker.replay()

        def log(event: str, **values: object) -> None:
            self.lines.append({"event": event, **values})

        watch = self._options.pop("watch", self.watch)
        server = make_server(self.taker, watch, log, self._clients, run=self._run, **self._options)
        try:
            self.port = await server.start(f"localhost:{self.port}", self._credentials)
            self._ready.set()
            await server.run_until(self._over)
        finally:
            await server.stop(self._grace_seconds, unfinished=True)
            self.taker.close()


def make_server(taker: Taker, watch: Watch, log: Log, clients: Sequence[str] = CLIENTS, **options: Any) -> GrpcServer:
    """A server for these clients."""
    agreements = dict.fromkeys(clients, AGREEMENT)
    return GrpcServer(taker, agreements, name="server", frame_bytes=FRAME_BYTES, watch=watch, log=log, **options)


def dial(
    port: int, credentials: Credentials | None, folder: Path, *, party: str | None = None, **options: Any
) -> GrpcTransport:
    """A client that has not connected yet."""
    party = party or (credentials.name if credentials is not None else CLIENTS[0])
    known: dict[str, Any] = {
        "agreement": AGREEMENT,
        "limits": TO_CLIENT,
        "patience_seconds": 20.0,
        "answer_seconds": 20.0,
    } | options
    return GrpcTransport(f"localhost:{port}", credentials, Sender(folder), party=party, **(known | options))


def question(party: str, step: int, rows: int = 4, kind: Kind = "activations") -> Message:
    """A message whose values follow from the step."""
    values = torch.arange(rows * 3.0).reshape(rows, 3) + step
    return Message(kind, party, step, {"activations": values})


def asks(transport: GrpcTransport, party: str, steps: Iterable[int], rows: int = 4) -> None:
    """Ask these steps' questions: every answer must be the right one."""
    for step in steps:
        sent = question(party, step, rows)
        answer = transport.exchange(sent)
        assert (answer.kind, answer.step) == ("gradients", step)
        assert torch.equal(answer.tensors["gradient"], sent.tensors["activations"] * 2)


def hello(party: str, agreement: Agreement = AGREEMENT, *, run: int = 0, **more: Any) -> bytes:
    """The frame of a greeting."""
    return encode(Message("hello", party, 0, {"told": agreement.told(run=run, next=0, **more)}))


def talk(
    port: int,
    credentials: Credentials | None,
    frames: Iterable[bytes],
    *,
    after: Callable[[], object] = lambda: None,
    timeout: float = 60.0,
    **options: Any,
) -> tuple[list[Message], grpc.StatusCode, str]:
    """What a bare gRPC stream gets that sends these frames: the answers, and how it ended; then calls `after`."""
    again = credentials is not None and bool(credentials.key)  # who may come in: a pause can spoil a handshake
    with bare_channel(port, credentials) as channel:
        call = channel.stream_stream(METHOD)(iter(frames), timeout=timeout, wait_for_ready=again, **options)
        answers: list[Message] = []
        try:
            with contextlib.suppress(grpc.RpcError):
                for frame in call:
                    answers.append(decode(frame))
            return answers, call.code(), call.details()
        finally:
            after()


def bare_channel(port: int, credentials: Credentials | None) -> grpc.Channel:
    """A channel of a stranger's own making, with a connection of its own."""
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    if credentials is None:
        return grpc.insecure_channel(f"localhost:{port}", options=options)
    # who has no certificate leaves both out
    own = (credentials.key or None, credentials.chain or None)
    return grpc.secure_channel(
        f"localhost:{port}", grpc.ssl_channel_credentials(credentials.root, *own), options=options
    )


def one_line(error: Exception, *words: str) -> None:
    """A message of one line that holds these words, in this order."""
    assert re.fullmatch("[^\n]*" + "[^\n]*".join(map(re.escape, words)) + "[^\n]*", str(error)), error


def until(holds: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until it holds; a test fails where it never does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


@final
class Alone:
    """A server as a process of its own while the context lasts: `port`, `log`. most_files: it may open no more."""

    def __init__(
        self, certificates: Path, folder: Path, *, handshake_seconds: float = 2.0, most_files: int | None = None
    ) -> None:
        folder.mkdir()
        self.log = folder / "log"
        files = [] if most_files is None else [str(most_files)]
        arguments = [str(certificates), str(folder / "journal"), str(handshake_seconds), *files]
        self._command = [sys.executable, "-m", "tests.wire_server", *arguments]

    def __enter__(self) -> Self:
        root = Path(__file__).parents[1]
        with self.log.open("w") as errors:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=root)
        assert self._process.stdout is not None
        first = self._process.stdout.readline()
        if not first:
            self._process.communicate()
            pytest.fail(f"the server ended with {self._process.returncode}: {self.log.read_text()}")
        self.process_id, self.port = self._process.pid, int(first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lives = self._process.poll() is None
        self._process.kill()
        self._process.communicate()
        assert lives

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The lines of its log that say so."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def memory_bytes(self) -> Mapping[str, int]:
        """What it takes: `now`, and `peak` so far."""
        lines = Path(f"/proc/{self.process_id}/status").read_text().splitlines()
        words = dict(line.split(":", 1) for line in lines)
        return {name: int(words[key].split()[0]) << 10 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


async def _serve_alone(certificates: Path, folder: Path, handshake_seconds: float) -> None:
    taker = Taker(Doubling(), dict.fromkeys(CLIENTS, TO_SERVER), run=RUN, window=2, folder=folder)
    server = make_server(taker, Unwatched(), party_log("server"), run=RUN, handshake_seconds=handshake_seconds)
    port = await server.start("localhost:0", load_credentials(certificates, "server"))
    print(port, flush=True)
    await server.run_until(asyncio.Event())


if __name__ == "__main__":
    if files := [int(word) for word in sys.argv[4:]]:  # here, not in a fork of a process with threads: that can crash
        resource.setrlimit(resource.RLIMIT_NOFILE, (files[0] // 2, files[0]))
    asyncio.run(_serve_alone(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])))
