"""A transport brings a message to the other party and its answer back. Three verbs are enough; one is here today."""

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
    """Where a client's messages go. It counts what it carries, in bytes as they are on the wire."""

    def __init__(self) -> None:
        self.traffic = Traffic()

    @abstractmethod
    def exchange(self, message: Message) -> Message:
        """Send `message` and wait for the answer. Raises MessageError when what comes back is not a message."""
