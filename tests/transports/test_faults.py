"""A bad network, a full disk, a jumping clock, a server that is away or silent: nothing is lost, one line says so."""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from milkglass.certificates import Credentials
from milkglass.errors import LinkError, RunError
from milkglass.messages import Message
from milkglass.transports.door import Connection
from milkglass.transports.grpc import GrpcTransport
from tests.wire_faults import FaultyNetwork
from tests.wire_server import RUN, Doubling, Holding, ServerThread, asks, bare_channel, dial, doubled, question, until

Own = Callable[[str], Credentials]
Dial = Callable[..., GrpcTransport]


@pytest.fixture
def service() -> Doubling:
    return Doubling()


@pytest.fixture
def network(theirs: Credentials, service: Doubling, tmp_path: Path) -> Iterator[FaultyNetwork]:
    """A bad network before a server with heartbeats of a second; `served` is the server."""
    with (
        ServerThread(theirs, tmp_path / "server", service, heartbeat_seconds=1.0) as server,
        FaultyNetwork(server.port) as network,
    ):
        yield network
        assert server.failure is None


def one_line(error: Exception, *words: str) -> None:
    """A message of one line that holds these words, in this order."""
    assert re.fullmatch("[^\n]*" + "[^\n]*".join(map(re.escape, words)) + "[^\n]*", str(error)), error


# The network.


@pytest.mark.parametrize("how", ["cut", "reset"])
def test_a_connection_that_is_ended_again_and_again_loses_nothing(
    how: str, network: FaultyNetwork, service: Doubling, client: Dial
) -> None:
    transport = client(network.port)
    asks(transport, "hospital-a", [0])
    over = threading.Event()

    def end() -> None:
        while not over.wait(0.15):
            network.cut() if how == "cut" else network.reset()

    ending = threading.Thread(target=end)
    ending.start()
    began, step = time.monotonic(), 1
    while time.monotonic() - began < 1.2:
        asks(transport, "hospital-a", [step], rows=2000)
        step += 1
    over.set()
    ending.join()
    assert network.accepted > 3
    assert service.steps == list(range(step))


def test_a_reset_in_the_middle_of_a_frame_loses_nothing(
    network: FaultyNetwork, service: Doubling, client: Dial
) -> None:
    rows, shares = 100_000, (0.01, 0.3, 0.6, 0.999)
    transport = client(network.port)
    for count, share in enumerate(shares):
        network.reset_after = int(share * rows * 3 * 4)
        network.cut()  # the next connection is the one that will be reset
        asks(transport, "hospital-a", [2 * count, 2 * count + 1], rows=rows)
        assert network.resets == count + 1
    assert service.steps == list(range(8))


def test_a_half_open_connection_is_found_by_its_heartbeats(
    network: FaultyNetwork, service: Doubling, client: Dial
) -> None:
    transport = client(network.port)
    asks(transport, "hospital-a", range(3))
    network.fall_silent()
    began = time.monotonic()
    asks(transport, "hospital-a", range(3, 6))
    assert 0.5 < time.monotonic() - began < 10
    assert network.accepted >= 2
    assert service.steps == list(range(6))


