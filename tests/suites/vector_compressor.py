"""What every compressor of a vector must do. A new one subclasses `VectorCompressorSuite` and makes itself in `make`.

Vectors are drawn by hypothesis: every float dtype, a single number, negative zeros, numbers too small to be normal and
the largest ones. Longer ones are fixed, of several distributions.

Legend: D numbers of a vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from milkglass.compression.base import FLOATS, Part
from milkglass.compression.error_feedback import ErrorFeedback
from milkglass.compression.vector import VectorCompressor
from milkglass.errors import MessageError
from tests.suites.compressor import bits, error, quick, same_bits

_WIDTHS = {torch.float16: 16, torch.bfloat16: 32, torch.float32: 32, torch.float64: 64}
_MOST = {torch.float16: 65504.0, torch.bfloat16: 2.0**127, torch.float32: 2.0**127, torch.float64: 2.0**1022}

WILD_HINTS: Final = (0.0, -1.0, 1e-300, 1e-3, 1e3, 1e300, float("inf"), float("-inf"), float("nan"))


def _sparse(length: int, generator: torch.Generator) -> Tensor:
    u_D = torch.zeros(length)
    u_D[torch.randperm(length, generator=generator)[: max(1, length // 5000)]] = 1.5
    return u_D


def _clustered(length: int, generator: torch.Generator) -> Tensor:
    u_D = torch.randn(length, generator=generator)
    u_D[: length // 500] *= 50  # the large ones are neighbours
    return u_D


def _normal(length: int, generator: torch.Generator) -> Tensor:
    return torch.randn(length, generator=generator)


DISTRIBUTIONS: Final[dict[str, Callable[[int, torch.Generator], Tensor]]] = {
    "gaussian": _normal,
    "laplace": lambda length, g: (torch.rand(length, generator=g) - 0.5).sign() * _exponential(length, g),
    "uniform": lambda length, g: torch.rand(length, generator=g) * 2 - 1,
    "positive": lambda length, g: torch.rand(length, generator=g) + 1,
    "far mean": lambda length, g: _normal(length, g) + 5,
    "far negative mean": lambda length, g: _normal(length, g) - 5,
    "heavy": lambda length, g: _normal(length, g) / _normal(length, g),
    "wide": lambda length, g: _normal(length, g) * torch.exp(4 * _normal(length, g)),
    "constant": lambda length, _: torch.full((length,), -0.25),
    "two values": lambda length, g: _normal(length, g).sign(),
    "whole": lambda length, g: _normal(length, g).mul_(2).round_(),
    "sparse": _sparse,
    "clustered": _clustered,
    "tiny": lambda length, g: _normal(length, g) * 1e-30,
    "huge": lambda length, g: _normal(length, g) * 1e30,
    "zeros": lambda length, _: torch.zeros(length),
}
"""Float32 vectors of a length."""


def vector(name: str, length: int, seed: int = 0) -> Tensor:
    """A vector of that distribution."""
    return DISTRIBUTIONS[name](length, torch.Generator().manual_seed(seed))


def decoded(compressor: VectorCompressor, parts: Mapping[str, Tensor], like_D: Tensor) -> Tensor:
    """What was sent, as a vector like that."""
    sent_D = torch.zeros_like(like_D)
    compressor.add_to(sent_D, parts)
    return sent_D


@st.composite
def vectors(draw: st.DrawFn) -> Tensor:
    """A finite vector of 1 to 20 numbers."""
    dtype = draw(st.sampled_from(FLOATS))
    limit = _MOST[dtype]
    numbers = st.one_of(
        st.floats(-limit, limit, width=_WIDTHS[dtype]),  # type: ignore[arg-type]
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, limit]),
    )
    array = draw(hnp.arrays(np.float64, st.integers(1, 20), elements=numbers))
    return torch.from_numpy(array.copy()).to(dtype)


class VectorCompressorSuite(ABC):
    """The conformance tests of a compressor of vectors."""

    @abstractmethod
    def make(self) -> VectorCompressor:
        """A compressor; any two that are made do the same."""

    def largest_error(self, u_D: Tensor) -> Tensor:
        """How far sent + left may be from the original, in float64: not at all."""
        return torch.zeros(u_D.shape, dtype=torch.float64)

    def _adds_up(self, u_D: Tensor, hint: float | None = None) -> None:
        compressor, left_D = self.make(), u_D.clone()
        taken = compressor.take(left_D, hint=hint)
        sent_D = decoded(compressor, taken.parts, u_D)
        assert bool((error(u_D, sent_D + left_D) <= self.largest_error(u_D)).all())

    @quick
    @given(vectors(), st.sampled_from([None, *WILD_HINTS]))
    def test_sent_and_left_add_up_to_the_original(self, u_D: Tensor, hint: float | None) -> None:
        self._adds_up(u_D, hint)

    @pytest.mark.parametrize("name", DISTRIBUTIONS)
    def test_sent_and_left_add_up_in_a_long_vector(self, name: str) -> None:
        for length in (65536 + 33, 3000):
            self._adds_up(vector(name, length))
            self._adds_up(vector(name, length).double())
            self._adds_up(vector(name, length).bfloat16())

    @pytest.mark.parametrize("name", sorted(set(DISTRIBUTIONS) - {"tiny", "huge"}))
    def test_the_sums_of_squares_are_right(self, name: str) -> None:
        for length in (1, 70_000, 300_001):
            u_D = vector(name, length)
            before = float(u_D.double().square().sum())
            taken = self.make().take(u_D)
            left = float(u_D.double().square().sum())
            assert taken.before == pytest.approx(before, rel=1e-5)
            assert taken.left == pytest.approx(left, rel=1e-3, abs=1e-7 * before)
            assert 0 <= taken.left <= taken.before * (1 + 1e-6)

    @quick
    @given(vectors())
    def test_the_parts_are_flat_and_of_the_dtypes_told(self, u_D: Tensor) -> None:
        compressor = self.make()
        told = compressor.dtypes(u_D.dtype)
        parts = compressor.take(u_D).parts
        assert {name: part.dtype for name, part in parts.items()} == told
        assert all(part.dim() == 1 and part.is_contiguous() and not part.requires_grad for part in parts.values())
        sizes = [dtype.itemsize for dtype in told.values()]
        assert sorted(min(size, 4) for size in sizes) == [min(size, 4) for size in reversed(sizes)]

    def test_the_parts_are_their_own_memory(self) -> None:
        for length in (1, 6, 7, 70_000):
            u_D = vector("gaussian", length)
            parts = self.make().take(u_D).parts
            before = {name: part.clone() for name, part in parts.items()}
            u_D.fill_(3.0)
            assert same_bits(parts, before)

    def test_what_arrives_is_added(self) -> None:
        for length in (1, 50, 70_000):
            compressor, u_D = self.make(), vector("gaussian", length)
            parts = compressor.take(u_D.clone()).parts
            sum_D = vector("uniform", length)
            expected_D = sum_D + decoded(compressor, parts, u_D)
            compressor.add_to(sum_D, parts)
            assert bits(sum_D) == bits(expected_D)

    def test_what_is_to_be_added_first_is(self) -> None:
        for length in (1, 50, 65536 + 33, 300_001):
            for dtype in FLOATS:
                u_D, plus_D = vector("gaussian", length), vector("uniform", length, seed=1).to(dtype)
                whole_D, before = u_D + plus_D.float(), bits(plus_D)
                one, other = self.make().take(u_D, plus_D), self.make().take(whole_D)
                assert same_bits(one.parts, other.parts)
                assert bits(u_D) == bits(whole_D)
                assert bits(plus_D) == before
                assert (one.before, one.left, one.hint) == (other.before, other.left, other.hint)

    @pytest.mark.parametrize("name", ["gaussian", "laplace", "uniform", "far mean", "constant"])
    def test_over_many_steps_all_that_came_in_goes_out_or_is_left(self, name: str) -> None:
        for length in (1, 300, 70_000):
            feedback = ErrorFeedback(self.make(), torch.zeros(length, dtype=torch.float64))
            came_D, went_D = torch.zeros(2, length, dtype=torch.float64)
            for step in range(20):
                g_D = vector(name, length, seed=step)
                came_D += g_D
                feedback.compressor.add_to(went_D, feedback.take(g_D).parts)
            assert torch.allclose(went_D + feedback.left_D, came_D, rtol=1e-12, atol=1e-12)

    def test_of_nothing_comes_nothing(self) -> None:
        for length in (1, 7, 70_000):
            for dtype in FLOATS:
                u_D = torch.zeros(length, dtype=dtype)
                taken = self.make().take(u_D)
                assert (taken.before, taken.left) == (0.0, 0.0)
                assert not decoded(self.make(), taken.parts, u_D).any()
                assert not u_D.any()

    def test_it_says_what_it_is(self) -> None:
        assert len(self.make().describe()) > 3
        assert type(self.make()).__name__ in repr(self.make())

    def test_what_cannot_be_compressed_is_refused(self) -> None:
        wrong = (torch.ones(3, 1), torch.ones(3).long(), torch.ones(0), torch.tensor(1.0), torch.ones(6)[::2])
        for bad in wrong:
            with pytest.raises(MessageError, match="cannot compress"):
                self.make().take(bad)
            with pytest.raises(MessageError, match="cannot"):
                self.make().take(torch.ones(3), bad)
        with pytest.raises(MessageError, match="cannot add 1 numbers to a vector of 3"):
            self.make().take(torch.ones(3), torch.ones(1))
        with pytest.raises(MessageError, match="detach the vector first"):
            self.make().take(torch.ones(3, requires_grad=True))

    def test_parts_that_do_not_fit_are_refused(self) -> None:
        compressor, u_D = self.make(), vector("gaussian", 40)
        parts = compressor.take(u_D.clone()).parts
        wrong: list[dict[str, Tensor]] = [{}, {**parts, "more": torch.ones(4)}]
        for name, part in parts.items():
            rest = {other: tensor for other, tensor in parts.items() if other != name}
            other_dtype = torch.int64 if part.dtype != torch.int64 else torch.int32
            changed = (part[None], part[:, None], part.to(other_dtype))
            wrong += [rest, {**rest, "nothing": part}, *({**rest, name: tensor} for tensor in changed)]
        for given_parts in wrong:
            with pytest.raises(MessageError, match="parts of another kind arrived"):
                compressor.add_to(u_D, given_parts)

    def test_parts_of_another_length_are_refused(self) -> None:
        compressor, u_D = self.make(), vector("wide", 40)
        parts = compressor.take(u_D.clone()).parts
        for name, part in parts.items():
            for changed in (part[:-1], torch.cat([part, part[-1:]])):
                before = bits(u_D)
                with pytest.raises(MessageError, match="arrived"):
                    compressor.add_to(u_D, {**parts, name: changed})
                assert bits(u_D) == before

    @quick
    @given(st.data())
    def test_whatever_the_parts_hold_a_sum_or_one_error_comes_of_it(self, data: st.DataObject) -> None:
        compressor, dtype = self.make(), data.draw(st.sampled_from(FLOATS))
        u_D = torch.ones(7, dtype=dtype)
        parts = {}
        for name, part in compressor.take(u_D.clone()).parts.items():
            size = len(part) * part.dtype.itemsize
            raw = data.draw(st.binary(min_size=size, max_size=size))
            parts[name] = torch.frombuffer(bytearray(raw), dtype=part.dtype) if raw else part
        before = {name: bits(part) for name, part in parts.items()}
        try:
            compressor.add_to(u_D, parts)
        except MessageError:
            pass
        else:
            assert Part.of(u_D) == Part((7,), dtype)
        assert {name: bits(part) for name, part in parts.items()} == before


def _exponential(length: int, generator: torch.Generator) -> Tensor:
    return torch.empty(length).exponential_(generator=generator)
