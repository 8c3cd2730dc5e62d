"""Adaptive periodic averaging: the rule by itself, and averages between two real gloo processes.

Oracles: torch's PeriodicModelAverager for a constant period, numpy in float64 for S, and the law that nothing is lost
between what is sent and what is left over. `averaging_plays.py` is what each rank does.
"""

from __future__ import annotations

import inspect
import itertools
import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from milkglass.compression.gaussian_k import GaussianK
from milkglass.compression.topk import ExactTopK
from milkglass.compression.vector import Dense, VectorCompressor
from milkglass.errors import RecipeError
from milkglass.training.averaging import (
    AdaptivePeriodicAverager,
    Course,
    PeriodRule,
    average_buffers,
    squared_distance,
)
from tests.training import averaging_plays as plays
from tests.training.averaging_plays import Play, Played
from tests.training.gloo_ranks import Ranks

CONSTANT = {"initial_period": 3, "floor": 3, "ceiling": 3}
ADAPTIVE = {"sampling_steps": 13, "ceiling": 8}
"""Samples after the steps 4, 8 and 12; from 16 on the period adapts."""


# The rule


def test_the_defaults_are_as_published() -> None:
    rule = PeriodRule()
    assert (rule.initial_period, rule.low, rule.high, rule.floor) == (4, 0.7, 1.3, 1)
    ours = inspect.signature(AdaptivePeriodicAverager).parameters
    fields = {name: parameter.default for name, parameter in inspect.signature(PeriodRule).parameters.items()}
    assert {name: ours[name].default for name in fields} == fields


@pytest.mark.parametrize(
    "settings",
    [
        *({"initial_period": 0}, {"initial_period": -1}, {"floor": 0}, {"floor": 5}, {"ceiling": 3}),
        *({"floor": 9, "ceiling": 8, "initial_period": 9}, {"low": 1.3}, {"low": 1.4}, {"low": -0.1}),
        *({"high": math.nan}, {"high": math.inf}, {"every_step_for": 0}, {"sampling_steps": 1}),
        {"every_step_for": 20, "sampling_steps": 20},
    ],
)
def test_settings_that_make_no_rule_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="expected") as refused:
        PeriodRule(**settings)
    assert "\n" not in str(refused.value)
    assert next(iter(settings)) in str(refused.value)


def test_c2_is_the_mean_of_whole_first_periods_until_the_sampling_ends() -> None:
    rule = PeriodRule(every_step_for=3, sampling_steps=20)
    course, since = Course(), 0
    steps: list[int] = []
    quotients: list[float] = []
    for step in range(22):
        since += 1
        if since < course.period:
            continue
        steps.append(step)
        variance, rate = 1.0 + step % 5, 0.1 + 0.01 * step
        if rule.phase(course, step) == "sampling":
            quotients.append(variance / rate)
        course, since = rule.after(course, step, variance, rate), 0
    assert steps == [0, 1, 2, 6, 10, 14, 18]
    assert len(quotients) == 4
    assert course.c2 == pytest.approx(statistics.fmean(quotients), rel=1e-14)
    assert rule.phase(course, 22) == "adapting"


@pytest.mark.parametrize(
    ("share", "period", "following"),
    [
        *((0.0, 4, 5), (0.69, 4, 5), (0.71, 4, 4), (1.0, 4, 4), (1.29, 4, 4), (1.31, 4, 3), (1e9, 4, 3)),
        *((0.5, 8, 8), (0.5, 7, 8), (2.0, 2, 2), (2.0, 3, 2)),
    ],
)
def test_the_period_goes_by_one_past_a_threshold_and_stays_between_floor_and_ceiling(
    share: float, period: int, following: int
) -> None:
    rule = PeriodRule(floor=2, ceiling=8, sampling_steps=9)
    course = Course(period, c2=3.0, samples=2)
    assert rule.after(course, 100, share * 0.05 * 3.0, 0.05) == Course(following, 3.0, 2)


def test_a_learning_rate_of_0_changes_nothing() -> None:
    rule = PeriodRule(sampling_steps=9)
    for course in (Course(4), Course(4, 3.0, 1), Course(6, 3.0, 2)):
        assert rule.after(course, 100, 5.0, 0.0) == course
        assert rule.after(course, 100, 0.0, 0.0) == course
    assert rule.after(Course(), 0, 5.0, 0.0).period == 4


def test_after_a_drop_of_the_learning_rate_the_period_dips_before_it_grows() -> None:
    """S of models that walk at random: the sum of gamma^2 over the period. So the period should end near 4 * 10."""
    rule = PeriodRule(sampling_steps=101)
    course, since, walked, periods = Course(), 0, 0.0, []
    for step in range(4000):
        rate = 0.1 if step < 400 else 0.01
        since, walked = since + 1, walked + (0.1 if step <= 400 else 0.01) ** 2
        if since >= course.period:
            course, since, walked = rule.after(course, step, walked, rate), 0, 0.0
            periods.append((step, course.period))
    assert {period for step, period in periods if step < 400} == {4}
    after = [period for step, period in periods if step >= 400]
    assert after[0] == 3
    assert after[1:] == sorted(after[1:])
    assert 0.7 * 40 <= after[-1] <= 1.3 * 40


