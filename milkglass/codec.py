"""Message <-> bytes: the only file that knows the wire format. Nothing is ever pickled.

A frame, little-endian, version 2:

    magic "MGLS" | version u8 | kind u8 | tensors u8 | party length u8 | run u64 | step u64 | piece u16 | pieces u16 |
        number u32 | frame bytes u64 | XXH3-64 u64
    party in UTF-8
    per tensor: name length u8 | dtype u8 | dimensions u8 | name in UTF-8 | sizes u64 ...
    per tensor: zeros up to a multiple of 64, then its raw values

The checksum covers all but itself. It finds damage, not forgery: that is the transport's business. A message of a run
has exactly one frame: whatever `decode` accepts, `encode` makes again, byte for byte.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast, final

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64

from milkglass.errors import MessageError
from milkglass.messages import KINDS, Kind, Message

VERSION: Final = 2
_MAGIC: Final = b"MGLS"
_FIXED: Final = struct.Struct("<4sBBBBQQHHIQQ")
_CHECKSUM: Final = struct.Struct("<Q")
_CHECKED_FIRST: Final = _FIXED.size - _CHECKSUM.size
_TENSOR: Final = struct.Struct("<BBB")
_MOST_DIMENSIONS: Final = 8
_SIZES: Final = tuple(struct.Struct(f"<{dimensions}Q") for dimensions in range(_MOST_DIMENSIONS + 1))
_ALIGNMENT: Final = 64
_ZEROS: Final = tuple(bytes(length) for length in range(_ALIGNMENT))
_KERNEL_ALIGNMENT: Final = 16  # a matrix product of values aligned to 4 or 8 bytes has other last bits; to 16 the same
_MOST_ELEMENTS: Final = 2**40
_MOST_IN_A_BYTE: Final = 255

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
_IN_NUMPY: Final[tuple[np.dtype[Any], ...]] = tuple(  # numpy has no bfloat16: its bits travel as int16
    np.dtype("int16" if dtype is torch.bfloat16 else str(dtype).removeprefix("torch.")) for dtype in DTYPES
)
_ITEM_BYTES: Final = tuple(dtype.itemsize for dtype in DTYPES)
_CODES: Final = {dtype: code for code, dtype in enumerate(DTYPES)}
_KIND_CODES: Final = {kind: code for code, kind in enumerate(KINDS)}

Frame = bytes | bytearray | memoryview
_Head = tuple[str, int, tuple[int, ...]]
"""What a frame says of a tensor: its name, its dtype's code, its shape."""

with warnings.catch_warnings():
    # torch warns once in a process of a tensor in memory that is not to be written to; `decode` makes them knowingly
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(bytes(1), np.uint8))


@final
@dataclass(frozen=True)
class Header:
    """Whose frame it is and what for, as it says itself; frame_bytes: how long the whole frame should be."""

    kind: Kind
    party: str
    step: int
    piece: int
    pieces: int
    number: int
    run: int
    frame_bytes: int


@final
@dataclass(frozen=True)
class Allowed:
    """What a tensor may be. shape: None stands for any size from 0 to `rows`; rows: None for those of the limits."""

    shape: tuple[int | None, ...]
    dtypes: frozenset[torch.dtype]
    rows: int | None = None

    def fits(self, dtype: torch.dtype, shape: tuple[int, ...], rows: int) -> bool:
        """Whether such a tensor was agreed on, under limits of `rows`."""
        if dtype not in self.dtypes or len(shape) != len(self.shape):
            return False
        most = rows if self.rows is None else self.rows
        return all(
            size <= most if agreed is None else size == agreed for size, agreed in zip(shape, self.shape, strict=True)
        )

    def most_bytes(self, rows: int) -> int:
        """How many bytes the values of such a tensor have at most, under limits of `rows`."""
        most = rows if self.rows is None else self.rows
        elements = math.prod(most if size is None else size for size in self.shape)
        return elements * max(dtype.itemsize for dtype in self.dtypes)

    def words(self, rows: int) -> str:
        """For error lines: `float16 or float32 (up to 64)x16x4x4`."""
        most = rows if self.rows is None else self.rows
        dtypes = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self.dtypes))
        return f"{dtypes} {_by([f'(up to {most})' if size is None else size for size in self.shape])}"


