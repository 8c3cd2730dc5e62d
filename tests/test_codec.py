"""decode(encode(m)) == m, and whatever is not a whole, honest frame of what was agreed raises."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from xxhash import xxh3_64

from milkglass.codec import DTYPES, Allowed, Limits, decode, encode, frame_bound, peek_header
from milkglass.errors import MessageError
from milkglass.messages import KINDS, Kind, Message

FLOATS = frozenset({torch.float32, torch.float16})
AGREED = {
    "activations": {
        "activations": Allowed((None, 3, 2), FLOATS),
        "labels": Allowed((None,), frozenset({torch.int64})),
    },
    "weights": {"sealed": Allowed((None,), frozenset({torch.uint8}), rows=1000)},
    "collect": {},
}
LIMITS = Limits(frame_bound(AGREED, rows=8), AGREED, rows=8)
FIXED = 48


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _bits(tensor: Tensor) -> bytes:
    values = tensor.contiguous()
    return (values.view(torch.int16) if values.dtype is torch.bfloat16 else values).numpy().tobytes()


def _agreed_message(rows: int = 4) -> Message:
    tensors = {"activations": torch.rand(rows, 3, 2), "labels": torch.arange(rows)}
    return Message("activations", "hospital-a", 7, tensors)


def _forge(frame: bytes, position: int, value: bytes) -> bytes:
    """A frame changed at `position`, with a checksum that fits: damage that only a forger makes."""
    forged = bytearray(frame)
    forged[position : position + len(value)] = value
    checksum = xxh3_64(forged[: FIXED - 8])
    checksum.update(forged[FIXED:])
    forged[FIXED - 8 : FIXED] = struct.pack("<Q", checksum.intdigest())
    return bytes(forged)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0, 3), (2, 3, 4, 5), (1,) * 8])
@pytest.mark.parametrize("held_in", [bytes, bytearray, memoryview])
def test_decode_of_encode(
    dtype: torch.dtype, shape: tuple[int, ...], held_in: Callable[[bytes], bytes | bytearray | memoryview]
) -> None:
    values = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    message = Message("activations", "hospital-a", 2**40, {"z": values, "other": torch.arange(3)}, 2, 5, 2**31)
    decoded = decode(held_in(encode(message, run=9)), run=9)
    assert (decoded.kind, decoded.party, decoded.step) == (message.kind, message.party, message.step)
    assert (decoded.piece, decoded.pieces) == (2, 5)
    assert list(decoded.tensors) == ["z", "other"]
    assert _same(decoded.tensors["z"], values)
    assert _same(decoded.tensors["other"], torch.arange(3))


@st.composite
def _tensors(draw: st.DrawFn) -> Tensor:
    """Any bits of any dtype, in any order in memory: turned, every second one, one value for all."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=8).filter(lambda shape: math.prod(shape) <= 200))
    size = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    values = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    tensor = (values > 127 if dtype is torch.bool else values.view(dtype)).reshape(shape)
    turned, every_second, repeated = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    if shape and turned:
        tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    if shape and every_second:
        tensor = tensor[..., ::2]
    if repeated and len(shape) < 8:
        tensor = tensor.unsqueeze(0).expand(draw(st.integers(0, 3)), *tensor.shape)
    return tensor


NAMES = st.text(st.characters(codec="utf-8"), max_size=60)


