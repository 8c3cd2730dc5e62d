"""The bound on what a noisy release tells, against closed forms and simulated mutual information; its gradient."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from milkglass.defenses.conditional_entropy import (
    KEPT,
    RECORDS_A_VALUE,
    ConditionalEntropy,
    information_bound,
    is_full,
    moments,
)
from milkglass.errors import RecipeError

SIGMA = 0.5


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _noisy(z_BD: Tensor, sigma: float = SIGMA, seed: int = 99) -> Tensor:
    return z_BD + sigma * _normal(*z_BD.shape, seed=seed)


def _mixture(records: int, apart: float) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[float]]:
    """Noise-free activations (B, 2), labels, and the components' means, covariances, probabilities."""
    shares = [0.5, 0.3, 0.2]
    means = [apart * m for m in (torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]), torch.tensor([0.0, -1.5]))]
    roots = [
        torch.tensor([[1.0, 0.0], [0.8, 0.4]]),
        torch.tensor([[0.5, 0.0], [0.0, 0.5]]),
        torch.diag(torch.tensor([2.0, 0.1])),
    ]
    roots = [root.double() for root in roots]
    y_B = torch.multinomial(torch.tensor(shares), records, replacement=True, generator=torch.Generator().manual_seed(5))
    unit = _normal(records, 2, seed=6)
    z_BD = torch.stack([m.double() for m in means])[y_B] + torch.einsum("bij,bj->bi", torch.stack(roots)[y_B], unit)
    return z_BD, y_B, means, [root @ root.T for root in roots], shares


def _simulated_information(
    sent_BD: Tensor, means: list[Tensor], covariances: list[Tensor], shares: list[float]
) -> float:
    """I(Z~; Z) = h(Z~) - h(N) of a Gaussian mixture with noise, by Monte Carlo with the true density."""
    noise = SIGMA**2 * np.eye(2)
    parts = [
        share * stats.multivariate_normal(m.numpy(), c.numpy() + noise).pdf(sent_BD.numpy())
        for m, c, share in zip(means, covariances, shares, strict=True)
    ]
    return float(-np.log(sum(parts)).mean() - 0.5 * np.linalg.slogdet(2 * np.pi * np.e * noise)[1])


@pytest.mark.parametrize("apart", [0.0, 1.0, 3.0, 20.0])
def test_it_bounds_the_information_of_a_mixture_and_is_sharp_where_its_components_lie_apart(apart: float) -> None:
    z_BD, y_B, means, covariances, shares = _mixture(100_000, apart)
    sent_BD = _noisy(z_BD)
    told = _simulated_information(sent_BD, means, covariances, shares)
    bound = information_bound(sent_BD, SIGMA, y_B)
    label_nats = -sum(share * math.log(share) for share in shares)
    assert told - 0.02 < bound < told + label_nats + 0.02
    if apart == 20.0:
        assert bound == pytest.approx(told, abs=0.02)
    if apart > 1.0:
        assert bound < information_bound(sent_BD, SIGMA) - 0.1  # a component a label is worth having


def test_a_gaussian_in_closed_form() -> None:
    root = _normal(4, 4, seed=3)
    sent_BD = _noisy(_normal(100_000, 4) @ root.T)
    capacity = 0.5 * torch.logdet(torch.eye(4, dtype=torch.float64) + root @ root.T / SIGMA**2)
    assert information_bound(sent_BD, SIGMA) == pytest.approx(capacity.item(), abs=0.02)