@final
@dataclass(frozen=True)
class Limits:
    """What may come from one direction.

    frame_bytes: no frame may be longer; see `frame_bound`. kinds: kind -> all the tensors that it holds. rows: what
    None means in their shapes.
    """

    frame_bytes: int
    kinds: Mapping[str, Mapping[str, Allowed]]
    rows: int


def frame_bound(kinds: Mapping[str, Mapping[str, Allowed]], rows: int) -> int:
    """The length in bytes that no legal frame of these kinds exceeds (the longest is up to 63 bytes shorter)."""
    longest = 0
    for agreed in kinds.values():
        heads = sum(_TENSOR.size + len(name.encode()) + _SIZES[len(a.shape)].size for name, a in agreed.items())
        values = sum(_aligned(allowed.most_bytes(rows)) for allowed in agreed.values())
        before = _FIXED.size + _MOST_IN_A_BYTE + heads
        longest = max(longest, _aligned(before) + values if agreed else before)
    return longest


def encode(message: Message, run: int = 0) -> bytes:
    """The frame of a message of a run. Raises MessageError for what may not travel.

    A contiguous tensor is copied once, from its memory into the frame.
    """
    try:
        party = message.party.encode()
        heads = [_describe(name, tensor) for name, tensor in message.tensors.items()]
    except UnicodeEncodeError as error:
        raise MessageError(f"message {message.kind!r}: a name is no Unicode text: {error}") from None
    if len(party) > _MOST_IN_A_BYTE or len(heads) > _MOST_IN_A_BYTE:
        raise MessageError(f"message {message.kind!r}: a party's name and the tensor count must fit in a byte")
    front = b"".join((party, *heads))
    total = _FIXED.size + len(front)
    parts: list[Any] = [front]
    for tensor in message.tensors.values():
        values = _values(tensor)
        parts += (_ZEROS[-total % _ALIGNMENT], values)
        total = _aligned(total) + values.nbytes
    kind = _KIND_CODES[message.kind]
    about = (run, message.step, message.piece, message.pieces, message.number)
    try:
        fixed = _FIXED.pack(_MAGIC, VERSION, kind, len(heads), len(party), *about, total, 0)[:_CHECKED_FIRST]
    except struct.error:
        raise MessageError(
            f"message {message.kind!r}: run {run}, step {message.step}, piece {message.piece} of {message.pieces}, "
            f"number {message.number}; at most 64, 64, 16 and 32 bits travel"
        ) from None
    checksum = xxh3_64(fixed)
    for part in parts:
        checksum.update(part)
    return b"".join((fixed, _CHECKSUM.pack(checksum.intdigest()), *parts))


def decode(frame: Frame, limits: Limits | None = None, run: int | None = None) -> Message:
    """The message in a frame. Its tensors share the frame's memory: never write to them, nor to the frame.

    limits: what was agreed; run: the one that the frame must belong to. Raises MessageError, before any tensor is
    made, when the frame is truncated, damaged, claims what cannot be, or is not what was agreed. Values are copied
    only where the frame's address is no multiple of 16: torch's kernels would give other last bits there.
    """
    view = memoryview(frame).cast("B")
    _, _, kind, count, party_length, its_run, step, piece, pieces, number, total, checksum = _fixed(view)
    if total != len(view):
        raise MessageError(f"frame of {len(view)} bytes says that it has {total}: truncated, or two frames in one")
    if limits is not None and total > limits.frame_bytes:
        raise MessageError(f"frame of {total} bytes; at most {limits.frame_bytes} were agreed")
    found = xxh3_64(view[:_CHECKED_FIRST])
    found.update(view[_FIXED.size :])
    if found.intdigest() != checksum:
        raise MessageError("frame is damaged: its checksum does not fit")
    name = _kind(kind)
    if run is not None and its_run != run:
        raise MessageError(f"frame of another run: {its_run:016x}; this one is {run:016x}")
    try:
        party = str(view[_FIXED.size : _FIXED.size + party_length], "utf-8")
        heads, offset = _heads(view, _FIXED.size + party_length, count)
    except struct.error:
        raise MessageError(f"frame is malformed: what it says of {count} tensors is cut off") from None
    except UnicodeDecodeError as error:
        raise MessageError(f"frame is malformed: a name is not UTF-8: {error}") from None
    if limits is not None:
        _check_agreed(limits, name, party, heads)
    offsets = _offsets(view, heads, offset)
    tensors = {head[0]: _tensor(view, head, offset) for head, offset in zip(heads, offsets, strict=True)}
    return Message(name, party, step, tensors, piece, pieces, number)


