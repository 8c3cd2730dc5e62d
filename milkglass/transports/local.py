"""All parties in one process. Messages still become frames, so that bytes are counted and not guessed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, final

from milkglass.codec import decode, encode
from milkglass.errors import MessageError
from milkglass.messages import Addressed, Message, Responder, Service
from milkglass.transports.base import Transport

_ALONE: Final = ""


@final
class LocalHub:
    """One service and the parties that it serves: each has a box for its answers."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._boxes: dict[str, deque[bytes]] = {}

    def box(self, party: str) -> deque[bytes]:
        """Where the frames for the party of that name will lie."""
        return self._boxes.setdefault(party, deque())

    def deliver(self, frame: bytes) -> None:
        """Hand a frame to the service, and put what it answers into the boxes of those it is for."""
        for party, answer in self._service.receive(decode(frame)):
            if party not in self._boxes:
                raise MessageError(f"an answer for {party!r}, who is not there; there are {', '.join(self._boxes)}")
            self._boxes[party].append(encode(answer))


@final
class LocalTransport(Transport):
    """Hands every message, encoded and decoded, to a responder, or as `party` to a hub, in the same process."""

    def __init__(self, other: Responder | LocalHub, party: str = _ALONE) -> None:
        super().__init__()
        self._hub = other if isinstance(other, LocalHub) else LocalHub(Sole(other, party))
        self._box = self._hub.box(party)

    def send(self, message: Message) -> None:
        frame = encode(message)
        self.traffic.count("to server", message.kind, len(frame))
        self._hub.deliver(frame)

    def receive(self) -> Message:
        if not self._box:
            raise MessageError("no answer is there, and none will come: nobody else in this process is at work")
        frame = self._box.popleft()
        answer = decode(frame)
        self.traffic.count("to client", answer.kind, len(frame))
        return answer

    @property
    def ready(self) -> bool:
        return bool(self._box)


@final
class Sole:
    """A responder as the service of the one party there is."""

    def __init__(self, responder: Responder, party: str = _ALONE) -> None:
        self._responder, self._party = responder, party

    def receive(self, message: Message) -> Sequence[Addressed]:
        """The answer, at once."""
        return [(self._party, self._responder.reply(message))]
