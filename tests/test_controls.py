"""Controls keep what they say they keep, and their answers are known."""

from __future__ import annotations

import pytest
import torch

from milkglass import controls
from milkglass.leakage.reconstruction import squared_errors
from milkglass.transcript import Pairs, Release, Trial, View


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def trial() -> Trial:
    draws = generator()

    def pairs(count: int) -> Pairs:
        records = torch.rand(count, 1, 4, 4, generator=draws)
        activations = torch.randn(count, 3, 2, generator=draws)
        return Pairs(activations, records, torch.rand(count, 5, generator=draws))

    known, validation, target = pairs(30), pairs(10), pairs(20)
    view = View(known, validation, Release(target.activations, target.entitled), release=lambda x: x)
    return Trial(view, target.records)


def parts(trial: Trial) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    view = trial.view
    return [
        (view.known.activations, view.known.records, view.known.entitled),
        (view.validation.activations, view.validation.records, view.validation.entitled),
        (view.target.activations, trial.truth, view.target.entitled),
    ]


def test_records_and_entitled_values_stay_as_they_are(trial: Trial) -> None:
    made = [
        controls.identity(trial),
        controls.identity_rotated(trial, generator()),
        controls.independent(trial, generator()),
    ]
    for control in made:
        for (_, records, entitled), (_, records_before, entitled_before) in zip(
            parts(control), parts(trial), strict=True
        ):
            assert torch.equal(records, records_before)
            assert torch.equal(entitled, entitled_before)
        assert control.view.release is None  # it would answer for the real cut


def test_identity_sends_the_records(trial: Trial) -> None:
    for sent, records, _ in parts(controls.identity(trial)):
        assert torch.equal(sent, records)


def test_rotation_is_one_rotation_for_all(trial: Trial) -> None:
    control = parts(controls.identity_rotated(trial, generator()))
    sent = torch.cat([part[0] for part in control])
    records = torch.cat([part[1].flatten(1).double() for part in control])
    torch.testing.assert_close(sent @ sent.T, records @ records.T)  # lengths and angles kept, between parts as well
    assert (sent - records).abs().mean() > 0.1


def test_independent_sends_the_release_of_another_record_of_the_same_part(trial: Trial) -> None:
    for (sent, _, _), (before, _, _) in zip(parts(controls.independent(trial, generator())), parts(trial), strict=True):
        same = (sent.flatten(1)[:, None] == before.flatten(1)[None]).all(2)
        assert (same.sum(1) == 1).all()
        assert (same.sum(0) == 1).all()
        assert not same.diagonal().any()


def test_the_least_gaussian_error_is_that_of_the_conditional_mean() -> None:
    trial, least_error = controls.gaussian(generator())
    assert trial.truth.shape == (controls.GAUSSIAN_TARGETS, 64)
    # The projection is drawn first: draw it again, and rebuild with what no attacker knows.
    projection = torch.randn(32, 64, generator=generator(), dtype=torch.float64) / 8
    noise = controls.GAUSSIAN_NOISE**2 * torch.eye(32, dtype=torch.float64)
    gain = torch.linalg.solve(projection @ projection.T + noise, projection)
    rebuilt = trial.view.target.activations.double() @ gain
    assert squared_errors(rebuilt, trial.truth).mean().item() == pytest.approx(least_error, rel=0.02)
    assert 0.5 < least_error < 0.9
    worse = trial.view.target.activations.double() @ (1.3 * gain)
    assert squared_errors(worse, trial.truth).mean().item() > 1.02 * least_error
