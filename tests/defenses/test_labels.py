"""Label protection: what the noise is by law, and what it leaves to the attacks that win without it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn import functional as F

from milkglass.attacks.labels import GradientDirection, GradientNorm
from milkglass.defenses.base import Defense, NoiseStream
from milkglass.defenses.labels import Marvell, MaxNorm, Variances, marvell, marvell_variances, max_norm
from milkglass.errors import MilkglassError, RecipeError
from milkglass.inference import audit_labels
from milkglass.randomness import drawing_from, public_source
from milkglass.transcript import LabelTrial, LabelView

DRAWS = 20_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(seed: int = 0) -> NoiseStream:
    return NoiseStream(public_source(seed))


def rows_of_two_classes(count: int = 12, width: int = 5) -> tuple[Tensor, Tensor]:
    """Gradients (count, width) of which every fourth is of class 1, far from the others and more spread; and labels."""
    y_B = (torch.arange(count) % 4 == 0).long()
    g_BD = torch.randn(count, width, generator=generator(3), dtype=torch.float64)
    scaled: Tensor = (0.2 + 0.5 * y_B[:, None]) * g_BD + y_B[:, None]
    return scaled, y_B


def many(sent: Tensor, count: int) -> Tensor:
    """A batch that was repeated DRAWS times, as (DRAWS, count, D)."""
    return sent.reshape(DRAWS, count, -1)


# Max-norm.


def test_max_norm_gives_all_rows_the_largest_squared_norm_on_average_and_keeps_their_lines() -> None:
    g_BD, _ = rows_of_two_classes()
    g_BD[5] = 0.0  # no line to keep
    normal = torch.randn(DRAWS * 12, 5, generator=generator(), dtype=torch.float64)
    sent = many(max_norm(g_BD.repeat(DRAWS, 1), normal), 12)
    square_B = g_BD.square().sum(1)
    largest = square_B.amax().item()
    assert sent.square().sum(2).mean(0).sub(largest).abs().max() < 0.05 * largest
    error_BD = (sent.mean(0) - g_BD) / (sent.std(0) + 1e-12)
    assert error_BD.abs().max() < 5 / DRAWS**0.5  # unbiased
    cosine = F.cosine_similarity(sent, g_BD[None], dim=2).abs()
    has_line_B = square_B > 0
    assert cosine[:, has_line_B].min() > 1 - 1e-9
    assert cosine[:, ~has_line_B].mean() < 0.6
    at = int(square_B.argmax())
    assert torch.equal(sent[:, at], g_BD[at].expand(DRAWS, 5))


# Marvell: the search, against outside oracles.


def model(v: float, along: float, across: float, mean: float, width: int) -> MultivariateNormal:
    """N(mean e1, v I + noise), the noise having these variances along e1 and across it."""
    variance_D = torch.full((width,), v + across, dtype=torch.float64)
    variance_D[0] = v + along
    mean_D = torch.zeros(width, dtype=torch.float64)
    mean_D[0] = mean
    return MultivariateNormal(mean_D, torch.diag(variance_D))


def both_ways(zero: MultivariateNormal, one: MultivariateNormal) -> float:
    return float(kl_divergence(zero, one) + kl_divergence(one, zero))


def sum_kl(variances: tuple[float, float], gap: float, width: int, found: Variances) -> float:
    """The sum of divergences, by torch."""
    zero, one = (model(variances[k], found.along[k], found.across[k], k * math.sqrt(gap), width) for k in (0, 1))
    return both_ways(zero, one)


PROBLEMS = [
    pytest.param((v0, v1), gap, width, share, strength, id=f"{v0}-{v1}-{gap}-{width}-{share}-{strength}")
    for v0, v1, gap, width, share, strength in (
        (0.1, 0.4, 1.0, 5, 0.1, 1.0),
        (0.4, 0.1, 1.0, 5, 0.1, 1.0),
        (1e-3, 0.5, 2.0, 40, 0.3, 0.25),
        (2.0, 1e-4, 3e-8, 10, 0.5, 4.0),
        (0.0, 0.2, 1.0, 8, 0.2, 2.0),  # one record in class 0
        (0.3, 0.0, 1.0, 8, 0.02, 0.1),  # one record in class 1
        (0.2, 0.2, 1.0, 8, 0.2, 2.0),
        (0.3, 0.1, 1.0, 1, 0.2, 2.0),
        (0.0, 0.0, 1.0, 1, 0.2, 2.0),
    )
]


@pytest.mark.parametrize(("variances", "gap", "width", "share", "strength"), PROBLEMS)
def test_marvell_spends_its_power_and_no_other_noise_of_that_power_hides_more(
    variances: tuple[float, float], gap: float, width: int, share: float, strength: float
) -> None:
    found = marvell_variances(variances, gap, width, share, strength)
    shares, others = (1 - share, share), width - 1
    spent = sum(shares[k] * (found.along[k] + others * found.across[k]) for k in (0, 1))
    assert spent == pytest.approx(strength * gap, rel=1e-9 + 1e-14 * max(variances) / gap)
    assert min(*found.along, *found.across) >= 0
    assert all(found.along[k] >= found.across[k] * (1 - 1e-6) for k in (0, 1))
    least = sum_kl(variances, gap, width, found)
    assert found.sum_kl == pytest.approx(least, rel=1e-6)

    def scaled(logs: NDArray[np.float64]) -> Variances:
        parts = np.exp(np.clip(logs, -30, 30))
        power = share * (parts[1] + others * parts[3]) + (1 - share) * (parts[0] + others * parts[2])
        a0, a1, c0, c1 = (float(part) * strength * gap / power for part in parts)
        return Variances((a0, a1), (c0, c1), math.nan)

    isotropic = scaled(np.zeros(4))
    assert least <= sum_kl(variances, gap, width, isotropic) * (1 + 1e-9)
    draws = np.random.default_rng(0)
    others_found = [sum_kl(variances, gap, width, scaled(draws.normal(0, 3, 4))) for _ in range(50)]
    assert least <= min(others_found) * (1 + 1e-9)
    if width > 1 and min(variances) > 0:
        descended = minimize(
            lambda logs: sum_kl(variances, gap, width, scaled(logs)),
            np.zeros(4),
            method="Nelder-Mead",
            options={"maxiter": 600, "maxfev": 600},
        )
        assert least <= descended.fun * (1 + 1e-6)
        assert descended.fun < 1.05 * least  # the oracle has come near


def test_marvell_hides_more_than_isotropic_noise_and_max_norm_of_the_same_power_on_a_batch() -> None:
    # Gaussians with the batch's class means, its within-class variance as the paper has it, and each noise's covariance
    g_BD, y_B = rows_of_two_classes(40)
    square_B = g_BD.square().sum(1)
    added_B = square_B.amax() - square_B
    unit_BD = F.normalize(g_BD, dim=1)
    longer_BDD = added_B[:, None, None] * unit_BD[:, :, None] * unit_BD[:, None, :]
    power = added_B.mean().item()  # what max-norm spends
    means = [g_BD[y_B == k].mean(0) for k in (0, 1)]
    strength = power / (means[1] - means[0]).square().sum().item()
    found = marvell(g_BD, y_B, strength)
    assert found is not None
    line_DD = torch.outer(found.direction, found.direction)
    eye_DD = torch.eye(5, dtype=torch.float64)

    def divergence(noises: list[Tensor]) -> float:
        spent = sum((y_B == k).double().mean() * noises[k].trace() for k in (0, 1))
        assert float(spent) == pytest.approx(power)
        within = [(g_BD[y_B == k] - means[k]).square().mean() for k in (0, 1)]
        zero, one = (MultivariateNormal(means[k], within[k] * eye_DD + noises[k]) for k in (0, 1))
        return both_ways(zero, one)

    ours = divergence([found.variances[0, k] * line_DD + found.variances[1, k] * (eye_DD - line_DD) for k in (0, 1)])
    isotropic = divergence([power / 5 * eye_DD] * 2)
    lengthened = divergence([longer_BDD[y_B == k].mean(0) for k in (0, 1)])
    assert ours < 0.8 * isotropic
    assert ours < 0.8 * lengthened


def test_marvells_noise_has_mean_zero_and_the_variances_it_says() -> None:
    g_BD, y_B = rows_of_two_classes()
    found = marvell(g_BD, y_B, 2.0)
    assert found is not None
    gap = (g_BD[y_B == 1].mean(0) - g_BD[y_B == 0].mean(0)).square().sum().item()
    normal = torch.randn(DRAWS * 12, 5, generator=generator(1), dtype=torch.float64)
    sent = many(found.add_to(g_BD.repeat(DRAWS, 1), y_B.repeat(DRAWS), normal), 12)
    added = sent - g_BD
    assert ((sent.mean(0) - g_BD) / (sent.std(0) + 1e-12)).abs().max() < 5 / DRAWS**0.5  # unbiased
    assert added.square().sum(2).mean().item() == pytest.approx(2.0 * gap, rel=0.02)
    along = added @ found.direction
    across = added - along[..., None] * found.direction
    for k in (0, 1):
        assert along[:, y_B == k].var().item() == pytest.approx(found.variances[0, k].item(), rel=0.03)
        spread = across[:, y_B == k].square().sum(2).mean().item()
        assert spread == pytest.approx(4 * found.variances[1, k].item(), rel=0.03)
    assert found.variances[1].max() > 0  # else nothing across was tested


def test_no_attack_on_gaussian_gradients_beats_what_the_divergence_allows() -> None:
    # total variation <= sqrt(sum_kl) / 2, and the area of the best test <= 1/2 + tv - tv^2 / 2
    variances, gap, width = (0.05, 0.3), 1.0, 6
    for strength in (0.5, 4.0):
        found = marvell_variances(variances, gap, width, 0.1, strength)
        zero, one = (model(variances[k], found.along[k], found.across[k], float(k), width) for k in (0, 1))
        with drawing_from(generator(4)):
            seen = torch.cat([zero.sample((4000,)), one.sample((4000,))])
        ratio = one.log_prob(seen) - zero.log_prob(seen)  # type: ignore[no-untyped-call]
        area = (ratio[4000:, None] > ratio[None, :4000]).double().mean().item()
        variation = math.sqrt(found.sum_kl) / 2
        assert 0.5 < area < 0.5 + variation - variation**2 / 2 + 0.01


# The defenses.


DEFENSES = (MaxNorm(), Marvell(4.0))


@pytest.mark.parametrize("defense", DEFENSES, ids=repr)
def test_shapes_and_types_stay_and_noise_is_the_holders_own(defense: Defense) -> None:
    flat_BD, y_B = rows_of_two_classes(8, 6)
    g_BCHW = flat_BD.float().reshape(8, 1, 2, 3)
    stream = noise()
    sent = defense.protect(g_BCHW, y_B, stream)
    assert (sent.shape, sent.dtype) == (g_BCHW.shape, g_BCHW.dtype)
    assert stream.block == 1
    assert torch.equal(sent, defense.protect(g_BCHW, y_B, noise()))
    assert not torch.equal(sent, defense.protect(g_BCHW, y_B, noise(1)))
    drawn = noise().gaussian_like(g_BCHW, defense.describe(), torch.float64).reshape(8, 6)
    found = marvell(flat_BD.float(), y_B, 4.0)
    assert found is not None
    flat = (
        max_norm(flat_BD.float(), drawn) if isinstance(defense, MaxNorm) else found.add_to(flat_BD.float(), y_B, drawn)
    )
    assert torch.equal(sent.reshape(8, 6), flat)
    assert torch.equal(defense.release(g_BCHW, noise()), g_BCHW)
    assert len(defense.describe()) > 5


@pytest.mark.parametrize("defense", DEFENSES, ids=repr)
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e12])
def test_the_gradients_unit_does_not_matter(defense: Defense, scale: float) -> None:
    g_BD, y_B = rows_of_two_classes(4000, 6)
    sent = defense.protect((g_BD * scale).float(), y_B, noise()).double() / scale
    plain = defense.protect(g_BD.float(), y_B, noise(1)).double()
    assert sent.square().sum(1).mean().item() == pytest.approx(plain.square().sum(1).mean().item(), rel=0.1)


def test_marvell_takes_a_class_of_one_record_and_a_batch_of_one_of_each() -> None:
    g_BD, _ = rows_of_two_classes()
    for rows, y_B in ((g_BD, (torch.arange(12) == 7).long()), (g_BD[:2], torch.tensor([0, 1]))):
        found = marvell(rows, y_B, 1.0)
        assert found is not None
        assert bool(torch.isfinite(found.variances).all())
        assert (found.variances[0] > 0).all()
        assert torch.isfinite(Marvell(1.0).protect(rows, y_B, noise())).all()


def test_a_batch_of_one_class_gets_the_noise_of_the_last_batch_of_both() -> None:
    g_BD, y_B = rows_of_two_classes(400, 6)
    zeros = torch.zeros(400, dtype=torch.int64)
    assert marvell(g_BD, zeros, 4.0) is None
    assert marvell(torch.zeros(400, 6), y_B, 4.0) is None
    first, later = Marvell(4.0), Marvell(4.0)
    small = 0.01 * g_BD
    largest = small.square().sum(1).amax().item()
    added = first.protect(small, zeros, noise()) - small  # nothing to go by
    assert added.square().sum(1).mean().item() == pytest.approx(4 * largest, rel=0.25)
    assert F.cosine_similarity(added, small).abs().min() > 1 - 1e-9
    assert later.state() == {}
    later.protect(g_BD, y_B, noise())
    found = marvell(g_BD, y_B, 4.0)
    assert found is not None
    added = later.protect(small, zeros, noise()) - small
    assert (added @ found.direction).var().item() == pytest.approx(found.variances[0, 0].item(), rel=0.25)
    resumed = Marvell(4.0)
    resumed.load_state(later.state())
    assert torch.equal(resumed.protect(small, zeros, noise()), later.protect(small, zeros, noise()))
    narrow = small[:, :3]
    assert (later.protect(narrow, zeros, noise()) - narrow).square().sum(1).mean() < 10 * largest
    first.load_state({})
    assert first.state() == {}


def test_what_cannot_be_protected_is_refused_in_one_line() -> None:
    g_BD, _ = rows_of_two_classes()
    with pytest.raises(RecipeError, match="labels from 0 to 2; expected two classes, 0 and 1; for more take MaxNorm"):
        Marvell(1.0).protect(g_BD, torch.arange(12) % 3, noise())
    with pytest.raises(MilkglassError, match="Marvell: the gradient is not finite"):
        Marvell(1.0).protect(g_BD / 0, torch.arange(12) % 2, noise())
    for strength in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(RecipeError, match=re.escape(f"strength is {strength}; expected a positive number")):
            Marvell(strength)
    of_three = MaxNorm().protect(g_BD, torch.arange(12) % 3, noise())
    assert not torch.equal(of_three, g_BD)


# What is left to the attacks.


def honest(rare: float, size: int, batches: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of each batch at a trained little network's input, and labels, of which a `rare` share is 1."""
    draws = generator(seed)
    y_T = (torch.rand(size * batches, generator=draws) < rare).long()
    z_TD = torch.randn(size * batches, 10, generator=draws) + 1.2 * F.one_hot(y_T, 10)
    with drawing_from(draws):
        top = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(top.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(top(z_TD), y_T).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    gradients: list[Tensor] = []
    for z_BD, y_B in zip(torch.split(z_TD, size), torch.split(y_T, size), strict=True):
        z_BD.requires_grad_()
        gradients += torch.autograd.grad(F.cross_entropy(top(z_BD), y_B), z_BD)
    return gradients, list(torch.split(y_T, size))


def areas(gradients_TD: Tensor, y_T: Tensor, known: int = 10) -> dict[str, float]:
    """By attack, the area under the ROC curve; of the norm's without known rows, as they may mislead it."""
    rows_k = torch.cat([(y_T == k).nonzero()[:known, 0] for k in (0, 1)])
    found: dict[str, float] = {}
    for attack, rows in ((GradientNorm(), rows_k[:0]), (GradientDirection(), rows_k)):
        trial = LabelTrial(LabelView(gradients_TD, None, rows, y_T[rows], 2), y_T)
        found |= {row.name: row.value for row in audit_labels(trial, (attack,)) if row.measure == "label.auc"}
    return found


@final
class Nothing(Defense):
    """Sends the gradient as it is."""

    def describe(self) -> str:
        return "no defense"


@pytest.mark.parametrize(
    ("make", "norm", "direction"),
    [
        pytest.param(Nothing, (0.99, 1.0), (0.99, 1.0), id="an open door"),
        # the lines stay, and the longest gradients keep their direction: measured .54 to .76
        pytest.param(MaxNorm, (0.45, 0.62), (0.5, 0.75), id="max-norm"),
        pytest.param(Marvell, (0.45, 0.62), (0.45, 0.62), id="Marvell"),
    ],
)
def test_label_attacks_win_without_protection_and_lose_most_with_it(
    make: Callable[[], Defense], norm: tuple[float, float], direction: tuple[float, float]
) -> None:
    found = []
    for seed in range(3):
        gradients, labels = honest(rare=0.1, size=64, batches=30, seed=seed)
        holder, stream = make(), noise(seed)
        sent = [holder.protect(g, y, stream) for g, y in zip(gradients, labels, strict=True)]
        found.append(areas(torch.cat(sent), torch.cat(labels)))
    for attack, (low, high) in (("gradient norm", norm), ("gradient direction", direction)):
        assert low <= sum(by_attack[attack] for by_attack in found) / 3 <= high, found


def test_a_batch_of_the_frequent_class_alone_is_not_known_by_its_small_gradients() -> None:
    gradients, labels = honest(rare=0.1, size=8, batches=150, seed=0)
    is_alone_B = [bool((y == 0).all()) for y in labels]
    assert sum(is_alone_B) > 40
    kept_T = torch.cat([y.bool() | alone for y, alone in zip(labels, is_alone_B, strict=True)])
    y_T = torch.cat(labels)

    def area(forgets: bool) -> float:
        """Class 1 against the rows of batches that lack it."""
        holder, stream, sent = Marvell(4.0), noise(), []
        for g_BD, y_B in zip(gradients, labels, strict=True):
            if forgets:
                holder.load_state({})
            sent.append(holder.protect(g_BD, y_B, stream))
        return areas(torch.cat(sent)[kept_T], y_T[kept_T])["gradient norm"]

    assert area(forgets=True) > 0.85
    assert abs(area(forgets=False) - 0.5) < 0.1
