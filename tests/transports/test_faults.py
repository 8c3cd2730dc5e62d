"""A bad network, a server that is away, silent, or busy: nothing is lost, and one line says so."""

from __future__ import annotations

import contextlib
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
from milkglass.codec import glance
from milkglass.errors import LinkError
from milkglass.messages import Message
from milkglass.transports.door import Connection
from milkglass.transports.grpc import GrpcTransport
from milkglass.transports.grpc_server import GrpcServer
from tests.wire_faults import FaultyNetwork
from tests.wire_server import (
    RUN,
    Computing,
    Doubling,
    Holding,
    ServerThread,
    asks,
    bare_channel,
    doubled,
    one_line,
    question,
    until,
)

Own = Callable[[str], Credentials]
Dial = Callable[..., GrpcTransport]


@pytest.fixture
def service() -> Doubling:
    return Doubling()


@contextlib.contextmanager
def bad_network(theirs: Credentials, service: Doubling, folder: Path, **options: Any) -> Iterator[FaultyNetwork]:
    """A bad network before a server."""
    with ServerThread(theirs, folder, service, **options) as server, FaultyNetwork(server.port) as network:
        yield network
        assert server.failure is None


@pytest.fixture
def network(theirs: Credentials, service: Doubling, tmp_path: Path) -> Iterator[FaultyNetwork]:
    """One whose server is asked for a sign of life so seldom that a pause of this process ends no connection."""
    with bad_network(theirs, service, tmp_path / "server") as network:
        yield network


# The network.


@pytest.mark.parametrize("how", ["cut", "reset"])
def test_a_connection_that_is_ended_again_and_again_loses_nothing(
    how: str, network: FaultyNetwork, service: Doubling, client: Dial
) -> None:
    transport = client(network.port)
    asks(transport, "hospital-a", [0])
    over = threading.Event()

    def end() -> None:
        taken = 0
        while not over.wait(0.15):
            if len(service.steps) > taken:  # or a slow machine would dial for ever
                taken = len(service.steps)
                network.cut() if how == "cut" else network.reset()

    ending = threading.Thread(target=end)
    ending.start()
    began, step = time.monotonic(), 1
    try:
        while network.accepted < 6:
            assert time.monotonic() - began < 60
            asks(transport, "hospital-a", [step], rows=2000)
            step += 1
    finally:
        over.set()
        ending.join()
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
    theirs: Credentials, service: Doubling, client: Dial, tmp_path: Path
) -> None:
    with bad_network(theirs, service, tmp_path / "server", heartbeat_seconds=1.0) as network:
        transport = client(network.port, heartbeat_seconds=1.0)
        asks(transport, "hospital-a", range(3))
        began = time.monotonic()
        network.fall_silent()
        asks(transport, "hospital-a", range(3, 6))
        assert 0.5 < time.monotonic() - began < 15
        assert network.accepted >= 2
    assert service.steps == list(range(6))


def test_a_slow_line_brings_the_same_answers(network: FaultyNetwork, service: Doubling, client: Dial) -> None:
    network.delay_seconds, network.bytes_per_second = 0.05, 2e6
    transport = client(network.port)
    asks(transport, "hospital-a", [0])
    began = time.monotonic()
    asks(transport, "hospital-a", [1])
    assert time.monotonic() - began > 0.1  # there and back
    asks(transport, "hospital-a", [2], rows=100_000)  # 0.6 seconds on the line each way
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
    theirs: Credentials, service: Doubling, client: Dial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, stop = list[int](), GrpcServer.stop

    async def noted(server: GrpcServer, grace_seconds: float, *, unfinished: bool = False) -> None:
        taken.append(len(service.steps))
        await stop(server, grace_seconds, unfinished=unfinished)

    monkeypatch.setattr(GrpcServer, "stop", noted)
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
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 10
        assert len(service.steps) - taken[0] <= 1, "what was being computed when it heard of its end"
    (line,) = server.said("disconnected")
    assert line["reason"] == "this server stops"
    over.set()
    again = Doubling()
    with ServerThread(theirs, tmp_path / "server", again, port=server.port):
        asking.join(60)
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
    assert 1 <= time.monotonic() - began < 15
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
        assert 1.5 <= time.monotonic() - began < 15
        assert len(server.said("connected")) < 10  # with growing pauses