def test_it_bounds_what_is_not_gaussian() -> None:
    # uniform activations of width w: I = h(uniform + noise) - h(noise), by numerical integration
    width = 3.0

    def density(v: float) -> float:
        return float(stats.norm.cdf((v + width / 2) / SIGMA) - stats.norm.cdf((v - width / 2) / SIGMA)) / width

    entropy = integrate.quad(lambda v: -density(v) * math.log(density(v)), -4.5, 4.5, limit=200)[0]
    told = entropy - 0.5 * math.log(2 * math.pi * math.e * SIGMA**2)
    z_BD = width * (torch.rand(100_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5)
    bound = information_bound(_noisy(z_BD), SIGMA)
    assert bound == pytest.approx(0.5 * math.log(1 + width**2 / 12 / SIGMA**2), abs=0.01)
    assert told < bound < told + 0.2


def test_laplaces_noise_costs_what_the_docstring_says() -> None:
    gaussian, laplace = stats.norm(0, 1).entropy(), stats.laplace(0, 0.5**0.5).entropy()
    assert gaussian - laplace == pytest.approx(0.0724, abs=5e-5)


def test_noise_alone_tells_nothing_and_a_label_its_entropy() -> None:
    y_B = torch.arange(30_000) % 3
    assert information_bound(SIGMA * _normal(30_000, 3), SIGMA) == pytest.approx(0, abs=0.03)
    constant_BD = torch.eye(3, dtype=torch.float64)[y_B] * 10
    assert information_bound(_noisy(constant_BD), SIGMA, y_B) == pytest.approx(math.log(3), abs=0.03)
    assert information_bound(0.1 * SIGMA * _normal(300, 3), SIGMA) == 0  # less than the noise there must be: chance


def test_units_rotations_shifts_and_names_do_not_matter() -> None:
    z_BD, y_B, *_ = _mixture(500, 2.0)
    sent_BD = _noisy(z_BD)
    rotation = torch.linalg.qr(_normal(2, 2, seed=8))[0]
    expected = pytest.approx(information_bound(sent_BD, SIGMA, y_B), rel=1e-9)
    assert information_bound(7 * sent_BD, 7 * SIGMA, y_B) == expected
    assert information_bound(sent_BD @ rotation + 5.0, SIGMA, y_B) == expected
    assert information_bound(sent_BD, SIGMA, torch.tensor([2, 0, 1])[y_B]) == expected
    assert information_bound(sent_BD, 2 * SIGMA, y_B) < information_bound(sent_BD, SIGMA, y_B)


def test_the_diagonal_is_an_upper_bound_and_takes_over_where_records_are_few() -> None:
    sent_BD = _normal(400, 6, seed=1) @ _normal(6, 6, seed=2)
    sigma = 0.01  # below all that is there
    full, diagonal = (moments(sent_BD, None, full=full).bound(sigma) for full in (True, False))
    assert diagonal > full + 1
    apart = sent_BD - sent_BD.mean(0)
    torch.testing.assert_close(full, 0.5 * torch.logdet(apart.T @ apart / 399 / sigma**2))
    torch.testing.assert_close(diagonal, 0.5 * (sent_BD.var(0) / sigma**2).log().sum())
    assert information_bound(sent_BD, sigma) == full
    assert is_full(sent_BD[: 6 * RECORDS_A_VALUE])
    few_BD = sent_BD[: 6 * RECORDS_A_VALUE - 1]
    assert information_bound(few_BD, sigma) == moments(few_BD, None, full=False).bound(sigma)


@pytest.mark.parametrize("records", [40, 5])
@pytest.mark.parametrize("labeled", [True, False])
def test_the_gradient_is_the_bounds_own(records: int, labeled: bool) -> None:
    # oracle: autograd through the logarithm of the determinant of the sample covariances; 40 records: full, 5: diagonal
    y_B = torch.arange(records) % 2 if labeled else torch.zeros(records, dtype=torch.int64)
    z_BD = _noisy(3 * _normal(records, 4, seed=4)).requires_grad_()
    penalty = ConditionalEntropy(2.0, 0.01).penalty(z_BD, z_BD, y_B if labeled else None)
    assert penalty is not None
    (given,) = torch.autograd.grad(penalty, z_BD)

    expected = torch.zeros((), dtype=torch.float64)
    freedom_B = torch.ones(records, dtype=torch.float64)
    for label in range(int(y_B.max()) + 1):
        apart = z_BD[y_B == label] - z_BD[y_B == label].mean(0)
        share, freedom = len(apart) / records, len(apart) - 1
        covariance = apart.T @ apart / freedom
        spread = covariance.logdet() if records == 40 else covariance.diagonal().log().sum()
        expected = expected + share * (0.5 * spread - 4 * math.log(0.01) - math.log(share))
        freedom_B[y_B == label] = freedom / len(apart)
    (own,) = torch.autograd.grad(2.0 * expected, z_BD)
    assert penalty.item() == pytest.approx(2.0 * expected.item())
    torch.testing.assert_close(given, own * freedom_B[:, None])


def test_what_is_no_louder_than_noise_is_left_alone() -> None:
    z_BD = (_normal(40, 3) * torch.tensor([5.0, 0.1, 0.1]) * SIGMA).requires_grad_()
    penalty = ConditionalEntropy(1.0, SIGMA).penalty(z_BD, z_BD)
    assert penalty is not None
    (gradient_BD,) = torch.autograd.grad(penalty, z_BD)
    loud = torch.linalg.eigh(torch.cov(z_BD.detach().T))[1][:, -1]
    along_B = gradient_BD @ loud
    assert along_B.abs().max() > 0.01
    torch.testing.assert_close(gradient_BD, along_B[:, None] * loud)


def test_descending_it_draws_a_class_together_and_leaves_classes_apart() -> None:
    defense = ConditionalEntropy(1.0, SIGMA)
    y_B = torch.arange(64) % 2
    z_BD = (_normal(64, 2, seed=1) + 6.0 * (2 * y_B - 1)[:, None]).requires_grad_()
    optimizer = torch.optim.Adam([z_BD], lr=0.05)
    before = information_bound(_noisy(z_BD.detach()), SIGMA, y_B)
    for step in range(100):
        optimizer.zero_grad()
        sent_BD = _noisy(z_BD, seed=step)
        penalty = defense.penalty(z_BD, sent_BD, y_B)
        assert penalty is not None
        penalty.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        defense.learn(z_BD, sent_BD)
    means = [z_BD[y_B == label].mean(0) for label in (0, 1)]
    assert information_bound(_noisy(z_BD.detach()), SIGMA, y_B) < before - 0.5
    assert (means[1] - means[0]).min() > 10


def test_small_classes_count_through_the_running_estimate() -> None:
    # 20 classes in batches of 40: two records a class, and yet the estimate comes near the truth
    defense, true = ConditionalEntropy(1.0, SIGMA), math.log(20) + 0.5 * 3 * math.log(1 + 4 / SIGMA**2)
    values = []
    for step in range(60):
        y_B = torch.randint(20, (40,), generator=torch.Generator().manual_seed(step))
        sent_BD = _noisy(2 * _normal(40, 3, seed=step) + 5.0 * y_B[:, None], seed=1000 + step)
        penalty = defense.penalty(sent_BD, sent_BD, y_B)
        assert penalty is not None
        values.append(penalty.item())
        defense.learn(sent_BD, sent_BD)
    assert values[0] < true - 2
    assert np.mean(values[-20:]) == pytest.approx(true, abs=0.35)


def test_the_running_estimate_follows_a_stage_that_changes() -> None:
    defense, y_B = ConditionalEntropy(1.0, SIGMA), torch.zeros(100, dtype=torch.int64)
    values = []
    for step in range(100):
        sent_BD = _noisy((10.0 if step < 20 else 1.0) * _normal(100, 2, seed=step), seed=1000 + step)
        penalty = defense.penalty(sent_BD, sent_BD, y_B)
        assert penalty is not None
        values.append(penalty.item())
        defense.learn(sent_BD, sent_BD)
    assert values[19] == pytest.approx(math.log(1 + 100 / SIGMA**2), abs=0.2)
    assert values[-1] == pytest.approx(math.log(1 + 1 / SIGMA**2), abs=0.2)


def test_running_moments_are_those_of_all_records_weighted() -> None:
    batches = [(_normal(50, 3, seed=s) + s, torch.arange(50) % (2 + s)) for s in range(2)]
    running = moments(*batches[0], full=True).faded(KEPT).merged(moments(*batches[1], full=True))
    z_BD, y_B = (torch.cat(parts) for parts in zip(*batches, strict=True))
    weight_B = torch.tensor([KEPT, 1.0], dtype=torch.float64).repeat_interleave(50)
    for label in range(3):
        rows, weights = z_BD[y_B == label].numpy(), weight_B[y_B == label].numpy()
        np.testing.assert_allclose(running.count_K[label], weights.sum())
        np.testing.assert_allclose(running.mean_KD[label], np.average(rows, axis=0, weights=weights))
        scatter = np.cov(rows.T, aweights=weights, ddof=0) * weights.sum()
        np.testing.assert_allclose(running.scatter[label], scatter, rtol=1e-9)


def test_its_state_goes_on_where_it_was_and_asking_leaves_no_trace() -> None:
    one, two = ConditionalEntropy(1.0, SIGMA), ConditionalEntropy(1.0, SIGMA)
    assert one.state() == {}
    y_B, z_BD = torch.arange(40) % 4, _normal(40, 3)
    one.penalty(z_BD, z_BD, y_B)
    one.learn(z_BD, z_BD)
    kept = {name: tensor.clone() for name, tensor in one.state().items()}
    two.load_state(kept)
    other_BD = _normal(40, 3, seed=1)
    assert torch.equal(one.penalty(other_BD, other_BD, y_B), two.penalty(other_BD, other_BD, y_B))  # type: ignore[arg-type]
    assert all(torch.equal(one.state()[name], tensor) for name, tensor in kept.items())
    assert not torch.equal(
        ConditionalEntropy(1.0, SIGMA).penalty(other_BD, other_BD, y_B),  # type: ignore[arg-type]
        two.penalty(other_BD, other_BD, y_B),  # type: ignore[arg-type]
    )
    two.load_state({})
    assert two.state() == {}


def test_without_labels_the_batch_stands_alone() -> None:
    defense = ConditionalEntropy(3.0, SIGMA)
    z_BD = _noisy(_normal(40, 3))
    for labels in (None, torch.full((40,), -1)):
        penalty = defense.penalty(z_BD, z_BD, labels)
        assert penalty is not None
        assert penalty.item() == pytest.approx(3.0 * information_bound(z_BD, SIGMA))
        defense.learn(z_BD, z_BD)
        assert defense.state() == {}


def test_a_weight_of_zero_does_nothing() -> None:
    defense = ConditionalEntropy(0.0, SIGMA)
    z_BD = _normal(8, 3)
    assert defense.penalty(z_BD, z_BD, torch.zeros(8, dtype=torch.int64)) is None
    defense.learn(z_BD, z_BD)
    assert defense.state() == {}


@pytest.mark.parametrize(
    ("weight", "sigma", "words"),
    [
        (-1.0, 1.0, "weight is -1.0; expected a number from 0 on"),
        (1.0, 0.0, "sigma is 0.0; expected the noise's, a positive number"),
        (1.0, math.nan, "sigma is nan"),
    ],
)
def test_settings_out_of_range(weight: float, sigma: float, words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"conditional entropy: {words}")):
        ConditionalEntropy(weight, sigma)
