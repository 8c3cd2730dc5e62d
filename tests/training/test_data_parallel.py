"""The communication hook on two real gloo processes: what is sent and what is left over is what there was.

The laws hold whatever the buckets are. `hook_plays.py` is what each rank does.
"""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from milkglass.compression.vector import count_of
from milkglass.errors import RecipeError, RunError
from milkglass.training.data_parallel import GaussianKState, GradientState, TopKState
from tests.training import hook_plays as plays
from tests.training.gloo_ranks import RankError, Ranks
from tests.training.hook_plays import Played

MAKERS = list(plays.STATES)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).double()


def left(played: Played) -> Tensor:
    return flat({name: played.state[f"left.{name}"] for name in played.weights})


@pytest.mark.parametrize("flat_one", [False, True])
@pytest.mark.parametrize("maker", MAKERS)
def test_what_came_back_and_what_is_left_over_is_all_that_there_was(
    two_ranks: Ranks, maker: str, flat_one: bool
) -> None:
    density = 1.0 if maker in ("dense", "rounding") else 0.1
    found = two_ranks.run(plays.train, maker, {"density": density, "flat": flat_one})
    total = sum(flat(each.own) - left(each) for each in found)
    torch.testing.assert_close(2 * flat(found[0].mean), total, rtol=0, atol=2e-6)
    kept = sum(float(left(each).abs().sum()) for each in found)
    assert (kept > 1e-3) == (maker != "dense") or maker == "rounding"


@pytest.mark.parametrize("flat_one", [False, True])
@pytest.mark.parametrize("maker", MAKERS)
def test_both_ranks_end_with_the_same_bits(two_ranks: Ranks, maker: str, flat_one: bool) -> None:
    one, other = two_ranks.run(plays.train, maker, {"density": 0.05, "flat": flat_one})
    assert torch.equal(flat(one.weights), flat(other.weights))
    assert not torch.equal(flat(one.own), flat(other.own))


def test_buckets_are_several_and_are_parted_anew_after_the_first_step(two_ranks: Ranks) -> None:
    one, _ = two_ranks.run(plays.train, "top-k", {"density": 0.1})
    first, *later = one.buckets
    assert len(first) == 1  # the first bucket takes a mebibyte, the first time
    assert len(later[0]) > 1
    assert all(buckets == later[0] for buckets in later)
    assert sum(first) == sum(later[0]) == len(flat(one.weights))


@pytest.mark.parametrize("flat_one", [False, True])
def test_all_gradients_sent_is_what_no_hook_does(two_ranks: Ranks, flat_one: bool) -> None:
    plain = two_ranks.run(plays.train, None, {})
    for maker in ("dense", "Gaussian-k", "top-k"):
        found = two_ranks.run(plays.train, maker, {"density": 1.0, "flat": flat_one})
        assert torch.equal(flat(found[0].weights), flat(plain[0].weights))
        assert found[0].dense == [True] * 6
        assert not left(found[0]).any()


def test_flat_is_exact_selection_over_all_gradients_with_error_feedback(two_ranks: Ranks) -> None:
    density = 0.03
    found = two_ranks.run(plays.train, "top-k", {"density": density, "flat": True})
    kept = [torch.zeros_like(flat(each.weights)) for each in found]
    for step in range(6):
        mean = torch.zeros_like(kept[0])
        for rank, each in enumerate(found):
            u = kept[rank] + flat(each.owns[step])
            largest = u.abs().topk(count_of(density, len(u))).indices
            mean[largest] += u[largest] / 2
            kept[rank] = u.index_fill(0, largest, 0.0)
            before, after = float(u.square().sum()), float(kept[rank].square().sum())
            assert each.left_shares[step] == pytest.approx(after / before, abs=1e-5)
        torch.testing.assert_close(flat(found[0].means[step]), mean, rtol=1e-5, atol=1e-7)


def test_flat_takes_one_threshold_and_buckets_one_each(two_ranks: Ranks) -> None:
    whole, _ = two_ranks.run(plays.train, "top-k", {"density": 0.03, "flat": True})
    parted, _ = two_ranks.run(plays.train, "top-k", {"density": 0.03})
    length = len(flat(whole.weights))
    assert whole.buckets[0] == [length]
    assert whole.sent[0] == count_of(0.03, length)
    assert parted.sent[0] == sum(count_of(0.03, size) for size in parted.buckets[0])


def test_momentum_correction_without_loss_is_sgd_with_momentum(two_ranks: Ranks) -> None:
    found = two_ranks.run(plays.train, "dense", {"density": 1.0, "momentum": 0.8})
    velocity = torch.zeros_like(flat(found[0].weights))
    for step in range(6):
        velocity = 0.8 * velocity + (flat(found[0].owns[step]) + flat(found[1].owns[step])) / 2
        torch.testing.assert_close(flat(found[0].means[step]), velocity, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5}, {"warmup": [(2, 0.2), (2, 0.1)]}])
