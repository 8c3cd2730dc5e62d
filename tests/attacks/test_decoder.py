"""Every attack of the suite against cuts whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scipy.optimize
import torch
from torch import Tensor

from milkglass.attacks import stack
from milkglass.attacks.base import Attack, Reconstruction
from milkglass.attacks.decoder import Decoder, beside
from milkglass.attacks.features import answer_alone, as_records, features
from milkglass.attacks.kernel_ridge import KernelRidge
from milkglass.attacks.mean_record import MeanRecord
from milkglass.attacks.ridge import Ridge, fit_ridge
from milkglass.attacks.stack import Stack, combine
from milkglass.attacks.suite import attacks_of, choose_attacks
from milkglass.errors import AuditError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.transcript import Pairs, Release, View

QUICK = (MeanRecord(), Ridge(), KernelRidge(), Decoder(steps=20, width=4), Stack((Ridge(), KernelRidge())))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def view_of(activations: Tensor, records: Tensor, entitled: Tensor | None = None) -> tuple[View, Tensor]:
    """Half known, a quarter validation, a quarter target."""
    entitled = entitled if entitled is not None else torch.zeros(len(records), 0)
    half, rest = len(records) // 2, 3 * len(records) // 4

    def pairs(rows: slice) -> Pairs:
        return Pairs(activations[rows], records[rows], entitled[rows])

    target = Release(activations[rest:], entitled[rest:])
    return View(pairs(slice(half)), pairs(slice(half, rest)), target), records[rest:]


def error(attack: Attack, view: View, truth: Tensor) -> float:
    return squared_errors(attack.attack(view).target, truth).mean().item()


def pictures(count: int, side: int = 6) -> Tensor:
    return torch.rand(count, 1, side, side, generator=generator(5))


@pytest.mark.parametrize("attack", QUICK, ids=repr)
@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 16, 16), (7,)])
@pytest.mark.parametrize("sent", [(5,), (4, 3, 3), (0,)])
@pytest.mark.parametrize("entitled", [0, 3])
def test_every_attack_takes_every_shape(
    attack: Attack, shape: tuple[int, ...], sent: tuple[int, ...], entitled: int
) -> None:
    draws = generator()
    records = torch.rand(64, *shape, generator=draws)
    view, truth = view_of(
        torch.randn(64, *sent, generator=draws), records, torch.rand(64, entitled, generator=draws).softmax(1)
    )
    made = attack.attack(view)
    assert made.target.shape == truth.shape
    assert made.validation.shape == view.validation.records.shape
    assert made.target.dtype == truth.dtype
    assert torch.isfinite(made.target).all()
    assert made.target.min() >= view.known.records.min()
    assert made.target.max() <= view.known.records.max()
    assert made.seconds >= 0


@pytest.mark.parametrize("attack", QUICK, ids=repr)
def test_who_saw_nothing_guesses_no_better_than_the_mean(attack: Attack) -> None:
    view, truth = view_of(torch.zeros(80, 0), pictures(80))
    floor = squared_errors(view.known.records.mean(0).expand_as(truth), truth).mean().item()
    assert error(attack, view, truth) == pytest.approx(floor, rel=0.05)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("attack", [Ridge(), Decoder(steps=20), Stack((Ridge(), MeanRecord()))], ids=repr)
def test_an_open_door_is_walked_through(attack: Attack, rotated: bool) -> None:
    records = pictures(160)
    sent = records.flatten(1).double()
    if rotated:
        sent = sent @ torch.linalg.qr(torch.randn(36, 36, generator=generator(), dtype=torch.float64))[0]
    view, truth = view_of(sent, records)
    assert error(attack, view, truth) < 1e-4 * truth.var().item()


def test_kernel_ridge_bends_where_ridge_cannot() -> None:
    sent = torch.randn(800, 2, generator=generator(), dtype=torch.float64)
    records = torch.stack([sent[:, 0] * sent[:, 1], sent[:, 0].square()], dim=1)
    view, truth = view_of(sent, records)
    assert error(KernelRidge(), view, truth) < 0.05 * error(Ridge(), view, truth)


def test_the_decoder_corrects_what_ridge_cannot() -> None:
    records = pictures(600)
    view, truth = view_of(records.sub(0.5).abs(), records.sub(0.5).abs().mul(4).sin().abs())
    assert error(Decoder(steps=200, width=16), view, truth) < 0.5 * error(Ridge(), view, truth)
    flat_view, flat_truth = view_of(view.known.activations.flatten(1)[:, :4], view.known.records.flatten(1)[:, :4])
    assert error(Decoder(steps=200), flat_view, flat_truth) < 0.5 * error(Ridge(), flat_view, flat_truth)


def test_the_decoder_never_loses_to_ridge_on_validation_and_repeats() -> None:
    records = torch.rand(64, 5, generator=generator())
    view, _ = view_of(torch.randn(64, 3, generator=generator(1)), records)  # nothing to learn: it can only overfit
    ridge, first, again = (attack.attack(view) for attack in (Ridge(), Decoder(steps=60), Decoder(steps=60)))
    loss = [squared_errors(made.validation, view.validation.records).mean().item() for made in (ridge, first)]
    assert loss[1] <= loss[0]
    assert torch.equal(first.target, again.target)


@pytest.mark.parametrize("width", [6, 60])  # through the (F, F) and through the (N, N) system
def test_left_out_predictions_are_those_of_fits_without_the_pair(width: int) -> None:
    draws = generator()
    sent = torch.randn(80, width, generator=draws, dtype=torch.float64)
    records = torch.randn(80, 4, generator=draws, dtype=torch.float64) + sent[:, :4]
    view, _ = view_of(sent, records)
    inputs = features(view)
    fit = fit_ridge(view, inputs)
    x, y = inputs.known_NF, view.known.records
    shift = fit.penalty * x.square().sum().item() / min(x.shape) * torch.eye(width, dtype=torch.float64)
    for left_out in (0, 17):
        kept = [row for row in range(len(x)) if row != left_out]
        x_kept, y_kept = x[kept] - x[kept].mean(0), y[kept] - y[kept].mean(0)
        weights = torch.linalg.solve(x_kept.T @ x_kept + shift, x_kept.T @ y_kept)
        slow = (x[left_out] - x[kept].mean(0)) @ weights + y[kept].mean(0)
        torch.testing.assert_close(fit.left_out_NP[left_out], slow)


@pytest.mark.parametrize("attack", [Ridge(), KernelRidge(), Decoder(steps=40)], ids=repr)
@pytest.mark.parametrize("jump", [1.0, 1e4])
def test_a_dead_coordinate_that_jumps_does_no_harm(attack: Attack, jump: float) -> None:
    records = torch.rand(200, 6, generator=generator())
    view, truth = view_of(torch.cat([records, 1e-6 * torch.randn(200, 2, generator=generator(1))], dim=1), records)
    before = error(attack, view, truth)
    jumped = view.target.activations.clone()
    jumped[:, 6:] += jump  # its spread in the known pairs is 1e-6
    after = error(attack, replace(view, target=replace(view.target, activations=jumped)), truth)
    assert before < 0.02 * truth.var().item()
    assert after < before + 0.01 * truth.var().item()


@pytest.mark.parametrize("attack", [Ridge(), KernelRidge(), Decoder(steps=20)], ids=repr)
@pytest.mark.parametrize("scale", [0.03, 1e-3, 1e-8, 1e-200])
def test_a_door_open_at_a_tiny_scale_beside_noise_is_walked_through(attack: Attack, scale: float) -> None:
    records = torch.rand(800, 16, generator=generator(), dtype=torch.float64)
    noise = torch.randn(800, 16, generator=generator(1), dtype=torch.float64)
    view, truth = view_of(torch.cat([scale * records, noise], dim=1), records)
    assert error(attack, view, truth) < 0.05 * truth.var().item()


@pytest.mark.parametrize("scale", [0.03, 1e-3, 1e-5])
def test_ridge_finds_the_second_valley_where_no_coordinate_is_faint(scale: float) -> None:
    """Rotated, all coordinates are loud, and their own scales do not help: a small enough penalty does."""
    records = torch.rand(800, 16, generator=generator(), dtype=torch.float64)
    noise = torch.randn(800, 16, generator=generator(1), dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=generator(2), dtype=torch.float64))[0]
    view, truth = view_of(torch.cat([scale * records, noise], dim=1) @ rotation, records)
    assert error(Ridge(), view, truth) < 0.05 * truth.var().item()


def test_by_coordinate_each_has_the_same_spread_and_what_never_moves_is_zero() -> None:
    sent = torch.randn(100, 4, generator=generator(), dtype=torch.float64) * torch.tensor([1.0, 1e3, 1e-200, 0.0]) + 0.1
    view, _ = view_of(sent, pictures(100))
    jumped = view.target.activations + torch.tensor([0, 0, 0, 1e4], dtype=torch.float64)
    rows = features(replace(view, target=replace(view.target, activations=jumped)), by_coordinate=True)
    torch.testing.assert_close(rows.known_NF[:, :2].square().mean(0) * 2, torch.ones(2, dtype=torch.float64))
    assert rows.known_NF[:, 2:].abs().max() == 0  # beside 0.1, no digit of 1e-200 is left
    assert rows.target_TF[:, 2:].abs().max() == 0


def test_one_scale_a_block_keeps_small_coordinates_small() -> None:
    sent = torch.randn(100, 3, generator=generator()) * torch.tensor([1.0, 1.0, 1e-6])
    entitled = 1e3 * torch.randn(100, 1, generator=generator(1))
    known = features(view_of(sent, pictures(100), entitled)[0]).known_NF
    assert known[:, 2].std() / known[:, 0].std() < 1e-5
    for block in (known[:, :3], known[:, 3:]):  # each block weighs the same
        assert block.square().sum(1).mean().item() == pytest.approx(1.0)


def test_probabilities_come_with_their_logarithms_on_both_sides() -> None:
    entitled = torch.randn(100, 3, generator=generator()).softmax(1)
    view, _ = view_of(torch.randn(100, 5, generator=generator(1)), pictures(100), entitled)
    assert features(view).known_NF.shape[1] == 5 + 3 + 3
    assert features(answer_alone(view)).known_NF.shape[1] == 3 + 3
    torch.testing.assert_close(features(answer_alone(view)).target_TF, features(view).target_TF[:, 5:])


def test_values_that_are_not_finite_or_too_large_are_refused() -> None:
    for value, line in ((float("nan"), "not all values are finite"), (1e308, "too large to compute with")):
        entitled = value * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(20)[:, None]
        view, _ = view_of(torch.rand(40, 3), pictures(40), entitled)
        for attack in QUICK[1:]:
            with pytest.raises(AuditError, match=line):
                attack.attack(view)


def test_the_stack_finds_the_best_mix() -> None:
    view, truth = view_of(torch.zeros(400, 0), torch.rand(400, 8, generator=generator()))
    noise = [0.1 * torch.randn(400, 8, generator=generator(seed)) for seed in (1, 2, 3)]
    records = torch.cat([view.known.records, view.validation.records, truth])

    def member(values: Tensor) -> Reconstruction:
        return Reconstruction(values[200:300], values[300:], 0.0)

    good, also_good = member(records + noise[0]), member(records + noise[1])
    bad, broken = member(noise[2]), member(torch.full_like(records, float("nan")))
    both = combine(view, [bad, good, broken, also_good, good])
    alone, mixed = (squared_errors(made.target, truth).mean().item() for made in (good, both))
    assert mixed < 0.65 * alone  # two independent errors averaged: half
    with pytest.raises(AuditError, match="no member"):
        combine(view, [broken])


def test_the_stack_is_not_judged_on_the_records_that_its_weights_were_fitted_on() -> None:
    view, truth = view_of(torch.zeros(80, 0), torch.rand(80, 2, generator=generator()))
    draws = generator(1)
    members = [  # as many weights as half of the validation values, and nothing to find
        Reconstruction(torch.rand(20, 2, generator=draws), torch.rand(20, 2, generator=draws), 0.0) for _ in range(20)
    ]
    both = combine(view, members)
    claimed = squared_errors(both.validation, view.validation.records).mean().item()
    assert claimed > 0.8 * squared_errors(both.target, truth).mean().item()


def test_the_stack_in_chunks_is_the_whole_least_squares_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    view, _ = view_of(torch.zeros(200, 0), torch.rand(200, 8, generator=generator()))
    validation = view.validation.records
    draws = generator(1)
    mixed = [validation + spread * torch.randn(50, 8, generator=draws) for spread in (0.2, 0.3, 0.4)]
    members = [Reconstruction(values, values, 0.0) for values in mixed]
    design = torch.stack([values.double().flatten() for values in mixed], dim=1).numpy()
    weights, _ = scipy.optimize.nnls(design, validation.double().flatten().numpy())
    slow = torch.from_numpy(design @ weights).reshape(50, 8).float()
    monkeypatch.setattr(stack, "VALUES_AT_ONCE", 24)  # three rows at a time
    torch.testing.assert_close(combine(view, members).target, as_records(slow, view))
    halves = slice(0, None, 2), slice(1, None, 2)
    for fitted, rebuilt in (halves, halves[::-1]):
        half = design.reshape(50, 8, 3)[fitted].reshape(-1, 3)
        weights, _ = scipy.optimize.nnls(half, validation[fitted].double().flatten().numpy())
        slow = torch.from_numpy(design.reshape(50, 8, 3)[rebuilt] @ weights).float()
        torch.testing.assert_close(combine(view, members).validation[rebuilt], as_records(slow.flatten(1), view))


def test_entitled_only_members_save_a_stack_whose_attack_is_led_astray() -> None:
    records = torch.rand(300, 4, generator=generator())
    entitled = records + 0.1 * torch.randn(300, 4, generator=generator(2))
    astray = torch.randn(300, 100, generator=generator(1))  # wide, and tells nothing
    view, truth = view_of(astray, records, entitled)
    assert error(Stack((Ridge(),)), view, truth) < 1.03 * error(Ridge(), answer_alone(view), truth)
    assert error(Ridge(), view, truth) > 1.1 * error(Ridge(), answer_alone(view), truth)


def test_attacks_are_chosen_by_name() -> None:
    suite = attacks_of("thorough")
    assert [attack.name for attack in choose_attacks(["decoder", "stack"], suite)] == [
        "mean record",
        "ridge",
        "decoder",
    ]
    with pytest.raises(AuditError, match="'kernel rigde' is not known; did you mean 'kernel ridge'"):
        choose_attacks(["kernel rigde"], suite)


@pytest.mark.parametrize(
    "make", [lambda: Decoder(steps=0), lambda: KernelRidge(pairs=2), lambda: Stack(())], ids=["steps", "pairs", "none"]
)
def test_settings_out_of_range_are_refused(make: type[Attack]) -> None:
    with pytest.raises(AuditError, match="expected at least"):
        make()


@pytest.mark.parametrize(("maps", "seen"), [(3, 3), (20, 20), (21, 0)])
def test_maps_are_looked_at_where_there_are_pairs_enough_to_learn_them(maps: int, seen: int) -> None:
    sent, records = torch.rand(80, maps, 2, 2), torch.rand(80, 1, 8, 8)
    pairs = Pairs(sent, records, torch.zeros(80, 0))
    view = View(pairs, pairs, Release(sent, torch.zeros(80, 0)))
    assert beside(view, features(view).known_NF).shape[:2] == (80, seen)
