"""Pieces of a vector on their way: what was sent is what is read, and what a stranger makes up is refused.

Legend: D numbers of a piece.
"""

from __future__ import annotations

import contextlib
import resource
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from milkglass.collaboration.duty import Averaging, digest_of
from milkglass.collaboration.engine import runtime_pb2
from milkglass.collaboration.wire_vector import PIECE, Compress, VectorCodec, pieces
from milkglass.errors import MessageError

FORMS: tuple[Compress, ...] = ("none", "fp16", "int8", "gaussian_k")
LARGEST_HALF = 65504.0
TINY = float(torch.finfo(torch.float32).tiny)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def vector(numbers: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(numbers, generator=torch.Generator().manual_seed(seed)) * scale


def sparse(numbers: int, kept: int) -> Tensor:
    piece_D = torch.zeros(numbers)
    places = torch.randperm(numbers, generator=torch.Generator().manual_seed(numbers))[:kept]
    piece_D[places] = vector(kept)
    return piece_D


def read(form: Compress, piece_D: Tensor) -> Tensor:
    """What comes out at the other end, after the wire."""
    message = VectorCodec(form).pack(piece_D)
    received = runtime_pb2.Tensor.FromString(message.SerializeToString())
    return VectorCodec("none").unpack(received, len(piece_D))  # every volunteer reads every form


@given(st.lists(floats, min_size=1, max_size=40))
def test_whole_numbers_are_exact(numbers: list[float]) -> None:
    piece_D = torch.tensor(numbers, dtype=torch.float32)
    assert torch.equal(read("none", piece_D), piece_D)
    assert torch.equal(read("gaussian_k", piece_D), piece_D)


@pytest.mark.parametrize("kept", [0, 1, 10, 499, 500, 501, 1000])
def test_sparse_is_exact_and_pays(kept: int) -> None:
    piece_D = sparse(1000, kept)
    assert torch.equal(read("gaussian_k", piece_D), piece_D)
    message = VectorCodec("gaussian_k").pack(piece_D)
    assert len(message.buffer) == min(8 * kept, 4000)


@given(st.lists(floats, min_size=1, max_size=40))
def test_halves_are_rounded_to_the_nearest(numbers: list[float]) -> None:
    """To the nearest number of 16 bits, as torch rounds; what is too large becomes the largest."""
    piece_D = torch.tensor(numbers, dtype=torch.float32)
    expected_D = piece_D.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()
    assert torch.equal(read("fp16", piece_D), expected_D)
    assert torch.allclose(expected_D, piece_D.clamp(-LARGEST_HALF, LARGEST_HALF), rtol=2**-11, atol=2**-25)


@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=40), st.integers(0, 1024))
@settings(max_examples=50)
def test_eight_bits_are_within_half_a_step(numbers: list[float], before: int) -> None:
    """A step is 1/127 of the largest of the block; also across blocks."""
    piece_D = torch.cat([vector(before), torch.tensor(numbers, dtype=torch.float32)])
    found_D = read("int8", piece_D)
    for start in range(0, len(piece_D), 1024):
        block = slice(start, start + 1024)
        largest = float(piece_D[block].abs().max())
        error = float((found_D[block].double() - piece_D[block].double()).abs().max())
        assert error <= largest / 254 * (1 + 1e-4) + 127 * TINY


def test_eight_bits_keep_extremes_zero_and_sign() -> None:
    piece_D = torch.tensor([0.0, 2.0, -2.0, 1e-9])
    assert read("int8", piece_D).tolist() == [0, 2, -2, 0]
    assert not read("int8", torch.zeros(5)).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("numbers", [1, 2, 1023, 1024, 1025, PIECE])
def test_every_length(form: Compress, numbers: int) -> None:
    piece_D = vector(numbers)
    found_D = read(form, piece_D)
    assert found_D.shape == (numbers,)
    assert found_D.dtype == torch.float32
    assert torch.allclose(found_D, piece_D, atol=float(piece_D.abs().max()) / 200)
    assert torch.equal(VectorCodec(form).unpack(VectorCodec(form).pack(piece_D), numbers), found_D)


