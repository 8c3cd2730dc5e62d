"""Bounds against cases whose best attack is known: lower ones stay below it, upper ones above, some meet it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import expon, norm
from torch import Tensor

from milkglass.errors import AuditError
from milkglass.leakage.classification import clopper_pearson
from milkglass.leakage.information import (
    ClippedBound,
    GapBound,
    bounded_gap_bound,
    clipped_gap_bound,
    exact_fano_upper_bound,
    exponential_gap_bound,
    fano_upper_bound,
    gaussian_capacity_bits,
    gaussian_sigma_for_bits,
    is_vacuous,
    maximum_over_radius,
    pinsker_upper_bound,
    sub_gaussian_gap_bound,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def entropy(chance: float) -> float:
    """Of a coin, in bits."""
    return -sum(p * math.log2(p) for p in (chance, 1 - chance) if p)


def exponential_at(gap: float, scale: float, radius: float) -> float:
    """The paper's bound at one R."""
    return 0.5 + gap / (4 * radius) - math.exp(-radius / (2 * scale)) * (1 + 2 * scale / radius)


def sub_gaussian_at(gap: float, scale: float, radius: float) -> float:
    tail = math.sqrt(2 * math.pi) * scale / radius * math.erfc(radius / scale / math.sqrt(2)) / 2
    return 0.5 + gap / (4 * radius) - math.exp(-(radius**2) / (2 * scale**2)) - tail


# --- lower bounds from the gap ---


def test_two_point_losses_meet_the_bounded_bounds() -> None:
    """Losses at one of two ends, q of others at the upper, p of members: the best attack has 1/2 + |q-p|/2."""
    p, q, radius = 0.2, 0.7, 3.0
    best = 0.5 + abs(q - p) / 2
    assert bounded_gap_bound(2 * radius * (q - p), radius).value == pytest.approx(best)
    assert bounded_gap_bound(radius * (p - q), radius, nonnegative=True).value == pytest.approx(best)
    assert bounded_gap_bound(0.0, radius) == GapBound(0.5, radius)
    assert bounded_gap_bound(2 * radius, radius).value == 1.0
    assert bounded_gap_bound(radius, radius, nonnegative=True).value == 1.0


@pytest.mark.parametrize(
    ("bound", "at"), [(exponential_gap_bound, exponential_at), (sub_gaussian_gap_bound, sub_gaussian_at)]
)
@pytest.mark.parametrize("scaled_gap", [3.2, 1.0, 0.3, 1e-3, 1e-9])
def test_the_maximum_over_r_is_the_greatest_of_a_fine_grid(
    bound: Callable[[float, float], GapBound], at: Callable[[float, float, float], float], scaled_gap: float
) -> None:
    scale = 4.0
    gap = scaled_gap * scale
    found = bound(gap, scale)
    on_grid = max(at(gap, scale, radius) for radius in np.geomspace(1e-2 * scale, 1e4 * scale, 20_000))
    assert on_grid - 1e-15 <= found.value <= on_grid + 1e-6 * (on_grid - 0.5) + 1e-15
    assert found.value == pytest.approx(at(gap, scale, found.radius), abs=1e-14)
    assert bound(-gap, scale) == found
    assert bound(10 * gap, 10 * scale).value == pytest.approx(found.value)  # a unit of the loss is no matter
    assert 0.5 < found.value < bound(1.01 * gap, scale).value
    assert bound(gap, 1.01 * scale).value < found.value


def test_the_published_bounds_and_the_true_maximum_beyond_their_search() -> None:
    assert exponential_gap_bound(2 * 20 * 4 / 21, 4.0).value == pytest.approx(0.53966, abs=5e-6)
    found = exponential_gap_bound(4.0, 4.0)
    assert found.value == pytest.approx(0.51800, abs=5e-6)
    assert found.radius == pytest.approx(46.2, abs=0.05)
    assert exponential_at(4.0, 4.0, 40.0) == pytest.approx(0.51691, abs=5e-6)


