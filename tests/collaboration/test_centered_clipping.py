"""A mean that fewer than half of the weight cannot pull far, in the same bits everywhere; claims; plausible parts."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from milkglass.collaboration.centered_clipping import (
    ClippedMean,
    centered_clip,
    compensated,
    is_plausible,
    remembered,
    running_mean,
)
from milkglass.collaboration.weights import cap_weights
from milkglass.errors import MessageError, RecipeError

HONEST, LIARS, SIZE = 13, 3, 500


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weighted_mean(x_ND: Tensor, weights_N: Tensor) -> Tensor:
    return (weights_N.double() @ x_ND.double() / weights_N.double().sum()).to(x_ND.dtype)


def honest(seed: int, count: int = HONEST) -> tuple[Tensor, Tensor]:
    """Contributions (count, SIZE) around one gradient of norm 5, with a noise of norm 22; a center beside it."""
    gradient_D = draw(1, SIZE)
    gradient_D *= 5 / gradient_D.norm()
    return gradient_D + draw(seed, count, SIZE), gradient_D + 0.3 * draw(seed + 1000, SIZE)


def typical(x_ND: Tensor) -> float:
    """The median distance of contributions to their mean."""
    return float((x_ND - x_ND.mean(0)).norm(dim=1).median())


# Everybody is honest.


@pytest.mark.parametrize("count", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("known", [True, False])
def test_where_nobody_is_an_outlier_the_result_is_the_weighted_mean(count: int, known: bool) -> None:
    x_ND, center_D = honest(count, count)
    weights_N = torch.arange(1.0, count + 1) + count  # at most twice as different
    found = centered_clip(x_ND, weights_N, center_D if known else None)
    torch.testing.assert_close(found.value_D, weighted_mean(x_ND, weights_N), rtol=1e-5, atol=1e-5)
    assert found.clipped_share == 0
    assert found.heard_N.tolist() == [1.0] * count


def test_who_has_few_records_is_heard_whole() -> None:
    """A mean of n records has a noise of 1 / sqrt(n), which is no reason for suspicion; with equal weights it is."""
    weights_N = torch.tensor([16.0] * 8 + [1.0] * 4)
    x_ND = draw(3, 12, SIZE) / weights_N.sqrt().unsqueeze(1)
    assert centered_clip(x_ND, weights_N, torch.zeros(SIZE)).heard_N.tolist() == [1.0] * 12
    assert max(centered_clip(x_ND, torch.ones(12), torch.zeros(SIZE)).heard_N[8:].tolist()) < 0.2


def test_noise_in_few_directions_costs_little() -> None:
    """Gradients have most of their noise in a few directions, so distances differ: no bias, hardly more error."""
    scale_D = 1 / torch.arange(1.0, SIZE + 1)
    errors, floors, sums_D = [], [], torch.zeros(SIZE)
    for seed in range(40):
        x_ND = draw(seed, 16, SIZE) * scale_D
        center_D = draw(seed + 100, SIZE) * scale_D / 4
        value_D = centered_clip(x_ND, torch.ones(16), center_D).value_D
        errors.append(value_D.square().sum().item())
        floors.append(x_ND.mean(0).square().sum().item())
        sums_D += value_D
    assert sum(errors) < 1.05 * sum(floors)
    assert (sums_D / 40).square().sum().item() < 2.5 * sum(floors) / 40 / 40  # as small as 40 means of means are


def test_a_center_far_away_does_not_hold_the_result_back() -> None:
    x_ND, _ = honest(5)
    found = centered_clip(x_ND, torch.ones(HONEST), 1e6 * draw(6, SIZE))
    torch.testing.assert_close(found.value_D, x_ND.mean(0), rtol=1e-3, atol=1e-3)


# Fewer than half lie.


def _a_little(x_ND: Tensor) -> Tensor:
    """Baruch et al. 2019, for 16 peers of which 3 lie."""
    return x_ND.mean(0) - NormalDist().inv_cdf(7 / 13) * x_ND.std(0)


def _hidden(x_ND: Tensor) -> Tensor:
    """As far against the gradient as is heard whole."""
    mean_D = x_ND.mean(0)
    return mean_D * (1 - 2 * typical(x_ND) / float(mean_D.norm()))


def _lies(x_ND: Tensor) -> dict[str, Tensor]:
    """What three liars send, who know what the honest do."""
    rows = (LIARS, SIZE)
    return {
        "flipped": -5 * x_ND[:LIARS],
        "scaled": 1000 * x_ND[:LIARS],
        "huge": torch.full(rows, 3e38),
        "random": 50 * draw(9, *rows),
        "together": (-100 * x_ND.mean(0)).expand(rows),
        "a little is enough": _a_little(x_ND).expand(rows),
        "hidden": _hidden(x_ND).expand(rows),
    }


FAR = ("flipped", "scaled", "huge", "random", "together")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", [*FAR, "a little is enough", "hidden"])
def test_liars_move_the_result_by_less_than_an_honest_contribution_s_noise(name: str, known: bool) -> None:
    x_ND, center_D = honest(7)
    told_ND = torch.cat([x_ND, _lies(x_ND)[name]])
    found = centered_clip(told_ND, torch.ones(HONEST + LIARS), center_D if known else None)
    share = LIARS / (HONEST + LIARS)
    moved = (found.value_D - x_ND.mean(0)).norm().item()
    assert moved <= 1.05 * 2 * share / (1 - share) * typical(x_ND)
    if name in FAR:
        assert moved < 0.05 * typical(x_ND)  # far away is hardly heard at all
        assert max(found.heard_N[HONEST:].tolist()) < 0.2
        mean_D = told_ND.double().mean(0)
        assert (mean_D - x_ND.mean(0)).norm().item() > typical(x_ND) / 2  # what it is there for


@pytest.mark.parametrize("distance", [10.0, 1e3, 1e20])
def test_just_under_half_of_the_weight_cannot_carry_the_result_away(distance: float) -> None:
    x_ND, center_D = honest(8, 8)
    lie_D = center_D + distance * draw(10, SIZE)
    told_ND = torch.cat([x_ND, lie_D.expand(7, SIZE)])
    found = centered_clip(told_ND, torch.ones(15), center_D)
    farthest = (x_ND - center_D).norm(dim=1).max().item()
    assert (found.value_D - center_D).norm().item() < 2 * farthest
    assert found.radius < 4 * farthest
    # ... and it is the weight that counts, not the heads
    heavy_N = torch.tensor([1.0] * 8 + [1.5] * 7)
    assert (centered_clip(told_ND, heavy_N, center_D).value_D - center_D).norm().item() > 2 * farthest


def test_liars_at_the_center_cannot_close_the_radius() -> None:
    x_ND, center_D = honest(11, 8)
    told_ND = torch.cat([x_ND, center_D.expand(7, SIZE)])
    found = centered_clip(told_ND, torch.ones(15), center_D)
    assert found.heard_N.tolist() == [1.0] * 15
    assert found.radius > (x_ND - found.value_D).norm(dim=1).min().item()


def test_one_liar_of_two_or_three_is_cut_off() -> None:
    for count in (1, 2):
        x_ND, center_D = honest(12, count)
        told_ND = torch.cat([x_ND, 1e6 * draw(13, 1, SIZE)])
        value_D = centered_clip(told_ND, torch.ones(count + 1), center_D).value_D
        assert (value_D - x_ND.mean(0)).norm().item() < 0.1 * (x_ND[0] - center_D).norm().item()


# Who is absent.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_counts_as_absent(bad: float) -> None:
    x_ND, center_D = honest(14)
    spoiled_ND = x_ND.clone()
    spoiled_ND[4, 17] = bad
    rest = [row for row in range(HONEST) if row != 4]
    weights_N = torch.arange(1.0, HONEST + 1)
    found = centered_clip(spoiled_ND, weights_N, center_D)
    expected = centered_clip(x_ND[rest], weights_N[rest], center_D)
    assert torch.equal(found.value_D, expected.value_D)
    assert found.heard_N[4] == 0
    assert found.clipped_share == expected.clipped_share


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_who_has_no_weight_counts_as_absent(weight: float) -> None:
    x_ND, center_D = honest(15)
    weights_N = torch.ones(HONEST)
    weights_N[0] = weight
    found, expected = centered_clip(x_ND, weights_N, center_D), centered_clip(x_ND[1:], torch.ones(12), center_D)
    assert torch.equal(found.value_D, expected.value_D)


def test_nobody_left_and_what_does_not_fit_is_refused() -> None:
    x_ND, center_D = honest(16)
    ones_N = torch.ones(HONEST)
    with pytest.raises(MessageError, match="none of 13 contributions is finite"):
        centered_clip(torch.full_like(x_ND, math.nan), ones_N, center_D)
    with pytest.raises(MessageError, match="none of 0 contributions"):
        centered_clip(x_ND[:0], ones_N[:0], center_D)
    for rows, weights_N, center, iterations in (
        (x_ND, ones_N[1:], center_D, 3),
        (x_ND[0], ones_N, center_D, 3),
        (x_ND.long(), ones_N, center_D, 3),
        (x_ND, ones_N, center_D[1:], 3),
        (x_ND, ones_N, center_D / 0, 3),
        (x_ND, ones_N, center_D, 0),
    ):
        with pytest.raises(MessageError, match="expected"):
            centered_clip(rows, weights_N, center, iterations)


def test_a_part_of_no_numbers_has_a_mean_of_none() -> None:
    for center_D in (None, torch.zeros(0)):
        found = centered_clip(torch.zeros(4, 0), torch.ones(4), center_D)
        assert found.value_D.shape == (0,)
        assert found.radius == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_floats_are_taken_up_to_the_largest(dtype: torch.dtype) -> None:
    largest = min(torch.finfo(dtype).max, 1e130)
    x_ND = draw(17, 5, 40).sign().to(dtype) * largest
    found = centered_clip(x_ND, torch.ones(5), -x_ND[0])
    assert found.value_D.dtype == dtype
    assert bool(torch.isfinite(found.value_D).all())


def test_weights_of_any_size_mean_the_same() -> None:
    x_ND, center_D = honest(18)
    x_ND[0] *= 10
    weights_N = torch.arange(1.0, HONEST + 1, dtype=torch.float64)
    expected = centered_clip(x_ND, weights_N, center_D)
    for scale in (2.0**-1000, 2.0**1018):
        found = centered_clip(x_ND, weights_N * scale, center_D)
        assert torch.equal(found.value_D, expected.value_D)
        assert torch.equal(found.heard_N, expected.heard_N)


# The same bits.


def _in_python(x_ND: Tensor, weights_N: Tensor, center_D: Tensor) -> list[float]:
    """Another writing of it, number by number, in Python's own floats."""

    def folded(values: list[float]) -> float:
        while len(values) > 1:
            half = len(values) // 2
            rest = len(values) - half
            values = [values[i] + values[rest + i] for i in range(half)] + values[half:rest]
        return values[0]

    rows, v = x_ND.double().tolist(), center_D.double().tolist()
    total = math.fsum(weights_N.tolist())
    weights = [weight / total for weight in weights_N.tolist()]

    def lower_median(values: list[float]) -> float:
        reached = 0.0
        for value, weight in sorted(zip(values, weights, strict=True), key=lambda pair: pair[0]):
            reached += weight
            if reached >= math.fsum(weights) / 2:
                return value
        raise AssertionError

    usual = lower_median(weights)
    for _ in range(3):
        far = [math.sqrt(folded([(x - c) * (x - c) for x, c in zip(row, v, strict=True)])) for row in rows]
        far = [each * math.sqrt(weight / usual) for each, weight in zip(far, weights, strict=True)]
        radius = 2 * lower_median(far)
        shares = [1.0 if each <= radius else (radius / each) * (radius / each) * (radius / each) for each in far]
        pulls = [weight * share for weight, share in zip(weights, shares, strict=True)]
        pulls = [pull / math.fsum(pulls) for pull in pulls]
        moves = [[(x - c) * pull for x, c in zip(row, v, strict=True)] for row, pull in zip(rows, pulls, strict=True)]
        v = [c + folded([move[i] for move in moves]) for i, c in enumerate(v)]
    return v


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 7), (5, 33), (16, 129)])
def test_it_is_the_formula_bit_by_bit(count: int, size: int) -> None:
    x_ND, center_D = draw(19, count, size).double(), draw(20, size).double()
    x_ND[0] *= 30
    weights_N = torch.arange(count, 0, -1, dtype=torch.float64)
    found = centered_clip(x_ND, weights_N, center_D)
    assert found.value_D.tolist() == _in_python(x_ND, weights_N, center_D)
    assert (found.clipped_share > 0) == (count > 2)


