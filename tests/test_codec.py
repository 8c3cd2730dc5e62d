"""decode(encode(m)) == m, and whatever is not a whole, honest frame raises."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch
from torch import Tensor

from milkglass.codec import DTYPES, decode, encode
from milkglass.errors import MessageError
from milkglass.messages import KINDS, Kind, Message


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0, 3), (2, 3, 4, 5), (1,) * 8])
def test_decode_of_encode(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    message = Message("activations", "hospital-a", 2**40, {"z": values, "other": torch.arange(3)})
    decoded = decode(encode(message))
    assert (decoded.kind, decoded.party, decoded.step) == (message.kind, message.party, message.step)
    assert list(decoded.tensors) == ["z", "other"]
    assert _same(decoded.tensors["z"], values)
    assert _same(decoded.tensors["other"], torch.arange(3))


def test_special_values_keep_their_bits() -> None:
    values = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    decoded = decode(encode(Message("gradients", "s", 0, {"v": values}))).tensors["v"]
    assert torch.equal(decoded.view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_non_contiguous_tensors(kind: Kind) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    message = Message(kind, "päivi", 1, {"t": whole.t(), "every second": whole[:, ::2]})
    decoded = decode(encode(message))
    assert decoded.kind == kind
    assert decoded.party == "päivi"
    assert _same(decoded.tensors["t"], whole.t())
    assert _same(decoded.tensors["every second"], whole[:, ::2])


def test_tensors_are_read_without_a_copy() -> None:
    frame = encode(Message("queries", "c", 0, {"z": torch.zeros(4)}))
    decoded = decode(frame).tensors["z"]
    frame[-4:] = struct.pack("<f", 7.0)
    assert decoded[-1] == 7.0


def test_every_truncation_raises() -> None:
    frame = encode(Message("activations", "c", 3, {"z": torch.arange(5.0), "y": torch.arange(2)}))
    for length in range(len(frame)):
        with pytest.raises(MessageError):
            decode(frame[:length])
    with pytest.raises(MessageError):
        decode(frame + bytearray(1))


def test_every_flipped_byte_raises_or_changes_the_header_only() -> None:
    message = Message("activations", "client", 3, {"z": torch.arange(5.0)})
    frame = encode(message)
    for position in range(len(frame)):
        damaged = bytearray(frame)
        damaged[position] ^= 0x10
        try:
            decoded = decode(damaged)
        except MessageError:
            continue
        # what the checksum does not cover: the step, the kind, and the zeros of the fixed part
        assert position < 40
        assert _same(decoded.tensors["z"], message.tensors["z"])


def _forge(frame: bytearray, position: int, value: bytes) -> bytearray:
    """A frame changed at `position`, with a checksum that fits: damage that only a forger makes."""
    forged = bytearray(frame)
    forged[position : position + len(value)] = value
    forged[24:28] = struct.pack("<I", zlib.crc32(memoryview(forged)[32:]))
    return forged


def test_forged_frames_raise() -> None:
    frame = encode(Message("activations", "c", 3, {"z": torch.arange(4.0)}))
    head = 32 + 1  # fixed part and party
    decode(_forge(frame, head, bytes(frame[head : head + 1])))  # the forging itself leaves a good frame
    shape = head + 3 + 1
    for position, value in (
        (head + 1, b"\xff"),  # dtype
        (head + 2, b"\x09"),  # dimensions
        (head, b"\xff"),  # name length
        (shape, struct.pack("<Q", 2**63)),
        (shape, struct.pack("<Q", 5)),
        (shape, struct.pack("<Q", 3)),
        (32, b"\xff"),  # party is not UTF-8
    ):
        with pytest.raises(MessageError):
            decode(_forge(frame, position, value))
    for position, value in ((0, b"X"), (4, b"\x02"), (5, b"\xff"), (6, b"\x02"), (6, b"\x00"), (7, b"\xff")):
        with pytest.raises(MessageError):
            decode(_forge(frame, position, value))


def test_a_huge_shape_is_refused_before_memory_is_taken() -> None:
    frame = encode(Message("activations", "c", 3, {"z": torch.zeros(1, 1, 1)}))
    huge = _forge(frame, 37, struct.pack("<QQQ", 2**39, 2**39, 0))
    with pytest.raises(MessageError, match=r"longer than the frame"):
        decode(huge)


def test_what_may_not_travel() -> None:
    with pytest.raises(MessageError, match="complex64; only these travel: float32"):
        encode(Message("activations", "c", 0, {"z": torch.zeros(2, dtype=torch.complex64)}))
    with pytest.raises(MessageError, match="at most 8"):
        encode(Message("activations", "c", 0, {"z": torch.zeros((1,) * 9)}))
    with pytest.raises(MessageError, match="detach"):
        Message("activations", "c", 0, {"z": torch.zeros(2, requires_grad=True)})
    with pytest.raises(MessageError, match="kind 'weights' is not known; known: activations"):
        Message("weights", "c", 0)  # type: ignore[arg-type]