def test_no_samples_no_adapting() -> None:
    """One step and a learning rate of 0 for long: the sampling phase waits."""
    rule = PeriodRule(sampling_steps=2)
    assert rule.phase(Course(4), 1000) == "sampling"
    assert rule.phase(Course(4, 1.0, 1), 1000) == "adapting"


# S


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_squared_distance_is_that_of_numpy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = [(3,), (), (0,), (700, 300), (5, 4)]  # one of them larger than a chunk
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    tensors[-1] = tensors[-1].t().contiguous().t()  # in another order in memory
    point = torch.randn(sum(tensor.numel() for tensor in tensors)).to(dtype)
    own = np.concatenate([tensor.double().numpy().ravel() for tensor in tensors])
    found = squared_distance(tensors, point)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(float(((own - point.double().numpy()) ** 2).sum()), rel=1e-5)


# Two ranks


def same(one: Played, other: Played) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.after, other.after, strict=True))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("warmup", "apart"), [(0, False), (5, False), (5, True)])
def test_a_constant_period_is_torchs_averager_bit_for_bit(
    two_ranks: Ranks, wrapped: bool, warmup: int, apart: bool
) -> None:
    ours = two_ranks.run(plays.train, Play(CONSTANT | {"warmup_steps": warmup}, wrapped=wrapped, apart=apart))
    torchs = Play({"period": 3, "warmup_steps": warmup}, torchs=True, wrapped=wrapped, apart=apart)
    for one, other in zip(ours, two_ranks.run(plays.train, torchs), strict=True):
        assert same(one, other)
    assert [sync.step for sync in ours[0].syncs] == list(range(warmup, 20, 3))
    together = [torch.equal(one, other) for one, other in zip(ours[0].after, ours[1].after, strict=True)]
    assert together == [step in range(warmup, 20, 3) for step in range(20)]


def test_bf16_is_averaged_as_torch_does(two_ranks: Ranks) -> None:
    ours = two_ranks.run(plays.train, Play(CONSTANT, dtype=torch.bfloat16))
    torchs = two_ranks.run(plays.train, Play({"period": 3}, torchs=True, dtype=torch.bfloat16))
    assert same(ours[0], torchs[0])
    assert same(ours[1], torchs[1])
    assert ours[0].after[0].dtype == torch.bfloat16


def variance(ranks: list[Played], step: int, mean: np.ndarray[Any, Any] | None = None) -> float:
    models = np.stack([played.before[step].double().numpy() for played in ranks])
    return float(((models - (models.mean(0) if mean is None else mean)) ** 2).sum(1).mean())


def test_s_is_that_of_the_gathered_models_and_the_rule_is_followed(two_ranks: Ranks) -> None:
    found = two_ranks.run(plays.train, Play(ADAPTIVE, steps=80, rate_drops_after=40))
    assert found[0].syncs == found[1].syncs
    rule, course = PeriodRule(sampling_steps=13, ceiling=8), Course()
    for sync in found[0].syncs:
        assert sync.variance == pytest.approx(variance(found, sync.step), rel=1e-5)
        assert sync.learning_rate == pytest.approx(0.1 if sync.step <= 40 else 0.01)
        assert (sync.period, sync.phase) == (course.period, rule.phase(course, sync.step))
        assert sync.bound == (sync.learning_rate * course.c2 if course.samples else None)
        course = rule.after(course, sync.step, sync.variance, sync.learning_rate)
        assert sync.next_period == course.period
    phases = [sync.phase for sync in found[0].syncs]
    assert phases[:4] == ["every step", "sampling", "sampling", "sampling"]
    assert set(phases[4:]) == {"adapting"}
    assert len({sync.period for sync in found[0].syncs}) > 3
    steps = [sync.step for sync in found[0].syncs]
    assert [later - step for step, later in itertools.pairwise(steps)] == [
        sync.next_period for sync in found[0].syncs[:-1]
    ]


def test_one_number_more_is_sent_than_by_torch_and_only_at_averages(two_ranks: Ranks) -> None:
    ours = two_ranks.run(plays.train, Play(CONSTANT))[0].calls
    torchs = two_ranks.run(plays.train, Play({"period": 3}, torchs=True))[0].calls
    assert [calls for calls in torchs if calls] == [[("all_reduce", 323)]] * 7
    for one, other in zip(ours, torchs, strict=True):
        assert one == [*other, ("all_reduce", 1)] if other else one == []


