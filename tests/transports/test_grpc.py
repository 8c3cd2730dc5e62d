"""The network's transport passes the suite that every transport passes; and how a server ends."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from milkglass.certificates import Credentials, load_credentials, make_certificates
from milkglass.codec import Allowed, Limits
from milkglass.errors import DataError, LinkError
from milkglass.messages import Addressed, Message, Responder
from milkglass.transports.base import Transport
from milkglass.transports.grpc import GrpcTransport
from tests.suites.transport import TransportSuite
from tests.wire_server import Doubling, ServerThread, asks, dial, question

Dial = Callable[..., GrpcTransport]
_ANY_ROWS = Allowed((None, 3), frozenset({torch.float32}))
_TO_SERVER = Limits(4 << 20, {"activations": {"activations": _ANY_ROWS}}, 1000)


class _Sole:
    """A responder as the service of one client, known to it by the suite's name."""

    def __init__(self, responder: Responder) -> None:
        self._responder = responder

    def receive(self, message: Message) -> list[Addressed]:
        return [(message.party, self._responder.reply(message))]


@pytest.mark.parametrize("secure", [True, False])
class TestGrpc(TransportSuite):
    @pytest.fixture(autouse=True)
    def _places(self, tmp_path: Path, secure: bool) -> Iterator[None]:
        make_certificates(tmp_path / "pki", "localhost", ["client"])
        self._folder, self._secure = tmp_path, secure
        with contextlib.ExitStack() as self._open:
            yield

    def make(self, responder: Responder) -> Transport:
        own, theirs = self._folder / "pki" / "client", self._folder / "pki" / "localhost"
        server = ServerThread(
            load_credentials(theirs, "server") if self._secure else None,
            self._folder / "server",
            _Sole(responder),
            limits=_TO_SERVER,
            clients=("client",),
        )
        self._open.enter_context(server)
        credentials = load_credentials(own, "client") if self._secure else None
        transport = dial(
            server.port,
            credentials,
            self._folder / "client",
            party="client",
            limits=Limits(4 << 20, {"gradients": {"gradient": _ANY_ROWS}}, 1000),
        )
        self._open.callback(transport.close)
        return transport


def test_what_cannot_go_on_is_told_to_every_client(
    theirs: Credentials, client: Callable[..., GrpcTransport], tmp_path: Path
) -> None:
    class Unmatched:
        def receive(self, message: Message) -> list[Addressed]:
            if message.party == "hospital-b":
                raise DataError("records do not match: 3 of hospital-a, 5 of hospital-b")
            return []

    with ServerThread(theirs, tmp_path / "server", Unmatched()) as server:
        waiting, second = client(server.port), client(server.port, "hospital-b")
        waiting.send(question("hospital-a", 0))
        second.send(question("hospital-b", 0))
        with pytest.raises(LinkError, match="records do not match: 3 of hospital-a, 5 of hospital-b"):
            second.receive()
        began = time.monotonic()
        with pytest.raises(LinkError, match="records do not match: 3 of hospital-a, 5 of hospital-b"):
            waiting.receive()
        assert time.monotonic() - began < 15
    assert isinstance(server.failure, DataError)


def test_an_error_of_the_servers_own_stops_it_too(
    theirs: Credentials, client: Callable[..., GrpcTransport], tmp_path: Path
) -> None:
    class Broken:
        def receive(self, message: Message) -> list[Addressed]:
            raise ZeroDivisionError("a secret: 0.123")

    with ServerThread(theirs, tmp_path / "server", Broken()) as server:
        transport = client(server.port, patience_seconds=1.0)
        with pytest.raises(LinkError) as raised:
            asks(transport, "hospital-a", [0])
    assert isinstance(server.failure, ZeroDivisionError)
    assert "secret" not in str(raised.value)
    assert "could not be reached" in str(raised.value)


@pytest.mark.parametrize("secure", [True, False])
def test_a_server_does_not_share_its_port(secure: bool, theirs: Credentials, tmp_path: Path) -> None:
    """Not even where another program has it at one of the two addresses of localhost."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = ServerThread(theirs if secure else None, tmp_path / "server", Doubling(), port=port)
        with pytest.raises(LinkError, match=f"cannot listen at localhost:{port}: it is in use"), server:
            pass