@given(
    st.sampled_from(KINDS),
    NAMES,
    st.integers(0, 2**64 - 1),
    st.dictionaries(NAMES, _tensors(), max_size=4),
    st.integers(1, 2**16 - 1).flatmap(lambda pieces: st.tuples(st.integers(0, pieces - 1), st.just(pieces))),
    st.integers(0, 2**64 - 1),
)
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_any_message_comes_back_bit_for_bit(
    kind: Kind, party: str, step: int, tensors: dict[str, Tensor], piece: tuple[int, int], run: int
) -> None:
    frame = encode(Message(kind, party, step, tensors, *piece), run)
    decoded = decode(frame, run=run)
    assert (decoded.kind, decoded.party, decoded.step) == (kind, party, step)
    assert (decoded.piece, decoded.pieces) == piece
    assert list(decoded.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert decoded.tensors[name].dtype == tensor.dtype
        assert decoded.tensors[name].shape == tensor.shape
        assert _bits(decoded.tensors[name]) == _bits(tensor)
    assert encode(decoded, run) == frame


def test_tensors_are_read_without_a_copy() -> None:
    frame = bytearray(encode(Message("queries", "c", 0, {"z": torch.zeros(4)})))
    decoded = decode(frame).tensors["z"]
    frame[-4:] = struct.pack("<f", 7.0)
    assert decoded[-1] == 7.0
    whole = encode(Message("queries", "c", 0, {"z": torch.arange(200.0)}))
    addresses = [decode(whole).tensors["z"].data_ptr() for _ in range(2)]
    assert addresses[0] == addresses[1]


def test_tensors_keep_their_frame_alive() -> None:
    tensor = decode(encode(Message("queries", "c", 0, {"z": torch.arange(2**16)}))).tensors["z"]
    others = [bytes([9]) * 2**19 for _ in range(8)]
    assert _same(tensor, torch.arange(2**16))
    assert len(others) == 8


def test_a_read_only_frame_raises_no_warning() -> None:
    program = (
        "import torch; from milkglass.codec import decode, encode; from milkglass.messages import Message; "
        "decode(encode(Message('queries', 'c', 0, {'z': torch.zeros(4), 'h': torch.zeros(2, dtype=torch.bfloat16)})))"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("shift", range(0, 64, 8))
def test_kernels_give_the_same_bits_wherever_a_frame_lies(shift: int) -> None:
    generator = torch.Generator().manual_seed(1)
    z_BD, weight_KD = torch.randn(16, 64, generator=generator), torch.randn(10, 64, generator=generator)
    x_BCHW, filters = torch.randn(2, 3, 32, 32, generator=generator), torch.randn(8, 3, 3, 3, generator=generator)
    bias_K = torch.randn(10, generator=generator)
    frame = encode(Message("activations", "c", 0, {"z": z_BD, "x": x_BCHW}))
    decoded = decode(memoryview(bytes(shift) + frame)[shift:])
    z, x = decoded.tensors["z"], decoded.tensors["x"]
    assert z.data_ptr() % 16 == x.data_ptr() % 16 == 0
    assert torch.equal(F.linear(z, weight_KD, bias_K), F.linear(z_BD, weight_KD, bias_K))
    assert torch.equal(F.conv2d(x, filters), F.conv2d(x_BCHW, filters))


def test_every_truncation_raises() -> None:
    frame = encode(Message("activations", "c", 3, {"z": torch.arange(5.0), "y": torch.arange(2)}))
    for length in range(len(frame)):
        with pytest.raises(MessageError):
            decode(frame[:length])
    with pytest.raises(MessageError, match="two frames in one"):
        decode(frame + bytes(1))


def test_every_flipped_bit_raises() -> None:
    frame = encode(Message("activations", "client", 3, {"z": torch.arange(5.0)}), run=5)
    for position in range(len(frame)):
        for bit in range(8):
            damaged = bytearray(frame)
            damaged[position] ^= 1 << bit
            with pytest.raises(MessageError):
                decode(damaged)


def test_forged_frames_raise() -> None:
    frame = encode(Message("activations", "c", 3, {"z": torch.arange(4.0), "y": torch.ones(3, dtype=torch.bool)}))
    first = FIXED + 1  # fixed part and party
    decode(_forge(frame, first, frame[first : first + 1]))  # the forging itself leaves a good frame
    shape = first + 3 + 1
    second = shape + 8
    for position, value, words in (
        (0, b"X", "not a milkglass frame"),
        (4, b"\x01", "version 1; this milkglass speaks version 2"),
        (5, b"\xff", "kind 255; known are 0 to"),
        (6, b"\x01", "other than zeros before tensor 'z'"),
        (6, b"\x03", "malformed"),
        (7, b"\xff", "malformed"),
        (24, b"\x01", "piece 1 of 1"),
        (26, b"\x00", "piece 0 of 0"),
        (32, struct.pack("<Q", 2**63), "says that it has"),
        (FIXED, b"\xff", "a name is not UTF-8"),
        (first, b"\xff", "malformed"),  # name length
        (first + 1, b"\xff", "dtype code 255"),
        (first + 2, b"\x09", "9 dimensions"),
        (shape, struct.pack("<Q", 2**63), "longer than the frame"),
        (shape, struct.pack("<Q", 500), "longer than the frame"),
        (shape, struct.pack("<Q", 3), "other than zeros before tensor 'y'"),
        (second + 3, b"z", "two tensors of one name"),
        (second + 4, b"\x02", "its header and tensors have"),
        (second + 12, b"\x01", "other than zeros before tensor 'z'"),
        (len(frame) - 1, b"\x02", "'y' is bool and holds bytes other than 0 and 1"),
    ):
        with pytest.raises(MessageError, match=words):
            decode(_forge(frame, position, value))


def test_a_huge_empty_shape_is_refused_on_both_sides() -> None:
    frame = encode(Message("activations", "c", 3, {"z": torch.zeros(0, 1, 1)}))
    shape = FIXED + 1 + 3 + 1
    with pytest.raises(MessageError, match="longer than the frame"):
        decode(_forge(frame, shape, struct.pack("<QQQ", 2**39, 2**39, 0)))
    with pytest.raises(MessageError, match="too large to travel"):
        encode(Message("activations", "c", 3, {"z": torch.zeros(2**30, 2**20, 0)}))


def test_what_was_agreed_passes_its_limits() -> None:
    assert _same(decode(encode(_agreed_message(8)), LIMITS).tensors["labels"], torch.arange(8))
    decode(encode(_agreed_message(0)), LIMITS)
    decode(encode(Message("weights", "c", 0, {"sealed": torch.zeros(1000, dtype=torch.uint8)})), LIMITS)
    decode(encode(Message("collect", "c", 0)), LIMITS)


def _with(**tensors: Tensor) -> Message:
    return Message("activations", "hospital-a", 7, {**_agreed_message().tensors, **tensors})


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (Message("queries", "c", 0), "frame of kind 'queries' from 'c'; expected activations, weights, collect"),
        (
            _agreed_message(9),
            "activations is float32 9x3x2; expected float16 or float32 (up to 8)x3x2",
        ),
        (_with(activations=torch.zeros(4, 3, 3)), "activations is float32 4x3x3; expected float16 or float32 (up to"),
        (_with(activations=torch.zeros(4, 6)), "activations is float32 4x6; expected"),
        (_with(activations=torch.zeros(4, 3, 2).double()), "activations is float64 4x3x2; expected"),
        (_with(labels=torch.tensor(1)), "labels is int64 scalar; expected int64 (up to 8)"),
        (_with(extra=torch.zeros(1)), "'activations' of 'hospital-a' holds 'extra'; expected activations, labels"),
        (
            Message("activations", "c", 0, {"activations": torch.zeros(4, 3, 2)}),
            "'activations' of 'c' lacks labels",
        ),
        (Message("collect", "c", 0, {"z": torch.zeros(1)}), "'collect' of 'c' holds 'z'; expected no tensor"),
        (
            Message("weights", "c", 0, {"sealed": torch.zeros(1001, dtype=torch.uint8)}),
            "sealed is uint8 1001; expected uint8 (up to 1000)",
        ),
    ],
)
def test_what_was_not_agreed_is_refused_with_what_was(message: Message, words: str) -> None:
    frame = encode(message)
    decode(frame)
    with pytest.raises(MessageError, match=re.escape(words)):
        decode(frame, LIMITS)