def test_the_first_steps_are_averaged_each(two_ranks: Ranks) -> None:
    found = two_ranks.run(plays.train, Play({"every_step_for": 5, "warmup_steps": 2}))
    assert [sync.step for sync in found[0].syncs] == [2, 3, 4, 5, 6, 10, 14, 18]


@pytest.mark.parametrize("compressor", [None, Dense(), GaussianK(0.1), ExactTopK(0.05)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ranks_have_the_same_bits_after_each_average(
    two_ranks: Ranks, compressor: VectorCompressor | None, dtype: torch.dtype
) -> None:
    one, other = two_ranks.run(plays.train, Play(ADAPTIVE | {"compressor": compressor}, steps=40, dtype=dtype))
    assert len(one.syncs) > 6
    for sync in one.syncs:
        assert torch.equal(one.after[sync.step], other.after[sync.step])
        assert not torch.equal(one.before[sync.step], other.before[sync.step])
    assert [sync.variance for sync in one.syncs] == [sync.variance for sync in other.syncs]


@pytest.mark.parametrize("compressor", [None, GaussianK(0.1), plays.InTurn()])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("from_step", [9, 20])  # while sampling, and while adapting
def test_a_resumed_training_is_the_uninterrupted_one(
    two_ranks: Ranks, compressor: VectorCompressor | None, wrapped: bool, from_step: int
) -> None:
    settings = ADAPTIVE | {"compressor": compressor}
    whole = two_ranks.run(plays.train, Play(settings, steps=40, wrapped=wrapped))
    averaged = [sync.step for sync in whole[0].syncs]
    inside = next(step for step in range(from_step, 40) if step not in averaged)
    resumed = two_ranks.run(plays.train, Play(settings, steps=40, wrapped=wrapped, resume_after=inside))
    for one, other in zip(whole, resumed, strict=True):
        assert same(one, other)
        assert one.syncs == other.syncs
        assert one.states[-1].keys() == other.states[-1].keys()
        assert all(torch.equal(one.states[-1][name], other.states[-1][name]) for name in one.states[-1])


def test_without_compression_the_compressed_average_is_the_plain_one(two_ranks: Ranks) -> None:
    plain = two_ranks.run(plays.train, Play(CONSTANT))[0]
    dense = two_ranks.run(plays.train, Play(CONSTANT | {"compressor": Dense()}))[0]
    torch.testing.assert_close(torch.stack(dense.after), torch.stack(plain.after), rtol=1e-4, atol=1e-6)
    for one, other in zip(plain.syncs, dense.syncs, strict=True):
        assert one.variance == pytest.approx(other.variance, rel=1e-3)
    assert [sync.exchanged is None for sync in dense.syncs] == [True] + [False] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_sent_and_what_is_left_over_is_all_that_moved(two_ranks: Ranks, dtype: torch.dtype) -> None:
    """The mean over the ranks of (moved + left before - left after) is how far the reference goes."""
    found = two_ranks.run(plays.train, Play(CONSTANT | {"compressor": GaussianK(0.1)}, steps=30, dtype=dtype))
    steps = [sync.step for sync in found[0].syncs]
    assert all(torch.equal(played.after[0], found[0].states[0]["reference"].to(dtype)) for played in found)
    for last, step in itertools.pairwise(steps):
        sent = 0.0
        for played in found:
            moved = played.before[step].double() - played.after[last].double()
            left = played.states[last]["left"].double() - played.states[step]["left"].double()
            sent = sent + (moved + left) / 2
        one, other = (played.states[step]["reference"] for played in found)
        assert torch.equal(one, other)
        assert torch.equal(one.to(dtype), found[0].after[step])
        torch.testing.assert_close(
            one.double(), found[0].states[last]["reference"].double() + sent, rtol=1e-6, atol=1e-6
        )
    compressed = [sync.exchanged for sync in found[0].syncs[1:]]
    assert all(exchanged is not None and not exchanged.dense and exchanged.sent < 323 / 3 for exchanged in compressed)
    assert float(found[0].states[-1]["left"].abs().sum()) > 0


def test_s_of_a_compressed_average_is_measured_from_where_all_go_on(two_ranks: Ranks) -> None:
    found = two_ranks.run(plays.train, Play(ADAPTIVE | {"compressor": GaussianK(0.1)}, steps=40))
    for sync in found[0].syncs:
        goal = found[0].after[sync.step].double().numpy()
        assert sync.variance == pytest.approx(variance(found, sync.step, goal), rel=1e-5)


def test_what_a_parameter_without_gradient_does(two_ranks: Ranks) -> None:
    for rank, (one_sided, without, frozen) in enumerate(two_ranks.run(plays.average_some)):
        assert one_sided.tolist() == without.tolist() == [2.0, 2.0]
        assert frozen.tolist() == [1.0 + 2 * rank] * 2


def test_the_learning_rate_comes_from_groups_or_from_the_settings(two_ranks: Ranks) -> None:
    for told in two_ranks.run(plays.tell_rates):
        assert told[:3] == [pytest.approx((192 * 0.5 + 131 * 0.1) / 323), 0.25, 0.125]
        for words, part in zip(told[3:], ("no learning rate", "-1.0", "no parameter", "str"), strict=True):
            assert part in str(words)
            assert "expected" in str(words)


def test_an_averager_that_is_given_its_step_alone_averages_at_once_and_samples_anew(two_ranks: Ranks) -> None:
    steps, phases = two_ranks.run(plays.go_on_from_a_step_alone)[0]
    assert steps == [50, 54, 58]
    assert phases == ["every step", "sampling", "sampling"]


def test_statistics_of_batchnorm_are_averaged_and_counts_are_the_largest(two_ranks: Ranks) -> None:
    one, other = two_ranks.run(plays.average_statistics)
    for place in ("0", "2"):
        for name in ("running_mean", "running_var"):
            mean = (one[f"own.{place}.{name}"].double() + other[f"own.{place}.{name}"].double()) / 2
            torch.testing.assert_close(one[f"{place}.{name}"].double(), mean, rtol=1e-6, atol=1e-7)
            assert torch.equal(one[f"{place}.{name}"], other[f"{place}.{name}"])
            assert not torch.equal(one[f"own.{place}.{name}"], other[f"own.{place}.{name}"])
        assert int(one[f"{place}.num_batches_tracked"]) == int(other[f"{place}.num_batches_tracked"]) == 3
    assert one["mask"].tolist() == [True, True]
    assert other["mask"].tolist() == [False, True]


# Faults


@pytest.mark.parametrize("compressor", [None, GaussianK(0.1)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_all_ranks_name_the_one_whose_parameters_are_not_finite(
    two_ranks: Ranks, compressor: VectorCompressor | None, value: float
) -> None:
    found = two_ranks.run(plays.meet_nan, {"compressor": compressor}, value)
    assert found[0] == found[1]
    words, stayed = found[0]
    assert "step 4" in words
    assert "rank 1 are NaN or infinite" in words
    assert stayed


def test_models_too_far_apart_are_no_silent_nonsense(two_ranks: Ranks) -> None:
    for words in two_ranks.run(plays.be_far_apart):
        assert "far apart" in words


@pytest.mark.parametrize("compressor", [None, GaussianK(0.1)])
def test_the_state_of_another_model_is_refused(two_ranks: Ranks, compressor: VectorCompressor | None) -> None:
    wider, shorter, damaged, plain, *left = two_ranks.run(plays.refuse_states, {"compressor": compressor})[0]
    assert "parameter 0 has shape (32, 6); here (31, 6)" in wider
    assert "of 4 parameters; here are 2" in shorter
    assert "c2 is missing" in damaged
    assert ("with a compressor" in plain) == (compressor is not None)
    assert ["(323,)" in words for words in left] == [True] * (compressor is not None)


@pytest.mark.parametrize("compressor", [None, GaussianK(0.1)])
def test_one_rank_alone_sends_nothing_and_keeps_its_period(
    two_ranks: Ranks, compressor: VectorCompressor | None
) -> None:
    for stayed, collectives, syncs in two_ranks.run(plays.be_alone, ADAPTIVE | {"compressor": compressor}):
        assert stayed
        assert collectives == 0
        assert [sync.step for sync in syncs] == list(range(0, 40, 4))
        assert all(sync.variance == 0.0 for sync in syncs)
        assert syncs[-1].phase == "adapting"


def test_a_rank_outside_the_group_only_counts(two_ranks: Ranks) -> None:
    for stayed, step, collectives in two_ranks.run(plays.be_left_out):
        assert stayed
        assert step == 6
        assert collectives == 0


def test_without_a_process_group_it_says_what_to_call() -> None:
    assert not dist.is_initialized()
    with pytest.raises(RecipeError, match="init_process_group"):
        AdaptivePeriodicAverager()
    average_buffers(nn.BatchNorm1d(2))


def test_a_negative_warm_up_is_refused() -> None:
    with pytest.raises(RecipeError, match="warmup_steps is -1; expected 0 or more"):
        AdaptivePeriodicAverager(warmup_steps=-1)


@pytest.mark.parametrize("compressor", [None, GaussianK(0.1)])
def test_a_rank_that_dies_is_named_by_all_others(compressor: VectorCompressor | None) -> None:
    ranks = Ranks(3, timeout_seconds=20.0)
    try:
        ranks.begin(plays.end_in_the_middle, {"compressor": compressor})
        for rank in (0, 1):
            assert "rank 2 of 3 is gone or hang" in ranks.end(rank, 60)
    finally:
        ranks.close()