@pytest.mark.parametrize("maker", ["top-k", "Gaussian-k"])
def test_a_resumed_training_ends_in_the_same_bits(two_ranks: Ranks, maker: str, settings: dict[str, Any]) -> None:
    settings = {"density": 0.03, "flat": True, **settings}
    through = two_ranks.run(plays.train, maker, settings)
    resumed = two_ranks.run(plays.train, maker, settings, 6, True, 3)
    for one, other in zip(through, resumed, strict=True):
        assert torch.equal(flat(one.weights), flat(other.weights))
        assert one.state.keys() == other.state.keys()
        for name, tensor in one.state.items():
            assert torch.equal(tensor, other.state[name]), name


def test_with_buckets_a_resumed_training_loses_nothing(two_ranks: Ranks) -> None:
    found = two_ranks.run(plays.train, "Gaussian-k", {"density": 0.05}, 6, True, 3)
    total = sum(flat(each.own) - left(each) for each in found)
    torch.testing.assert_close(2 * flat(found[0].mean), total, rtol=0, atol=2e-6)


def test_warm_up_sends_more_at_first(two_ranks: Ranks) -> None:
    one, _ = two_ranks.run(plays.train, "top-k", {"density": 0.01, "flat": True, "warmup": [(1, 0.2), (2, 0.05)]})
    length = len(flat(one.weights))
    assert one.sent == [count_of(share, length) for share in (0.2, 0.05, 0.05, 0.01, 0.01, 0.01)]


def test_what_is_cheaper_uncompressed_is_sent_uncompressed(two_ranks: Ranks) -> None:
    for density, dense in ((0.6, True), (0.4, False)):  # 8 bytes for each of a share, against 4 for all of two ranks
        one, _ = two_ranks.run(plays.train, "top-k", {"density": density, "flat": True})
        assert one.dense == [dense] * 6
        assert bool(left(one).any()) != dense


def test_gradients_that_are_accumulated_go_out_once(two_ranks: Ranks) -> None:
    (through, own), (_, theirs) = two_ranks.run(plays.accumulate, {"density": 0.05})
    torch.testing.assert_close(flat(through), flat(own) + flat(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flat_one", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_named_everywhere_and_spoils_nothing_kept(
    two_ranks: Ranks, bad: float, flat_one: bool
) -> None:
    found = two_ranks.run(plays.poisoned, bad, "Gaussian-k", {"density": 0.05, "flat": flat_one})
    for each in found:
        assert each["broken"] == [(), (), (1,), (), ()]
        assert each["alive"] == [True, True, False, True, True]
        assert each["left_is_finite"]
    assert torch.equal(found[0]["weights"], found[1]["weights"])
    assert torch.isfinite(found[0]["weights"]).all()


@pytest.mark.parametrize("maker", MAKERS)
def test_gradients_of_zeros_come_back_as_zeros(two_ranks: Ranks, maker: str) -> None:
    for _, gradients in two_ranks.run(plays.zeros, maker, True):
        assert not any(bool(gradient.any()) for gradient in gradients)
    (sent, one), (other_sent, other) = two_ranks.run(plays.zeros, maker, False)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert any(bool(gradient.any()) for gradient in one)
    if maker == "top-k":  # counts differ between ranks: nobody sends zeros
        assert sent != other_sent


@pytest.mark.parametrize("maker", MAKERS)
def test_a_network_of_one_weight_learns(two_ranks: Ranks, maker: str) -> None:
    for mean, _ in two_ranks.run(plays.single, maker):
        assert mean == pytest.approx(1.5)


@pytest.mark.parametrize("flat_one", [False, True])
def test_what_is_left_over_follows_the_gradient_scaler(two_ranks: Ranks, flat_one: bool) -> None:
    one, other = two_ranks.run(plays.with_scaler, {"density": 0.05, "flat": flat_one})
    assert one["scale"] == 512.0
    assert one["same"]  # what is kept has no scale, so that a training without a scaler can take it over
    total = one["own"] + other["own"] - one["left"] - other["left"]
    torch.testing.assert_close(2 * one["mean"], total, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("maker", MAKERS)
def test_gradients_of_half_precision_lose_no_more_than_its_rounding(
    two_ranks: Ranks, maker: str, dtype: torch.dtype
) -> None:
    one, other = two_ranks.run(plays.in_half, maker, dtype)
    total = one["own"] + other["own"] - one["left"] - other["left"]
    size = float(total.abs().max())
    torch.testing.assert_close(2 * one["mean"], total, rtol=0, atol=8 * torch.finfo(dtype).eps * size)


def test_the_state_of_another_network_is_refused_and_nothing_changes(two_ranks: Ranks) -> None:
    one, _ = two_ranks.run(plays.train, "top-k", {"density": 0.1}, 2)
    state = TopKState(0.1)
    for other, words in (
        (plays.net(hidden=32), r"state of another model: .*last.weight have shape \(4, 64\); expected \(4, 32\)"),
        (torch.nn.Linear(3, 3), r"state of another model: .* of .*, a parameter not here"),
    ):
        with pytest.raises(RunError, match=words):
            state.load_state_dict(one.state, other)
        assert state.step == 0
    with pytest.raises(RunError, match="step is missing"):
        state.load_state_dict({}, plays.net())
    state.load_state_dict(one.state, plays.net())
    assert state.step == 2


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, math.nan])
def test_a_density_that_is_none_is_refused(density: float) -> None:
    with pytest.raises(RecipeError, match=r"density is .*; expected a number above 0, at most 1"):
        GaussianKState(density)
    with pytest.raises(RecipeError, match="density"):
        GaussianKState(warmup=[(3, density)])


