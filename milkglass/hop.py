"""A party in the middle of the way: it holds a stage between the client's and the server's, and no loss.

Multi-hop split learning (Vepakomma et al. 2018, arXiv 1812.00564, section 2.3, "Tor-like"): to the client it is a
server, to the next party a client. The labels go through it on their way to the server. It sees the client's
activations as a server would, so it is trusted no more; what the last server sees has gone through its stage.
"""

from __future__ import annotations

from typing import final

import torch

from milkglass.errors import LinkError, MessageError
from milkglass.messages import Message
from milkglass.server import Server
from milkglass.transports.base import Transport


@final
class Hop:
    """Answers a client's messages with the help of the next party; the other side of a `Server`.

    server: holds the stage, with loss None: a hop is a server that is sent the gradient of what it made. onward: to the
    next party. classes: labels are below it; None for any.
    """

    def __init__(self, server: Server, onward: Transport, classes: int | None = None) -> None:
        self.server = server
        self._classes = classes
        self.onward = onward

    @property
    def name(self) -> str:
        """The party's name."""
        return self.server.name

    def reply(self, message: Message) -> Message:
        """The answer to a training piece or a query, once the next party has answered."""
        if message.kind == "queries":
            made = self.server.reply(message).tensors["logits"]
            return self._ask(message, {"activations": made}, "predictions")
        if message.kind != "activations":
            raise MessageError(f"a hop does not answer {message.kind!r}")
        labels = {name: tensor for name, tensor in message.tensors.items() if name != "activations"}
        self._check_labels(message)
        own = Message("activations", message.party, message.step, {"activations": message.tensors["activations"]})
        made = self.server.reply(self._piece(own, message)).tensors["features"]
        answer = self._ask(message, {"activations": made, **labels}, "gradients")
        gradient = {"gradient": answer.tensors.get("gradient", torch.zeros(0))}
        try:
            back = self.server.reply(self._piece(Message("returns", message.party, message.step, gradient), message))
        except MessageError as error:
            raise self._fault(answer.party, error) from None
        told = {name: tensor for name, tensor in answer.tensors.items() if name != "gradient"}
        return self._piece(Message("gradients", self.name, message.step, {**back.tensors, **told}), message)

    def _check_labels(self, message: Message) -> None:
        """Refuse the client's fault here: the next party would lay it to this one."""
        rows, y_B = len(message.tensors["activations"]), message.tensors.get("labels")
        if y_B is None or y_B.shape != (rows,) or y_B.dtype != torch.int64:
            raise MessageError(f"'activations' of {message.party}: expected an int64 label for each of {rows} records")
        if self._classes is not None and (y_B.min() < 0 or y_B.max() >= self._classes):
            raise MessageError(
                f"'activations' of {message.party}: labels from {y_B.min()} to {y_B.max()}; expected 0 to "
                f"{self._classes - 1}"
            )

    def _ask(self, message: Message, tensors: dict[str, torch.Tensor], kind: str) -> Message:
        question = self._piece(Message(message.kind, self.name, message.step, tensors), message)
        try:
            answer = self.onward.exchange(question)
            if answer.kind != kind or (answer.step, answer.piece) != (message.step, message.piece):
                raise MessageError(f"step {message.step}: expected {kind!r}, {answer.party} sent {answer.kind!r}")
        except MessageError as error:
            raise self._fault("the next party", error) from None
        return Message(answer.kind, self.name, answer.step, answer.tensors, answer.piece, answer.pieces)

    def _fault(self, party: str, error: MessageError) -> LinkError:
        """Not this client's fault, and in the middle of a step: the hop stops, and goes on from its journal."""
        return LinkError(f"{self.name} cannot go on with {party}: {error}")

    def _piece(self, message: Message, of: Message) -> Message:
        return Message(message.kind, message.party, message.step, message.tensors, of.piece, of.pieces)
