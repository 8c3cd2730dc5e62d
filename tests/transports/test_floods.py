"""Many at once: connections that say nothing, streams without end. The server survives, and honest clients go on."""

from __future__ import annotations

import contextlib
import resource
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from milkglass.certificates import Credentials
from milkglass.transports.grpc import METHOD
from tests.wire_server import GREETING_SECONDS, Alone, ServerThread, asks, bare_channel, dial, until

Own = Callable[[str], Credentials]


@contextlib.contextmanager
def silent_connections(port: int, count: int) -> Iterator[None]:
    """So many TCP connections that say nothing, and stay."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"this machine lets a process open {hard} files; {wanted} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    strangers: list[socket.socket] = []
    families = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    try:
        for number in range(count):
            family, address = families[number % len(families)]
            stranger = socket.socket(family)
            strangers.append(stranger)
            stranger.setblocking(False)
            stranger.connect_ex((address, port))
            if number % 100 == 0:
                time.sleep(0.002)  # for the server to accept them: its backlog is short
        yield
    finally:
        for stranger in strangers:
            stranger.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_half_open_connections_hold_up_nobody(count: int, kit: Path, own: Own, tmp_path: Path) -> None:
    with Alone(kit / "localhost", tmp_path / "alone") as alone:
        there = dial(alone.port, own("hospital-a"), tmp_path / "a")
        asks(there, "hospital-a", range(1))
        before = alone.memory_bytes()["now"]
        with silent_connections(alone.port, count):
            seconds, began = list[float](), time.monotonic()
            newcomer = dial(alone.port, own("hospital-b"), tmp_path / "b", patience_seconds=60.0)
            asks(newcomer, "hospital-b", range(3))
            assert time.monotonic() - began < 30
            newcomer.close()
            while len(seconds) < 20 or time.monotonic() - began < 1.5:
                asked = time.monotonic()
                asks(there, "hospital-a", [len(seconds) + 1])
                seconds.append(time.monotonic() - asked)
            assert statistics.median(seconds) < 1
            until(lambda: sum(line.get("connections", 0) for line in alone.lines("refused")) >= count)
        asks(there, "hospital-a", range(len(seconds) + 1, len(seconds) + 4))
        there.close()
        refusals = alone.lines("refused")
        assert {line["why"] for line in refusals} == {"handshake"}
        assert len(refusals) < 30  # and not a line for each
        assert alone.memory_bytes()["now"] - before < count * 100_000
        until(lambda: len(alone.lines("disconnected")) == 2)
        assert len(alone.lines("connected")) == 2


@pytest.mark.usefixtures("short_pauses")
def test_strangers_do_not_take_the_last_file_descriptor(kit: Path, own: Own, tmp_path: Path) -> None:
    with Alone(kit / "localhost", tmp_path / "alone", handshake_seconds=7.0, most_files=700) as alone:
        there = dial(alone.port, own("hospital-a"), tmp_path / "a")
        asks(there, "hospital-a", range(1))
        with silent_connections(alone.port, 1_500):
            asks(there, "hospital-a", range(1, 50))
            assert 350 < len(list(Path(f"/proc/{alone.process_id}/fd").iterdir())) < 600
            began = time.monotonic()  # all places are taken, until those in them have been silent for 7 seconds
            newcomer = dial(alone.port, own("hospital-b"), tmp_path / "b", patience_seconds=60.0)
            asks(newcomer, "hospital-b", range(3))
            assert 0.5 < time.monotonic() - began < 60
            newcomer.close()
        asks(there, "hospital-a", range(50, 60))
        there.close()


def test_streams_without_a_greeting_are_few_at_a_time(server: ServerThread, own: Own, unmoved: None) -> None:  # noqa: ARG001
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(60)
        yield from ()

    counted, began = server.watch.refusals.copy(), time.monotonic()
    with contextlib.ExitStack() as channels:
        calls = []
        for _ in range(6):  # connections of its own, for one is held to 8 streams by gRPC
            channel = channels.enter_context(bare_channel(server.port, own("hospital-b")))
            calls += [channel.stream_stream(METHOD)(nothing(), timeout=60, wait_for_ready=True) for _ in range(8)]
        codes = [call.code() for call in calls]
        seconds = time.monotonic() - began
        over.set()
    silent, too_many = codes.count(grpc.StatusCode.DEADLINE_EXCEEDED), codes.count(grpc.StatusCode.UNAVAILABLE)
    assert silent + too_many == 48
    assert 1 <= silent <= 8 * int(seconds / GREETING_SECONDS)  # then a place is free again
    new = server.watch.refusals - counted
    del new["handshake"]  # dials that took too long
    assert new == {"too many streams": too_many, "silent": silent}
    assert any("8 streams of hospital-b have not greeted yet" in line["reason"] for line in server.said("refused"))


def test_one_connection_has_few_streams(server: ServerThread, own: Own, unmoved: None) -> None:  # noqa: ARG001
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(60)
        yield from ()

    counted, began = server.watch.refusals["silent"], time.monotonic()
    with bare_channel(server.port, own("hospital-b")) as channel:
        calls = [channel.stream_stream(METHOD)(nothing(), timeout=60, wait_for_ready=True) for _ in range(100)]
        assert calls[0].code() == grpc.StatusCode.DEADLINE_EXCEEDED
        time.sleep(0.3)
        silent = server.watch.refusals["silent"] - counted
        # no more than 8 at a time come as far as the server, each for as long as a greeting is awaited
        assert 1 <= silent <= 8 * int((time.monotonic() - began) / GREETING_SECONDS)
        for call in calls:
            call.cancel()
        over.set()
