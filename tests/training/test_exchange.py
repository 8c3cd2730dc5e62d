"""What travels of a vector, without any process: parts as bytes, and when everything is cheaper."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from milkglass.errors import MessageError
from milkglass.training.exchange import dense_bytes, finite, packed, unpacked

DTYPES = (torch.float32, torch.int32, torch.float64, torch.float16, torch.int8, torch.uint8)


@st.composite
def parts(draw: st.DrawFn) -> dict[str, Tensor]:
    """Named parts, those of more bytes a number first."""
    dtypes = sorted(draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4)), key=lambda d: -d.itemsize)
    sizes = [draw(st.integers(0, 20)) for _ in dtypes]
    return {
        f"part{number}": torch.randint(-100, 100, (size,)).to(dtype)
        for number, (dtype, size) in enumerate(zip(dtypes, sizes, strict=True))
    }


@settings(max_examples=100, deadline=None, database=None)
@given(parts(), st.integers(0, 64))
def test_parts_come_back_from_bytes_of_any_length_that_holds_them(given_parts: dict[str, Tensor], room: int) -> None:
    length = sum(tensor.nbytes for tensor in given_parts.values()) + room
    dtypes = {name: tensor.dtype for name, tensor in given_parts.items()}
    back = unpacked(packed(given_parts, length), dtypes, [len(tensor) for tensor in given_parts.values()])
    assert back.keys() == given_parts.keys()
    for name, tensor in given_parts.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


@pytest.mark.parametrize("sizes", [[3, 2], [2, 3], [-1, 2], [2**40, 0], [0, 2**62]])
def test_sizes_that_the_bytes_do_not_hold_are_refused(sizes: list[int]) -> None:
    raw = packed({"indexes": torch.arange(2, dtype=torch.int32), "values": torch.ones(2)}, 16)
    with pytest.raises(MessageError, match="cannot lie in the 16 bytes that arrived"):
        unpacked(raw, {"indexes": torch.int32, "values": torch.float32}, sizes)


def test_everything_is_cheaper_where_as_many_bytes_would_arrive() -> None:
    """Counted for itself: in a ring each rank receives P - 1 pieces of 1/P of the vector, twice."""
    for ranks in (2, 3, 4, 8, 64):
        vector, length = torch.zeros(960), 960 * 4
        of_all_reduce = 2 * (ranks - 1) * length / ranks
        of_gather = (ranks - 1) * dense_bytes(vector, ranks)
        assert of_gather == pytest.approx(of_all_reduce)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_numbers_are_finite_and_nan_is_not(dtype: torch.dtype) -> None:
    large = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)  # the sum of squares is not finite
    assert finite(large)
    assert finite(torch.zeros(1000, dtype=dtype))
    for bad in (math.nan, math.inf, -math.inf):
        large[17] = bad
        assert not finite(large)
