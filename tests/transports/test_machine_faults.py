"""A jumping clock, a full disk: nothing is lost, and one line says so."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milkglass.certificates import Credentials
from milkglass.errors import RunError
from milkglass.transports.grpc import GrpcTransport
from tests.wire_server import Doubling, Holding, ServerThread, asks, dial, one_line, until

Own = Callable[[str], Credentials]
Dial = Callable[..., GrpcTransport]


@pytest.mark.usefixtures("rare_pings")
@pytest.mark.parametrize("jump", [-1e9, -3600.0, 3600.0, 1e8])
def test_a_clock_that_jumps_changes_nothing(
    jump: float, theirs: Credentials, client: Dial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, began = time.time, time.monotonic()
    with ServerThread(theirs, tmp_path / "server", Holding(), heartbeat_seconds=0.3) as server:
        clients = {party: client(server.port, party) for party in ("hospital-a", "hospital-b")}
        asking = [
            threading.Thread(target=lambda party=party: asks(clients[party], party, range(200))) for party in clients
        ]
        for thread in asking:
            thread.start()
        while any(thread.is_alive() for thread in asking):
            assert time.monotonic() - began < 60
            monkeypatch.setattr(time, "time", lambda: real() + jump)
            time.sleep(0.01)
            monkeypatch.setattr(time, "time", real)
            time.sleep(0.01)
        assert server.watch.taken == {"hospital-a": 200, "hospital-b": 200}
        assert len(server.said("connected")) == 2
        assert not server.said("disconnected")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | None, int], None]:
    """(folder, bytes): no more than so many bytes can be written below it from now on; None: there is room again."""
    real, left = os.pwrite, [0]
    full: list[Path] = []

    def pwrite(file: int, content: bytes, offset: int) -> int:
        if full and Path(f"/proc/self/fd/{file}").resolve().is_relative_to(full[0]):
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            content = bytes(memoryview(content)[: left[0]])
            left[0] -= len(content)
        return real(file, content, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)

    def fill(folder: Path | None, room_bytes: int = 0) -> None:
        full[:] = [] if folder is None else [folder.resolve()]
        left[0] = room_bytes

    return fill


def test_a_full_disk_at_the_server_stops_it_and_its_clients_wait(
    theirs: Credentials, client: Dial, tmp_path: Path, full_disk: Any
) -> None:
    first, second = Doubling(), Doubling()
    with ServerThread(theirs, tmp_path / "server", first) as server:
        transport, other = client(server.port), client(server.port, "hospital-b")
        asks(transport, "hospital-a", range(3))
        asks(other, "hospital-b", range(3))
        full_disk(tmp_path / "server", 100)
        asking = threading.Thread(target=lambda: asks(transport, "hospital-a", range(3, 6)))
        asking.start()
        until(lambda: server.failure is not None)
    assert isinstance(server.failure, RunError)
    one_line(server.failure, "cannot write", "No space left on device", "what was written before is whole")
    time.sleep(0.3)
    assert asking.is_alive()
    full_disk(None)
    with ServerThread(theirs, tmp_path / "server", second, port=server.port):  # as with --resume
        asking.join(60)
        assert not asking.is_alive()
        asks(other, "hospital-b", range(3, 5))
    assert second.steps == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4]


@pytest.mark.parametrize("room_bytes", [0, 1, 100, 500])
def test_a_full_disk_at_a_client_is_one_line_and_it_goes_on(
    room_bytes: int, theirs: Credentials, own: Own, tmp_path: Path, full_disk: Any
) -> None:
    service = Doubling()
    with ServerThread(theirs, tmp_path / "server", service) as server:
        transport = dial(server.port, own("hospital-a"), tmp_path / "own")
        asks(transport, "hospital-a", range(3))
        full_disk(tmp_path / "own", room_bytes)
        with pytest.raises(RunError) as raised:
            asks(transport, "hospital-a", range(3, 6))
        one_line(raised.value, "cannot write", "No space left on device", "what was written before is whole")
        transport.close()
        full_disk(None)
        again = dial(server.port, own("hospital-a"), tmp_path / "own")
        asks(again, "hospital-a", range(6))
        again.close()
    assert service.steps == list(range(6))
