"""What parties say to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol, get_args

from torch import Tensor

from milkglass.errors import MessageError

Kind = Literal[
    "activations",
    "gradients",
    "queries",
    "predictions",
    "features",
    "returns",
    "weights",
    "collect",
    "handed",
    "enters",
    "hashes",
    "goodbye",
    "receipt",
    "hello",
    "welcome",
    "waits",
]
"""
activations  client -> server  the cut's activations of a training batch; the labels where the server holds the loss
gradients    server -> client  the loss's gradient with respect to those activations; the loss where the server holds it
queries      client -> server  activations of records that are only to be classified
predictions  server -> client  what the server's stage makes of them: logits, or U-shaped the features before the head
features     server -> client  U-shaped training: what the server's stage makes of a training batch
returns      client -> server  U-shaped training: the loss's gradient with respect to those features
weights      client -> server  a client's stage after its turn, sealed under a key that the server lacks
collect      client -> server  asks for what other clients left in this round
handed       server -> client  that, still sealed
enters       client -> server  where there are several: how many training batches it has in an epoch
hashes       client -> server  vertical training: its records' ids, hashed under a key that the server lacks
receipt      server -> client  what was left there was taken
goodbye      client -> server  its training is over
hello        client -> server  the handshake: the agreed part of its recipe
welcome      server -> client  the answer
waits        server -> client  a heartbeat: the answer is still to come, and for whom it waits
"""
KINDS: tuple[str, ...] = get_args(Kind)
"""The position is the code on the wire: add at the end only."""

Direction = Literal["to server", "to client"]


@dataclass(frozen=True)
class Message:
    """Named tensors from one party at one step. Tensors are detached: a message carries values, never a graph.

    piece, pieces: a batch may go out in pieces that follow each other; this is the one of that number, from 0. number:
    counts a client's messages on their way; an answer has that of what it answers. Transports set it.
    """

    kind: Kind
    party: str
    step: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    piece: int = 0
    pieces: int = 1
    number: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise MessageError(f"message kind {self.kind!r} is not known; known: {', '.join(KINDS)}")
        if not 0 <= self.piece < self.pieces:
            raise MessageError(f"message {self.kind!r}: piece {self.piece} of {self.pieces}; expected one from 0 on")
        for name, tensor in self.tensors.items():
            if tensor.requires_grad:
                raise MessageError(f"message {self.kind!r}: tensor {name!r} is still part of a graph; detach it first")
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))


class Responder(Protocol):
    """Whoever answers messages: the server, or, in an audit, an attacker in its place."""

    def reply(self, message: Message) -> Message:
        """The answer to a message."""
        ...


Addressed = tuple[str, Message]
"""A message, and the name of the party that it is for."""


class Service(Protocol):
    """Whoever serves several parties: a message may be answered at once, later, or together with others'."""

    def receive(self, message: Message) -> Sequence[Addressed]:
        """Take a message; returns the answers that are due now, to whom they may be."""
        ...
