"""The server's side where a message changes nothing: a repeated one is computed again, and nothing is kept.

It speaks the numbers of `exactly_once.py`, whose client's half is the same: an answer has the number of its question.
A client may begin with any number, so each of its processes, and each of its connections, begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import final

from milkglass.codec import Limits, decode, encode
from milkglass.errors import MessageError
from milkglass.messages import Message, Service
from milkglass.transports.exactly_once import Frames


@final
class QueryTaker:
    """Takes each client's questions as often as they come.

    service: answers at once, and learns nothing. limits: what each client may send.
    """

    def __init__(self, service: Service, limits: Mapping[str, Limits], *, run: int) -> None:
        self._service = service
        self._limits = limits
        self._run = run

    def owes(self, party: str) -> bool:  # noqa: ARG002
        """No: no answer waits for another client's message."""
        return False

    def check(self, party: str, frame: bytes) -> Message:
        """The message in a frame from `party`. Raises MessageError unless it is one that may come from there."""
        message = decode(frame, self._limits[party], self._run)
        if message.party != party:
            raise MessageError(f"a frame of {message.party!r} came from {party!r}: that is the name in its certificate")
        return message

    def again(self, party: str, message: Message, frame: bytes) -> bytes | None:  # noqa: ARG002
        """None: every message is new."""
        return None

    def take(self, party: str, message: Message, frame: bytes) -> Frames:  # noqa: ARG002
        """The answer."""
        return [
            (to, encode(replace(answer, number=message.number), self._run))
            for to, answer in self._service.receive(message)
        ]
