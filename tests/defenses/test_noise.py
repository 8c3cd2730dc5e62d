"""Fixed noise: its law, and that both kinds are equally loud."""

from __future__ import annotations

import math
import re

import pytest
import torch
from scipy import stats

from milkglass.defenses.base import NoiseStream
from milkglass.defenses.noise import GRID, Kind, Noise
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


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
@pytest.mark.parametrize("size", [0.0, 1e-5, 1.0, 50.0])
def test_what_is_sent_lies_on_a_grid_that_does_not_depend_on_the_record(kind: Kind, size: float) -> None:
    # else the last bits of a sum of floats tell: some sums can come of some values alone (Mironov 2012)
    z = size * torch.rand(64, 32, generator=torch.Generator().manual_seed(1))
    step = 2.0 ** math.floor(math.log2(0.3 / GRID))
    steps = Noise(0.3, kind).release(z, _stream()).double() / step
    assert torch.equal(steps, steps.round())


def test_the_last_bits_do_not_tell_zero_from_another_value() -> None:
    # an attacker who asks of each value sent whether it is a float32 multiple of sigma, as noise on 0 would be
    told = []
    for value in (0.0, 1 / 32):
        sent = Noise(3.0).release(torch.full((1, 1024), value), _stream())
        drawn = (sent / 3.0).float()
        told.append(float((drawn * 3.0 == sent).double().mean()))
    assert abs(told[0] - told[1]) < 0.1


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
        (0.0, "gaussian", "sigma is 0.0; expected a number from 1e-06 to 1e+06"),
        (math.inf, "laplace", "sigma is inf"),
        (1.0, "laplcae", "kind 'laplcae' is not known; did you mean 'laplace'?"),
    ],
)
def test_settings_out_of_range(sigma: float, kind: Kind, words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        Noise(sigma, kind)