def test_no_gap_proves_nothing_and_a_gap_that_the_tails_cannot_have_is_refused() -> None:
    for bound in (exponential_gap_bound, sub_gaussian_gap_bound):
        assert bound(0.0, 1.0) == GapBound(0.5, math.inf)
    # The greatest of all: |loss| as large as the tails allow, its sign telling who is a member.
    exponential = 2 * quad(lambda t: min(1.0, 2 * math.exp(-t / 2)), 0, 100, points=[2 * math.log(2)])[0]
    sub_gaussian = 2 * quad(lambda t: min(1.0, 2 * math.exp(-t * t / 2)), 0, 20, points=[1.1774])[0]
    for bound, greatest in ((exponential_gap_bound, exponential), (sub_gaussian_gap_bound, sub_gaussian)):
        assert 0.5 < bound(0.999 * greatest, 1.0).value < 1
        with pytest.raises(AuditError, match="such tails allow at most"):
            bound(1.001 * greatest, 1.0)


@pytest.mark.parametrize("shift", [0.1, 0.5, 1.0, 2.0])
def test_gaussian_losses_bounds_stay_below_the_best_attack(shift: float) -> None:
    """Members' losses N(-shift, 1), others' N(shift, 1): the best attack reads the sign, and has Phi(shift)."""
    draws, trials = generator(1), 40_000
    member_T = torch.arange(trials) % 2 == 0
    loss_T = torch.randn(trials, generator=draws, dtype=torch.float64) + torch.where(member_T, -shift, shift)
    attack = clopper_pearson(int(((loss_T < 0) == member_T).sum()), trials, confidence=0.999)
    assert attack.low <= norm.cdf(shift) <= attack.high

    def tail(t: float) -> float:
        return float(norm.sf(t - shift) + norm.sf(t + shift))

    at = np.linspace(1e-3, shift + 8, 4000)
    sub_gaussian = max(math.sqrt(t * t / (2 * math.log(2 / tail(t)))) for t in at)
    exponential = max(t / (2 * math.log(2 / tail(t))) for t in at[at < shift + 5])
    sub_gaussian_bound = sub_gaussian_gap_bound(2 * shift, sub_gaussian).value
    assert 0.5 < sub_gaussian_bound < norm.cdf(shift)
    assert 0.5 < exponential_gap_bound(2 * shift, exponential).value < norm.cdf(shift)


def test_the_clipped_bound_of_exponential_losses_is_its_closed_form_below_the_best_attack() -> None:
    """Losses with means 1 and 3: E[min(loss, R)] = mean (1 - exp(-R / mean)); the best attack is one threshold."""

    def closed(radius: float) -> float:
        return 0.5 + (3 * (1 - math.exp(-radius / 3)) - (1 - math.exp(-radius))) / (2 * radius)

    truth = maximum_over_radius(closed, 1e-3, 1e3)
    threshold = 1.5 * math.log(3)
    best = 0.5 + (expon.cdf(threshold) - expon.cdf(threshold / 3)) / 2
    member_M, other_O = exponential_losses(200_000, generator(2))
    found = clipped_gap_bound(member_M, other_O)
    assert found.value == pytest.approx(truth.value, abs=0.004)
    assert found.low < truth.value < best
    assert found.radius == pytest.approx(truth.radius, rel=0.1)
    # P(loss >= t) = exp(-t / 3) <= 2 exp(-t / (2 scale)) for scale 1.5: dropping the tail costs most of the bound.
    assert exponential_gap_bound(2.0, 1.5).value < truth.value


def exponential_losses(count: int, draws: torch.Generator, others_mean: float = 3.0) -> tuple[Tensor, Tensor]:
    member, other = -torch.rand(2, count, generator=draws, dtype=torch.float64).log()
    return member, others_mean * other


def slow_clipped(member_M: Tensor, other_O: Tensor) -> tuple[float, float]:
    """Value and R, from the definition, at every loss."""
    radii = [radius for radius in torch.cat([member_M, other_O]).tolist() if radius > 0]
    values = [0.5 + (other_O.clamp(max=r).mean() - member_M.clamp(max=r).mean()).item() / (2 * r) for r in radii]
    best = max(range(len(radii)), key=values.__getitem__)
    return values[best], radii[best]


@pytest.mark.parametrize("seed", range(5))
def test_the_clipped_bound_is_its_definition_at_the_best_radius(seed: int) -> None:
    draws = generator(seed)
    member_M, other_O = (torch.rand(count, generator=draws, dtype=torch.float64) ** 3 for count in (30, 41))
    other_O = (3 * other_O).mul(8).round() / 8  # with ties, and some of exactly 0
    found = clipped_gap_bound(member_M, other_O)
    value, radius = slow_clipped(member_M, other_O)
    assert (found.value, found.radius) == pytest.approx((value, radius))
    finer = maximum_over_radius(
        lambda r: 0.5 + (other_O.clamp(max=r).mean() - member_M.clamp(max=r).mean()).item() / (2 * r), 1e-4, 10.0
    )
    assert finer.value <= found.value + 1e-12