def test_other_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(RecipeError, match="warmup: 0 steps"):
        GaussianKState(warmup=[(0, 0.1)])
    with pytest.raises(RecipeError, match="momentum is 1"):
        GaussianKState(momentum=1)


def test_the_density_follows_the_warm_up() -> None:
    state: GradientState = GaussianKState(warmup=[(2, 0.015625), (1, 0.004)])
    densities = []
    for step in range(5):
        state.step = step
        densities.append(state.density_now)
    assert densities == [0.015625, 0.015625, 0.004, 0.001, 0.001]


@pytest.mark.parametrize("flat_one", [False, True])
def test_nothing_is_lost_where_no_rank_uses_a_parameter(two_ranks: Ranks, flat_one: bool) -> None:
    (mean, own, left), (_, theirs, other_left) = two_ranks.run(plays.with_branches, {"density": 0.1, "flat": flat_one})
    torch.testing.assert_close(2 * mean, own + theirs - left - other_left, rtol=0, atol=2e-6)
    assert left.any()


def test_the_mean_of_large_halves_is_theirs(two_ranks: Ranks) -> None:
    for found in two_ranks.run(plays.large_halves, torch.float16):
        torch.testing.assert_close(found.float(), torch.full((4, 1), 40000.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("flat_one", [False, True])
def test_two_networks_under_one_state_keep_apart(two_ranks: Ranks, flat_one: bool) -> None:
    (one, left), (other, other_left) = two_ranks.run(plays.two_with_one_state, flat_one)
    assert torch.equal(one, other)
    assert not torch.equal(left, other_left)


def test_one_rank_alone_has_momentum_too_and_is_named() -> None:
    ranks = Ranks(1)
    try:
        ((found, broken),) = ranks.run(plays.alone_with_momentum)
        assert found[:3] == pytest.approx([1.0, 1.9, 2.71])
        assert math.isnan(found[3])
        assert broken == (0,)
    finally:
        ranks.close()


def test_one_rank_alone_trains_as_if_there_were_no_hook() -> None:
    ranks = Ranks(1)
    try:
        plain = ranks.run(plays.train, None, {})[0]
        for maker in MAKERS:
            found = ranks.run(plays.train, maker, {"density": 0.01})[0]
            assert torch.equal(flat(found.weights), flat(plain.weights))
    finally:
        ranks.close()


def test_whoever_is_left_tells_who_is_gone() -> None:
    ranks = Ranks(3, timeout_seconds=60)
    try:
        ranks.begin(plays.endless, 1, 4)
        began = time.monotonic()
        for rank in (0, 2):
            with pytest.raises(RankError) as told:
                ranks.end(rank, seconds=60)
            assert told.value.kind == "LinkError"
            assert told.value.words.startswith(f"rank {rank}: rank 1 of 3 is gone or hangs (")
        assert time.monotonic() - began < 40  # not the timeout of the collective operation
    finally:
        ranks.close()


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_after_the_timeout(tmp_path: Path) -> None:
    ranks = Ranks(3, timeout_seconds=6)
    try:
        ranks.begin(plays.endless, -1, 3, str(tmp_path / "at work"))
        while not (tmp_path / "at work").exists():
            time.sleep(0.05)
        os.kill(ranks.pid(2), signal.SIGSTOP)
        for rank in (0, 1):
            with pytest.raises(RankError) as told:
                ranks.end(rank, seconds=60)
            assert told.value.kind == "LinkError"
            assert told.value.words.startswith(f"rank {rank}: rank 2 of 3 is gone or hangs (")
    finally:
        ranks.close()


@pytest.mark.slow
def test_a_rank_that_is_there_but_does_something_else_is_named() -> None:
    ranks = Ranks(3, timeout_seconds=6)
    try:
        ranks.begin(plays.asleep, 1)
        for rank in (0, 2):
            with pytest.raises(RankError) as told:
                ranks.end(rank, seconds=60)
            assert told.value.words.startswith(
                f"rank {rank}: rank 1 of 3 is there, but behind: stuck in work of its own ("
            )
    finally:
        ranks.close()
