"""What every transport must do. A new transport subclasses `TransportSuite` and makes itself in `make`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import pytest
import torch

from milkglass.errors import MessageError
from milkglass.messages import Message, Responder
from milkglass.transports.base import Transport


class Echo:
    """Answers every message with twice its activations."""

    def reply(self, message: Message) -> Message:
        tensors = {"gradient": message.tensors["activations"] * 2}
        return Message("gradients", "server", message.step, tensors)


class Broken:
    """Raises, as a server does that was sent what it did not expect."""

    def reply(self, message: Message) -> Message:
        raise MessageError(f"no answer to {message.kind}")


def question(rows: int = 4) -> Message:
    """A message with a tensor of values that differ."""
    return Message("activations", "client", 7, {"activations": torch.arange(rows * 3.0).reshape(rows, 3)})


class TransportSuite(ABC):
    """The conformance tests of a transport."""

    @abstractmethod
    def make(self, responder: Responder) -> Transport:
        """A transport whose other end is `responder`."""

    def test_brings_the_answer_back(self) -> None:
        answer = self.make(Echo()).exchange(question())
        assert (answer.kind, answer.step) == ("gradients", 7)
        assert torch.equal(answer.tensors["gradient"], question().tensors["activations"] * 2)

    def test_counts_messages_and_bytes_both_ways(self) -> None:
        transport = self.make(Echo())
        for rows in (4, 400):
            transport.exchange(question(rows))
        sent, received = transport.traffic.wire_bytes("to server"), transport.traffic.wire_bytes("to client")
        values = 404 * 3 * 4
        assert values < sent < values + 2 * 256
        assert values < received < values + 2 * 256
        assert transport.traffic.messages == 4
        assert transport.traffic.flows[("to server", "activations")].messages == 2

    def test_an_error_of_the_other_end_arrives(self) -> None:
        with pytest.raises(MessageError, match="no answer to activations"):
            self.make(Broken()).exchange(question())

    def test_the_sender_keeps_its_values(self) -> None:
        class Careless:
            def reply(self, message: Message) -> Message:
                message.tensors["activations"].zero_()
                return Echo().reply(message)

        message = question()
        self.make(Careless()).exchange(message)
        assert torch.equal(message.tensors["activations"], question().tensors["activations"])
