"""Message <-> bytes: the only file that knows the wire format. Nothing is ever pickled.

A frame, little-endian, version 1:

    magic "MGLS" | version u8 | kind u8 | tensors u8 | party length u8 | step u64 | frame bytes u64 | CRC-32 u32 | 0 u32
    party in UTF-8
    per tensor: name length u8 | dtype u8 | dimensions u8 | name in UTF-8 | sizes u64 ...
    per tensor: zeros up to a multiple of 8, then its raw values

The checksum covers everything behind the fixed part. It finds damage, not forgery: that is the transport's business.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Final, cast

import torch
from torch import Tensor

from milkglass.errors import MessageError
from milkglass.messages import KINDS, Kind, Message

VERSION: Final = 1
_MAGIC: Final = b"MGLS"
_FIXED: Final = struct.Struct("<4sBBBBQQI4x")
_TENSOR: Final = struct.Struct("<BBB")
_SIZE: Final = struct.Struct("<Q")
_ALIGNMENT: Final = 8
_MOST_DIMENSIONS: Final = 8
_MOST_ELEMENTS: Final = 2**40

DTYPES: Final = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
"""What may travel. The position is the code on the wire: add at the end only."""


def encode(message: Message) -> bytearray:
    """The frame of a message. Raises MessageError for a dtype or a shape that may not travel."""
    head = bytearray(message.party.encode())
    party_length = len(head)
    if party_length > 255 or len(message.tensors) > 255:
        raise MessageError(f"message {message.kind!r}: a party's name and the tensor count must fit in a byte")
    for name, tensor in message.tensors.items():
        head += _describe(name, tensor)
    total = _FIXED.size + len(head)
    for tensor in message.tensors.values():
        total += -total % _ALIGNMENT + tensor.numel() * tensor.element_size()
    frame = bytearray(total)
    offset = _FIXED.size
    frame[offset : offset + len(head)] = head
    offset += len(head)
    for tensor in message.tensors.values():
        offset += -offset % _ALIGNMENT
        size = tensor.numel() * tensor.element_size()
        if size:
            target = torch.frombuffer(frame, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
            target.view(tensor.shape).copy_(tensor)
        offset += size
    checksum = zlib.crc32(memoryview(frame)[_FIXED.size :])
    kind = KINDS.index(message.kind)
    _FIXED.pack_into(frame, 0, _MAGIC, VERSION, kind, len(message.tensors), party_length, message.step, total, checksum)
    return frame


def decode(frame: bytearray) -> Message:
    """The message in a frame. Its tensors share the frame's memory: keep the frame's bytes unchanged.

    Raises MessageError, before any memory is taken, when the frame is truncated, damaged, or claims what cannot be.
    """
    if len(frame) < _FIXED.size:
        raise MessageError(f"frame of {len(frame)} bytes: truncated; the fixed part alone has {_FIXED.size}")
    magic, version, kind, count, party_length, step, total, checksum = _FIXED.unpack_from(frame)
    if magic != _MAGIC:
        raise MessageError(f"frame starts with {magic!r}; expected {_MAGIC!r}: not a milkglass frame")
    if version != VERSION:
        raise MessageError(f"frame of version {version}; this milkglass speaks version {VERSION}")
    if total != len(frame):
        raise MessageError(f"frame of {len(frame)} bytes says that it has {total}: truncated, or two frames in one")
    if kind >= len(KINDS):
        raise MessageError(f"frame of kind {kind}; known are 0 to {len(KINDS) - 1}")
    if zlib.crc32(memoryview(frame)[_FIXED.size :]) != checksum:
        raise MessageError("frame is damaged: its checksum does not fit")
    try:
        party = bytes(frame[_FIXED.size : _FIXED.size + party_length]).decode()
        tensors = dict(_tensors(frame, _FIXED.size + party_length, count))
    except (struct.error, UnicodeDecodeError) as error:
        raise MessageError(f"frame is malformed: {error}") from None
    if len(tensors) != count:
        raise MessageError("frame is malformed: two tensors of one name")
    return Message(cast(Kind, KINDS[kind]), party, step, tensors)


def _describe(name: str, tensor: Tensor) -> bytes:
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise MessageError(f"tensor {name!r} is {tensor.dtype}; only these travel: {known}")
    if tensor.dim() > _MOST_DIMENSIONS:
        raise MessageError(f"tensor {name!r} has {tensor.dim()} dimensions; at most {_MOST_DIMENSIONS} travel")
    text = name.encode()
    if len(text) > 255:
        raise MessageError(f"a tensor's name of {len(text)} bytes does not fit in a frame; at most 255 do")
    head = _TENSOR.pack(len(text), DTYPES.index(tensor.dtype), tensor.dim())
    return head + text + b"".join(_SIZE.pack(size) for size in tensor.shape)


def _tensors(frame: bytearray, offset: int, count: int) -> Iterator[tuple[str, Tensor]]:
    heads: list[tuple[str, torch.dtype, list[int]]] = []
    for _ in range(count):
        name_length, code, dimensions = _TENSOR.unpack_from(frame, offset)
        offset += _TENSOR.size
        if code >= len(DTYPES) or dimensions > _MOST_DIMENSIONS:
            raise MessageError(f"frame is malformed: dtype code {code}, {dimensions} dimensions")
        name = bytes(frame[offset : offset + name_length]).decode()
        offset += name_length
        shape = [_SIZE.unpack_from(frame, offset + 8 * axis)[0] for axis in range(dimensions)]
        offset += 8 * dimensions
        heads.append((name, DTYPES[code], shape))
    for name, dtype, shape in heads:
        elements = math.prod(shape)
        size = elements * dtype.itemsize
        claimed = math.prod(max(length, 1) for length in shape)  # an empty tensor may claim nothing huge either
        if claimed > _MOST_ELEMENTS or offset + (-offset % _ALIGNMENT) + size > len(frame):
            raise MessageError(f"frame is malformed: tensor {name!r} of shape {shape} is longer than the frame")
        offset += -offset % _ALIGNMENT
        if elements:
            yield name, torch.frombuffer(frame, dtype=dtype, count=elements, offset=offset).reshape(shape)
        else:
            yield name, torch.empty(shape, dtype=dtype)
        offset += size
    if offset != len(frame):
        raise MessageError(f"frame is malformed: {len(frame) - offset} bytes behind its last tensor")


def shapes(tensors: Mapping[str, Tensor]) -> str:
    """The tensors of a message in words, for error lines: `z float32 64x16x4x4, labels int64 64`."""
    return ", ".join(
        f"{name} {str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}"
        for name, tensor in tensors.items()
    )