@pytest.mark.parametrize(("count", "others_mean"), [(20, 1.0), (50, 1.5), (200, 3.0)])
def test_the_low_end_of_the_clipped_bound_holds_although_r_was_chosen_on_the_losses(
    count: int, others_mean: float
) -> None:
    draws, wrong, naive_wrong, trials = generator(3), 0, 0, 400
    for _ in range(trials):
        member_M, other_O = exponential_losses(count, draws, others_mean)
        found = clipped_gap_bound(member_M, other_O)
        r = found.radius
        if r == math.inf:
            truth = 0.5
        else:
            truth = 0.5 + (others_mean * (1 - math.exp(-r / others_mean)) - (1 - math.exp(-r))) / (2 * r)
        wrong += found.low > max(truth, 0.5)
        naive_wrong += found.value > max(truth, 0.5)
    assert wrong <= 0.05 * trials
    assert naive_wrong > 0.3 * trials  # without the interval it would be wrong this often


def test_few_members_prove_nothing_however_many_others_there_are() -> None:
    draws, wrong, trials = generator(5), 0, 300
    for _ in range(trials):
        losses_N = -torch.rand(5020, generator=draws, dtype=torch.float64).clamp_min(1e-12).log()
        wrong += clipped_gap_bound(losses_N[:20], losses_N[20:]).low > 0.5
    assert wrong <= 0.05 * trials


def test_many_losses_leave_little_of_the_error() -> None:
    member_M, other_O = exponential_losses(100_000, generator(4))
    found = clipped_gap_bound(member_M, other_O)
    assert found.value - 0.005 < found.low < found.value
    assert found.value - found.low == pytest.approx(math.sqrt(math.log(40) / 200_000))  # each may err in 2.5 %
    surer = clipped_gap_bound(member_M, other_O, confidence=0.999)
    assert surer.low < found.low


def test_losses_that_tell_nothing_or_everything() -> None:
    zeros, ones = torch.zeros(2000), torch.ones(3000)
    assert clipped_gap_bound(zeros, zeros) == ClippedBound(0.5, 0.5, math.inf, 0.95)
    assert clipped_gap_bound(ones, zeros) == ClippedBound(0.5, 0.5, math.inf, 0.95)
    apart = clipped_gap_bound(zeros, ones)
    assert (apart.value, apart.radius) == (1.0, 1.0)
    assert 0.95 < apart.low < 1
    scaled = clipped_gap_bound(zeros, 1e-300 * ones.double())
    assert (scaled.value, scaled.low) == (apart.value, apart.low)


def test_a_maximum_is_found_among_several() -> None:
    def bumps(radius: float) -> float:
        places = {0.1: 0.9, 5.0: 0.91, 300.0: 1.0}
        return sum(height * math.exp(-((math.log(radius / at) / 0.2) ** 2)) for at, height in places.items())

    found = maximum_over_radius(bumps, 1e-3, 1e4)
    assert (found.value, found.radius) == pytest.approx((1.0, 300.0), rel=1e-6)
    rising = maximum_over_radius(lambda radius: radius, 1.0, 2.0)
    assert (rising.value, rising.radius) == pytest.approx((2.0, 2.0))


# --- upper bounds from mutual information ---


@pytest.mark.parametrize("flip", [0.5, 0.499, 0.4, 0.25, 0.1, 0.0])
def test_a_flipped_fair_bit_is_guessed_no_better_than_pinsker_and_exactly_as_fano(flip: float) -> None:
    """What is seen is the bit, flipped with a known chance: I = 1 - h(flip) bits, and the best guess has 1 - flip."""
    bits = max(1 - entropy(flip), 0.0)
    pinsker = pinsker_upper_bound(bits * math.log(2))
    assert pinsker >= 1 - flip - 1e-9
    assert exact_fano_upper_bound(bits, 2) == pytest.approx(1 - flip, abs=1e-7)
    assert exact_fano_upper_bound(bits, 2) <= pinsker + 1e-7
    assert fano_upper_bound(bits, 2) == 1.0
    if flip > 0.4:
        assert pinsker == pytest.approx(1 - flip, abs=1e-4)  # with little information Pinsker is tight


