"""Every compressor of vectors passes the same suite, and does what it is for.

Legend: D numbers of a vector, K of them sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from milkglass.compression.cast import Cast
from milkglass.compression.error_feedback import ErrorFeedback
from milkglass.compression.gaussian_k import GaussianK, PublishedGaussianK
from milkglass.compression.peaks import Peaks
from milkglass.compression.quantize import Int8
from milkglass.compression.random_k import RandomK
from milkglass.compression.rounding import Rounding
from milkglass.compression.sampled_topk import SampledTopK
from milkglass.compression.topk import ExactTopK, TopK
from milkglass.compression.vector import Dense, Selector, Taken, VectorCompressor, bounds
from milkglass.errors import MessageError, RecipeError
from tests.suites.compressor import bits, gaussian, quick, ulp
from tests.suites.vector_compressor import DISTRIBUTIONS, WILD_HINTS, VectorCompressorSuite, decoded, vector, vectors


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestDense(VectorCompressorSuite):
    def make(self) -> VectorCompressor:
        return Dense()


class TestExactTopK(VectorCompressorSuite):
    def make(self) -> VectorCompressor:
        return ExactTopK(0.001)


class TestExactTopKOfMany(VectorCompressorSuite):
    def make(self) -> VectorCompressor:
        return ExactTopK(0.3)


class TestGaussianK(VectorCompressorSuite):
    def make(self) -> VectorCompressor:
        return GaussianK(0.001)


class TestGaussianKOfMany(VectorCompressorSuite):
    def make(self) -> VectorCompressor:
        return GaussianK(0.3)


class TestPublishedGaussianK(VectorCompressorSuite):
    def make(self) -> VectorCompressor:
        return PublishedGaussianK(0.05)


class TestSampledTopK(VectorCompressorSuite):
    def make(self) -> VectorCompressor:
        return SampledTopK(0.01, _generator())


class TestRandomK(VectorCompressorSuite):
    def make(self) -> VectorCompressor:
        return RandomK(0.1, _generator())


class RoundingSuite(VectorCompressorSuite):
    def largest_error(self, u_D: Tensor) -> Tensor:
        return ulp(u_D)


class TestFloat16(RoundingSuite):
    def make(self) -> VectorCompressor:
        return Rounding(Cast(torch.float16))


class TestBfloat16(RoundingSuite):
    def make(self) -> VectorCompressor:
        return Rounding(Cast(torch.bfloat16), width=3)


class TestInt8(RoundingSuite):
    def make(self) -> VectorCompressor:
        return Rounding(Int8(), width=6)


class TestTopKOfEachRecord(RoundingSuite):
    def make(self) -> VectorCompressor:
        return Rounding(TopK(0.25), width=8)


SELECTORS: dict[str, Callable[[float], Selector]] = {
    "exact": ExactTopK,
    "gaussian": GaussianK,
    "published": PublishedGaussianK,
    "sampled": lambda density: SampledTopK(density, _generator()),
    "random": lambda density: RandomK(density, _generator()),
}


def _sent(taken: Taken) -> int:
    return len(taken.parts["indexes"])


def _in_band(sent: int, count: int) -> bool:
    return 2 * count <= 3 * sent <= 4 * count


# ---- all selectors


@pytest.mark.parametrize("make", SELECTORS.values(), ids=SELECTORS)
@quick
@given(u_D=vectors(), density=st.sampled_from([0.01, 0.3, 1.0]))
def test_a_selector_moves_numbers_bit_for_bit(make: Callable[[float], Selector], u_D: Tensor, density: float) -> None:
    left_D = u_D.clone()
    parts = make(density).take(left_D).parts
    indexes_K = parts["indexes"].long()
    assert len(set(indexes_K.tolist())) == len(indexes_K)
    assert bits(parts["values"]) == bits(u_D[indexes_K])
    assert not left_D[indexes_K].any()
    stays_D = torch.ones(len(u_D), dtype=torch.bool).index_fill_(0, indexes_K, False)
    assert bits(left_D[stays_D]) == bits(u_D[stays_D])


@pytest.mark.parametrize("make", SELECTORS.values(), ids=SELECTORS)
def test_a_density_that_is_none_is_refused(make: Callable[[float], Selector]) -> None:
    for density in (0.0, -0.1, 1.0001, math.nan, math.inf):
        with pytest.raises(RecipeError, match="expected a number above 0, at most 1"):
            make(density)
    assert _sent(make(5e-324).take(torch.tensor([-3.0, 5.0, 1.0]))) <= 3  # too small for one in any vector: one is sent


@pytest.mark.parametrize("name", ["exact", "gaussian", "sampled", "random"])
def test_density_1_sends_all_that_is_not_zero(name: str) -> None:
    for length in (1, 10, 70_000):
        for kind in ("whole", "gaussian", "zeros", "sparse"):
            u_D = vector(kind, length)
            original_D = u_D.clone()
            taken = SELECTORS[name](1.0).take(u_D)
            assert not u_D.any()
            assert taken.left == 0
            assert _sent(taken) == (length if name == "random" else int(original_D.count_nonzero()))


@pytest.mark.parametrize("name", ["exact", "gaussian", "sampled"])
def test_a_zero_is_never_sent(name: str) -> None:
    for kind in ("whole", "sparse", "zeros"):
        for length in (100, 70_000, 300_001):
            assert bool(SELECTORS[name](0.03).take(vector(kind, length)).parts["values"].all())


def test_an_index_out_of_the_vector_is_refused() -> None:
    for indexes in ([-1, 2], [1, 3], [2**31 - 1, 0]):
        parts = {"indexes": torch.tensor(indexes, dtype=torch.int32), "values": torch.ones(2)}
        with pytest.raises(MessageError, match="not from 0 to 2"):
            ExactTopK(0.1).add_to(torch.zeros(3), parts)


# ---- peaks, exact top-k and its bound


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_numbers_above_a_threshold_are_all_found(name: str) -> None:
    for length in (65536, 140_031):
        u_D = vector(name, length)
        sizes_D = u_D.abs()
        for threshold in (0.0, *sizes_D.quantile(torch.tensor([0.3, 0.99, 0.9999])).tolist()):
            found = Peaks(u_D).above(threshold, len(u_D))
            assert found is not None
            assert torch.equal(found.indexes_C, ((sizes_D >= threshold) & (sizes_D > 0)).nonzero().squeeze(1))
            assert torch.equal(found.sizes_C, sizes_D[found.indexes_C])


def test_a_search_that_finds_too_many_blocks_stops() -> None:
    peaks = Peaks(torch.ones(3200))
    assert peaks.above(0.5, 99) is None
    found = peaks.above(0.5, 100)
    assert found is not None
    assert len(found.indexes_C) == 3200


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_exact_top_k_leaves_no_larger_number_behind(name: str) -> None:
    for length, dtype in ((300_001, torch.float32), (262_144, torch.float64), (300_001, torch.bfloat16), (999, None)):
        u_D = vector(name, length).to(dtype or torch.float32)
        expected = u_D.abs().topk(max(1, int(0.002 * length)), sorted=True).values
        values_K = ExactTopK(0.002).take(u_D).parts["values"].abs().sort(descending=True).values
        assert torch.equal(values_K, expected[expected > 0])


@pytest.mark.parametrize("shift", [0, 1])
def test_exact_top_k_does_not_trust_its_sample(shift: int) -> None:
    u_D = vector("gaussian", 300_032)
    u_D.view(-1, 32)[shift::2] *= 100  # of the blocks, every other one is in the sample
    expected = set(u_D.abs().topk(600).indices.tolist())
    assert set(ExactTopK(0.002).take(u_D).parts["indexes"].tolist()) == expected


def test_exact_top_k_meets_the_bound_where_the_paper_says_so_and_not_everywhere() -> None:
    tight, old = bounds(1000, 10**6)
    assert tight == pytest.approx(0.999**2)
    assert old == 0.999
    kept = {}
    for name in ("gaussian", "laplace", "uniform", "constant"):
        taken = ExactTopK(0.001).take(vector(name, 10**6))
        kept[name] = taken.left / taken.before
    z, log = scipy.stats.norm.isf(0.0005), math.log(1000)
    # what lies below the threshold, of the sum of squares: .98730, .96823, .99700
    assert kept["gaussian"] == pytest.approx(1 - 2 * z * scipy.stats.norm.pdf(z) - 0.001, abs=4e-4)
    assert kept["laplace"] == pytest.approx(1 - (log**2 + 2 * log + 2) / 2000, abs=1.5e-3)
    assert kept["uniform"] == pytest.approx(0.999**3, abs=3e-5)
    assert kept["constant"] == pytest.approx(0.999, abs=1e-6)
    assert max(kept["gaussian"], kept["laplace"], kept["uniform"]) <= tight < kept["constant"] <= old + 1e-6


# ---- Gaussian-k


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("length", [65536 + 17, 200_003, 1000])
def test_gaussian_k_sends_about_the_count_wanted_whatever_the_vector_and_the_hint(name: str, length: int) -> None:
    for density in (0.0001, 0.001, 1 / 64):
        count = max(1, int(density * length))
        for hint in (None, *WILD_HINTS):
            u_D = vector(name, length)
            wanted = min(count, int(u_D.count_nonzero()))
            taken = GaussianK(density).take(u_D, hint=hint)
            assert _in_band(_sent(taken), count) or _sent(taken) == wanted < count
            if _sent(taken):
                assert float(u_D.abs().max()) <= float(taken.parts["values"].abs().min())
            assert taken.hint is None or 0 <= taken.hint < math.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["gaussian", "laplace", "uniform", "constant"])
def test_gaussian_k_holds_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    for hint in (None, 1.0, 3.0, 1e3):
        taken = GaussianK(0.001).take(vector(name, 200_003).to(dtype), hint=hint)
        assert _in_band(_sent(taken), 200)


@pytest.mark.parametrize("name", ["gaussian", "laplace", "uniform", "far mean", "heavy", "constant", "clustered"])
def test_gaussian_k_stays_in_the_band_with_what_is_left_over(name: str) -> None:
    for density in (0.001, 0.01):
        feedback = ErrorFeedback(GaussianK(density), torch.zeros(100_000))
        counts = [_sent(feedback.take(vector(name, 100_000, seed=step))) for step in range(50)]
        assert all(_in_band(sent, int(density * 100_000)) for sent in counts)


def test_on_bell_shaped_numbers_the_first_threshold_is_right() -> None:
    u_D = gaussian(10**6) * 7
    taken = GaussianK(0.001).take(u_D.clone())
    threshold = 7 * scipy.stats.norm.isf(0.0005)
    passed = int((u_D.abs() >= threshold).sum())
    assert _sent(taken) == pytest.approx(passed, abs=2)
    assert _sent(taken) != 1000  # no guard was needed
    assert taken.hint == pytest.approx(scipy.stats.norm.isf(0.0005), rel=0.01)


def test_the_hint_is_the_smallest_number_sent_over_the_root_of_the_mean_square() -> None:
    u_D = vector("laplace", 200_003)
    kth = float(u_D.abs().topk(200).values.min())
    rms = float(u_D.double().square().mean().sqrt())
    for scale in (1.0, 1e4):
        assert GaussianK(0.001).take(u_D * scale).hint == pytest.approx(kth / rms, rel=1e-4)  # by the guard


def test_a_threshold_within_the_band_is_kept_and_moved_toward_the_count() -> None:
    u_D = vector("laplace", 200_003) * 1e4
    sizes_D, rms = u_D.abs(), float(u_D.double().square().mean().sqrt())
    for wanted in (150, 250):
        hint = float(sizes_D.topk(wanted).values.min()) / rms * (1 - 1e-5)
        taken = GaussianK(0.001).take(u_D.clone(), hint=hint)
        assert _sent(taken) == wanted
        assert taken.hint is not None
        moved = taken.hint / hint
        assert (0.97 < moved < 0.999) if wanted < 200 else (1.001 < moved < 1.03)


def test_published_gaussian_k_is_as_published() -> None:
    for name in DISTRIBUTIONS:
        for density in (0.001, 0.01):
            u_D = vector(name, 50_000)
            assert PublishedGaussianK(density).take(u_D.clone()).parts["indexes"].tolist() == _oracle(u_D, density)


def _oracle(u_D: Tensor, density: float) -> list[int]:
    """The algorithm on the page, in numpy."""
    u, k = u_D.numpy(), max(int(density * len(u_D)), 1)
    t = np.float64(torch.mean(u_D)) + np.float64(torch.std(u_D, correction=0)) * scipy.stats.norm.ppf(1 - density / 2)
    for _ in range(3):
        idx = np.flatnonzero(np.abs(u) > np.float32(t))
        t *= 0.5 if len(idx) < 2 * k / 3 else 1.5
        if 2 * k / 3 <= len(idx) <= 4 * k / 3:
            break
    return list(idx)


def test_published_gaussian_k_selects_nothing_of_uniform_numbers_and_runs_away_with_what_is_left_over() -> None:
    uniform_D = vector("uniform", 200_000)
    assert _sent(PublishedGaussianK(0.001).take(uniform_D.clone())) == 0
    assert _in_band(_sent(GaussianK(0.001).take(uniform_D)), 200)
    feedback = ErrorFeedback(PublishedGaussianK(0.001), torch.zeros(100_000))
    counts = [_sent(feedback.take(gaussian(100_000, seed=step))) for step in range(10)]
    assert _in_band(counts[0], 100)
    assert max(counts) > 500


# ---- sampling and random numbers


def test_sampling_is_fair() -> None:
    u_D = vector("laplace", 10**6)
    counts = []
    for seed in range(20):
        left_D = u_D.clone()
        taken = SampledTopK(0.01, _generator(seed)).take(left_D)
        counts.append(_sent(taken))
        assert float(left_D.abs().max()) <= float(taken.parts["values"].abs().min())
    # 100 of a sample of 10,000 are above: a standard deviation of 1,000, and of 1,000 / sqrt(20) for the mean
    assert sum(counts) / len(counts) == pytest.approx(10_000, abs=4 * 1000 / math.sqrt(20))
    assert 300 < np.std(counts) < 2000


def test_sampling_chooses_exactly_where_far_too_many_pass() -> None:
    for name in ("constant", "two values", "whole"):
        for seed in range(5):
            assert _sent(SampledTopK(0.001, _generator(seed)).take(vector(name, 300_001))) <= 400
    assert _sent(SampledTopK(0.001, _generator()).take(vector("constant", 300_001))) == 300


def test_a_vector_too_short_to_sample_is_searched() -> None:
    u_D = vector("heavy", 60_000)
    taken = SampledTopK(0.001, _generator()).take(u_D.clone())
    assert set(taken.parts["indexes"].tolist()) == set(u_D.abs().topk(60).indices.tolist())


def test_every_number_is_equally_likely_in_random_k() -> None:
    for length, density in ((40, 0.1), (40, 0.6)):
        compressor, hits_D = RandomK(density, _generator()), torch.zeros(length)
        rounds, count = 4000, int(density * length)
        for _ in range(rounds):
            indexes_K = compressor.take(torch.ones(length)).parts["indexes"].long()
            assert len(indexes_K) == len(set(indexes_K.tolist())) == count
            hits_D[indexes_K] += 1
        # of a sample without replacement, the statistic is (length - 1) / (length - count) of that with
        expected = rounds * count / length
        statistic = float(((hits_D - expected) ** 2 / expected).sum()) * (length - 1) / (length - count)
        assert 1e-4 < scipy.stats.chi2.sf(statistic, length - 1) < 1 - 1e-4


def test_random_k_of_a_long_vector_takes_no_shuffle_of_it() -> None:
    taken = RandomK(1e-6, _generator()).take(torch.ones(10**7))
    assert len(set(taken.parts["indexes"].tolist())) == 10
    one, other = (RandomK(0.01, _generator(3)).take(torch.ones(10**5)) for _ in range(2))
    assert torch.equal(one.parts["indexes"], other.parts["indexes"])


# ---- rounding


def test_rounding_sends_what_the_compressor_of_messages_does() -> None:
    u_D = vector("laplace", 5000)
    for compressor in (Cast(torch.float16), Cast(torch.bfloat16), Int8()):
        vector_compressor = Rounding(compressor, width=2048)
        taken = vector_compressor.take(u_D.clone())
        arrived_D = decoded(vector_compressor, taken.parts, u_D)
        rows = [u_D[:4096].view(2, 2048), u_D[4096:].view(1, -1)]
        assert torch.equal(arrived_D, torch.cat([compressor.round_trip(row).flatten() for row in rows]))
    assert [len(part) for part in taken.parts.values()] == [3, 5000]
    with pytest.raises(RecipeError, match="width is 0"):
        Rounding(Int8(), width=0)
