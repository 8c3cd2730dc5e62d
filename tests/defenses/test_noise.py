"""Fixed noise: its law, and that both kinds are equally loud."""

from __future__ import annotations

import math
import re

import pytest
import torch
from scipy import stats

from milkglass.defenses.base import NoiseStream
from milkglass.defenses.noise import Kind, Noise
from milkglass.errors import RecipeError
from milkglass.randomness import public_source


def _stream(seed: int = 0) -> NoiseStream:
    return NoiseStream(public_source(seed))


@pytest.mark.parametrize(
    ("kind", "law"), [("gaussian", stats.norm(0, 0.5)), ("laplace", stats.laplace(0, 0.5**0.5 / 2))]
)
def test_noise_follows_its_law_at_the_same_standard_deviation(kind: Kind, law: stats.rv_continuous) -> None:
    defense = Noise(0.5, kind)
    sent = defense.release(torch.full((100, 200), 3.0, dtype=torch.float64), _stream()) - 3.0
    assert law.std() == pytest.approx(defense.noise_sigma)
    assert stats.kstest(sent.flatten().numpy(), law.cdf).pvalue > 0.001
    assert sent.std().item() == pytest.approx(0.5, rel=0.02)


def test_gaussian_noise_is_what_it_always_was() -> None:
    z = torch.rand(8, 6, generator=torch.Generator().manual_seed(1))
    sent = Noise(0.25).release(z, _stream())
    assert torch.equal(sent, z + 0.25 * _stream().gaussian_like(z, "Gaussian noise, sigma 0.25"))


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_noise_scales_with_sigma_and_passes_the_gradient(kind: Kind) -> None:
    z = torch.zeros(50, 40, requires_grad=True)
    unit = _stream()
    sent = Noise(2.0, kind).release(z, unit)
    assert unit.block == 1
    sent.sum().backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert torch.equal(z.grad, torch.ones_like(z))
    assert sent.std().item() == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize(
    ("sigma", "kind", "words"),
    [
        (0.0, "gaussian", "sigma is 0.0; expected a positive number"),
        (math.inf, "laplace", "sigma is inf"),
        (1.0, "laplcae", "kind 'laplcae' is not known; did you mean 'laplace'?"),
    ],
)
def test_settings_out_of_range(sigma: float, kind: Kind, words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        Noise(sigma, kind)