def test_same_rows_give_the_same_bits_with_any_threads_and_layout() -> None:
    x_ND, center_D = draw(21, 6, 100_000), draw(22, 100_000)  # several blocks of columns, the last one shorter
    x_ND[2] *= 100
    weights_N = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0])

    def bits(found: ClippedMean) -> tuple[bytes, float, float, list[float]]:
        return found.value_D.numpy().tobytes(), found.radius, found.clipped_share, found.heard_N.tolist()

    before, laid_out = torch.get_num_threads(), x_ND.T.contiguous().T
    kept_ND, kept_D = x_ND.clone(), center_D.clone()
    try:
        for center in (center_D, None):
            torch.set_num_threads(1)
            expected = bits(centered_clip(x_ND, weights_N, center))
            torch.set_num_threads(3)
            assert bits(centered_clip(laid_out.requires_grad_(), weights_N, center)) == expected
    finally:
        torch.set_num_threads(before)
    assert torch.equal(x_ND, kept_ND)
    assert torch.equal(center_D, kept_D)


def test_blocks_of_columns_are_one_vector() -> None:
    x_ND, center_D = draw(23, 5, 70_000), torch.zeros(70_000)
    x_ND[0] *= 8
    found = centered_clip(x_ND, torch.ones(5), center_D, iterations=1)
    far_N = x_ND.double().norm(dim=1)
    radius = 2 * far_N.median()
    pulls_N = (radius / far_N).clamp_max(1) ** 3
    assert found.radius == pytest.approx(radius.item())
    torch.testing.assert_close(found.value_D.double(), pulls_N @ x_ND.double() / pulls_N.sum(), rtol=1e-5, atol=1e-6)


