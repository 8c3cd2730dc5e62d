"""The server's end of the wire: clients dial in with a certificate, each gets one stream; strangers are turned away.

A client's name is the common name of its certificate. Whoever is not expected, speaks for another run, or is there
already, is refused with a reason that it is told, and that is logged. Messages are computed one by one. A short
computation runs in the event loop, where it costs nothing extra; once one has taken long, the next ones of its kind run
in a thread, so that the loop goes on answering: handshakes, heartbeats, health.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, final

import grpc
import grpc.aio
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from milkglass.certificates import Credentials
from milkglass.codec import decode, encode
from milkglass.errors import LinkError, MessageError, MilkglassError
from milkglass.messages import Message
from milkglass.transports.agreement import GREETINGS, Agreement, read_greeting
from milkglass.transports.exactly_once import Frames
from milkglass.transports.grpc import METHOD, Log, channel_options, silent

_LONG_SECONDS: Final = 0.005
_GREETING_SECONDS: Final = 20.0
_HANDSHAKE_MILLISECONDS: Final = 10_000
_STREAMS_PER_CONNECTION: Final = 8


class Watch(Protocol):
    """Who counts what happens at the server's door."""

    def connected(self, parties: int) -> None:
        """So many clients are connected now."""

    def refused(self, reason: str) -> None:
        """Somebody was turned away; `reason` is one of a few words."""

    def message(self, party: str, kind: str, wire_bytes: int, seconds: float) -> None:
        """A message was taken, and computed in so many seconds."""


class Taking(Protocol):
    """Who takes the clients' frames: a `Taker`, or where a message changes nothing, a `QueryTaker`."""

    def owes(self, party: str) -> bool:
        """Whether a message of that client waits for others before it is answered."""
        ...

    def check(self, party: str, frame: bytes) -> Message:
        """The message in a frame from `party`. Raises MessageError unless it is one that may come from there now."""
        ...

    def again(self, party: str, message: Message, frame: bytes) -> bytes | None:
        """The answer that it got before; b"" if that is still to come; None if it is new."""
        ...

    def take(self, party: str, message: Message, frame: bytes) -> Frames:
        """Take a new one: the frames that are due now."""
        ...


@final
class Unwatched:
    """Nobody counts."""

    def connected(self, parties: int) -> None:
        """Do nothing."""

    def refused(self, reason: str) -> None:
        """Do nothing."""

    def message(self, party: str, kind: str, wire_bytes: int, seconds: float) -> None:
        """Do nothing."""


@dataclass(eq=False)
class _Connection:
    """One client's open stream."""

    party: str
    context: Any
    outgoing: deque[bytes] = field(default_factory=deque)
    writing: bool = False
    last_sign: float = field(default_factory=time.monotonic)

    async def push(self, *frames: bytes) -> None:
        """Write frames to the client, in order; never two at a time."""
        self.outgoing.extend(frames)
        if self.writing:
            return
        self.writing = True
        try:
            while self.outgoing:
                await self.context.write(self.outgoing.popleft())
        finally:
            self.writing = False