def peek_header(frame: Frame) -> Header:
    """What a frame, or the beginning of one, says about itself, for logs and journals: neither checked nor agreed."""
    view = memoryview(frame).cast("B")
    _, _, kind, _, party_length, run, step, piece, pieces, number, total, _ = _fixed(view)
    end = _FIXED.size + party_length
    if len(view) < end:
        raise MessageError(f"frame of {len(view)} bytes: truncated; its header alone has {end}")
    try:
        party = str(view[_FIXED.size : end], "utf-8")
    except UnicodeDecodeError as error:
        raise MessageError(f"frame is malformed: a name is not UTF-8: {error}") from None
    return Header(_kind(kind), party, step, piece, pieces, number, run, total)


def glance(frame: Frame) -> tuple[Kind, int, int]:
    """Kind, number and checksum that a frame claims: a part of `peek_header` in a tenth of its time."""
    fields = _fixed(memoryview(frame))
    return _kind(fields[2]), fields[9], fields[11]


def shapes(tensors: Mapping[str, Tensor]) -> str:
    """The tensors of a message in words, for error lines: `z float32 64x16x4x4, labels int64 64`."""
    return ", ".join(
        f"{name} {str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}"
        for name, tensor in tensors.items()
    )


def _aligned(offset: int) -> int:
    return offset + -offset % _ALIGNMENT


def _by(sizes: list[int | str] | tuple[int, ...]) -> str:
    return "x".join(map(str, sizes)) or "scalar"


def _kind(code: int) -> Kind:
    if code >= len(KINDS):
        raise MessageError(f"frame of kind {code}; known are 0 to {len(KINDS) - 1}")
    return cast(Kind, KINDS[code])


def _describe(name: str, tensor: Tensor) -> bytes:
    code = _CODES.get(tensor.dtype)
    shape = tensor.shape
    if code is None:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise MessageError(f"tensor {name!r} is {tensor.dtype}; only these travel: {known}")
    if len(shape) > _MOST_DIMENSIONS:
        raise MessageError(f"tensor {name!r} has {len(shape)} dimensions; at most {_MOST_DIMENSIONS} travel")
    if 0 in shape and _claimed(shape) > _MOST_ELEMENTS:
        raise MessageError(f"tensor {name!r} is empty, and its shape {tuple(shape)} too large to travel")
    text = name.encode()
    if len(text) > _MOST_IN_A_BYTE:
        raise MessageError(f"a tensor's name of {len(text)} bytes does not fit in a frame; at most 255 do")
    return _TENSOR.pack(len(text), code, len(shape)) + text + _SIZES[len(shape)].pack(*shape)


def _claimed(shape: tuple[int, ...]) -> int:
    """The elements of a shape; an empty one counts as well: it may not claim a huge size beside its 0 either."""
    return math.prod(size or 1 for size in shape)