def test_a_frame_that_is_too_long_is_refused_before_it_is_read() -> None:
    frame = encode(_agreed_message())
    damaged = frame[:-1] + bytes([frame[-1] ^ 1])
    decode(frame, Limits(len(frame), AGREED, 8))
    with pytest.raises(MessageError, match=rf"frame of {len(frame)} bytes; at most {len(frame) - 1} were agreed"):
        decode(damaged, Limits(len(frame) - 1, AGREED, 8))


@given(st.integers(0, 40), st.integers(0, 20), st.integers(1, 300))
@settings(max_examples=50, deadline=None, database=None, derandomize=True)
def test_the_longest_legal_frame_is_just_within_the_bound(rows: int, width: int, sealed: int) -> None:
    agreed = {
        "activations": {
            "z": Allowed((None, width), frozenset({torch.float64, torch.float16})),
            "labels": Allowed((None,), frozenset({torch.int64})),
        },
        "weights": {"sealed": Allowed((None,), frozenset({torch.uint8}), rows=sealed)},
        "collect": {},
    }
    bound = frame_bound(agreed, rows)
    party = "p" * 255
    frames = (
        encode(
            Message("activations", party, 0, {"z": torch.zeros(rows, width).double(), "labels": torch.arange(rows)})
        ),
        encode(Message("weights", party, 0, {"sealed": torch.zeros(sealed, dtype=torch.uint8)})),
        encode(Message("collect", party, 0)),
    )
    for frame in frames:
        decode(frame, Limits(bound, agreed, rows))
    assert 0 <= bound - max(map(len, frames)) < 64


