"""The server's end of the wire: clients dial in with a certificate, each gets one stream; strangers are turned away.

A client's name is the common name of its certificate. Whoever is not expected, speaks for another run, or is there
already, is refused with a reason that it is told, and that is logged. Messages are computed one by one. A short
computation runs in the event loop, where it costs nothing extra; once one has taken long, the next ones of its kind run
in a thread, so that the loop goes on answering: handshakes, heartbeats, health.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, final

import grpc
import grpc.aio
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from milkglass.certificates import Credentials
from milkglass.codec import decode, encode
from milkglass.errors import MessageError, MilkglassError
from milkglass.messages import Message
from milkglass.transports import door
from milkglass.transports.address import cannot_listen, every_address
from milkglass.transports.agreement import GREETINGS, Agreement, read_greeting
from milkglass.transports.door import Connection, Door, Health, StoppedError, Unwatched, Watch
from milkglass.transports.exactly_once import Frames, Taking
from milkglass.transports.grpc import METHOD, Log, channel_options, silent

_LONG_SECONDS: Final = 0.005
_END_SECONDS: Final = 0.05
_LAST_WORDS_SECONDS: Final = 2.0
_STREAMS: Final = 8


@final
class GrpcServer:
    """Takes the messages of the clients that `agreements` names, and gives them their answers.

    agreements: for each client what the handshake compares. taken: called after every message, in the loop, while
    nothing is being computed; the place for checkpoints. waits_for: for whom held answers wait. handshake_seconds,
    greeting_seconds: what a stranger may take for either. Plain text (credentials None) is for loopback alone: there a
    client is whom it says it is.
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
        handshake_seconds: float = 10.0,
        greeting_seconds: float = 20.0,
        in_thread: bool = False,
        watch: Watch | None = None,
        log: Log = silent,
    ) -> None:
        self._in_thread = in_thread
        self._taker, self._agreements = taker, agreements
        self._name, self._run, self._frame_bytes = name, run, frame_bytes
        self._taken, self._may_begin, self._waits_for = taken, may_begin, waits_for
        self._heartbeat = heartbeat_seconds
        self._handshake_seconds, self._greeting_seconds = handshake_seconds, greeting_seconds
        self._door = Door(1.5 * handshake_seconds)
        self._watch: Watch = watch or Unwatched()
        self._log: Log = partial(log, run=f"{run:016x}")
        self._steps: dict[str, int] = {}  # of each client's last message
        self._stalled: dict[str, str] = {}  # whom each client waits for, as was logged last
        self._connections: dict[str, Connection] = {}
        self._changed = asyncio.Event()  # set, and replaced, after each message that was taken
        self._turn = asyncio.Lock()
        self._seconds: dict[str, float] = {}  # how long the last message of a kind took
        # threads that compute are asked for in each thread anew, and they decide about the last bits
        self._thread = ThreadPoolExecutor(1, "compute", torch.set_num_threads, (torch.get_num_threads(),))
        self._in_hand: Counter[str] = Counter()
        self._greeting: Counter[str] = Counter()  # streams of each that have not been let in yet
        self._failed: asyncio.Future[None] | None = None
        self._stopped = False
        self._server: grpc.aio.Server | None = None
        self._health = Health(self._door)
        self._tasks: set[asyncio.Task[None]] = set()
        self._plain = False

    async def start(self, address: str, credentials: Credentials | None) -> int:
        """Listen at HOST:PORT (port 0: a free one); returns the port. Raises LinkError where that is not possible."""
        options = [
            *channel_options(self._frame_bytes, self._heartbeat),
            *door.options(_STREAMS, self._handshake_seconds),
        ]
        self._failed = asyncio.get_running_loop().create_future()
        self._plain = credentials is None
        self._server = grpc.aio.server(options=options)
        self._server.add_generic_rpc_handlers((door.OneMethod(METHOD, self._talk),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            if credentials is None:
                door.check_plain(address)
                ports = [self._server.add_insecure_port(place) for place in every_address(address)]
            else:  # gRPC hands a set of these out once
                shown = self._door.credentials
                ports = [self._server.add_secure_port(place, shown(credentials)) for place in every_address(address)]
        except RuntimeError as error:  # what gRPC says goes to its own log
            raise cannot_listen(address) from error
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        self._spawn(self._beat())
        if credentials is not None:
            self._spawn(self._watch_door())
        return int(ports[0])

    async def run_until(self, over: asyncio.Event) -> None:
        """Serve until `over` is set. Raises what made further service impossible, such as a full disk."""
        assert self._failed is not None
        waiting: asyncio.Future[Any] = asyncio.ensure_future(over.wait())
        await asyncio.wait([waiting, self._failed], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._failed.done():
            if door.for_good(self._failed.exception()):
                await asyncio.sleep(_LAST_WORDS_SECONDS)  # whoever was away, or writing, comes back and hears why
            self._failed.result()

    async def stop(self, grace_seconds: float, *, unfinished: bool = False) -> None:
        """Let nobody in any more, and end what is under way after so many seconds at most.

        unfinished: nothing more is taken either, and the clients are told to come back.
        """
        if self._server is None:
            return
        self._stopped = unfinished
        for connection in self._connections.values() if unfinished else ():
            self._spawn(door.give_up(connection.context, None))
        await self._health.end()
        await self._server.stop(grace_seconds)
        for task in self._tasks:
            task.cancel()
        async with self._turn:  # what is being computed is finished and kept
            await asyncio.to_thread(self._thread.shutdown)
        if self._failed is not None and self._failed.done():
            self._failed.exception()  # asked for, or asyncio complains that nobody did

    # One client.

    async def _talk(self, _: object, context: Any) -> None:
        peer, connection = context.peer(), None
        self._door.speaks(peer)
        try:
            connection = await self._let_in(context)
            await connection.push(encode(self._welcome(connection.party)))
            while (frame := await context.read()) is not grpc.aio.EOF:
                await self._handle(connection, frame)
            await asyncio.sleep(_END_SECONDS)  # where the stream broke, this is cancelled
            self._leave(connection, peer)
        except MessageError as error:
            await self._turn_away(context, grpc.StatusCode.INVALID_ARGUMENT, "message", str(error), connection)
        except StoppedError as stopped:
            await door.give_up(context, stopped.cause)
        except MilkglassError as error:
            await door.give_up(context, error)
        except asyncio.CancelledError:
            if connection is not None:
                words = f"it hung up, the connection broke, or a frame longer than {self._frame_bytes} bytes came"
                self._leave(connection, peer, reason=words)
            raise
        finally:
            if connection is not None:
                self._leave(connection, peer, reason="this server stops" if self._stopped else "refused")

    def _leave(self, connection: Connection, peer: str, **reason: str) -> None:
        if self._connections.get(connection.party) is connection:
            del self._connections[connection.party]
            self._watch.connected(len(self._connections))
            step = self._steps.get(connection.party)
            self._log("disconnected", party=connection.party, step=step, peer=peer, **reason)

    async def _let_in(self, context: Any) -> Connection:
        """Who it is, and whether both hold the same recipe. Aborts the stream where it may not come in."""
        codes = grpc.StatusCode
        names = context.auth_context().get("x509_common_name", [])
        if not self._plain and len(names) != 1:
            await self._turn_away(context, codes.PERMISSION_DENIED, "no name", "the certificate has no common name")
        name = "" if self._plain else names[0].decode(errors="replace")
        if not self._plain and name not in self._agreements:
            words = f"{name!r} is not among the clients of this run"
            await self._turn_away(context, codes.PERMISSION_DENIED, "unknown name", words)
        hello = await self._greeted(context, name)
        party = hello.party if self._plain else name
        if hello.kind != "hello" or hello.party != party:
            words = f"the certificate is of {party!r}, the greeting, {hello.kind!r}, of {hello.party!r}"
            await self._turn_away(context, codes.PERMISSION_DENIED, "false name", words)
        if party not in self._agreements:
            words = f"{party!r} is not among the clients of this run"
            await self._turn_away(context, codes.PERMISSION_DENIED, "unknown name", words)
        told = read_greeting(hello)
        difference = self._agreements[party].difference(told)
        if difference is not None:
            words = f"the parties do not agree: {difference} (here: {self._name}; there: {party})"
            await self._turn_away(context, codes.FAILED_PRECONDITION, "another recipe", words)
        if told.get("run") not in (0, self._run):
            words = "it began another run than the one that is served here"
            await self._turn_away(context, codes.FAILED_PRECONDITION, "another run", words)
        if party in self._connections:
            words = f"{party} is connected already; the name is free once that connection misses its heartbeats"
            await self._turn_away(context, codes.ALREADY_EXISTS, "there already", words)
        self._check_running()
        connection = self._connections[party] = Connection(party, context)
        self._watch.connected(len(self._connections))
        self._log("connected", party=party, step=self._steps.get(party), peer=context.peer())
        return connection

    async def _greeted(self, context: Any, name: str) -> Message:
        """The greeting; so many streams of one name may be without one at a time."""
        if self._greeting[name] >= _STREAMS:
            words = f"{_STREAMS} streams of {name or 'this machine'} have not greeted yet"
            await self._turn_away(context, grpc.StatusCode.UNAVAILABLE, "too many streams", words)
        self._greeting[name] += 1
        try:
            async with asyncio.timeout(self._greeting_seconds):
                frame = await context.read()
        except TimeoutError:
            words = f"no greeting came for {self._greeting_seconds:g} seconds"
            await self._turn_away(context, grpc.StatusCode.DEADLINE_EXCEEDED, "silent", words)
        finally:
            self._greeting[name] -= 1
        if frame is grpc.aio.EOF:
            words = f"it hung up before a greeting, or a frame longer than {self._frame_bytes} bytes came"
            await self._turn_away(context, grpc.StatusCode.INVALID_ARGUMENT, "no greeting", words)
        return decode(frame, GREETINGS)

    def _welcome(self, party: str) -> Message:
        return Message("welcome", self._name, 0, {"told": self._agreements[party].told(run=self._run)})

    async def _turn_away(
        self, context: Any, code: grpc.StatusCode, why: str, words: str, connection: Connection | None = None
    ) -> None:
        """Tell, log and count a refusal, and end the stream (this raises)."""
        self._watch.refused(why)
        party = {} if connection is None else {"party": connection.party}
        self._log("refused", why=why, reason=words[: door.WORDS], peer=context.peer(), **party)
        await context.abort(code, words[: door.WORDS])
        raise AssertionError("abort raises")

    # One message.

    async def _handle(self, connection: Connection, frame: bytes) -> None:
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
        if self._in_thread or self._turn.locked() or self._seconds.get(message.kind, math.inf) > _LONG_SECONDS:
            # a client that hangs up must not stop what is being computed for it
            await asyncio.shield(self._spawn(self._take_in_thread(party, message, frame)))
            return
        with self._or_stop():
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
            with self._or_stop():
                frames = await self._take_as_new(party, message, frame)
        await self._deliver(frames, party)

    async def _take_as_new(self, party: str, message: Message, frame: bytes) -> Frames:
        answer = self._taker.again(party, message, frame)
        if answer is not None:  # it came twice while another one was computed
            return [(party, answer)] if answer else []
        loop = asyncio.get_running_loop()
        frames = await loop.run_in_executor(self._thread, self._take_now, party, message, frame)
        self._was_taken()
        return frames

    def _check_running(self) -> None:
        assert self._failed is not None
        if self._failed.done():
            raise StoppedError(self._failed.exception())
        if self._stopped:
            raise StoppedError(None)

    @contextlib.contextmanager
    def _or_stop(self) -> Iterator[None]:
        """What the service, or the disk, cannot go on after stops the server: memory may be ahead of what was kept."""
        self._check_running()
        try:
            yield
        except MessageError:
            raise
        except Exception as error:
            assert self._failed is not None
            self._failed.set_exception(error)
            for connection in self._connections.values():
                self._spawn(door.give_up(connection.context, error))
            raise StoppedError(error) from error

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
                await connection.push(answer)
            else:
                self._spawn(connection.push(answer))

    def _take_now(self, party: str, message: Message, frame: bytes) -> Frames:
        started = time.perf_counter()
        frames = self._taker.take(party, message, frame)
        self._steps[party] = message.step
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
                self._log_stall(connection.party, waits_for)
                owes = self._taker.owes(connection.party) or self._in_hand[connection.party]
                if owes and not connection.writing.locked():  # one that does not read must not hold up the others
                    self._spawn(connection.push(frame))

    def _log_stall(self, party: str, waits_for: str) -> None:
        """Say once for whom a client waits, and again when that changes."""
        found = waits_for if self._taker.owes(party) else ""
        if found and found != self._stalled.get(party):
            self._log("waiting", party=party, step=self._steps.get(party), waits_for=found)
        self._stalled[party] = found

    async def _watch_door(self) -> None:
        while True:
            await asyncio.sleep(min(self._handshake_seconds, 1.0))
            strangers = self._door.strangers()
            if strangers:
                self._watch.refused("handshake", strangers)
                words = "no handshake: no certificate, another CA's, an expired one, no TLS, or not a word"
                self._log("refused", why="handshake", reason=words, connections=strangers)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