def _values(tensor: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """The tensor's own memory where it is contiguous and on the CPU."""
    if not tensor.is_cpu:
        tensor = tensor.cpu()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return tensor.numpy()


def _fixed(view: memoryview) -> tuple[Any, ...]:
    if len(view) < _FIXED.size:
        raise MessageError(f"frame of {len(view)} bytes: truncated; the fixed part alone has {_FIXED.size}")
    fields = _FIXED.unpack_from(view)
    if fields[0] != _MAGIC:
        raise MessageError(f"frame starts with {fields[0]!r}; expected {_MAGIC!r}: not a milkglass frame")
    if fields[1] != VERSION:
        raise MessageError(f"frame of version {fields[1]}; this milkglass speaks version {VERSION}")
    return fields


def _heads(view: memoryview, offset: int, count: int) -> tuple[list[_Head], int]:
    """What the frame says of its tensors, and where that ends."""
    heads: list[_Head] = []
    for _ in range(count):
        name_length, code, dimensions = _TENSOR.unpack_from(view, offset)
        if code >= len(DTYPES) or dimensions > _MOST_DIMENSIONS:
            raise MessageError(f"frame is malformed: dtype code {code}, {dimensions} dimensions")
        offset += _TENSOR.size
        name = str(view[offset : offset + name_length], "utf-8")
        offset += name_length
        sizes = _SIZES[dimensions]
        heads.append((name, code, sizes.unpack_from(view, offset)))
        offset += sizes.size
    if count > 1 and len({name for name, _, _ in heads}) != count:
        raise MessageError("frame is malformed: two tensors of one name")
    return heads, offset


def _check_agreed(limits: Limits, kind: str, party: str, heads: list[_Head]) -> None:
    agreed = limits.kinds.get(kind)
    if agreed is None:
        raise MessageError(f"frame of kind {kind!r} from {party!r}; expected {', '.join(limits.kinds) or 'none'}")
    for name, code, shape in heads:
        allowed = agreed.get(name)
        if allowed is None:
            raise MessageError(f"{kind!r} of {party!r} holds {name!r}; expected {', '.join(agreed) or 'no tensor'}")
        if not allowed.fits(DTYPES[code], shape, limits.rows):
            raise MessageError(
                f"{kind!r} of {party!r}: {name} is {str(DTYPES[code]).removeprefix('torch.')} {_by(shape)}; "
                f"expected {allowed.words(limits.rows)}"
            )
    if len(heads) != len(agreed):
        held = {name for name, _, _ in heads}
        raise MessageError(f"{kind!r} of {party!r} lacks {', '.join(name for name in agreed if name not in held)}")


def _offsets(view: memoryview, heads: list[_Head], offset: int) -> list[int]:
    """Where the values of each tensor begin. Raises MessageError unless they fill the frame, with zeros between."""
    offsets: list[int] = []
    length = len(view)
    for name, code, shape in heads:
        start = offset + -offset % _ALIGNMENT
        elements = math.prod(shape)
        end = start + elements * _ITEM_BYTES[code]
        if end > length or (not elements and _claimed(shape) > _MOST_ELEMENTS):
            raise MessageError(f"frame is malformed: tensor {name!r} of shape {list(shape)} is longer than the frame")
        if view[offset:start] != _ZEROS[start - offset]:
            raise MessageError(f"frame is malformed: something other than zeros before tensor {name!r}")
        offsets.append(start)
        offset = end
    if offset != length:
        raise MessageError(f"frame is malformed: it has {length} bytes; its header and tensors have {offset}")
    return offsets


def _tensor(view: memoryview, head: _Head, offset: int) -> Tensor:
    name, code, shape = head
    array = np.ndarray(shape, _IN_NUMPY[code], view, offset)
    dtype = DTYPES[code]
    if dtype is torch.bool and array.size and array.view(np.uint8).max() > 1:
        raise MessageError(f"frame is malformed: tensor {name!r} is bool and holds bytes other than 0 and 1")
    tensor = torch.from_numpy(array)
    if tensor.data_ptr() % _KERNEL_ALIGNMENT:
        tensor = torch.from_numpy(array.copy())
    return tensor.view(dtype) if dtype is torch.bfloat16 else tensor
