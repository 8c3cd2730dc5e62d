"""A piece of a vector on its way between volunteers: hivemind's float forms, eight bits, or what is not zero.

Eight bits are a whole number of -127 to 127 and a scale for each block of 1,024 (linear steps, as in Dettmers 2016,
arXiv 1511.04561): hivemind's own uniform form calls what torch will remove, and its blockwise one needs bitsandbytes.
What comes in was made by a stranger: its form is checked before a number is read.
"""

from __future__ import annotations

from typing import Final, Literal, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from milkglass.collaboration.engine import (
    CompressionInfo,
    Float16Compression,
    NoCompression,
    deserialize_torch_tensor,
    runtime_pb2,
)
from milkglass.errors import MessageError, first_line

Compress = Literal["none", "fp16", "int8", "gaussian_k"]
PIECE: Final = 1 << 17
"""Numbers in a piece: 512 KiB of float32, as in hivemind."""
_SPARSE: Final = "sparse_float32"
_INT8: Final = "int8_blocks"
_DTYPES: Final = {"float32", _SPARSE, _INT8}
_FORMS: Final = {NoCompression.compression_type, Float16Compression.compression_type}
_BLOCK: Final = 1024


@final
class VectorCodec:
    """compress: the recipe's. `gaussian_k` chooses elsewhere what is sent; here what is zero is left out."""

    def __init__(self, compress: Compress) -> None:
        self._compress = compress

    def pack(self, piece_D: Tensor) -> runtime_pb2.Tensor:
        """The message that carries a float32 piece."""
        if self._compress == "gaussian_k":
            places_K = piece_D.nonzero().squeeze(1)
            if 2 * len(places_K) < len(piece_D):
                buffer = places_K.int().numpy().tobytes() + piece_D[places_K].numpy().tobytes()
                return runtime_pb2.Tensor(buffer=buffer, size=[len(piece_D)], dtype=_SPARSE)
        if self._compress == "int8":
            return runtime_pb2.Tensor(buffer=_eight_bits(piece_D), size=[len(piece_D)], dtype=_INT8)
        codec = Float16Compression() if self._compress == "fp16" else NoCompression()
        return codec.compress(piece_D, CompressionInfo.from_tensor(piece_D), allow_inplace=False)

    def unpack(self, message: runtime_pb2.Tensor, numbers: int) -> Tensor:
        """The float32 piece (numbers,) in a message. Raises MessageError, whatever a stranger sent."""
        if list(message.size) != [numbers] or message.dtype not in _DTYPES:
            raise MessageError(f"a piece of size {list(message.size)} and kind {message.dtype!r}; expected [{numbers}]")
        try:
            piece_D: Tensor = _READ.get(message.dtype, _dense)(message, numbers)
        except Exception as error:  # hivemind and numpy raise many
            raise MessageError(f"a piece that cannot be read: {first_line(error)}") from None
        if piece_D.shape != (numbers,):
            raise MessageError(f"a piece of shape {tuple(piece_D.shape)}; expected ({numbers},)")
        return piece_D


def pieces(start: int, stop: int) -> list[tuple[int, int]]:
    """Where the pieces of a slice begin and end."""
    return [(at, min(at + PIECE, stop)) for at in range(start, stop, PIECE)]


def _dense(message: runtime_pb2.Tensor, numbers: int) -> Tensor:
    if message.compression not in _FORMS or len(message.buffer) > 4 * numbers:
        raise ValueError("another form of compression, or more bytes than numbers")
    read: Tensor = deserialize_torch_tensor(message)
    return read.detach().float()


def _sparse(message: runtime_pb2.Tensor, numbers: int) -> Tensor:
    buffer = message.buffer
    if len(buffer) % 8 or len(buffer) > 8 * numbers:
        raise ValueError("not as many places as values")
    half = len(buffer) // 2
    places_K = np.frombuffer(buffer[:half], np.int32).astype(np.int64)
    values_K = np.frombuffer(buffer[half:], np.float32)
    if len(places_K) and (places_K[0] < 0 or places_K[-1] >= numbers or not (np.diff(places_K) > 0).all()):
        raise ValueError("places that are not in order, or not there")
    piece_D = torch.zeros(numbers)
    piece_D[torch.from_numpy(places_K)] = torch.from_numpy(values_K.copy())
    return piece_D


def _eight_bits(piece_D: Tensor) -> bytes:
    blocks = F.pad(piece_D, (0, -len(piece_D) % _BLOCK)).view(-1, _BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True) / 127
    steps = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return scales.numpy().tobytes() + steps.flatten()[: len(piece_D)].numpy().tobytes()


def _from_eight_bits(message: runtime_pb2.Tensor, numbers: int) -> Tensor:
    blocks = -(-numbers // _BLOCK)
    if len(message.buffer) != 4 * blocks + numbers:
        raise ValueError(f"{len(message.buffer)} bytes for {numbers} numbers")
    scales = torch.from_numpy(np.frombuffer(message.buffer[: 4 * blocks], np.float32).copy())
    steps = torch.from_numpy(np.frombuffer(message.buffer[4 * blocks :], np.int8).astype(np.float32))
    return steps * scales.repeat_interleave(_BLOCK)[:numbers]


_READ: Final = {_SPARSE: _sparse, _INT8: _from_eight_bits}