@pytest.mark.parametrize("candidates", [2, 3, 16, 1024])
@pytest.mark.parametrize("over_chance", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_channel_that_meets_fano_exactly(candidates: int, over_chance: float) -> None:
    success = 1 / candidates + over_chance * (1 - 1 / candidates)
    bits = math.log2(candidates) - entropy(success) - (1 - success) * math.log2(max(candidates - 1, 1))
    bits = max(bits, 0.0)
    assert exact_fano_upper_bound(bits, candidates) == pytest.approx(success, abs=1e-6)
    assert exact_fano_upper_bound(bits, candidates) <= fano_upper_bound(bits, candidates) + 1e-6


def test_upper_bounds_rise_from_chance_and_say_when_they_say_nothing() -> None:
    for bound, chance in ((pinsker_upper_bound, 0.5), (lambda bits: exact_fano_upper_bound(bits, 256), 1 / 256)):
        values = [bound(information) for information in (0.0, 1e-18, 1e-6, 0.01, 0.1, 0.4)]
        assert values[0] == chance
        assert values == sorted(values)
        assert not any(map(is_vacuous, values))
        assert bound(math.inf) == 1.0
        assert is_vacuous(bound(math.inf))
    assert fano_upper_bound(3.0, 256) == 0.5
    assert is_vacuous(fano_upper_bound(7.0, 256))
    assert not is_vacuous(exact_fano_upper_bound(7.0, 256))
    assert is_vacuous(exact_fano_upper_bound(8.0, 256))
    assert is_vacuous(exact_fano_upper_bound(math.nextafter(8.0, 0.0), 256))
    assert exact_fano_upper_bound(7.999, 256) < 1
    assert is_vacuous(math.nan)


@pytest.mark.parametrize("bits", [0.5, 1.0, 2.0, 4.0])
def test_a_game_of_picking_the_sender_of_a_noisy_vector_stays_below_the_bounds(bits: float) -> None:
    """The best guess, the nearest of N vectors of norm C, through the noise whose capacity is `bits`."""
    candidates, dimensions, clip, trials = 64, 8, 2.0, 4000
    draws = generator(5)
    sigma = gaussian_sigma_for_bits(bits, dimensions, clip)
    z_ND = torch.randn(candidates, dimensions, generator=draws, dtype=torch.float64)
    z_ND *= clip / z_ND.norm(dim=1, keepdim=True)
    sent_T = torch.randint(candidates, (trials,), generator=draws)
    seen_TD = z_ND[sent_T] + sigma * torch.randn(trials, dimensions, generator=draws, dtype=torch.float64)
    success = clopper_pearson(int((torch.cdist(seen_TD, z_ND).argmin(1) == sent_T).sum()), trials, confidence=0.99)
    assert success.low > 1.5 / candidates  # the game is not lost anyway
    assert success.high < exact_fano_upper_bound(bits, candidates) < fano_upper_bound(bits, candidates)


# --- the Gaussian channel ---


def binary_information_bits(norm_1: float, sigma: float) -> float:
    """Mutual information of +C or -C, alike likely, with itself plus noise, by integration: 1 - E[log2(1 + e^-2 L)]."""

    def integrand(x: float) -> float:
        seen = norm_1 + sigma * x
        return float(norm.pdf(x) * np.logaddexp(0.0, -2 * seen * norm_1 / sigma**2) / math.log(2))

    return 1 - float(quad(integrand, -12, 12, points=[-norm_1 / sigma] if norm_1 < 12 * sigma else None)[0])


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 3.0, 10.0])
def test_capacity_is_above_what_a_binary_input_tells_and_meets_it_in_much_noise(sigma: float) -> None:
    told, capacity = binary_information_bits(1.0, sigma), gaussian_capacity_bits(1, 1.0, sigma)
    assert 0 < told < capacity
    if sigma == 10.0:
        assert told == pytest.approx(capacity, rel=1e-4 + 1 / sigma**2)
    # A corner of the cube has norm C, and its D coordinates are D such inputs of C / sqrt D.
    assert 9 * binary_information_bits(1 / 3, sigma) < gaussian_capacity_bits(9, 1.0, sigma)


