"""Who may take part: every record in the DHT, every join, every download shows a token, and this says what it is worth.

hivemind's own authorizer guards calls to the DHT alone; matchmaking, averaging and the state of training never ask it.
Here a token names a peer id, which the connection itself proves, so that a token that was stolen is worth nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final


class Admission(ABC):
    """Subclasses are final. They may be asked from any thread."""

    @property
    @abstractmethod
    def token(self) -> bytes:
        """This volunteer's own, to show to others; empty where none is asked for."""

    @property
    def authority(self) -> bytes | None:
        """The peer id of the authority that admits; None where there is none."""
        return None

    @abstractmethod
    def objection(self, peer_id: bytes, token: bytes) -> str | None:
        """Why the peer of that id, showing that token, may not take part; None where it may."""


@final
class OpenDoor(Admission):
    """Everybody may take part."""

    @property
    def token(self) -> bytes:
        """None."""
        return b""

    def objection(self, peer_id: bytes, token: bytes) -> str | None:
        """Never one."""
        del peer_id, token
        return None
