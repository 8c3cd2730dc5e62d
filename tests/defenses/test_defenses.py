"""What each defense does at the cut."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from milkglass.defenses.base import Defense, NoiseStream
from milkglass.defenses.conditional_entropy import ConditionalEntropy
from milkglass.defenses.learned_noise import LearnedNoise
from milkglass.defenses.noise import Noise
from milkglass.defenses.nopeek import NoPeek
from milkglass.errors import RecipeError
from milkglass.leakage.distance_correlation import distance_correlation
from milkglass.randomness import public_source

X = torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Z = torch.rand(32, 6, generator=torch.Generator().manual_seed(1))


def _noise() -> NoiseStream:
    return NoiseStream(public_source(0))


def _learned_noise() -> LearnedNoise:
    defense = LearnedNoise()
    defense.client_end(tuple(Z.shape[1:]))
    return defense


@pytest.mark.parametrize(
    "make",
    [
        lambda: NoPeek(1.0),
        lambda: NoPeek(0.5, "unbiased"),
        lambda: NoPeek(0.5, "linear"),
        lambda: Noise(0.5),
        lambda: Noise(0.5, "laplace"),
        _learned_noise,
        lambda: ConditionalEntropy(0.5, 0.1),
    ],
)
def test_every_defense_keeps_shapes_and_says_what_it_is(make: Callable[[], Defense]) -> None:
    defense = make()
    released = defense.release(Z, _noise())
    assert released.shape == Z.shape
    assert released.dtype == Z.dtype
    assert defense.random == (not torch.equal(released, Z))
    assert torch.equal(defense.protect(Z, torch.zeros(len(Z), dtype=torch.int64), _noise()), Z)
    assert (defense.noise_sigma > 0) == defense.random
    penalty = defense.penalty(X, Z)
    assert penalty is None or penalty.shape == ()
    assert len(defense.describe()) > 5
    assert type(defense).__name__ in repr(defense)


def test_noise_has_its_sigma_never_repeats_and_passes_the_gradient() -> None:
    z, stream = torch.zeros(200, 300, requires_grad=True), _noise()
    one, two = Noise(0.5).release(z, stream), Noise(0.5).release(z, stream)
    assert one.std().item() == pytest.approx(0.5, rel=0.01)
    assert float((one == two).double().mean()) < 1e-3  # values lie on a grid, so a few are equal by chance
    assert stream.block == 2
    one.sum().backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert torch.equal(z.grad, torch.ones_like(z))


def test_noise_is_never_put_on_two_different_activations() -> None:
    # a client that resumes, or runs twice under one key: equal block, other activations
    other = Z.clone()
    other[0, 0] += 1e-6
    noises = [_noise().gaussian_like(z, "noise") for z in (Z, Z, other)]
    assert torch.equal(noises[0], noises[1])  # the same message again, so that a resumed run has the same bits
    assert not (noises[0] == noises[2]).any()
    assert not (_noise().gaussian_like(Z, "noise of another sigma") == noises[0]).any()
    assert not (NoiseStream(public_source(0), 1).gaussian_like(Z, "noise") == noises[0]).any()


def test_settings_out_of_range() -> None:
    for make, words in (
        (lambda: Noise(-1.0), "sigma is -1.0"),
        (lambda: Noise(float("nan")), "sigma is nan"),
        (lambda: NoPeek(-1.0), "weight is -1.0"),
        (lambda: NoPeek(1.0, "unbaised"), "did you mean 'unbiased'?"),  # type: ignore[arg-type]
    ):
        with pytest.raises(RecipeError, match=re.escape(words)):
            make()


def test_nopeek_is_weight_times_distance_correlation() -> None:
    penalty = NoPeek(3.0).penalty(X, Z)
    assert penalty is not None
    assert torch.equal(penalty, 3.0 * distance_correlation(X, Z))
    assert NoPeek(0.0).penalty(X, Z) is None


@pytest.mark.parametrize("estimator", ["biased", "unbiased", "linear"])
def test_descending_the_penalty_makes_activations_less_dependent(estimator: str) -> None:
    defense = NoPeek(1.0, estimator)  # type: ignore[arg-type]
    z = X.flatten(1)[:, :6].clone().requires_grad_()
    before = distance_correlation(X, z.detach())
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        penalty = defense.penalty(X, z)
        assert penalty is not None
        penalty.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert distance_correlation(X, z.detach()) < before - 0.05