def test_capacity_is_that_of_a_gaussian_input_of_that_power_and_its_limits() -> None:
    dimensions, clip, sigma = 5, 3.0, 0.7
    signal, noise = np.eye(dimensions) * clip**2 / dimensions, np.eye(dimensions) * sigma**2
    log_dets = [np.linalg.slogdet(matrix).logabsdet for matrix in (signal + noise, noise)]
    assert gaussian_capacity_bits(dimensions, clip, sigma) == pytest.approx((log_dets[0] - log_dets[1]) / math.log(4))
    many = gaussian_capacity_bits(10**9, clip, sigma)
    assert many == pytest.approx(clip**2 / (2 * sigma**2 * math.log(2)))  # rises with D, to that
    assert gaussian_capacity_bits(5, clip, sigma) < gaussian_capacity_bits(6, clip, sigma) < many
    assert gaussian_capacity_bits(5, clip, 1e-150) > 2000 > gaussian_capacity_bits(5, clip, 1e-3)


@pytest.mark.parametrize("bits", [1e-9, 0.1, 1.0, 16.0, 3000.0])
@pytest.mark.parametrize("dimensions", [1, 8, 4096])
def test_the_noise_for_some_bits_has_that_capacity(bits: float, dimensions: int) -> None:
    if bits / dimensions > 1000:
        with pytest.raises(AuditError, match="no such sigma"):
            gaussian_sigma_for_bits(bits, dimensions, 4.0)
    else:
        sigma = gaussian_sigma_for_bits(bits, dimensions, 4.0)
        assert gaussian_capacity_bits(dimensions, 4.0, sigma) == pytest.approx(bits)
        assert gaussian_sigma_for_bits(0.9 * bits, dimensions, 4.0) > sigma


# --- bad input ---


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_values_out_of_range_are_refused(bad: float) -> None:
    for call in (
        lambda: bounded_gap_bound(0.1, bad),
        lambda: exponential_gap_bound(0.1, bad),
        lambda: sub_gaussian_gap_bound(0.1, bad),
        lambda: gaussian_capacity_bits(4, bad, 1.0),
        lambda: gaussian_capacity_bits(4, 1.0, bad),
        lambda: gaussian_sigma_for_bits(bad, 4, 1.0),
        lambda: gaussian_sigma_for_bits(1.0, 4, bad),
    ):
        with pytest.raises(AuditError, match="expected a positive number"):
            call()


def test_other_bad_input_is_refused() -> None:
    for gap in (math.nan, math.inf, -7.0):
        with pytest.raises(AuditError, match="expected at most 6"):
            bounded_gap_bound(gap, 3.0)
        with pytest.raises(AuditError, match="such tails allow"):
            exponential_gap_bound(gap, 1.0)
    with pytest.raises(AuditError, match="expected at most 3"):
        bounded_gap_bound(3.1, 3.0, nonnegative=True)
    for information in (-1e-9, math.nan):
        with pytest.raises(AuditError, match="expected 0 or more"):
            pinsker_upper_bound(information)
        for fano in (fano_upper_bound, exact_fano_upper_bound):
            with pytest.raises(AuditError, match="expected 0 or more"):
                fano(information, 4)
    for fano in (fano_upper_bound, exact_fano_upper_bound):
        with pytest.raises(AuditError, match="candidates: 1; expected at least 2"):
            fano(1.0, 1)
    for count in (gaussian_capacity_bits, lambda d, clip, bits: gaussian_sigma_for_bits(bits, d, clip)):
        with pytest.raises(AuditError, match="D: 0; expected at least 1"):
            count(0, 1.0, 1.0)
    good = torch.ones(3)
    for bad in (torch.tensor([-1.0]), torch.tensor([math.nan]), torch.tensor([math.inf]), torch.ones(0)):
        with pytest.raises(AuditError, match="members; expected finite ones"):
            clipped_gap_bound(bad, good)
        with pytest.raises(AuditError, match="other records; expected finite ones"):
            clipped_gap_bound(good, bad)
    for confidence in (0.4, 1.0, math.nan):
        with pytest.raises(AuditError, match="a confidence of"):
            clipped_gap_bound(good, good, confidence=confidence)
    for low, high in ((0.0, 1.0), (2.0, 1.0), (1.0, math.inf)):
        with pytest.raises(AuditError, match="expected 0 < low < high"):
            maximum_over_radius(lambda radius: radius, low, high)