@pytest.mark.parametrize("form", FORMS)
def test_the_sender_reads_the_same(form: Compress) -> None:
    """A reducer counts its own contribution as others would have read it."""
    piece_D = sparse(3000, 400) if form == "gaussian_k" else vector(3000)
    averaging = Averaging(VectorCodec(form), 4.0, robust=False)
    packed = averaging.pack(piece_D)
    assert torch.equal(averaging.read(packed, 0, 3000), read(form, piece_D))
    assert digest_of(packed) == digest_of(averaging.pack(piece_D.clone()))


@pytest.mark.parametrize("form", FORMS)
def test_a_block_is_its_pieces(form: Compress) -> None:
    """Longer than a piece by one: two messages, one of a single number."""
    averaging = Averaging(VectorCodec(form), 4.0, robust=False)
    block_D = vector(PIECE + 1)
    packed = averaging.pack(block_D)
    assert [list(each.size) for each in packed] == [[PIECE], [1]]
    assert torch.allclose(averaging.read(packed, 7, 7 + PIECE + 1), block_D, atol=0.05)
    with pytest.raises(MessageError, match="1 pieces; expected 2"):
        averaging.read(packed[:1], 0, PIECE + 1)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_pieces_cover_a_slice_in_order(start: int, length: int) -> None:
    found = pieces(start, start + length)
    assert sum(stop - begin for begin, stop in found) == length
    assert all(0 < stop - begin <= PIECE for begin, stop in found)
    assert [begin for begin, _ in found] == [start + PIECE * index for index in range(len(found))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(form: Compress, value: float) -> None:
    """By whoever reads a block; fp16 alone makes something finite of infinity, as it does of 1e9."""
    piece_D = sparse(1500, 100)
    piece_D[3] = value
    averaging = Averaging(VectorCodec(form), 4.0, robust=False)
    if form == "fp16" and value == value:
        assert averaging.read(averaging.pack(piece_D), 0, 1500)[3].abs() == LARGEST_HALF
        return
    with pytest.raises(MessageError, match="not finite"):
        averaging.read(averaging.pack(piece_D), 0, 1500)


def message(buffer: bytes, dtype: str, size: list[int], **others: Any) -> runtime_pb2.Tensor:
    return runtime_pb2.Tensor(buffer=buffer, dtype=dtype, size=size, **others)


def places(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}i", *numbers) + bytes(4 * len(numbers))


HOSTILE = {
    "size": message(bytes(16), "float32", [5]),
    "two dimensions": message(bytes(16), "float32", [2, 2]),
    "no size": message(bytes(16), "float32", []),
    "kind": message(bytes(32), "float64", [4]),
    "kind of torch": message(bytes(8), "bfloat16", [4]),
    "no kind": message(bytes(16), "", [4]),
    "objects": message(bytes(16), "object", [4]),
    "short": message(bytes(15), "float32", [4]),
    "shorter": message(bytes(12), "float32", [4]),
    "empty": message(b"", "float32", [4]),
    "long": message(bytes(1 << 20), "float32", [4]),
    "a lookup table": message(bytes(16), "float32", [4], compression=runtime_pb2.UNIFORM_8BIT),
    "bitsandbytes": message(bytes(16), "float32", [4], compression=runtime_pb2.BLOCKWISE_8BIT),
    "scaled": message(bytes(16), "float32", [4], compression=runtime_pb2.MEANSTD_16BIT),
    "quantiles": message(bytes(16), "float32", [4], compression=runtime_pb2.QUANTILE_8BIT),
    "short halves": message(bytes(7), "float32", [4], compression=runtime_pb2.FLOAT16),
    "halves as floats": message(bytes(16), "float32", [4], compression=runtime_pb2.FLOAT16),
    "eight bits, short": message(bytes(7), "int8_blocks", [4]),
    "eight bits, long": message(bytes(9), "int8_blocks", [4]),
    "place beyond": message(places(4), "sparse_float32", [4]),
    "place before": message(places(-1), "sparse_float32", [4]),
    "places twice": message(places(1, 1), "sparse_float32", [4]),
    "places unordered": message(places(2, 1), "sparse_float32", [4]),
    "places that go around": message(places(0, 2**31 - 1, -(2**31), -10), "sparse_float32", [8]),
    "places that come back": message(places(0, 2**31 - 1, -(2**31), -10, 5), "sparse_float32", [8]),
    "too many places": message(places(0, 1, 2, 3, 4), "sparse_float32", [4]),
    "half a value": message(places(1) + bytes(4), "sparse_float32", [4]),
    "odd": message(places(1) + b"x", "sparse_float32", [4]),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("form", FORMS)
def test_hostile_pieces_are_refused(name: str, form: Compress) -> None:
    each = HOSTILE[name]
    with pytest.raises(MessageError):
        VectorCodec(form).unpack(each, 8 if list(each.size) == [8] else 4)


@given(
    st.sampled_from(FORMS),
    st.binary(max_size=64),
    st.sampled_from(["float32", "float16", "int8_blocks", "sparse_float32", "float64", "O", "S4", "<f4"]),
    st.lists(st.integers(0, 2**32 - 1), max_size=2) | st.just([4]),
    st.integers(0, 5),
    st.booleans(),
)
@settings(max_examples=300)
def test_made_up_pieces_are_numbers_or_refused(
    form: Compress, buffer: bytes, dtype: str, size: list[int], compression: int, learns: bool
) -> None:
    made_up = message(buffer, dtype, size, compression=compression, requires_grad=learns)
    try:
        piece_D = VectorCodec(form).unpack(made_up, 4)
    except MessageError:
        return
    assert piece_D.shape == (4,)
    assert piece_D.dtype == torch.float32
    assert not piece_D.requires_grad


@given(st.sampled_from(FORMS), st.data())
@settings(max_examples=200)
def test_damaged_pieces_are_numbers_or_refused(form: Compress, data: st.DataObject) -> None:
    """Bytes of an honest message changed, cut off or added."""
    piece_D = sparse(40, 9)
    honest = VectorCodec(form).pack(piece_D)
    buffer = bytearray(honest.buffer)
    for _ in range(data.draw(st.integers(0, 3))):
        buffer[data.draw(st.integers(0, len(buffer) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(buffer) + 4))
    honest.buffer = bytes(buffer[:cut]) + bytes(max(cut - len(buffer), 0))
    with contextlib.suppress(MessageError):
        assert VectorCodec(form).unpack(honest, 40).shape == (40,)


@pytest.mark.parametrize(
    "made_up",
    [
        message(b"", "sparse_float32", [2**31 - 1]),
        message(b"", "float32", [2**32 - 1]),
        message(bytes(100), "int8_blocks", [2**32 - 1]),
    ],
)
def test_a_promise_of_much_takes_no_memory(made_up: runtime_pb2.Tensor) -> None:
    """The size is what is expected here, not what the message says: nothing is set aside for the rest."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    with pytest.raises(MessageError):
        VectorCodec("none").unpack(made_up, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_places_are_of_the_machine_that_wrote_them_in_order() -> None:
    """By hand: places as int32, then values as float32."""
    buffer = np.array([1, 3], "<i4").tobytes() + np.array([0.5, -2], "<f4").tobytes()
    made = message(buffer, "sparse_float32", [5])
    assert VectorCodec("none").unpack(made, 5).tolist() == [0, 0.5, 0, -2, 0]
    assert VectorCodec("gaussian_k").pack(torch.tensor([0, 0.5, 0, -2, 0])).buffer == buffer
