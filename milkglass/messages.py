"""What parties say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol, get_args

from torch import Tensor

from milkglass.errors import MessageError

Kind = Literal["activations", "gradients", "queries", "predictions"]
"""
activations  client -> server  the cut's activations of a training batch; the labels where the server holds the loss
gradients    server -> client  the loss's gradient with respect to those activations, and the loss
queries      client -> server  activations of records that are only to be classified
predictions  server -> client  the logits of those records
"""
KINDS: tuple[str, ...] = get_args(Kind)

Direction = Literal["to server", "to client"]


@dataclass(frozen=True)
class Message:
    """Named tensors from one party at one step. Tensors are detached: a message carries values, never a graph."""

    kind: Kind
    party: str
    step: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise MessageError(f"message kind {self.kind!r} is not known; known: {', '.join(KINDS)}")
        for name, tensor in self.tensors.items():
            if tensor.requires_grad:
                raise MessageError(f"message {self.kind!r}: tensor {name!r} is still part of a graph; detach it first")
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))


class Responder(Protocol):
    """Whoever answers messages: the server, or, in an audit, an attacker in its place."""

    def reply(self, message: Message) -> Message:
        """The answer to a message."""
        ...