@pytest.mark.usefixtures("rare_pings")
def test_a_server_that_never_answers_is_named_with_what_was_awaited(
    theirs: Credentials, client: Dial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats, push = list[float](), Connection.push

    async def four_beats(connection: Connection, frame: bytes) -> None:
        if len(beats) < 4:
            if glance(frame)[0] == "waits":
                beats.append(time.monotonic())
            await push(connection, frame)

    monkeypatch.setattr(Connection, "push", four_beats)
    with ServerThread(theirs, tmp_path / "server", Holding(), heartbeat_seconds=0.3) as server:
        transport = client(server.port, answer_seconds=4.0)
        transport.send(question("hospital-a", 7))
        with pytest.raises(LinkError) as raised:
            transport.receive()
        assert 3.9 < time.monotonic() - beats[-1] < 15  # each heartbeat kept it waiting for four seconds more
    one_line(
        raised.value,
        f"the server at localhost:{server.port} has given no sign for 4 seconds",
        "awaited was the answer to 'activations' of step 7",
        "it was waiting for hospital-b",
    )


@pytest.mark.usefixtures("rare_pings")
def test_heartbeats_keep_a_long_wait_alive_and_say_for_whom(theirs: Credentials, client: Dial, tmp_path: Path) -> None:
    said: list[dict[str, object]] = []
    with ServerThread(theirs, tmp_path / "server", Holding(), heartbeat_seconds=0.3) as server:
        waiting = client(
            server.port, answer_seconds=4.0, log=lambda event, **values: said.append({"event": event, **values})
        )
        late = client(server.port, "hospital-b")
        waiting.send(question("hospital-a", 0))
        timer = threading.Timer(5.0, lambda: asks(late, "hospital-b", [0]))
        timer.start()
        answer = waiting.receive()
        timer.join()
        assert torch.equal(answer.tensors["gradient"], question("hospital-a", 0).tensors["activations"] * 2)
    lines = [line for line in said if line["event"] == "waiting"]
    named = {"event": "waiting", "run": f"{RUN:016x}", "step": 0, "party": "hospital-a", "waits_for": "hospital-b"}
    assert named in lines
    assert len(lines) <= 3  # a beat while a message is just being taken names both; but no line for each beat


@pytest.mark.usefixtures("rare_pings")
def test_health_is_told_over_mutual_tls_also_while_a_step_computes(
    theirs: Credentials, own: Own, client: Dial, tmp_path: Path
) -> None:
    service, asked = Computing(), health_pb2.HealthCheckRequest()
    with ServerThread(theirs, tmp_path / "server", service, heartbeat_seconds=0.5, handshake_seconds=1.0) as server:
        transport = client(server.port, answer_seconds=4.0)
        computing = threading.Thread(target=lambda: asks(transport, "hospital-a", range(2)))
        computing.start()
        with bare_channel(server.port, own("hospital-b")) as channel:
            for seconds in (0.0, 4.5):  # the second step takes longer than a client waits for a sign
                assert service.begun.acquire(timeout=20)
                for _ in range(10):
                    answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=10, wait_for_ready=True)
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
                time.sleep(seconds)
                service.end.release()
        computing.join(20)
        assert not computing.is_alive()
        with bare_channel(server.port, Credentials(theirs.root, b"", b"", "")) as stranger:
            with pytest.raises(grpc.RpcError) as raised:
                health_pb2_grpc.HealthStub(stranger).Check(asked, timeout=20)
            assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
        until(lambda: server.watch.refusals["handshake"] >= 1)
        assert set(server.watch.refusals) == {"handshake"}  # who asks for health is no stranger
    assert service.steps == [0, 1]
