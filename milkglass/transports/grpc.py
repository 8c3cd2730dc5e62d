"""A client's end of the wire: one gRPC stream to the server, mutual TLS, over which numbered frames go.

The client dials out. Where the connection breaks it dials again, with growing pauses, and sends again what has no
answer yet, the same bytes. Its event loop runs only while the client sends or waits, in the client's own thread; gRPC's
own threads move the bytes meanwhile, so that a piece of a batch travels while the next one is computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, final

import grpc
import grpc.aio

from milkglass.certificates import Credentials
from milkglass.codec import Limits, decode, encode, glance, peek_header
from milkglass.errors import LinkError, MessageError
from milkglass.messages import Message
from milkglass.transports.agreement import GREETINGS, HEARTBEATS, Agreement, read_greeting, refused
from milkglass.transports.base import Transport
from milkglass.transports.door import check_plain
from milkglass.transports.exactly_once import Sender
from milkglass.transports.own_loop import OwnLoop

METHOD: Final = "/milkglass.Parties/Talk"
RUN_UNKNOWN: Final = 0
_FIRST_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 10.0
_LAST_DIAL_SECONDS: Final = 2.0  # however little patience is left: a handshake over a long line takes a second
_FAREWELL_SECONDS: Final = 1.0
_WINDOW_BYTES: Final = 8 << 20
_FINAL: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: MessageError,
    grpc.StatusCode.FAILED_PRECONDITION: LinkError,
    grpc.StatusCode.PERMISSION_DENIED: LinkError,
    grpc.StatusCode.UNIMPLEMENTED: LinkError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LinkError,
    grpc.StatusCode.DATA_LOSS: LinkError,
}
"""Ends after which trying again is no use."""
_UNTRUSTED: Final = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification Check failed", "WRONG_VERSION_NUMBER")
"""What TLS calls a server that is not trusted, or does not speak it."""


def channel_options(frame_bytes: int, heartbeat_seconds: float) -> list[tuple[str, Any]]:
    """For both ends: no longer frame is taken; the peer is asked for a sign of life; a window that a frame fits in."""
    beat = int(heartbeat_seconds * 1000)
    return [
        ("grpc.max_receive_message_length", frame_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
        ("grpc.keepalive_time_ms", beat),
        ("grpc.keepalive_timeout_ms", beat),
        ("grpc.http2.ping_timeout_ms", beat),  # also of the pings that measure the line: no other is sent meanwhile
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
    ]


class _LostError(Exception):
    """The connection broke: dial again."""


class _NotYetError(_LostError):
    """The server is there, and does not let this client in now: dial again."""


Log = Callable[..., None]
"""(event, named values): writes one line of a structured log."""


def silent(event: str, **values: object) -> None:
    """Nobody reads the log."""


@final
class GrpcTransport(Transport):
    """Numbered messages to the server at `address` (HOST:PORT) and its answers back, each once.

    credentials: None for a connection in plain text, which is for loopback alone. agreement: what the handshake
    compares. limits: what the server may answer. run: the server's number of the run, 0 for a client that is new to it;
    `entered` is called with it at the first handshake. patience_seconds: how long to try to reach a server that is
    away, or that lets nothing through. answer_seconds: how long to await a sign of a server that is there.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials | None,
        sender: Sender,
        *,
        party: str,
        agreement: Agreement,
        limits: Limits,
        run: int = RUN_UNKNOWN,
        entered: Callable[[int], None] = lambda _: None,
        patience_seconds: float = 600.0,
        answer_seconds: float = 300.0,
        heartbeat_seconds: float = 10.0,
        log: Log = silent,
    ) -> None:
        super().__init__()
        if credentials is None:
            check_plain(address)
        self.sender = sender
        self._address, self._credentials, self._party = address, credentials, party
        self._agreement, self._limits = agreement, limits
        self._run, self._entered = run, entered
        self.patience_seconds = patience_seconds
        self._answer_seconds, self._heartbeat = answer_seconds, heartbeat_seconds
        self._write_log = log
        self._step = 0
        self._own_loop = OwnLoop()
        self._loop = self._own_loop.loop
        self._reader: asyncio.Task[Any] | None = None
        self._reading_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._channel: grpc.aio.Channel | None = None
        self._call: Any = None
        self._outgoing: deque[bytes] = deque()
        self._writer: asyncio.Task[None] | None = None
        self._waits_for = ""
        self._was_in = False
        self._welcomed = 0.0
        self._failing_since: float | None = None
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._jitter = random.Random()  # of pauses alone: nothing that counts follows from it

    @property
    def run(self) -> int:
        """The server's number of the run; 0 until it is known."""
        return self._run

    def _log(self, event: str, **values: object) -> None:
        self._write_log(event, run=f"{self._run:016x}", step=self._step, **values)

    def connect(self) -> None:
        """Dial and shake hands; raises LinkError where the server is away for too long, or refuses."""
        self._own_loop.finish(self._connected())

    def send(self, message: Message) -> None:
        if self._run == RUN_UNKNOWN:
            self.connect()
        frame, leaves = self.sender.send(message, self._run)
        self._step = message.step
        self.traffic.count("to server", message.kind, len(frame))
        if not leaves:
            return
        self._outgoing.append(frame)
        if message.pieces > 1 and self._call is not None:
            for _ in range(3):  # enough for gRPC to take a frame; its threads do the rest while the next is computed
                self._own_loop.finish(self._let_write())

    def receive(self) -> Message:
        found = self.sender.answer()
        if found is None:
            found = self._own_loop.finish(self._awaited_answer())
        message, wire_bytes = found
        self.traffic.count("to client", message.kind, wire_bytes)
        return message

    def close(self) -> None:
        """Hang up; what Ctrl-C has left half-done is given up first."""
        self._own_loop.give_up()
        self._own_loop.finish(self._say_farewell())
        self._own_loop.finish(self._hang_up())
        self._own_loop.close()
        self.sender.close()

    def interrupt(self) -> None:
        """From another thread: what waits for the server now ends, with InterruptedError."""
        self._own_loop.interrupt()

    # In the loop.

    async def _awaited_answer(self) -> tuple[Message, int]:
        while True:
            await self._connected()
            try:
                self._let_go_on()
                while (found := self.sender.answer()) is None:
                    await self._read_one()
                return found
            except _LostError as error:
                self._log("connection lost", reason=str(error))
                await self._hang_up()
                if time.monotonic() - self._welcomed > _LONGEST_PAUSE_SECONDS:
                    self._goes_well()
                await self._pause(str(error))

    async def _read_one(self) -> None:
        """Take in the next frame, whatever it is."""
        try:
            with self._patience_to_read():
                frame = await self._call.read()
        except TimeoutError:
            awaited = self._what_is_awaited()
            await self._hang_up()
            waits = f"; it was waiting for {self._waits_for}" if self._waits_for else ""
            raise LinkError(
                f"the server at {self._address} has given no sign for {self._answer_seconds:g} seconds; awaited was "
                f"{awaited}{waits}"
            ) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # it is this client that gives up, not the stream that ended
            frame = grpc.aio.EOF
        except grpc.aio.AioRpcError:
            frame = grpc.aio.EOF
        if frame is grpc.aio.EOF:
            await self._ended()
        self._goes_well()
        if glance(frame)[0] == "waits":
            self._heartbeat_came(frame)
            return
        self._waits_for = ""
        self.sender.received(frame, self._limits, self._run)

    @contextlib.contextmanager
    def _patience_to_read(self) -> Iterator[None]:
        """Inside, for `answer_seconds`; then TimeoutError. One timer serves many reads: a new one for each costs more
        than all else that a short message needs here.
        """
        self._reader, self._reading_since = asyncio.current_task(), self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._answer_seconds, self._look_at_reader)
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._reader is not None or task is None:
                raise
            task.uncancel()  # it is told by TimeoutError, and goes on
            raise TimeoutError from None
        finally:
            self._reader = None

    def _look_at_reader(self) -> None:
        self._timer = None
        if self._reader is None:
            return
        left = self._reading_since + self._answer_seconds - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look_at_reader)
            return
        reader, self._reader = self._reader, None
        reader.cancel()

    def _heartbeat_came(self, frame: bytes) -> None:
        waits_for = bytes(decode(frame, HEARTBEATS).tensors["for"].numpy()).decode(errors="replace")
        if waits_for != self._waits_for:
            self._log("waiting", party=self._party, waits_for=waits_for)
        self._waits_for = waits_for

    async def _ended(self) -> None:
        """The stream is at its end: raise what that means."""
        code, details = await self._call.code(), await self._call.details()
        if code in _FINAL:
            await self._hang_up()
            error = _FINAL[code]
            raise error(details) if error is MessageError else refused(details or code.name.lower())
        if code is grpc.StatusCode.ALREADY_EXISTS and details:
            raise _NotYetError(details)
        raise _LostError(f"{code.name.lower()}: {details}" if details else code.name.lower())

    async def _connected(self) -> None:
        """Return with an open stream on which everything unanswered is under way; dial as often as it takes."""
        while self._call is None:
            try:
                await self._dial()
                return
            except (_LostError, grpc.aio.AioRpcError, OSError, TimeoutError) as error:
                reason, kept_out = _in_words(error), isinstance(error, _NotYetError)
                await self._hang_up()
            except BaseException:
                await self._hang_up()
                raise
            if not self._was_in and any(sign in reason for sign in _UNTRUSTED):
                raise LinkError(f"the server at {self._address} is not one that this client trusts: {reason}")
            await self._pause(reason, kept_out=kept_out)

    async def _pause(self, reason: str, *, kept_out: bool = False) -> None:
        """Before dialing again. Raises LinkError once nothing has come through for too long."""
        left = self._patience_left()
        if left <= 0:
            hint = " (does it trust this client?)" if "Socket closed" in reason and not self._was_in else ""
            failed = "did not let this client in" if kept_out else "could not be reached"
            raise LinkError(
                f"the server at {self._address} {failed} for {self.patience_seconds:g} seconds: "
                f"{reason}{hint}; nothing is lost: run it again (join: with --resume)"
            )
        self._log("dialing again", address=self._address, reason=reason)
        await asyncio.sleep(min(self._pause_seconds * self._jitter.uniform(0.5, 1.0), left))
        self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)

    def _patience_left(self) -> float:
        if self._failing_since is None:
            self._failing_since = time.monotonic()
        return self.patience_seconds - (time.monotonic() - self._failing_since)

    def _goes_well(self) -> None:
        self._failing_since, self._pause_seconds = None, _FIRST_PAUSE_SECONDS

    async def _dial(self) -> None:
        options = channel_options(self._limits.frame_bytes, self._heartbeat)
        if self._credentials is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=options)
        else:
            told = grpc.ssl_channel_credentials(self._credentials.root, self._credentials.key, self._credentials.chain)
            self._channel = grpc.aio.secure_channel(self._address, told, options=options)
        self._call = self._channel.stream_stream(METHOD)()
        told_run = self._agreement.told(run=self._run, next=self.sender.number)
        hello = Message("hello", self._party, 0, {"told": told_run})
        async with asyncio.timeout(min(self._answer_seconds, max(self._patience_left(), _LAST_DIAL_SECONDS))):
            try:
                await self._call.write(encode(hello))
                frame = await self._call.read()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                frame = grpc.aio.EOF
            if frame is grpc.aio.EOF:
                await self._ended()
        self._enter(decode(frame, GREETINGS))
        self._was_in, self._welcomed = True, time.monotonic()
        self._outgoing = deque(self.sender.again())
        self._log("connected", address=self._address, again=len(self._outgoing))

    def _enter(self, welcome: Message) -> None:
        told = read_greeting(welcome)
        difference = self._agreement.difference(told)
        if welcome.kind != "welcome" or difference is not None:
            words = difference or f"it says {welcome.kind!r}"
            raise LinkError(f"the server at {self._address} does not agree with this client: {words}")
        run = told.get("run")
        if not isinstance(run, int) or not 0 < run < 2**64 or self._run not in (RUN_UNKNOWN, run):
            raise LinkError(f"the server at {self._address} has another run than the one that this client began")
        if self._run == RUN_UNKNOWN:
            self._run = run
            self._entered(run)

    async def _let_write(self) -> None:
        self._let_go_on()
        await asyncio.sleep(0)

    def _let_go_on(self) -> None:
        """See that frames that wait are being written."""
        if self._outgoing and (self._writer is None or self._writer.done()):
            self._writer = self._loop.create_task(self._write_all(self._call, self._outgoing))

    async def _write_all(self, call: Any, outgoing: deque[bytes]) -> None:
        try:
            while outgoing:
                await call.write(outgoing[0])
                outgoing.popleft()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the stream is at its end: whoever reads it learns why, and everything unanswered is sent again

    async def _say_farewell(self) -> None:
        """Where all is said, end the stream in order, so that the server does not take it for a broken one."""
        if self._call is None or self.sender.awaited is not None:
            return
        with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await self._call.done_writing()
                while await self._call.read() is not grpc.aio.EOF:
                    pass

    async def _hang_up(self) -> None:
        call, channel, writer = self._call, self._channel, self._writer
        self._call = self._channel = self._writer = None
        self._outgoing = deque()
        if writer is not None and not writer.done():
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
        if call is not None:
            call.cancel()
        if channel is not None:
            await channel.close()

    def _what_is_awaited(self) -> str:
        number = self.sender.awaited
        frames = self.sender.again()
        if number is None or not frames:
            return "an answer"
        header = peek_header(frames[0])
        return f"the answer to {header.kind!r} of step {header.step}"


def _in_words(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower()}: {error.details()}"
    return str(error) or "it did not answer in time"