def test_without_a_center_it_starts_from_zero() -> None:
    x_ND, _ = honest(24)
    x_ND[0] *= 20
    found, expected = (centered_clip(x_ND, torch.ones(HONEST), center) for center in (None, torch.zeros(SIZE)))
    assert torch.equal(found.value_D, expected.value_D)


# Memory.


def test_what_is_left_out_comes_to_nothing_and_averages_are_those_of_the_gradients() -> None:
    peers, left_out_PD = 5, torch.zeros(5, 40, dtype=torch.float64)
    for epoch in range(30):
        gradients_PD = draw(epoch, peers, 40).double()
        weights = (draw(epoch + 50, peers).abs() + 0.2).double()  # other weights in each epoch
        sent_PD = torch.stack([compensated(gradients_PD[i], left_out_PD[i], weights[i].item()) for i in range(peers)])
        average_D = weighted_mean(sent_PD, weights)
        torch.testing.assert_close(average_D, weighted_mean(gradients_PD, weights))
        left_out_PD = torch.stack(
            [remembered(left_out_PD[i], gradients_PD[i], average_D, weights[i].item()) for i in range(peers)]
        )
        torch.testing.assert_close(left_out_PD.sum(0), torch.zeros(40, dtype=torch.float64))


def test_contributions_are_increments_of_running_means() -> None:
    """In the paper's words: peers contribute momentum, and what is applied is how much the averages have moved."""
    memory, left_out_D, center_D, own_D = 0.9, torch.zeros(8).double(), torch.zeros(8).double(), torch.zeros(8).double()
    for epoch in range(25):
        gradient_D, average_D = draw(epoch, 8).double(), draw(epoch + 100, 8).double()
        sent_D = compensated(gradient_D, left_out_D, 3.0, memory)
        own_D = own_D * memory + gradient_D * (1 - memory)
        torch.testing.assert_close(sent_D, (own_D - memory * center_D) / (1 - memory))
        left_out_D = remembered(left_out_D, gradient_D, average_D, 3.0, memory)
        center_D = running_mean(center_D, average_D, memory)