def test_a_slow_line_brings_the_same_answers(network: FaultyNetwork, service: Doubling, client: Dial) -> None:
    network.delay_seconds, network.bytes_per_second = 0.05, 2e6
    transport = client(network.port)
    asks(transport, "hospital-a", [0])
    began = time.monotonic()
    asks(transport, "hospital-a", [1])
    assert time.monotonic() - began > 0.1  # there and back
    asks(transport, "hospital-a", [2], rows=100_000)  # longer on the line than two heartbeats would be
    assert service.steps == [0, 1, 2]
    assert network.accepted == 1


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [1, 1, 0, 3, 0, 2, 2, 3], [2, 3, 0, 0, 0, 1]])
def test_doubled_and_reordered_answers_are_put_in_order(
    order: list[int], theirs: Credentials, client: Dial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, held = Doubling(), list[bytes]()
    push = Connection.push

    async def shuffled(connection: Connection, frame: bytes) -> None:
        if len(frame) > 1000:  # no greeting
            held.append(frame)
            if len(held) < 4:
                return
            batch = [held[place] for place in order]
            held.clear()
            for each in batch:
                await push(connection, each)
        else:
            await push(connection, frame)

    monkeypatch.setattr(Connection, "push", shuffled)
    with ServerThread(theirs, tmp_path / "server", service, window=5) as server:
        transport = client(server.port)
        for step in range(6):
            sent = question("hospital-a", step, rows=400)
            pieces = [Message("activations", "hospital-a", step, sent.tensors, piece, 4) for piece in range(4)]
            for piece in pieces:
                transport.send(piece)
            for piece in pieces:
                answer = transport.receive()
                assert (answer.step, answer.piece) == (step, piece.piece)
                assert torch.equal(answer.tensors["gradient"], doubled(piece).tensors["gradient"])
    assert service.steps == [step for step in range(6) for _ in range(4)]


def test_a_server_comes_back_at_the_same_port(theirs: Credentials, client: Dial, tmp_path: Path) -> None:
    services, port, transport = [Doubling() for _ in range(3)], 0, None
    for restart, service in enumerate(services):
        with ServerThread(theirs, tmp_path / "server", service, port=port) as server:
            port = server.port
            transport = transport or client(port)
            asks(transport, "hospital-a", range(restart * 5, restart * 5 + 5))
    for restart, service in enumerate(services):  # each took what came before again, from the journal, and once
        assert service.steps == list(range(restart * 5 + 5))


# A server that is away, silent, or busy.


def test_a_server_that_stops_takes_nothing_more_however_long_its_grace(
    theirs: Credentials, service: Doubling, client: Dial, tmp_path: Path
) -> None:
    with ServerThread(theirs, tmp_path / "server", service, grace_seconds=15.0) as server:
        transport, over = client(server.port), threading.Event()
        asks(transport, "hospital-a", [0])

        def go_on() -> None:
            step = 1
            while not over.is_set():
                asks(transport, "hospital-a", [step])
                step += 1

        asking = threading.Thread(target=go_on)
        asking.start()
        until(lambda: len(service.steps) > 20)
        taken, began = len(service.steps), time.monotonic()
        server.stop()
        assert time.monotonic() - began < 10
        assert len(service.steps) - taken < 200, "what came before it heard of its end"
    (line,) = server.said("disconnected")
    assert "hung up" not in str(line)
    over.set()
    again = Doubling()
    with ServerThread(theirs, tmp_path / "server", again, port=server.port):
        asking.join(20)
        assert not asking.is_alive()
    assert again.steps == list(range(len(again.steps))), "those before from its journal"


def test_a_server_that_is_away_is_named_after_the_clients_patience(
    theirs: Credentials, client: Dial, tmp_path: Path
) -> None:
    with ServerThread(theirs, tmp_path / "server", Doubling()) as server:
        transport = client(server.port, patience_seconds=1.0)
        asks(transport, "hospital-a", [0])
    began = time.monotonic()
    with pytest.raises(LinkError) as raised:
        asks(transport, "hospital-a", [1])
    assert 1 <= time.monotonic() - began < 5
    one_line(raised.value, f"localhost:{server.port} could not be reached for 1 seconds", "nothing is lost", "--resume")


def test_a_server_that_lets_in_and_hangs_up_is_given_up_as_well(
    theirs: Credentials, client: Dial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs_up(*_: object) -> Message:
        raise RuntimeError("hung up")

    with ServerThread(theirs, tmp_path / "server", Doubling()) as server:
        monkeypatch.setattr(type(server.taker), "check", hangs_up)
        transport = client(server.port, patience_seconds=1.5)
        began = time.monotonic()
        with pytest.raises(LinkError, match=r"could not be reached for 1\.5 seconds"):
            asks(transport, "hospital-a", [0])
        assert 1.5 <= time.monotonic() - began < 6
        assert len(server.said("connected")) < 10  # with growing pauses


def test_a_server_that_never_answers_is_named_with_what_was_awaited(
    theirs: Credentials, client: Dial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, push = threading.Event(), Connection.push

    async def unless_silent(connection: Connection, frame: bytes) -> None:
        if not silent.is_set():
            await push(connection, frame)

    monkeypatch.setattr(Connection, "push", unless_silent)
    with ServerThread(theirs, tmp_path / "server", Holding(), heartbeat_seconds=0.3) as server:
        transport = client(server.port, answer_seconds=1.0)
        transport.send(question("hospital-a", 7))
        threading.Timer(1.3, silent.set).start()
        began = time.monotonic()
        with pytest.raises(LinkError) as raised:
            transport.receive()
        assert 2 < time.monotonic() - began < 8  # heartbeats kept it waiting for longer than a second
    one_line(
        raised.value,
        f"the server at localhost:{server.port} has given no sign for 1 seconds",
        "awaited was the answer to 'activations' of step 7",
        "it was waiting for hospital-b",
    )


def test_heartbeats_keep_a_long_wait_alive_and_say_for_whom(theirs: Credentials, client: Dial, tmp_path: Path) -> None:
    said: list[dict[str, object]] = []
    with ServerThread(theirs, tmp_path / "server", Holding(), heartbeat_seconds=0.3) as server:
        waiting = client(
            server.port, answer_seconds=1.0, log=lambda event, **values: said.append({"event": event, **values})
        )
        late = client(server.port, "hospital-b")
        waiting.send(question("hospital-a", 0))
        timer = threading.Timer(1.6, lambda: asks(late, "hospital-b", [0]))
        timer.start()
        answer = waiting.receive()
        timer.join()
        assert torch.equal(answer.tensors["gradient"], question("hospital-a", 0).tensors["activations"] * 2)
    assert [line for line in said if line["event"] == "waiting"] == [
        {"event": "waiting", "run": f"{RUN:016x}", "step": 0, "party": "hospital-a", "waits_for": "hospital-b"}
    ]


def test_health_is_told_over_mutual_tls_also_while_a_step_computes(
    theirs: Credentials, own: Own, client: Dial, tmp_path: Path
) -> None:
    service = Doubling(seconds=1.2)
    with ServerThread(theirs, tmp_path / "server", service, heartbeat_seconds=0.5, handshake_seconds=0.5) as server:
        transport = client(server.port, answer_seconds=1.0)
        transport.connect()
        computing = threading.Thread(target=lambda: asks(transport, "hospital-a", range(2)))
        computing.start()
        with bare_channel(server.port, own("hospital-b")) as channel:
            asked = 0
            while computing.is_alive():
                began = time.monotonic()
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                assert time.monotonic() - began < 0.5
                asked += 1
                time.sleep(0.05)
        assert asked > 10
        computing.join()
        with bare_channel(server.port, Credentials(theirs.root, b"", b"", "")) as stranger:
            with pytest.raises(grpc.RpcError) as raised:
                health_pb2_grpc.HealthStub(stranger).Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
        until(lambda: server.watch.refusals["handshake"] >= 1)
        assert set(server.watch.refusals) == {"handshake"}  # who asks for health is no stranger
    assert service.steps == [0, 1]


# The machine.


@pytest.mark.parametrize("jump", [-1e9, -3600.0, 3600.0, 1e8])
def test_a_clock_that_jumps_changes_nothing(
    jump: float, theirs: Credentials, client: Dial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, began = time.time, time.monotonic()
    with ServerThread(theirs, tmp_path / "server", Holding(), heartbeat_seconds=0.3) as server:
        clients = {party: client(server.port, party, answer_seconds=2.0) for party in ("hospital-a", "hospital-b")}
        asking = [
            threading.Thread(target=lambda party=party: asks(clients[party], party, range(200))) for party in clients
        ]
        for thread in asking:
            thread.start()
        while any(thread.is_alive() for thread in asking):
            monkeypatch.setattr(time, "time", lambda: real() + jump)
            time.sleep(0.01)
            monkeypatch.setattr(time, "time", real)
            time.sleep(0.01)
        assert server.watch.taken == {"hospital-a": 200, "hospital-b": 200}
        assert len(server.said("connected")) == 2
        assert not server.said("disconnected")
    assert time.monotonic() - began < 10


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
        asking.join(20)
        assert not asking.is_alive()
        asks(other, "hospital-b", range(3, 5))
    assert second.steps == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4]


@pytest.mark.parametrize("room_bytes", [0, 1, 100, 500])
def test_a_full_disk_at_a_client_is_one_line_and_it_goes_on(
    room_bytes: int, theirs: Credentials, own: Own, service: Doubling, tmp_path: Path, full_disk: Any
) -> None:
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
