"""Every transport and wrapper passes the same suite; a wrapper also does what it is for."""

from __future__ import annotations

from milkglass.messages import Responder
from milkglass.transports.base import Transport
from milkglass.transports.local import LocalTransport
from milkglass.transports.wrappers import RecordingTransport
from tests.suites.transport import Echo, TransportSuite, question


class TestLocal(TransportSuite):
    def make(self, responder: Responder) -> Transport:
        return LocalTransport(responder)


class TestRecording(TransportSuite):
    def make(self, responder: Responder) -> Transport:
        return RecordingTransport(LocalTransport(responder))


class TestRecordingTwice(TransportSuite):
    def make(self, responder: Responder) -> Transport:
        return RecordingTransport(RecordingTransport(LocalTransport(responder)))


def test_a_recording_keeps_order_and_bytes() -> None:
    transport = RecordingTransport(LocalTransport(Echo()))
    for rows in (1, 2):
        transport.exchange(question(rows))
    crossings = list(transport.transcript)
    assert [crossing.direction for crossing in crossings] == ["to server", "to client"] * 2
    assert [len(crossing.message.tensors["activations"]) for crossing in crossings[::2]] == [1, 2]
    assert sum(crossing.wire_bytes for crossing in crossings[::2]) == transport.traffic.wire_bytes("to server")
