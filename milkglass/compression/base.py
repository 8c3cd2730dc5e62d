"""What every compressor is: a tensor (B, ...) to named parts and back, outside the graph and without memory.

A compressor keeps nothing between two calls. A residual would carry what one record left over into another's message:
error feedback is for sums over many records, and is put around a compressor (what is left over is x - round_trip(x)).
Each record's parts follow from that record alone, and a part has one row a record, so what holds of a message by the
record still holds of its parts.

Legend: B records, `...` a record's own shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self, final

import torch
from torch import Tensor

from milkglass.errors import MessageError

FLOATS: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""What can be compressed."""


@dataclass(frozen=True)
class Part:
    """The shape and dtype of a part; written as `float32 64x10`."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Those of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def size_bytes(self) -> int:
        """What its values take, in memory and on the wire."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {'x'.join(map(str, self.shape))}"


class Compressor(ABC):
    """Makes a message smaller. Subclasses are final; settings in the constructor, the same at both ends."""

    @abstractmethod
    def describe(self) -> str:
        """The compressor and its settings in a few words, for summaries and reports."""

    @abstractmethod
    def layout(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Part]:
        """Name, shape and dtype of every part of a tensor (B, ...) of `shape` and `dtype`, whatever its values."""

    @abstractmethod
    def _compress(self, x: Tensor) -> dict[str, Tensor]:
        """The parts of `x`, which was checked."""

    @abstractmethod
    def _decompress(self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor of `parts`, which have the right layout; what their values claim is still to be checked."""

    @final
    def compress(self, x: Tensor) -> dict[str, Tensor]:
        """The parts of `x` (B, ...); they may share its memory. Raises MessageError for what cannot be compressed."""
        if x.requires_grad:
            raise MessageError(
                "a compressor stands outside the graph, where it has no gradient; detach the tensor first"
            )
        _check(x.shape, x.dtype)
        return self._compress(x)

    @final
    def decompress(self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor of `shape` (B, ...) and `dtype` that the parts stand for; it may share their memory.

        `shape` and `dtype` are the agreed ones; the parts are another party's. Raises MessageError, before memory is
        taken for the result, unless they are such as `compress` makes. A value in them may be NaN or infinite where
        the tensor's own may be: whoever takes the result checks it, as one that was not compressed.
        """
        _check(shape, dtype)
        expected = self.layout(shape, dtype)
        found = {name: Part.of(tensor) for name, tensor in parts.items()}
        if found != expected:
            raise MessageError(f"{self.describe()}: expected the parts {_words(expected)}; got {_words(found)}")
        return self._decompress(parts, shape, dtype)

    @final
    def round_trip(self, x: Tensor) -> Tensor:
        """What the receiver makes of `x` (B, ...)."""
        return self.decompress(self.compress(x), x.shape, x.dtype)


@final
class Identity(Compressor):
    """Sends the values as they are."""

    def __repr__(self) -> str:
        return "Identity()"

    def describe(self) -> str:
        return "no compression"

    def layout(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Part]:
        return {"values": Part(tuple(shape), dtype)}

    def _compress(self, x: Tensor) -> dict[str, Tensor]:
        return {"values": x}

    def _decompress(self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        return parts["values"]


def saturating(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in another floating-point dtype. What is too large for it becomes its largest finite value, not infinity.

    NaN and infinities that are there stay, so that whoever asks for finite values still finds them.
    """
    y, limit = x.to(dtype), torch.finfo(dtype).max
    if limit >= torch.finfo(x.dtype).max or not y.isinf().any():
        return y
    return torch.where(x.isinf(), y, y.clamp(-limit, limit))


def _check(shape: Sequence[int], dtype: torch.dtype) -> None:
    if dtype not in FLOATS or len(shape) < 2 or min(shape) < 1:
        raise MessageError(
            f"cannot compress {Part(tuple(shape), dtype)}; expected floats (B, ...), at least one a record"
        )


def _words(parts: Mapping[str, Part]) -> str:
    return ", ".join(f"{name} {part}" for name, part in sorted(parts.items())) or "none"
