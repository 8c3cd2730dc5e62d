"""A client that is in, and sends what it may not: it is refused, and nobody else notices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from milkglass.certificates import Credentials
from milkglass.codec import encode
from milkglass.messages import Message
from milkglass.transports.grpc import GrpcTransport
from tests.wire_server import (
    FRAME_BYTES,
    RUN,
    Alone,
    Holding,
    ServerThread,
    asks,
    bare_channel,
    dial,
    hello,
    question,
    talk,
    until,
)

Own = Callable[[str], Credentials]
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def frame(number: int, *, run: int = RUN, party: str = "hospital-b", **changes: Any) -> bytes:
    """What hospital-b sends next, or something in its place."""
    return encode(replace(question(party, number), number=number, **changes), run)


@pytest.fixture
def number(server: ServerThread, unmoved: None) -> int:  # noqa: ARG001 - unmoved goes first
    """The number of hospital-b's next message."""
    return server.watch.taken["hospital-b"]


def test_a_frame_that_comes_twice_gets_the_same_answer_and_counts_once(
    server: ServerThread, own: Own, number: int
) -> None:
    twice = [frame(number)] * 2
    answers, code, _ = talk(server.port, own("hospital-b"), [hello("hospital-b"), *twice])
    assert code == grpc.StatusCode.OK
    assert [answer.kind for answer in answers] == ["welcome", "gradients", "gradients"]
    again, _, _ = talk(server.port, own("hospital-b"), [hello("hospital-b"), *twice])  # over a new connection as well
    for answer in (*answers[1:], *again[1:]):
        assert answer.number == number
        assert torch.equal(answer.tensors["gradient"], question("hospital-b", number).tensors["activations"] * 2)
    assert server.watch.taken["hospital-b"] == number + 1


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (
            lambda n: encode(replace(question("hospital-b", 99), number=n - 1), RUN),
            "was another one when it came first",
        ),
        (lambda n: frame(n - 4), "came long ago"),
        (lambda n: frame(n + 1), "some are missing"),
        (lambda n: frame(n, run=RUN + 1), "frame of another run"),
        (lambda n: frame(n, run=0), "frame of another run"),
        (lambda n: frame(n, party="hospital-a"), "a frame of 'hospital-a' came from 'hospital-b'"),
        (lambda n: frame(n)[:-3], "truncated"),
        (lambda n: frame(n) + b"x", "truncated, or two frames in one"),
        (lambda n: frame(n)[:-1] + b"\xee", "checksum does not fit"),
        (lambda n: frame(n, tensors={"activations": torch.zeros(4, 3).double()}), "activations is float64 4x3"),
        (lambda n: frame(n, tensors={"activations": torch.zeros(4, 4)}), "activations is float32 4x4"),
        (lambda n: frame(n, tensors={"activations": torch.zeros(3)}), "activations is float32 3"),
        (lambda n: frame(n, tensors={"activations": torch.zeros(200_001, 3)}), "activations is float32 200001x3"),
        (lambda n: frame(n, tensors={"records": torch.zeros(4, 3)}), "holds 'records'"),
        (lambda n: frame(n, tensors={}), "lacks activations"),
        (lambda n: frame(n, kind="queries"), "frame of kind 'queries'"),
        (lambda n: frame(n, kind="gradients"), "frame of kind 'gradients'"),
        (lambda _: hello("hospital-b"), "frame of another run"),
        (lambda n: encode(Message("hello", "hospital-b", 0, number=n), RUN), "frame of kind 'hello'"),
        (lambda _: b"", "truncated"),
    ],
)
def test_what_was_not_agreed_is_refused_and_changes_nothing(
    bad: Callable[[int], bytes], words: str, server: ServerThread, own: Own, number: int
) -> None:
    good = [frame(number + count) for count in range(5)]
    answers, _, _ = talk(server.port, own("hospital-b"), [hello("hospital-b"), *good])
    assert len(answers) == 6
    counted, lines = server.watch.refusals.copy(), len(server.lines)
    answers, code, details = talk(server.port, own("hospital-b"), [hello("hospital-b"), bad(number + 5)])
    assert ([answer.kind for answer in answers], code) == (["welcome"], INVALID)
    assert words in details
    assert "\n" not in details
    refusals = server.watch.refusals - counted
    del refusals["handshake"]  # dials that took too long
    assert refusals == {"message": 1}
    refusal = next(line for line in server.lines[lines:] if line.get("why") == "message")
    assert (refusal["event"], refusal["party"], refusal["reason"]) == ("refused", "hospital-b", details)
    answers, code, _ = talk(server.port, own("hospital-b"), [hello("hospital-b"), frame(number + 5)])
    assert code == grpc.StatusCode.OK
    assert torch.equal(answers[1].tensors["gradient"], question("hospital-b", number + 5).tensors["activations"] * 2)
    assert server.watch.taken["hospital-b"] == number + 6


