"""Every compressor passes the same suite, and does what it is for.

Legend: B records, C channels, D values of a record, K of them sent.
"""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from milkglass.compression.base import Compressor, Identity, Part
from milkglass.compression.cast import Cast
from milkglass.compression.quantize import Int8
from milkglass.compression.topk import TopK
from milkglass.compression.wire import CompressorKind, compressor_of
from milkglass.errors import MessageError, RecipeError
from tests.suites.compressor import CompressorSuite, bits, error, gaussian, messages, quick, ulp

F32_MAX = torch.finfo(torch.float32).max


class TestIdentity(CompressorSuite):
    def make(self) -> Compressor:
        return Identity()

    def largest_error(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=torch.float64)


def _cast_error(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of `dtype`, and what is above its largest value."""
    info = torch.finfo(dtype)
    size = x.double().abs()
    # float64 goes by way of float32, so it may be rounded twice
    return ulp(size.clamp(max=info.max).to(dtype)) * 0.5001 + (size - info.max).clamp(min=0)


class TestFloat16(CompressorSuite):
    def make(self) -> Compressor:
        return Cast(torch.float16)

    def largest_error(self, x: Tensor) -> Tensor:
        return _cast_error(x, torch.float16)


class TestBfloat16(CompressorSuite):
    def make(self) -> Compressor:
        return Cast(torch.bfloat16)

    def largest_error(self, x: Tensor) -> Tensor:
        return _cast_error(x, torch.bfloat16)


class TestInt8(CompressorSuite):
    def make(self) -> Compressor:
        return Int8()

    def largest_error(self, x: Tensor) -> Tensor:
        channels = x.shape[1] if x.dim() > 2 else 1
        x_BCP = x.double().reshape(len(x), channels, -1)
        step_BC1 = (x_BCP.abs().amax(dim=2, keepdim=True) / 127).clamp(max=F32_MAX)
        step_BC1 = step_BC1 + torch.where(step_BC1 > 0, ulp(step_BC1.float()), 0)  # rounded up to a float32
        too_large_BCP = (x_BCP.abs() - 127 * step_BC1).clamp(min=0)
        return (step_BC1 / 2 + too_large_BCP).reshape(x.shape) * (1 + 1e-6) + ulp(x)


class TestTopKOfOne(CompressorSuite):
    def make(self) -> Compressor:
        return TopK(0.001)

    def largest_error(self, x: Tensor) -> Tensor:
        return x.double().abs()


class TestTopKOfSome(CompressorSuite):
    def make(self) -> Compressor:
        return TopK(0.3)

    def largest_error(self, x: Tensor) -> Tensor:
        return x.double().abs()


class TestTopKOfAll(CompressorSuite):
    def make(self) -> Compressor:
        return TopK(1.0)

    def largest_error(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=torch.float64)


@quick
@given(messages())
def test_no_compression_keeps_every_bit(x: Tensor) -> None:
    assert bits(Identity().round_trip(x)) == bits(x)


@quick
@given(messages((torch.float32, torch.bfloat16, torch.float64)), st.sampled_from([torch.float16, torch.bfloat16]))
def test_a_cast_sends_the_nearest_value_and_is_exact_the_second_time(x: Tensor, dtype: torch.dtype) -> None:
    sent = Cast(dtype).round_trip(x)
    fits = x.abs() <= torch.finfo(dtype).max
    assert torch.equal(sent[fits], x[fits].to(dtype).to(x.dtype))
    assert bits(Cast(dtype).round_trip(sent)) == bits(sent)
    assert torch.equal(sent.signbit(), x.signbit())


def test_a_cast_clamps_what_overflows_and_keeps_what_is_not_finite() -> None:
    x = torch.tensor([[7e4, -1e30, 65504.0, 65519.0, torch.inf, -torch.inf, torch.nan, -0.0]])
    sent = Cast(torch.float16).round_trip(x)
    assert sent[0, :6].tolist() == [65504.0, -65504.0, 65504.0, 65504.0, torch.inf, -torch.inf]
    assert sent[0, 6].isnan()
    assert sent[0, 7].signbit()
    assert Cast(torch.bfloat16).round_trip(torch.tensor([[F32_MAX, -1e38]])).isfinite().all()
    # back from bfloat16, the largest float16 would overflow
    half = torch.tensor([[65504.0, -65504.0]], dtype=torch.float16)
    assert torch.equal(Cast(torch.bfloat16).round_trip(half), half)


def test_int8_is_exact_for_whole_steps_and_zeros() -> None:
    x = torch.zeros(2, 3, 2, 4)
    x[0, 1] = torch.tensor([[127.0, -127, 1, 0], [-64, 5, -1, 126]]) / 1024
    parts = Int8().compress(x)
    assert torch.equal(Int8().round_trip(x), x)
    assert parts["scales"][0].tolist() == [0, 1 / 1024, 0]
    assert not parts["scales"][1].any()
    assert not Int8().round_trip(-x[1:]).signbit().any()


@quick
@given(messages((torch.float32, torch.float64), most=2.0**60))
def test_int8_reaches_the_largest_value_of_each_channel_with_127_steps(x: Tensor) -> None:
    parts = Int8().compress(x)
    scales_BC, channels = parts["scales"].double(), parts["scales"].shape[1]
    assert bool((127 * scales_BC >= x.double().abs().reshape(len(x), channels, -1).amax(dim=2)).all())
    assert parts["values"].min() >= -127


def test_int8_has_a_scale_for_each_channel_of_a_picture_and_for_each_record_of_a_table() -> None:
    assert Int8().layout((5, 3, 8, 8), torch.float32)["scales"] == Part((5, 3), torch.float32)
    assert Int8().layout((5, 3, 8), torch.float64)["scales"] == Part((5, 3), torch.float32)
    assert Int8().layout((5, 192), torch.float16)["scales"] == Part((5, 1), torch.float32)
    x = gaussian(5, 3, 8, 8)
    x[:, 1] *= 1e-6  # beside a large channel a small one keeps its digits
    relative_BC = error(x, Int8().round_trip(x)).amax(dim=(2, 3)) / x.double().abs().amax(dim=(2, 3))
    assert bool((relative_BC < 1 / 253).all())


def test_int8_holds_at_both_ends_of_a_dtype() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        least = info.smallest_normal * info.eps
        x = torch.tensor([[info.max, -info.max / 3, 0], [least, 0, 0], [254 * least, 127 * least, 0]]).to(dtype)
        sent = Int8().round_trip(x)
        assert sent[0, 0] == info.max
        assert torch.equal(sent[1], x[1])
        assert bool((error(x, sent)[2] <= least).all())
    x = torch.tensor([[1e300, -2e40, 0]], dtype=torch.float64)  # the step would be no float32
    assert Int8().round_trip(x)[0, 0].item() == 127 * F32_MAX


@pytest.mark.parametrize("scale", [-1.0, -1e-45, torch.nan, torch.inf, -torch.inf])
def test_int8_refuses_a_scale_that_none_has(scale: float) -> None:
    parts = Int8().compress(gaussian(4, 3, 2, 2))
    parts["scales"][2, 1] = scale
    with pytest.raises(MessageError, match="a scale is negative or not finite"):
        Int8().decompress(parts, (4, 3, 2, 2), torch.float32)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_int8_does_not_send_what_it_cannot(bad: float) -> None:
    x = gaussian(4, 6)
    x[2, 3] = bad
    with pytest.raises(MessageError, match="not finite"):
        Int8().compress(x)


@quick
@given(messages(), st.sampled_from([0.001, 0.07, 0.3, 0.5, 1.0]))
def test_top_k_sends_the_largest_values_with_their_bits_and_zeros_for_the_others(x: Tensor, share: float) -> None:
    compressor = TopK(share)
    parts, sent_BD, x_BD = compressor.compress(x), compressor.round_trip(x).flatten(1), x.flatten(1)
    for row in range(len(x)):
        indexes = parts["indexes"][row].tolist()
        assert indexes == sorted(set(indexes))
        kept = torch.zeros(x_BD.shape[1], dtype=torch.bool)
        kept[indexes] = True
        assert bits(sent_BD[row][kept]) == bits(x_BD[row][kept]) == bits(parts["values"][row])
        assert not sent_BD[row][~kept].any()
        if not kept.all():
            assert x_BD[row][kept].abs().min() >= x_BD[row][~kept].abs().max()
    left = x - compressor.round_trip(x)
    assert torch.equal(left + compressor.round_trip(x), x)


@pytest.mark.parametrize(
    ("share", "length", "count"),
    [(0.07, 100, 7), (0.1, 10, 1), (0.1, 11, 2), (1e-9, 5, 1), (1.0, 9, 9), (0.55, 20, 11)],
)
def test_top_k_sends_the_share_rounded_up(share: float, length: int, count: int) -> None:
    assert TopK(share).compress(gaussian(3, length))["values"].shape == (3, count)


def test_top_k_of_a_nan_sends_it() -> None:
    x = gaussian(2, 50) * 1e6
    x[1, 20] = torch.nan
    assert TopK(0.01).compress(x)["indexes"].tolist()[1] == [20]


@pytest.mark.parametrize("indexes", [[0, 1, 6], [-1, 1, 2], [0, 2, 2], [2, 1, 3], [-(2**31), 0, 1], [0, 1, 2**31 - 1]])
def test_top_k_refuses_indexes_that_none_has(indexes: list[int]) -> None:
    parts = TopK(0.5).compress(gaussian(3, 2, 3))
    parts["indexes"][1] = torch.tensor(indexes, dtype=torch.int32)
    with pytest.raises(MessageError, match="not ascending numbers from 0 to 5"):
        TopK(0.5).decompress(parts, (3, 2, 3), torch.float32)


def test_top_k_refuses_records_whose_indexes_do_not_fit() -> None:
    with pytest.raises(MessageError, match="at most 2147483647 have an int32 index"):
        TopK(1e-9).compress(torch.zeros(1, 1).expand(1, 2**31))
    assert TopK(1e-9).layout((1, 2**31 - 1), torch.float32)["values"].shape == (1, 3)


def test_a_share_of_none_or_of_more_than_all_is_refused() -> None:
    for share in (0.0, -0.1, 1.1, math.nan, math.inf):
        with pytest.raises(RecipeError, match="share is"):
            TopK(share)
    with pytest.raises(RecipeError, match=r"dtype is torch\.float32"):
        Cast(torch.float32)


def test_a_recipe_names_every_compressor() -> None:
    kinds: tuple[CompressorKind, ...] = get_args(CompressorKind)
    made = [compressor_of(kind, 0.25) for kind in kinds]
    shape = (64, 16, 8, 8)
    sizes = [sum(part.size_bytes for part in c.layout(shape, torch.float32).values()) for c in made]
    whole = 64 * 16 * 8 * 8
    assert dict(zip(kinds, sizes, strict=True)) == {
        "none": 4 * whole,
        "fp16": 2 * whole,
        "bf16": 2 * whole,
        "int8": whole + 64 * 16 * 4,
        "topk": whole // 4 * 8,
    }
    assert len({c.describe() for c in made}) == len(kinds)
    with pytest.raises(RecipeError, match=r"did you mean 'int8'\?"):
        compressor_of("int-8", 0.25)  # type: ignore[arg-type]
