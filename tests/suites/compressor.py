"""What every compressor must do. A new one subclasses `CompressorSuite` and makes itself in `make`.

Messages are drawn by hypothesis: every float dtype, one record and one value, negative zeros, numbers too small to be
normal and the largest ones, and memory in another order than the dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from milkglass.codec import decode, encode
from milkglass.compression.base import FLOATS, Compressor, Part
from milkglass.errors import MessageError
from milkglass.messages import Message

_WIDTHS = {torch.float16: 16, torch.bfloat16: 32, torch.float32: 32, torch.float64: 64}
_MOST = {torch.float16: 65504.0, torch.bfloat16: 2.0**127, torch.float32: 2.0**127, torch.float64: 2.0**1022}

quick = settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.differing_executors],  # a suite's tests are run by each of its classes
)
"""For a property that is cheap to check."""


def bits(tensor: Tensor) -> bytes:
    """Its values as they lie in memory, in the order of its dimensions."""
    dense = tensor.clone(memory_format=torch.contiguous_format)  # .contiguous() may keep odd strides where sizes are 1
    return dense.view(-1).view(torch.uint8).numpy().tobytes()


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether the parts have the same names, shapes, dtypes and bits."""
    if {name: Part.of(tensor) for name, tensor in a.items()} != {name: Part.of(tensor) for name, tensor in b.items()}:
        return False
    return all(bits(tensor) == bits(b[name]) for name, tensor in a.items())


def ulp(x: Tensor) -> Tensor:
    """One unit in the last place of each value, in float64."""
    info = torch.finfo(x.dtype)
    _, exponent = torch.frexp(x.double().abs().clamp(min=info.tiny))
    return info.eps * 2.0 ** (exponent - 1).double()


def error(x: Tensor, sent: Tensor) -> Tensor:
    """The distance of what arrived from what was sent, in float64."""
    return (sent.double() - x.double()).abs()


