"""A server's door: how many may stand in it, and how many came no further than it.

gRPC itself turns away whoever fails the TLS handshake, and tells nobody. But before each handshake it asks for
the server's certificate, so what began can be counted; a connection on which no stream follows in time is a stranger's.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, final

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from milkglass.certificates import Credentials
from milkglass.errors import LinkError, MilkglassError, RunError

IDLE_SECONDS: Final = 60.0
"""A connection without a stream is closed after so long."""
WORDS: Final = 1000
"""So long may a reason be: it travels in a header."""
_MOST_CONNECTIONS: Final = 12_288  # a handshake that hangs takes 45 KB
_OWN_FILES: Final = 256  # for checkpoints and journals: strangers must not take the last file descriptor
_LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")


class Watch(Protocol):
    """Who counts what happens at the server's door."""

    def connected(self, parties: int) -> None:
        """So many clients are connected now."""

    def refused(self, reason: str, times: int = 1) -> None:
        """Somebody was turned away, or several were; `reason` is one of a few words."""

    def message(self, party: str, kind: str, wire_bytes: int, seconds: float) -> None:
        """A message was taken, and computed in so many seconds."""


@final
class Unwatched:
    """Nobody counts."""

    def connected(self, parties: int) -> None:
        """Do nothing."""

    def refused(self, reason: str, times: int = 1) -> None:
        """Do nothing."""

    def message(self, party: str, kind: str, wire_bytes: int, seconds: float) -> None:
        """Do nothing."""


def most_connections() -> int:
    """So many may be open at each address; lets this process open as many files as it may for that.

    gRPC counts them by address, and `localhost` is two: IPv4 and IPv6.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _MOST_CONNECTIONS + _OWN_FILES
    limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return max(limit - _OWN_FILES, limit // 2) // 2


def options(streams: int, handshake_seconds: float) -> list[tuple[str, Any]]:
    """A gRPC server's own: how many streams a connection may have, how many connections, and how long each may take."""
    return [
        ("grpc.max_concurrent_streams", streams),
        ("grpc.max_allowed_incoming_connections", most_connections()),
        ("grpc.server_handshake_timeout_ms", int(handshake_seconds * 1000)),
        ("grpc.max_connection_idle_ms", int(IDLE_SECONDS * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", 500),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),
    ]


def check_plain(address: str) -> None:
    """Raise LinkError unless HOST:PORT is on loopback: nowhere else may anything travel in plain text."""
    if address.rpartition(":")[0] not in _LOOPBACK:
        raise LinkError(f"{address}: plain text is for loopback alone ({', '.join(_LOOPBACK)}); expected certificates")


@final
class Door:
    """Counts the connections that came to no stream within `seconds`."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._begun: deque[float] = deque()  # when; added to by gRPC's own threads
        self._late = self._spoke = self._told = 0
        self._peers: dict[str, float] = {}  # connections with a stream, and when it began; the oldest first

    def credentials(self, credentials: Credentials) -> Any:
        """For gRPC: mutual TLS, and every handshake that begins is counted."""
        shown = grpc.ssl_server_certificate_configuration([(credentials.key, credentials.chain)], credentials.root)
        return grpc.dynamic_ssl_server_credentials(shown, self.begins, require_client_authentication=True)

    def begins(self) -> None:
        """A connection was accepted."""
        self._begun.append(self._clock())

    def speaks(self, peer: str) -> None:
        """A stream came over the connection of that peer."""
        if self._peers.pop(peer, None) is None:
            self._spoke += 1
        self._peers[peer] = self._clock()

    def strangers(self) -> int:
        """How many connections came to nothing since this was asked last."""
        now = self._clock()
        while self._begun and self._begun[0] < now - self._seconds:
            self._begun.popleft()
            self._late += 1
        while self._peers and next(iter(self._peers.values())) < now - 2 * IDLE_SECONDS:
            del self._peers[next(iter(self._peers))]  # its next stream is another connection's, from the same port
        new = max(self._late - self._spoke - self._told, 0)
        self._told += new
        return new


@final
class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The gRPC health protocol; who asks is no stranger."""

    def __init__(self, door: Door) -> None:
        self._inner = health.aio.HealthServicer()
        self._door = door
        self.set, self.end = self._inner.set, self._inner.enter_graceful_shutdown

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's own name
        """The state now."""
        self._door.speaks(context.peer())
        return await self._inner.Check(request, context)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """Every change of it."""
        self._door.speaks(context.peer())
        await self._inner.Watch(request, context)


@final
class OneMethod(grpc.GenericRpcHandler):  # type: ignore[misc]
    """All that a client may call: a stream of bytes either way, as they are."""

    def __init__(self, method: str, talk: Callable[[object, Any], Any]) -> None:
        self._method = method
        self._handler = grpc.stream_stream_rpc_method_handler(talk)

    def service(self, details: Any) -> Any:
        """The method of that name, or None."""
        return self._handler if details.method == self._method else None


@final
@dataclass(eq=False)
class Connection:
    """One client's open stream."""

    party: str
    context: Any
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def push(self, frame: bytes) -> None:
        """Write a frame to the client, after those before it: who does not read its answers must wait with more."""
        with contextlib.suppress(Exception):  # it hung up meanwhile: it asks again when it comes back
            async with self.writing:
                await self.context.write(frame)


@final
class StoppedError(Exception):
    """The server takes nothing more; cause: why."""

    def __init__(self, cause: BaseException | None) -> None:
        super().__init__("the server has stopped")
        self.cause = cause


async def give_up(context: Any, error: BaseException | None) -> None:
    """Tell a client that the server stops: for good, or until somebody has seen to its machine."""
    with contextlib.suppress(Exception):
        if for_good(error):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error)[:WORDS])
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server has stopped, and says why; it can be resumed")


def for_good(error: BaseException | None) -> bool:
    """Whether going on is no use: it is not this machine alone that somebody must see to."""
    return isinstance(error, MilkglassError) and not isinstance(error, RunError)