def test_a_frame_of_another_run_is_refused() -> None:
    frame = encode(_agreed_message(), run=2**63 + 1)
    decode(frame, LIMITS, run=2**63 + 1)
    with pytest.raises(MessageError, match="frame of another run: 8000000000000001; this one is 0000000000000001"):
        decode(frame, LIMITS, run=1)


def test_a_header_is_read_from_a_frames_beginning() -> None:
    frame = encode(Message("gradients", "päivi", 2**50, {"z": torch.zeros(9)}, 3, 4), run=2**60)
    header = peek_header(frame[: FIXED + len("päivi".encode())])
    assert (header.kind, header.party, header.step, header.run) == ("gradients", "päivi", 2**50, 2**60)
    assert (header.piece, header.pieces, header.frame_bytes) == (3, 4, len(frame))
    for beginning in (b"", frame[: FIXED - 1], frame[:FIXED], _forge(frame, FIXED, b"\xff"), _forge(frame, 5, b"\xff")):
        with pytest.raises(MessageError):
            peek_header(beginning)


def test_what_may_not_travel() -> None:
    with pytest.raises(MessageError, match="complex64; only these travel: float32"):
        encode(Message("activations", "c", 0, {"z": torch.zeros(2, dtype=torch.complex64)}))
    with pytest.raises(MessageError, match="at most 8"):
        encode(Message("activations", "c", 0, {"z": torch.zeros((1,) * 9)}))
    with pytest.raises(MessageError, match="detach"):
        Message("activations", "c", 0, {"z": torch.zeros(2, requires_grad=True)})
    with pytest.raises(MessageError, match="kind 'gossip' is not known; known: activations"):
        Message("gossip", "c", 0)  # type: ignore[arg-type]
    with pytest.raises(MessageError, match="name of 256 bytes does not fit"):
        encode(Message("activations", "c", 0, {"z" * 256: torch.zeros(1)}))
    with pytest.raises(MessageError, match="must fit in a byte"):
        encode(Message("activations", "ä" * 128, 0))
    for party, names in (("\ud800", "z"), ("c", "\udfff")):
        with pytest.raises(MessageError, match="no Unicode text"):
            encode(Message("activations", party, 0, {names: torch.zeros(1)}))
    for message, run in (
        (Message("activations", "c", -1), 0),
        (Message("activations", "c", 2**64), 0),
        (Message("activations", "c", 0, {}, 0, 2**16), 0),
        (Message("activations", "c", 0, number=2**32), 0),
        (Message("activations", "c", 0), 2**64),
    ):
        with pytest.raises(MessageError, match="at most 64, 64, 16 and 32 bits travel"):
            encode(message, run)
