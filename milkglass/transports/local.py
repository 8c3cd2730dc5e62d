"""Both parties in one process. Messages still become frames, so that bytes are counted and not guessed."""

from __future__ import annotations

from typing import final

from milkglass.codec import decode, encode
from milkglass.messages import Message, Responder
from milkglass.transports.base import Transport


@final
class LocalTransport(Transport):
    """Hands every message, encoded and decoded, to a responder in the same process."""

    def __init__(self, responder: Responder) -> None:
        super().__init__()
        self._responder = responder

    def exchange(self, message: Message) -> Message:
        sent = encode(message)
        self.traffic.count("to server", message.kind, len(sent))
        answer = self._responder.reply(decode(sent))
        received = encode(answer)
        self.traffic.count("to client", answer.kind, len(received))
        return decode(received)