@final
class GrpcServer:
    """Takes the messages of the clients that `agreements` names, and gives them their answers.

    agreements: for each client what the handshake compares. taken: called after every message, in the loop, while
    nothing is being computed; the place for checkpoints. waits_for: for whom held answers wait. Plain text (credentials
    None) is for loopback alone: there a client is whom it says it is.
    """

    def __init__(
        self,
        taker: Taking,
        agreements: Mapping[str, Agreement],
        *,
        name: str,
        run: int,
        frame_bytes: int,
        taken: Callable[[], None] = lambda: None,
        may_begin: Callable[[], bool] = lambda: True,
        waits_for: Callable[[], list[str]] = list,
        heartbeat_seconds: float = 10.0,
        in_thread: bool = False,
        watch: Watch | None = None,
        log: Log = silent,
    ) -> None:
        self._in_thread = in_thread
        self._taker, self._agreements = taker, agreements
        self._name, self._run, self._frame_bytes = name, run, frame_bytes
        self._taken, self._may_begin, self._waits_for = taken, may_begin, waits_for
        self._heartbeat = heartbeat_seconds
        self._watch: Watch = watch or Unwatched()
        self._log = log
        self._connections: dict[str, _Connection] = {}
        self._changed = asyncio.Event()  # set, and replaced, after each message that was taken
        self._turn = asyncio.Lock()
        self._seconds: dict[str, float] = {}  # how long the last message of a kind took
        # threads that compute are asked for in each thread anew, and they decide about the last bits
        self._thread = ThreadPoolExecutor(1, "compute", torch.set_num_threads, (torch.get_num_threads(),))
        self._in_hand: Counter[str] = Counter()
        self._failed: asyncio.Future[None] | None = None
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._beating: asyncio.Task[None] | None = None
        self._pushes: set[asyncio.Task[None]] = set()
        self._plain = False

    async def start(self, address: str, credentials: Credentials | None) -> int:
        """Listen at HOST:PORT (port 0: a free one); returns the port. Raises LinkError where that is not possible."""
        options = [
            *channel_options(self._frame_bytes, self._heartbeat),
            ("grpc.max_concurrent_streams", _STREAMS_PER_CONNECTION),
            ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MILLISECONDS),
            ("grpc.http2.min_ping_interval_without_data_ms", 500),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.so_reuseport", 0),
        ]
        self._failed = asyncio.get_running_loop().create_future()
        self._plain = credentials is None
        self._server = grpc.aio.server(options=options)
        self._server.add_generic_rpc_handlers((_Handler(self._talk),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                key = [(credentials.key, credentials.chain)]
                port = self._server.add_secure_port(
                    address, grpc.ssl_server_credentials(key, credentials.root, require_client_auth=True)
                )
        except RuntimeError:
            port = 0  # what gRPC says goes to its own log
        if port == 0:
            raise LinkError(f"cannot listen at {address}: it is in use, or no address of this machine")
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        self._beating = asyncio.create_task(self._beat())
        return int(port)

    async def run_until(self, over: asyncio.Event) -> None:
        """Serve until `over` is set. Raises what made further service impossible, such as a full disk."""
        assert self._failed is not None
        waiting: asyncio.Future[Any] = asyncio.ensure_future(over.wait())
        await asyncio.wait([waiting, self._failed], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._failed.done():
            self._failed.result()

    async def stop(self, grace_seconds: float) -> None:
        """Let nobody in any more, and end what is under way after so many seconds at most."""
        if self._server is None:
            return
        await self._health.enter_graceful_shutdown()
        if self._beating is not None:
            self._beating.cancel()
        await self._server.stop(grace_seconds)
        async with self._turn:  # what is being computed is finished and kept
            self._thread.shutdown()

    # One client.

    async def _talk(self, _: object, context: Any) -> None:
        connection: _Connection | None = None
        try:
            connection = await self._let_in(context)
            while (frame := await context.read()) is not grpc.aio.EOF:
                await self._handle(connection, frame)
        except MessageError as error:
            await self._turn_away(context, grpc.StatusCode.INVALID_ARGUMENT, "message", str(error), connection)
        except MilkglassError as error:
            self._fail(error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        finally:
            if connection is not None and self._connections.get(connection.party) is connection:
                del self._connections[connection.party]
                self._watch.connected(len(self._connections))
                self._log("disconnected", party=connection.party)

    async def _let_in(self, context: Any) -> _Connection:
        """Who it is, and whether both hold the same recipe. Aborts the stream where it may not come in."""
        refused = grpc.StatusCode.PERMISSION_DENIED
        names = context.auth_context().get("x509_common_name", [])
        if not self._plain and len(names) != 1:
            await self._turn_away(context, refused, "no name", "the certificate has no single common name")
        try:
            async with asyncio.timeout(_GREETING_SECONDS):
                frame = await context.read()
        except TimeoutError:
            frame = grpc.aio.EOF
        if frame is grpc.aio.EOF:
            await self._turn_away(context, grpc.StatusCode.DEADLINE_EXCEEDED, "silent", "no greeting came")
        hello = decode(frame, GREETINGS)
        party = hello.party if self._plain else names[0].decode(errors="replace")
        if hello.kind != "hello" or hello.party != party:
            words = f"the certificate is {party!r}'s, the greeting {hello.party!r}'s"
            await self._turn_away(context, refused, "false name", words)
        if party not in self._agreements:
            words = f"{party!r} is not among the clients of this run"
            await self._turn_away(context, refused, "unknown name", words)
        told = read_greeting(hello)
        difference = self._agreements[party].difference(told)
        if difference is not None:
            words = f"the parties do not agree: {difference} (here: {self._name}; there: {party})"
            await self._turn_away(context, grpc.StatusCode.FAILED_PRECONDITION, "another recipe", words)
        if told.get("run") not in (0, self._run):
            words = "it began another run than the one that is served here"
            await self._turn_away(context, grpc.StatusCode.FAILED_PRECONDITION, "another run", words)
        if party in self._connections:
            words = f"{party} is connected already; the name is free once that connection misses its heartbeats"
            await self._turn_away(context, grpc.StatusCode.ALREADY_EXISTS, "there already", words)
        connection = self._connections[party] = _Connection(party, context)
        self._watch.connected(len(self._connections))
        self._log("connected", party=party, peer=context.peer())
        welcome = Message("welcome", self._name, 0, {"told": self._agreements[party].told(run=self._run)})
        await connection.push(encode(welcome))
        return connection

    async def _turn_away(
        self, context: Any, code: grpc.StatusCode, why: str, words: str, connection: _Connection | None = None
    ) -> None:
        """Tell, log and count a refusal, and end the stream (this raises)."""
        self._watch.refused(why)
        party = {} if connection is None else {"party": connection.party}
        self._log("refused", why=why, reason=words, peer=context.peer(), **party)
        await context.abort(code, words)

    # One message.

    async def _handle(self, connection: _Connection, frame: bytes) -> None:
        message = self._taker.check(connection.party, frame)
        answer = self._taker.again(connection.party, message, frame)
        if answer is not None:
            if answer:
                await connection.push(answer)
            return
        if message.kind == "activations" and message.piece == 0:
            await self._until_it_may_begin(connection.party)
        await self._take(connection.party, message, frame)

    async def _until_it_may_begin(self, party: str) -> None:
        """Let others finish what is half done, where a checkpoint waits for that; more of this client's waits too.

        A client that hangs up meanwhile takes its message with it, and sends it again when it comes back.
        """
        self._in_hand[party] += 1
        try:
            while not self._may_begin():
                await self._changed.wait()
        finally:
            self._in_hand[party] -= 1

    async def _take(self, party: str, message: Message, frame: bytes) -> None:
        if self._in_thread or self._turn.locked() or self._seconds.get(message.kind, 0.0) > _LONG_SECONDS:
            # a client that hangs up must not stop what is being computed for it
            await asyncio.shield(asyncio.create_task(self._take_in_thread(party, message, frame)))
            return
        frames = self._take_now(party, message, frame)
        self._was_taken()
        await self._deliver(frames, party)

    async def _take_in_thread(self, party: str, message: Message, frame: bytes) -> None:
        self._in_hand[party] += 1
        try:
            await self._take_in_turn(party, message, frame)
        finally:
            self._in_hand[party] -= 1

    async def _take_in_turn(self, party: str, message: Message, frame: bytes) -> None:
        async with self._turn:
            answer = self._taker.again(party, message, frame)
            if answer is not None:  # it came twice while another one was computed
                frames = [(party, answer)] if answer else []
            else:
                loop = asyncio.get_running_loop()
                frames = await loop.run_in_executor(self._thread, self._take_now, party, message, frame)
                self._was_taken()
        await self._deliver(frames, party)

    def _was_taken(self) -> None:
        self._taken()
        self._changed.set()
        self._changed = asyncio.Event()

    async def _deliver(self, frames: Frames, party: str) -> None:
        """To whoever is there; who is away asks again when it comes back."""
        for to, answer in frames:
            connection = self._connections.get(to)
            if connection is None:
                continue
            if to == party:
                await _push_to(connection, answer)
            else:
                task = asyncio.create_task(_push_to(connection, answer))
                self._pushes.add(task)
                task.add_done_callback(self._pushes.discard)

    def _take_now(self, party: str, message: Message, frame: bytes) -> Frames:
        started = time.perf_counter()
        frames = self._taker.take(party, message, frame)
        seconds = self._seconds[message.kind] = time.perf_counter() - started
        self._watch.message(party, message.kind, len(frame), seconds)
        return frames

    async def _beat(self) -> None:
        """A sign of life to each client that waits for an answer, and for whom it waits."""
        while True:
            await asyncio.sleep(self._heartbeat)
            waits_for = ", ".join(self._waits_for())[:1024]
            told = torch.frombuffer(bytearray(waits_for.encode()[:1024] or b" "), dtype=torch.uint8)
            frame = encode(Message("waits", self._name, 0, {"for": told}), self._run)
            for connection in list(self._connections.values()):
                if self._taker.owes(connection.party) or self._in_hand[connection.party]:
                    await _push_to(connection, frame)

    def _fail(self, error: MilkglassError) -> None:
        if self._failed is not None and not self._failed.done():
            self._failed.set_exception(error)


async def _push_to(connection: _Connection, frame: bytes) -> None:
    with contextlib.suppress(Exception):  # it hung up meanwhile: it asks again when it comes back
        await connection.push(frame)


@final
class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The one method that there is; bytes go in and out as they are."""

    def __init__(self, talk: Callable[[object, Any], Any]) -> None:
        self._method = grpc.stream_stream_rpc_method_handler(talk)

    def service(self, details: Any) -> Any:
        """The method of that name, or None."""
        return self._method if details.method == METHOD else None
