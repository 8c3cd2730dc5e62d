"""A server that answers with the tensor that came, and a client that asks: over our whole stack, and over bare gRPC.

Ours is all that a message goes through in training: codec, outbox and inbox at the client, inbox at the server, limits,
checksums, numbers. Bare is a stream of bytes with the same certificates and channel options: asyncio at both ends, as
ours is, or gRPC's blocking interface.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, final

import grpc
import grpc.aio
import torch

from benchmarks.slow_link import enter
from benchmarks.turns import OverError, Turn
from benchmarks.two_parties import CLIENT, Place
from milkglass.certificates import Credentials, load_credentials
from milkglass.memory import keep_freed_memory
from milkglass.messages import Addressed, Message
from milkglass.transports.agreement import Agreement, Crossing
from milkglass.transports.exactly_once import Sender, Taker
from milkglass.transports.grpc import GrpcTransport, channel_options
from milkglass.transports.grpc_server import GrpcServer

ROWS: Final = 64
WARM_UP: Final = 50
JOURNAL_BYTES: Final = 32 << 20  # then there is a checkpoint, and the journal begins anew
_HEARTBEAT_SECONDS: Final = 10.0
_METHOD: Final = "/bare/Talk"
_TCP_BYTES: Final = struct.Struct("120x2Q")  # of struct tcp_info: bytes acknowledged, bytes received


def crossing(size_kib: int) -> Crossing:
    """Tensors of so many KiB each way, and nothing else."""
    return Crossing(cut=(size_kib * 1024 // 4 // ROWS,), features=None, classes=2, rows=ROWS, sends_labels=False)


def message(size_kib: int, step: int = 0) -> Message:
    """What the client sends."""
    return Message("activations", CLIENT, step, {"activations": torch.rand(ROWS, *crossing(size_kib).cut)})


@final
class Echo:
    """The service."""

    def receive(self, message: Message) -> list[Addressed]:
        """The tensor that came, as a gradient."""
        answer = {"gradient": message.tensors["activations"]}
        return [(message.party, Message("gradients", "server", message.step, answer))]


def serve_ours(pipe: Connection, where: Place, size_kib: int) -> None:
    """In a worker: our server. It says on which port it listens."""
    keep_freed_memory()  # as `serve` and `join` do
    asyncio.run(_serve_ours(pipe, *_at_server(where), size_kib))


async def _serve_ours(pipe: Connection, address: str, credentials: Credentials, size_kib: int) -> None:
    limits = crossing(size_kib).to_server()
    with tempfile.TemporaryDirectory() as folder:
        taker = Taker(Echo(), {CLIENT: limits}, run=1, window=2, folder=Path(folder))

        def keep() -> None:
            if taker.size_bytes >= JOURNAL_BYTES:
                taker.rotate()

        agreements = {CLIENT: Agreement({}, crossing(size_kib).cut)}
        server = GrpcServer(taker, agreements, name="server", run=1, frame_bytes=limits.frame_bytes, taken=keep)
        pipe.send(await server.start(address, credentials))
        await server.run_until(asyncio.Event())


def ask_ours(pipe: Connection, where: Place, size_kib: int, port: int, warm_up: int | None = None) -> None:
    """In a worker: our client. It reports what it has sent and received, in frames and over TCP: bytes."""
    keep_freed_memory()
    address, credentials = _at_client(where, port)
    told = message(size_kib)
    with tempfile.TemporaryDirectory() as folder:
        transport = GrpcTransport(
            address,
            credentials,
            Sender(Path(folder)),
            party=CLIENT,
            agreement=Agreement({}, crossing(size_kib).cut),
            limits=crossing(size_kib).to_client(),
        )

        def report() -> tuple[int, int]:
            return sum(transport.traffic.wire_bytes(way) for way in ("to server", "to client")), _tcp_bytes(port)

        def ask() -> None:
            transport.exchange(told)
            if transport.sender.size_bytes >= JOURNAL_BYTES:
                transport.sender.rotate()

        once_round = -(-2 * JOURNAL_BYTES // (size_kib << 10))
        _work(Turn(pipe, once_round if warm_up is None else warm_up, report), ask)
        transport.close()


def serve_asyncio(pipe: Connection, where: Place, size_kib: int) -> None:
    """In a worker: a bare server."""

    async def talk(_: object, context: Any) -> None:
        while (frame := await context.read()) is not grpc.aio.EOF:
            await context.write(frame)

    async def serve(address: str, credentials: Credentials) -> None:
        server = grpc.aio.server(options=_options(size_kib))
        pipe.send(_listen(server, talk, address, credentials))
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve(*_at_server(where)))


def ask_asyncio(pipe: Connection, where: Place, size_kib: int, port: int) -> None:
    """In a worker: a bare client."""

    async def ask(address: str, credentials: Credentials) -> None:
        frame, turn = _bytes(size_kib), Turn(pipe, WARM_UP)
        async with grpc.aio.secure_channel(address, _shown(credentials), options=_options(size_kib)) as channel:
            call = channel.stream_stream(_METHOD)()
            with contextlib.suppress(OverError):
                while True:
                    await call.write(frame)
                    assert len(await call.read()) == len(frame)
                    turn.done()

    asyncio.run(ask(*_at_client(where, port)))


def serve_blocking(pipe: Connection, where: Place, size_kib: int) -> None:
    """In a worker: a bare server of gRPC's blocking interface."""

    def talk(frames: Iterator[bytes], _: object) -> Iterator[bytes]:
        yield from frames

    server = grpc.server(ThreadPoolExecutor(2), options=_options(size_kib))
    port = _listen(server, talk, *_at_server(where))
    server.start()
    pipe.send(port)
    server.wait_for_termination()


