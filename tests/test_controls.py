"""Controls keep what they say they keep, and their answers are known."""

from __future__ import annotations

from dataclasses import replace

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
        controls.faint(trial, generator()),
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


def test_large_records_are_rotated_in_blocks(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "ROTATED_AT_ONCE", 6)  # 16 values: blocks of 6, 5 and 5
    units = Trial(
        replace(trial.view, target=Release(torch.zeros(16, 2), torch.zeros(16, 5))), torch.eye(16).reshape(16, 1, 4, 4)
    )
    (known, records, _), _, (turn, _, _) = parts(controls.identity_rotated(units, generator()))
    torch.testing.assert_close(turn @ turn.T, torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(known, records.flatten(1).double() @ turn)  # one rotation for all parts
    reach = (turn.abs() > 1e-12).sum(1)
    assert sorted(reach.tolist()) == [5] * 10 + [6] * 6
    assert not torch.equal(reach, reach.sort(descending=True).values)  # a block is no run of neighbors


def test_faint_sends_the_record_at_a_tiny_scale_beside_loud_releases_of_others(trial: Trial) -> None:
    made = parts(controls.faint(trial, generator()))
    (known, _, _), _, _ = made
    assert known.shape[1] == (30 - 16) // 2 - 1 + 16  # activations have six values, all of them fit in
    ratios = torch.cat([sent[:, 6:] / records.flatten(1).double() for sent, records, _ in made])
    torch.testing.assert_close(ratios, ratios.flatten()[0].expand_as(ratios))
    assert (known[:, 6:].std() / known[:, :6].std()).item() == pytest.approx(controls.FAINT_SCALE, rel=0.1)
    for (sent, _, _), (before, _, _) in zip(made, parts(trial), strict=True):
        same = (sent[:, None, :6].sort(2).values == before.flatten(1).double().sort(1).values[None]).all(2)
        assert (same.sum(1) == 1).all()
        assert not same.diagonal().any()


def test_faint_keeps_so_few_loud_coordinates_that_the_pairs_pin_a_map_down(trial: Trial) -> None:
    def of(activations: torch.Tensor, pairs: int) -> int:
        view = trial.view
        known = Pairs(activations[:pairs], view.known.records[:pairs], view.known.entitled[:pairs])
        rest = Pairs(activations[:10], view.validation.records, view.validation.entitled)
        target = Release(activations[:20], view.target.entitled)
        made = controls.faint(Trial(View(known, rest, target), trial.truth), generator())
        return made.view.known.activations.shape[1] - 16

    wide = torch.randn(30, 40, generator=generator())
    assert (of(wide, 30), of(wide, 20), of(wide, 10)) == (7, 2, 1)
    assert of(wide[:, :0], 30) == 0
    assert of(wide[:, 0], 30) == 1


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
