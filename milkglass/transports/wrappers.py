"""A wrapper is a transport around a transport, or a service around a service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from milkglass.compression.base import Compressor
from milkglass.errors import MessageError, MilkglassError
from milkglass.messages import Addressed, Message, Service
from milkglass.transcript import Crossing, Transcript
from milkglass.transports.base import Transport


@final
class RecordingTransport(Transport):
    """Keeps what crossed, in order, in `transcript`."""

    def __init__(self, inner: Transport) -> None:
        super().__init__()
        self._inner = inner
        self.traffic = inner.traffic
        self.transcript = Transcript()

    def send(self, message: Message) -> None:
        before = self.traffic.wire_bytes("to server")
        self._inner.send(message)
        self.transcript.append(Crossing("to server", message, self.traffic.wire_bytes("to server") - before))

    def receive(self) -> Message:
        before = self.traffic.wire_bytes("to client")
        answer = self._inner.receive()
        self.transcript.append(Crossing("to client", answer, self.traffic.wire_bytes("to client") - before))
        return answer

    @property
    def ready(self) -> bool:
        return self._inner.ready


@final
class Packing:
    """Compresses what a message holds of a cut, and makes it out again: the same at both ends.

    shapes: (kind, name of the tensor) -> the shape of one record's row. Others travel as they are.
    """

    def __init__(self, compressor: Compressor, shapes: Mapping[tuple[str, str], tuple[int, ...]]) -> None:
        self._compressor = compressor
        self._shapes = shapes

    def pack(self, message: Message) -> Message:
        """The message with parts `activations.values`, ... in place of `activations`."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in message.tensors.items():
            if (message.kind, name) in self._shapes:
                tensors |= {f"{name}.{part}": t for part, t in self._compressor.compress(tensor).items()}
            else:
                tensors[name] = tensor
        return replace(message, tensors=tensors)

    def unpack(self, message: Message) -> Message:
        """The other way. Raises MessageError for parts that are not what was agreed."""
        parts: dict[str, dict[str, Tensor]] = {}
        tensors: dict[str, Tensor] = {}
        for name, tensor in message.tensors.items():
            whole, dot, part = name.partition(".")
            if dot and (message.kind, whole) in self._shapes:
                parts.setdefault(whole, {})[part] = tensor
            elif (message.kind, name) in self._shapes:
                raise MessageError(f"{message.kind!r} of {message.party}: {name} is not compressed as was agreed")
            else:
                tensors[name] = tensor
        for name, found in parts.items():
            rows = max((len(tensor) if tensor.dim() else 0) for tensor in found.values())
            shape = (rows, *self._shapes[message.kind, name])
            tensors[name] = self._compressor.decompress(found, shape, torch.float32)
        return replace(message, tensors=tensors)


def packing(compressor: Compressor, cut: tuple[int, ...], features: tuple[int, ...]) -> Packing:
    """What is compressed in split training: activations and gradients at the cut, and U-shaped at the second one."""
    return Packing(
        compressor,
        {
            ("activations", "activations"): cut,
            ("queries", "activations"): cut,
            ("gradients", "gradient"): cut,
            ("features", "features"): features,
            ("returns", "gradient"): features,
        },
    )


@final
class PackingTransport(Transport):
    """Compresses what is sent, and makes out what comes back."""

    def __init__(self, inner: Transport, packing: Packing) -> None:
        super().__init__()
        self._inner = inner
        self._packing = packing
        self.traffic = inner.traffic

    def send(self, message: Message) -> None:
        self._inner.send(self._packing.pack(message))

    def receive(self) -> Message:
        return self._packing.unpack(self._inner.receive())

    @property
    def ready(self) -> bool:
        return self._inner.ready


@final
class PackingService:
    """A service whose messages come compressed, and whose answers leave so; packings: by party."""

    def __init__(self, inner: Service, packings: Mapping[str, Packing]) -> None:
        self._inner = inner
        self._packings = packings

    def receive(self, message: Message) -> list[Addressed]:
        """Make out, serve, compress."""
        if message.party not in self._packings:
            raise MessageError(f"{message.party!r} takes no part; those who do: {', '.join(self._packings)}")
        answers = self._inner.receive(self._packings[message.party].unpack(message))
        try:
            return [(party, self._packings[party].pack(answer)) for party, answer in answers]
        except MessageError as error:  # what it answers has had its effect: it is too late to refuse the question
            raise MilkglassError(f"an answer cannot be compressed: {error}") from None