def test_a_client_cannot_send_ahead_of_its_answers_without_end(theirs: Credentials, own: Own, tmp_path: Path) -> None:
    with ServerThread(theirs, tmp_path / "server", Holding(), window=2) as server:
        frames = [hello("hospital-b"), *(frame(count) for count in range(3))]
        answers, code, details = talk(server.port, own("hospital-b"), frames)
        assert ([answer.kind for answer in answers], code) == (["welcome"], INVALID)
        assert details == "hospital-b has 2 messages unanswered; at most 2"
        assert server.watch.taken["hospital-b"] == 2


def test_a_client_that_reads_no_answer_is_not_served_without_end(server: ServerThread, own: Own, number: int) -> None:
    rows = 100_000
    same = encode(replace(question("hospital-b", number, rows), number=number), RUN)
    sent = 0

    def frames() -> Iterator[bytes]:
        nonlocal sent
        yield hello("hospital-b")
        while not over:
            sent += 1
            yield same

    over: list[bool] = []
    with bare_channel(server.port, own("hospital-b")) as channel:
        call = channel.stream_stream("/milkglass.Parties/Talk")(frames(), timeout=60, wait_for_ready=True)
        until(lambda: sent > 0)
        before = -1
        while before < sent < 200:  # until flow control holds it: it has stopped sending, for nobody reads
            before = sent
            time.sleep(0.5)
        assert 0 < sent < 200
        over.append(True)
        call.cancel()
    until(lambda: server.watch.there == 1)


@pytest.fixture(scope="module")
def there(alone: Alone, own: Own, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcTransport]:
    """hospital-a, connected to the server that runs alone."""
    transport = dial(alone.port, own("hospital-a"), tmp_path_factory.mktemp("there"))
    yield transport
    transport.close()


@pytest.mark.parametrize("when", ["as a greeting", "as a frame"])
@pytest.mark.parametrize("packed", [False, True])
def test_an_oversized_frame_takes_no_memory(
    when: str, packed: bool, alone: Alone, there: GrpcTransport, own: Own
) -> None:
    first = there.sender.number
    asks(there, "hospital-a", range(first, first + 2))
    connected, before = len(alone.lines("connected")), alone.memory_bytes()["peak"]
    said = f"a frame longer than {FRAME_BYTES} bytes came"
    refused = alone.log.read_text().count(said)
    large = bytes(64 * FRAME_BYTES)
    frames = [large] if when == "as a greeting" else [hello("hospital-b"), large]
    compression = grpc.Compression.Gzip if packed else grpc.Compression.NoCompression  # a bomb: 1000 times as large
    answers, code, details = talk(alone.port, own("hospital-b"), frames, compression=compression, timeout=120)
    assert (len(answers), code) == (len(frames) - 1, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert "larger than max" in details
    asks(there, "hospital-a", range(first + 2, first + 4))
    until(lambda: alone.log.read_text().count(said) == refused + 1)
    assert alone.memory_bytes()["peak"] - before < 8 * FRAME_BYTES
    assert len(alone.lines("connected")) == connected + len(frames) - 1