@st.composite
def messages(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FLOATS, most: float | None = None) -> Tensor:
    """A finite tensor (B, ...) of two to four dimensions. most: no value is larger than that."""
    dtype = draw(st.sampled_from(dtypes))
    limit = _MOST[dtype] if most is None else most
    numbers = st.one_of(
        st.floats(-limit, limit, width=_WIDTHS[dtype]),  # type: ignore[arg-type]
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, limit]),
    )
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, max_side=5))
    array = draw(hnp.arrays(np.float64, shape, elements=numbers))
    x = torch.from_numpy(array.copy()).to(dtype)
    order = draw(st.sampled_from(["dense", "turned", "strided", "repeated"]))
    if order == "turned":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if order == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    if order == "repeated":
        return x[:1].expand(x.shape)
    return x


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class CompressorSuite(ABC):
    """The conformance tests of a compressor."""

    @abstractmethod
    def make(self) -> Compressor:
        """A compressor."""

    @abstractmethod
    def largest_error(self, x: Tensor) -> Tensor:
        """How far each value that arrives may be from that of `x`, in float64 and in the shape of `x`."""

    @quick
    @given(messages())
    def test_shape_and_dtype_come_back_and_the_error_is_bounded(self, x: Tensor) -> None:
        before = bits(x)
        sent = self.make().round_trip(x)
        assert Part.of(sent) == Part.of(x)
        assert bool((error(x, sent) <= self.largest_error(x)).all())
        assert bits(x) == before

    @quick
    @given(messages())
    def test_sent_and_left_over_add_up_to_the_original(self, x: Tensor) -> None:
        sent = self.make().round_trip(x)
        left = x - sent
        assert bool((error(x, sent + left) <= ulp(x)).all())

    @quick
    @given(messages())
    def test_the_parts_are_as_laid_out_with_a_row_for_each_record(self, x: Tensor) -> None:
        compressor = self.make()
        parts = compressor.compress(x)
        assert {name: Part.of(tensor) for name, tensor in parts.items()} == compressor.layout(x.shape, x.dtype)
        assert {len(tensor) for tensor in parts.values()} == {len(x)}
        assert set(parts) <= {"values", "scales", "indexes"}

    @quick
    @given(messages(), st.data())
    def test_the_parts_of_a_record_follow_from_it_alone(self, x: Tensor, data: st.DataObject) -> None:
        compressor = self.make()
        parts = compressor.compress(x)
        row = data.draw(st.integers(0, len(x) - 1))
        own = {name: tensor[row : row + 1] for name, tensor in parts.items()}
        assert same_bits(compressor.compress(x[row : row + 1]), own)
        others = (torch.randn(x.shape, generator=torch.Generator().manual_seed(row)) * 1e4).to(x.dtype)
        others[row] = x[row]
        assert same_bits({name: tensor[row : row + 1] for name, tensor in compressor.compress(others).items()}, own)

    def test_the_parts_of_a_record_follow_from_it_alone_in_a_large_batch(self) -> None:
        for dtype in FLOATS:
            for shape in ((37, 16, 5, 7), (37, 301)):
                x = gaussian(*shape, dtype=dtype)
                x[5] = x[7] = torch.round(x[5])  # many equally large values
                parts = self.make().compress(x)
                for row in range(len(x)):
                    own = {name: tensor[row : row + 1] for name, tensor in parts.items()}
                    assert same_bits(self.make().compress(x[row : row + 1]), own)
                assert all(bits(tensor[5]) == bits(tensor[7]) for tensor in parts.values())

    def test_nothing_is_remembered(self) -> None:
        compressor = self.make()
        x, other = gaussian(4, 3, 2, 2), gaussian(4, 3, 2, 2, seed=1)
        first = compressor.compress(x)
        sent = compressor.round_trip(x)
        compressor.round_trip(other)
        assert same_bits(compressor.compress(x), first)
        assert bits(compressor.round_trip(x)) == bits(sent)

    @quick
    @given(messages())
    def test_the_order_in_memory_does_not_matter(self, x: Tensor) -> None:
        compressor = self.make()
        dense = x.contiguous()
        assert same_bits(compressor.compress(x), compressor.compress(dense))
        assert bits(compressor.round_trip(x)) == bits(compressor.round_trip(dense))

    def test_the_parts_travel(self) -> None:
        compressor, x = self.make(), gaussian(6, 4, 3, 3)
        frame = encode(Message("activations", "client", 0, compressor.compress(x)))
        sent = compressor.decompress(decode(frame).tensors, x.shape, x.dtype)
        assert bits(sent) == bits(compressor.round_trip(x))
        promised = sum(part.size_bytes for part in compressor.layout(x.shape, x.dtype).values())
        assert promised < len(frame) < promised + 256

    def test_values_that_are_not_finite_are_found(self) -> None:
        for dtype in FLOATS:
            for bad in (torch.nan, torch.inf, -torch.inf):
                x = gaussian(3, 40, dtype=dtype)
                x[1, 17] = bad
                try:
                    sent = self.make().round_trip(x)
                except MessageError:
                    continue
                assert torch.isfinite(sent).all(dim=1).tolist() == [True, False, True]

    def test_it_says_what_it_is(self) -> None:
        assert len(self.make().describe()) > 3
        assert type(self.make()).__name__ in repr(self.make())

    def test_what_cannot_be_compressed_is_refused(self) -> None:
        for x in (torch.ones(3), torch.ones(3, 2).long(), torch.ones(0, 2), torch.ones(2, 0), torch.tensor(1.0)):
            with pytest.raises(MessageError, match="cannot compress"):
                self.make().compress(x)
            with pytest.raises(MessageError, match="cannot compress"):
                self.make().decompress({"values": x}, x.shape, x.dtype)
        with pytest.raises(MessageError, match="detach the tensor first"):
            self.make().compress(torch.ones(3, 2, requires_grad=True))

    def test_parts_of_another_layout_are_refused(self) -> None:
        compressor, x = self.make(), gaussian(4, 3, 2, 2)
        parts = compressor.compress(x)
        wrong: list[dict[str, Tensor]] = [{}, parts | {"more": torch.ones(4, 1)}]
        for name, tensor in parts.items():
            rest = {other: part for other, part in parts.items() if other != name}
            wrong += [rest, rest | {"nothing": tensor}]
            other_dtype = torch.int64 if tensor.dtype != torch.int64 else torch.int32
            changed = (
                tensor[:3],
                torch.cat([tensor, tensor]),
                tensor[:, :-1],
                tensor[None],
                tensor[0],
                tensor[..., None],
            )
            wrong += [parts | {name: new} for new in (*changed, tensor.flatten(), tensor.to(other_dtype))]
        for given_parts in wrong:
            with pytest.raises(MessageError, match="expected the parts"):
                compressor.decompress(given_parts, x.shape, x.dtype)

    def test_no_memory_is_taken_for_parts_that_promise_too_much(self) -> None:
        compressor, x = self.make(), gaussian(2, 3)
        parts = compressor.compress(x)
        for shape in ((2, 2**30), (2**40, 3), (2, 3, 2**40)):
            with pytest.raises(MessageError):
                compressor.decompress(parts, shape, x.dtype)

    @quick
    @given(st.data())
    def test_whatever_the_parts_hold_a_tensor_or_one_error_comes_of_it(self, data: st.DataObject) -> None:
        compressor = self.make()
        shape, dtype = data.draw(st.sampled_from([(2, 3), (1, 1), (2, 2, 2, 2)])), data.draw(st.sampled_from(FLOATS))
        parts = {}
        for name, part in compressor.layout(shape, dtype).items():
            raw = data.draw(st.binary(min_size=part.size_bytes, max_size=part.size_bytes))
            parts[name] = torch.frombuffer(bytearray(raw), dtype=part.dtype).reshape(part.shape)
        before = {name: bits(tensor) for name, tensor in parts.items()}
        try:
            sent = compressor.decompress(parts, shape, dtype)
        except MessageError:
            pass
        else:
            assert Part.of(sent) == Part(shape, dtype)
        assert {name: bits(tensor) for name, tensor in parts.items()} == before
