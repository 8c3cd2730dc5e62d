"""Noise of learned scale: what reaches the scales, and what keeps them within bounds."""

from __future__ import annotations

import math
import re
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from milkglass.defenses.base import NoiseStream
from milkglass.defenses.learned_noise import SPEED, LearnedNoise, Scales, nats_per_value
from milkglass.defenses.noise import Kind
from milkglass.errors import MilkglassError, RecipeError
from milkglass.randomness import public_source


def _stream(seed: int = 0) -> NoiseStream:
    return NoiseStream(public_source(seed))


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _with_end(defense: LearnedNoise, *shape: int) -> Scales:
    return cast(Scales, defense.client_end(shape))


def _set(end: Scales, scales: Tensor) -> None:
    with torch.no_grad():
        end.exponents.copy_(scales.log() / SPEED)


def test_its_end_passes_activations_on_and_is_saved_and_trained_with_the_stage() -> None:
    defense = LearnedNoise(start=0.3)
    assert defense.noise_sigma == 0
    stage = nn.Sequential(nn.Linear(4, 6), _with_end(defense, 6))
    x = _normal(5, 4)
    assert torch.equal(stage(x), stage[0](x))
    assert defense.noise_sigma == pytest.approx(0.3)
    assert sum(p.numel() for p in stage.parameters()) == 4 * 6 + 6 + 6
    saved = {name: tensor * 2 for name, tensor in stage.state_dict().items()}
    stage.load_state_dict(saved)  # as a checkpoint does it: the defense sees it
    assert defense.noise_sigma == pytest.approx(0.3**2)


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_each_value_has_noise_of_its_own_scale(kind: Kind) -> None:
    defense = LearnedNoise(kind=kind)
    scales = torch.tensor([0.1, 1.0, 3.0])
    _set(_with_end(defense, 3), scales)
    sent = defense.release(torch.zeros(20_000, 3), _stream())
    torch.testing.assert_close(sent.std(0), scales, rtol=0.03, atol=0)
    assert defense.noise_sigma == pytest.approx(scales.square().mean().sqrt().item(), rel=1e-5)


def test_the_gradient_reaches_the_scales_through_what_is_sent() -> None:
    defense = LearnedNoise()
    end = _with_end(defense, 2, 3)
    z = _normal(4, 2, 3).requires_grad_()
    sent = defense.release(z, _stream())
    unit = ((sent - z) / end.scales()).detach()
    seen = _normal(4, 2, 3, seed=1)
    (seen * sent).sum().backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert end.exponents.grad is not None
    torch.testing.assert_close(z.grad, seen)
    torch.testing.assert_close(end.exponents.grad, SPEED * (end.scales() * (seen * unit).sum(0)).detach())


def test_the_penalty_is_the_capacity_of_each_value() -> None:
    defense = LearnedNoise(weight=2.0)
    loud, noise = torch.tensor([1.0, 2.0, 0.5, 0.0]), torch.tensor([1.0, 0.5, 2.0, 1.0])
    _set(_with_end(defense, 4), noise)
    z = defense.release(_normal(50_000, 4) * loud, _stream())
    penalty = defense.penalty(z, z)
    expected = 2.0 * (0.5 * torch.log1p((loud / noise).square())).mean()
    assert penalty is not None
    assert penalty.item() == pytest.approx(expected.item(), rel=0.02)


def test_the_penalty_depends_on_the_ratio_alone() -> None:
    z, scales = _normal(64, 5), torch.rand(5, generator=torch.Generator().manual_seed(2)) + 0.1
    nats = nats_per_value(z, scales)
    torch.testing.assert_close(nats_per_value(7.0 * z + 3.0, 7.0 * scales), nats)
    assert nats_per_value(z, 0.5 * scales) > nats > nats_per_value(z, 2 * scales)
    assert nats_per_value(z, 10 * z.std(0)) == 0  # less than the noise there must be: chance


def test_its_pull_is_that_of_the_closed_form_and_fades() -> None:
    # d/d log s of 1/2 log(1 + S / s^2) is -S / (S + s^2): towards louder noise, and to nothing once it is loud
    pulls = []
    for noise in (0.3, 1.0, 3.0, 30.0):
        defense = LearnedNoise(weight=1.0, start=noise)
        end = _with_end(defense, 1)
        x = _normal(200_000, 1)
        penalty = defense.penalty(x, defense.release(x, _stream()))
        assert penalty is not None
        assert penalty >= 0
        penalty.backward()  # type: ignore[no-untyped-call]
        assert end.exponents.grad is not None
        pulls.append(end.exponents.grad.item() / SPEED)
        assert pulls[-1] == pytest.approx(-1 / (1 + noise**2), abs=0.005)
    assert pulls == sorted(pulls)


def test_training_makes_noise_loud_where_the_task_does_not_mind_and_it_does_not_run_away() -> None:
    defense = LearnedNoise(weight=1.0, start=0.1)
    end = _with_end(defense, 2)
    optimizer = torch.optim.Adam(end.parameters(), lr=0.01)
    stream, x = _stream(), _normal(256, 2)
    for _ in range(200):
        optimizer.zero_grad()
        sent = defense.release(x, stream)
        penalty = defense.penalty(x, sent)
        assert penalty is not None
        task = 5.0 * (sent[:, 0] - x[:, 0]).square().mean()  # it reads the first value only
        (task + penalty).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    needed, free = end.scales().tolist()
    # the task's pull on log s is 10 s^2, the penalty's 1/2 / (1 + s^2)
    assert needed == pytest.approx(((math.sqrt(1.2) - 1) / 2) ** 0.5, rel=0.15)
    assert 3 < free < 1e6


def test_a_weight_of_zero_leaves_the_scales_to_the_task() -> None:
    defense = LearnedNoise(weight=0.0)
    end = _with_end(defense, 3)
    z = defense.release(_normal(4, 3), _stream())
    assert defense.penalty(z, z) is None
    z.square().sum().backward()  # type: ignore[no-untyped-call]
    assert end.exponents.grad is not None


def test_one_record_gives_no_penalty_and_no_nan() -> None:
    defense = LearnedNoise()
    _with_end(defense, 3)
    penalty = defense.penalty(torch.zeros(1, 3), defense.release(torch.zeros(1, 3), _stream()))
    assert penalty is not None
    assert penalty.item() == 0


@pytest.mark.parametrize(
    ("weight", "start", "kind", "words"),
    [
        (-1.0, 0.1, "gaussian", "learned noise: weight is -1.0; expected a number from 0 on"),
        (0.1, 0.0, "gaussian", "learned noise: start is 0.0; expected a positive number"),
        (0.1, 0.1, "gausian", "learned noise: kind 'gausian' is not known; did you mean 'gaussian'?"),
    ],
)
def test_settings_out_of_range(weight: float, start: float, kind: Kind, words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        LearnedNoise(weight, start, kind)


def test_activations_that_do_not_fit_its_scales() -> None:
    defense = LearnedNoise()
    with pytest.raises(MilkglassError, match="expected client_end first"):
        defense.release(torch.zeros(2, 3), _stream())
    _with_end(defense, 3)
    with pytest.raises(RecipeError, match=re.escape("activations of shape (4,) a record; expected (3,)")):
        defense.release(torch.zeros(2, 4), _stream())
