"""What tests of the wire share: certificates, a server that runs, and an honest client that must not notice a thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from milkglass.certificates import Credentials, load_credentials, make_certificates
from milkglass.transports.grpc import GrpcTransport, channel_options
from tests.wire_server import GREETING_SECONDS, Alone, Doubling, ServerThread, asks, dial


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of the server, of its two clients, and of somebody of the same CA whom it does not expect."""
    folder = tmp_path_factory.mktemp("wire") / "pki"
    make_certificates(folder, "localhost", ["hospital-a", "hospital-b", "stranger"])
    return folder


@pytest.fixture(scope="session")
def theirs(kit: Path) -> Credentials:
    """The server's."""
    return load_credentials(kit / "localhost", "server")


@pytest.fixture(scope="session")
def own(kit: Path) -> Callable[[str], Credentials]:
    """Those of the client of that name."""
    return lambda name: load_credentials(kit / name, "client")


@pytest.fixture(scope="module")
def server(theirs: Credentials, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    """A server that doubles, and has little patience with strangers."""
    folder = tmp_path_factory.mktemp("server")
    with ServerThread(theirs, folder, Doubling(), handshake_seconds=0.7, greeting_seconds=GREETING_SECONDS) as server:
        yield server


@pytest.fixture(scope="module")
def honest(
    server: ServerThread, own: Callable[[str], Credentials], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GrpcTransport]:
    """hospital-a, connected from the first test to the last."""
    transport = dial(server.port, own("hospital-a"), tmp_path_factory.mktemp("honest"))
    asks(transport, "hospital-a", range(1))
    yield transport
    transport.close()


@pytest.fixture
def unmoved(server: ServerThread, honest: GrpcTransport) -> Iterator[None]:
    """Whatever the test does: hospital-a stays connected, goes on, gets right answers, and each step counts once."""
    before, connected = server.watch.taken["hospital-a"], len(server.said("connected", party="hospital-a"))
    first = honest.sender.number
    asks(honest, "hospital-a", range(first, first + 2))
    yield
    asks(honest, "hospital-a", range(first + 2, first + 4))
    assert server.watch.taken["hospital-a"] == before + 4
    assert len(server.said("connected", party="hospital-a")) == connected
    assert server.failure is None


@pytest.fixture(scope="module")
def alone(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    """A server as a process of its own."""
    with Alone(kit / "localhost", tmp_path_factory.mktemp("alone") / "server") as alone:
        yield alone


@pytest.fixture
def client(own: Callable[[str], Credentials], tmp_path: Path) -> Iterator[Callable[..., GrpcTransport]]:
    """(port, options): hospital-a, to be closed at the end."""
    opened: list[GrpcTransport] = []

    def make(port: int, name: str = "hospital-a", **options: Any) -> GrpcTransport:
        opened.append(dial(port, own(name), tmp_path / f"{name}-{len(opened)}", **options))
        return opened[-1]

    yield make
    for transport in opened:
        transport.close()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that waits for seconds dials again every second, for a test to be over soon."""
    monkeypatch.setattr("milkglass.transports.grpc._LONGEST_PAUSE_SECONDS", 1.0)


@pytest.fixture
def rare_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a server beats, gRPC's pings stay rare: a process that pauses does not answer them in time."""
    monkeypatch.setattr(
        "milkglass.transports.grpc_server.channel_options", lambda frame_bytes, _: channel_options(frame_bytes, 20.0)
    )