def test_the_first_average_is_the_first_center() -> None:
    average_D = draw(24, 8)
    assert torch.equal(running_mean(None, average_D), average_D)


def _pushed(memory: float) -> float:
    """How far 3 liars of 16, hidden in the noise, carry the sum of 150 averages, over the sum of true gradients."""
    gradient_D = draw(1, 100)
    gradient_D *= 2 / gradient_D.norm()
    left_out_PD, center_D, sum_D = torch.zeros(HONEST, 100), gradient_D, torch.zeros(100)
    for epoch in range(150):
        gradients_PD = gradient_D + draw(epoch, HONEST, 100)
        sent_PD = torch.stack([compensated(gradients_PD[i], left_out_PD[i], 1.0, memory) for i in range(HONEST)])
        lie_D = sent_PD.mean(0) - typical(sent_PD) * gradient_D / gradient_D.norm()
        told_ND = torch.cat([sent_PD, lie_D.expand(LIARS, 100)])
        average_D = centered_clip(told_ND, torch.ones(HONEST + LIARS), center_D).value_D
        left_out_PD = torch.stack(
            [remembered(left_out_PD[i], gradients_PD[i], average_D, 1.0, memory) for i in range(HONEST)]
        )
        center_D, sum_D = running_mean(center_D, average_D, memory), sum_D + average_D
    return 1 - (sum_D @ gradient_D).item() / (150 * gradient_D.square().sum().item())


