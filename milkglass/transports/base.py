"""A transport brings a message to the other party and its answer back. Three verbs are enough."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from milkglass.messages import Direction, Message


@dataclass
class Flow:
    """What went one way under one kind: messages, and their bytes on the wire."""

    messages: int = 0
    wire_bytes: int = 0


@dataclass
class Traffic:
    """Everything that went over a transport so far, by (direction, kind)."""

    flows: dict[tuple[Direction, str], Flow] = field(default_factory=dict)

    def count(self, direction: Direction, kind: str, wire_bytes: int, messages: int = 1) -> None:
        """Add messages of one kind with their bytes on the wire."""
        flow = self.flows.setdefault((direction, kind), Flow())
        flow.messages += messages
        flow.wire_bytes += wire_bytes

    def wire_bytes(self, direction: Direction) -> int:
        """All bytes that went that way."""
        return sum(flow.wire_bytes for (way, _), flow in self.flows.items() if way == direction)

    @property
    def messages(self) -> int:
        """All messages, both ways."""
        return sum(flow.messages for flow in self.flows.values())


class Transport(ABC):
    """Where a client's messages go. It counts what it carries, in bytes as they are on the wire.

    Every message gets one answer, in order. Several may be under way before the first answer is taken.
    """

    def __init__(self) -> None:
        self.traffic = Traffic()

    @abstractmethod
    def send(self, message: Message) -> None:
        """Put `message` on its way. Raises MessageError for one that cannot travel."""

    @abstractmethod
    def receive(self) -> Message:
        """The next answer; waits for it. Raises MessageError when what comes back is not a message."""

    @property
    def ready(self) -> bool:
        """Whether it is worth asking for the next answer now; of use where one process plays several parties."""
        return True

    def exchange(self, message: Message) -> Message:
        """Send `message` and wait for the answer."""
        self.send(message)
        return self.receive()
