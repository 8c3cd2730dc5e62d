"""A wrapper is a transport around a transport."""

from __future__ import annotations

from typing import final

from milkglass.messages import Message
from milkglass.transcript import Crossing, Transcript
from milkglass.transports.base import Transport


@final
class RecordingTransport(Transport):
    """Keeps what crossed, in order, in `transcript`."""

    def __init__(self, inner: Transport) -> None:
        super().__init__()
        self._inner = inner
        self.traffic = inner.traffic
        self.transcript = Transcript()

    def exchange(self, message: Message) -> Message:
        sent, received = self.traffic.wire_bytes("to server"), self.traffic.wire_bytes("to client")
        answer = self._inner.exchange(message)
        sent, received = self.traffic.wire_bytes("to server") - sent, self.traffic.wire_bytes("to client") - received
        self.transcript.append(Crossing("to server", message, sent))
        self.transcript.append(Crossing("to client", answer, received))
        return answer