def test_memory_shrinks_what_hides_in_the_noise() -> None:
    """Noise of norm 10 on gradients of norm 2: hidden liars turn training around without a memory, not with one."""
    assert _pushed(memory=0.0) > 0.8
    assert _pushed(memory=0.98) < 0.4


# Parts that come back.


def test_an_honest_part_is_plausible_to_all_peers_and_a_large_lie_to_none() -> None:
    for seed in range(20):
        x_ND, center_D = honest(seed)
        part_D = x_ND.mean(0)
        for own_D in x_ND:
            assert is_plausible(part_D, center_D, own_D)
            assert is_plausible(part_D, None, own_D)
            assert not is_plausible(1000 * part_D, center_D, own_D)
            assert not is_plausible(1000 * part_D, None, own_D)
            assert is_plausible(torch.zeros(SIZE), center_D, own_D)  # a net for large lies only


def test_plausible_is_a_ball_around_the_center() -> None:
    center_D, own_D, way_D = draw(25, 60).double(), draw(26, 60).double(), draw(27, 60).double()
    reach = (own_D - center_D).norm() / way_D.norm()
    for factor in (1.0, 4.0):
        assert is_plausible(center_D + 0.999 * factor * reach * way_D, center_D, own_D, factor)
        assert not is_plausible(center_D + 1.001 * factor * reach * way_D, center_D, own_D, factor)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_part_that_is_not_finite_is_not_plausible(bad: float) -> None:
    part_D = torch.zeros(5)
    assert is_plausible(part_D, None, torch.ones(5))
    part_D[3] = bad
    assert not is_plausible(part_D, None, torch.ones(5))


def test_parts_of_other_lengths_are_refused() -> None:
    with pytest.raises(MessageError, match="one length"):
        is_plausible(torch.zeros(5), None, torch.zeros(6))
    with pytest.raises(MessageError, match="one length"):
        is_plausible(torch.zeros(5), torch.zeros(6), torch.zeros(5))


# Claims.


def test_no_claim_counts_for_more_than_the_cap() -> None:
    assert cap_weights([10, 20, 30, 1e300], 2) == [10, 20, 30, 40]
    assert cap_weights([10, 20, 30], 2) == [10, 20, 30]
    assert cap_weights([7], 1) == [7]
    assert cap_weights([], 2) == []


def test_a_liar_of_two_does_not_set_the_cap() -> None:
    assert cap_weights([10, 1e9], 4) == [10, 40]


@pytest.mark.parametrize("claim", [-5.0, math.nan, math.inf, -math.inf])
def test_nonsense_counts_as_nothing_and_does_not_move_the_median(claim: float) -> None:
    assert cap_weights([claim, 10, 10, 100, claim], 3) == [0, 10, 10, 30, 0]
    assert cap_weights([claim, 0], 3) == [0, 0]


def test_capped_liars_stay_below_half_of_the_weight() -> None:
    """As the docstring says: cap < (1 - d) / d."""
    for liars, cap in ((3, 4.0), (5, 2.0)):
        weights = cap_weights([8.0] * (16 - liars) + [1e12] * liars, cap)
        assert sum(weights[-liars:]) < sum(weights) / 2
        weights = cap_weights([8.0] * (16 - liars) + [1e12] * liars, (16 - liars) / liars * 1.01)
        assert sum(weights[-liars:]) > sum(weights) / 2


@pytest.mark.parametrize("cap", [0.5, -1.0, math.nan])
def test_a_cap_below_the_median_is_refused(cap: float) -> None:
    with pytest.raises(RecipeError, match="expected 1 or more"):
        cap_weights([1.0, 2.0], cap)