def ask_blocking(pipe: Connection, where: Place, size_kib: int, port: int) -> None:
    """In a worker: a bare client of gRPC's blocking interface."""
    address, credentials = _at_client(where, port)
    frame: bytes = _bytes(size_kib)
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with grpc.secure_channel(address, _shown(credentials), options=_options(size_kib)) as channel:
        answers = channel.stream_stream(_METHOD)(iter(frames.get, b""))

        def ask() -> None:
            frames.put(frame)
            assert len(next(answers)) == len(frame)

        _work(Turn(pipe, WARM_UP), ask)
        frames.put(b"")


def _work(turn: Turn, once: Callable[[], None]) -> None:
    with contextlib.suppress(OverError):
        while True:
            once()
            turn.done()


def _at_server(where: Place) -> tuple[str, Credentials]:
    if where.server_namespace is not None:
        enter(where.server_namespace)
    torch.set_num_threads(1)
    return f"{where.host}:0", load_credentials(where.pki / where.host, "server")


def _at_client(where: Place, port: int) -> tuple[str, Credentials]:
    if where.client_namespace is not None:
        enter(where.client_namespace)
    torch.set_num_threads(1)
    return f"{where.host}:{port}", load_credentials(where.pki / CLIENT, "client")


def _listen(server: Any, talk: Callable[..., Any], address: str, credentials: Credentials) -> int:
    handler = grpc.stream_stream_rpc_method_handler(talk)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"Talk": handler}),))
    shown = grpc.ssl_server_credentials(
        [(credentials.key, credentials.chain)], credentials.root, require_client_auth=True
    )
    return int(server.add_secure_port(address, shown))


def _shown(credentials: Credentials) -> Any:
    return grpc.ssl_channel_credentials(credentials.root, credentials.key, credentials.chain)


def _options(size_kib: int) -> list[tuple[str, Any]]:
    return channel_options(crossing(size_kib).to_server().frame_bytes, _HEARTBEAT_SECONDS)


def _bytes(size_kib: int) -> bytes:
    tensor = message(size_kib).tensors["activations"]
    return tensor.numpy().tobytes()


def _tcp_bytes(port: int) -> int:
    """What this process's connections to `port` have sent, acknowledged, and received, as TCP counts it."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=socket.dup(int(entry.name))) as connection:
                internet = connection.family in (socket.AF_INET, socket.AF_INET6)
                if internet and connection.getpeername()[1] == port:
                    total += sum(_TCP_BYTES.unpack_from(connection.getsockopt(socket.IPPROTO_TCP, 11, 256)))
    return total
