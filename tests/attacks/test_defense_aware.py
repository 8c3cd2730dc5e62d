"""The defense-aware decoder against releases whose randomness is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from milkglass.attacks import defense_aware
from milkglass.attacks.decoder import Decoder
from milkglass.attacks.defense_aware import DefenseAware, shifted
from milkglass.attacks.features import answer_alone, features
from milkglass.attacks.ridge import Ridge, best_ridge, fit_ridge, least_error, second_moments
from milkglass.errors import AuditError, MissingKnowledgeError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.transcript import Pairs, Release, View


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def view_of(records: Tensor, release: Callable[[Tensor], Tensor], known: int, times: int = 1) -> tuple[View, Tensor]:
    """Of the records after the known ones, half validate and half are the target; each is released so many times."""

    def pairs(part: Tensor) -> Pairs:
        repeats = torch.stack([release(part) for _ in range(times)])
        return Pairs(repeats.mean(0), part, part.flatten(1)[:, :0], repeats=repeats if times > 1 else None)

    middle = (known + len(records)) // 2
    target = pairs(records[middle:])
    shown = Release(target.activations, target.entitled, repeats=target.repeats)
    return View(pairs(records[:known]), pairs(records[known:middle]), shown, release=release), records[middle:]


def error(attack: Ridge | Decoder | DefenseAware, view: View, truth: Tensor) -> float:
    return squared_errors(attack.attack(view).target, truth).mean().item()


def noisy(sigma: float, bend: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    draws = generator(9)
    return lambda x: bend(x) + sigma * torch.randn(x.shape, generator=draws)


def test_fresh_noise_is_averaged_out_where_one_release_is_learned_by_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defense_aware, "MOVES", ("none",))
    pictures = torch.rand(230, 1, 4, 4, generator=generator())
    view, truth = view_of(pictures, noisy(0.1, lambda x: x.pow(4)), known=30)
    ridge, once, fresh = (error(attack, view, truth) for attack in (Ridge(), Decoder(100, 16), DefenseAware(100, 16)))
    assert fresh - once < 0.5 * (once - ridge)  # both below ridge, and further by half as much again at least


def test_moved_pictures_are_new_pairs_where_nothing_is_random() -> None:
    pictures = torch.rand(220, 1, 4, 4, generator=generator())
    view, truth = view_of(pictures, lambda x: x.pow(4), known=20)
    assert error(DefenseAware(100, 16), view, truth) < 0.75 * error(Decoder(100, 16), view, truth)


def test_repeated_releases_are_fused_and_their_spread_is_read() -> None:
    draws = generator(9)

    def loud_where_bright(x: Tensor) -> Tensor:  # the mean tells nothing, the spread all
        return x * torch.randn(x.shape, generator=draws)

    view, truth = view_of(torch.rand(800, 4, generator=generator()), loud_where_bright, known=400, times=30)
    ridge, fused = error(Ridge(), view, truth), error(DefenseAware(steps=200), view, truth)
    assert ridge > 0.9 * truth.var().item()
    assert fused < 0.3 * truth.var().item()


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("shape", [(5,), (1, 6, 6), (3, 16, 16)])
@pytest.mark.parametrize("sent", ["as it is", "flat"])
def test_every_shape_is_taken_and_the_same_comes_out_again(times: int, shape: tuple[int, ...], sent: str) -> None:
    def made() -> tuple[Tensor, Tensor]:
        release = noisy(0.1, lambda x: x.clone())
        flattened = release if sent == "as it is" else lambda x: release(x).flatten(1)
        view, truth = view_of(torch.rand(48, *shape, generator=generator()), flattened, 24, times)
        result = DefenseAware(steps=5, width=2).attack(view)
        assert result.target.shape == truth.shape
        assert result.validation.shape == view.validation.records.shape
        return result.validation, result.target

    for one, other in zip(made(), made(), strict=True):
        assert torch.equal(one, other)


def test_it_never_loses_to_ridge_on_validation() -> None:
    view, _ = view_of(torch.rand(64, 5, generator=generator()), noisy(1.0, torch.zeros_like), known=32)
    ridge, aware = (
        squared_errors(attack.attack(view).validation, view.validation.records).mean().item()
        for attack in (Ridge(), DefenseAware(steps=60))
    )
    assert aware <= ridge


@pytest.mark.parametrize("width", [6, 60])  # through the (F, F) and through the (N, N) system
def test_ridge_images_of_new_releases_are_those_of_fits_without_the_record(width: int) -> None:
    draws = generator()
    sent = torch.randn(80, width, generator=draws, dtype=torch.float64)
    records = torch.randn(80, 4, generator=draws, dtype=torch.float64) + sent[:, :4]
    pairs = Pairs(sent[:40], records[:40], records[:40, :0])
    rest = Pairs(sent[40:], records[40:], records[40:, :0])
    view = View(pairs, rest, Release(sent[40:], records[40:, :0]))
    fit = best_ridge(view)
    x, y = fit.inputs.known_NF, records[:40]
    again = torch.randn(2, width, generator=draws, dtype=torch.float64)
    got = fit.left_out_again(torch.tensor([0, 17]), again)
    torch.testing.assert_close(fit.left_out_again(torch.arange(40), x), fit.left_out_NP)
    shift = fit.shift * torch.eye(width, dtype=torch.float64)
    for left_out, new, image in zip((0, 17), again, got, strict=True):
        kept = [row for row in range(40) if row != left_out]
        x_kept, y_kept = x[kept] - x[kept].mean(0), y[kept] - y[kept].mean(0)
        weights = torch.linalg.solve(x_kept.T @ x_kept + shift, x_kept.T @ y_kept)
        torch.testing.assert_close(image, (new - x[kept].mean(0)) @ weights + y[kept].mean(0))


@pytest.mark.parametrize("width", [5, 50])  # with fewer features than pairs, one system serves both scalings
def test_the_ridge_fit_that_attacks_share_is_the_better_of_two_made_alone(width: int) -> None:
    def view(scale: float) -> View:
        sent = torch.randn(70, width, generator=generator(), dtype=torch.float64)
        records = sent[:, :2].sin()
        sent[:, 0] *= scale
        rest = Release(sent[50:], records[50:, :0])
        known, other = (
            Pairs(sent[:40], records[:40], records[:40, :0]),
            Pairs(sent[40:], records[40:], records[40:, :0]),
        )
        return View(known, other, rest)

    for seen in (view(1.0), view(1e-6)):
        alone = [fit_ridge(seen, features(seen, by_coordinate)) for by_coordinate in (False, True)]
        better = min(alone, key=lambda fit: fit.validation_error)
        shared = best_ridge(seen)
        torch.testing.assert_close(shared.target_TP, better.target_TP, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(shared.left_out_NP, better.left_out_NP, rtol=1e-7, atol=1e-7)
        assert best_ridge(seen) is shared
        assert best_ridge(replace(seen)) is not shared


def test_settings_far_behind_on_the_first_rows_are_not_tried_on_all() -> None:
    asked = []

    def error(setting: float, rows: slice) -> float:
        asked.append((setting, rows.stop))
        return setting if rows.stop == 256 else 10 - setting

    assert least_error([1.0, 1.2, 1.1, 9.0], error, 1000) == (1.2, 8.8)
    assert (9.0, 1000) not in asked
    assert least_error([1.0, 9.0], error, 255) == (9.0, 1.0)  # too few rows to save any


def test_second_moments_by_tiles() -> None:
    for width in (1, 3, 50):
        x = torch.randn(20, width, generator=generator(), dtype=torch.float64)
        torch.testing.assert_close(second_moments(x), x.T @ x)


def test_shifts_move_whole_pictures_and_flips_turn_half_of_them() -> None:
    pictures = torch.rand(400, 2, 7, 9, generator=generator())
    ways = set()
    for before, after in zip(pictures, shifted(pictures, generator(), flips=True), strict=True):
        found = [
            (down, right, turned)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            for turned in (False, True)
            if torch.equal(
                (after.flip(2) if turned else after)[:, 1:-1, 1:-1],
                before.roll((-down, -right), (1, 2))[:, 1:-1, 1:-1],
            )
        ]
        assert len(found) == 1
        ways.add(found[0])
    assert len(ways) == 18
    still = shifted(pictures, generator(), flips=False)
    assert any(torch.equal(before, after) for before, after in zip(pictures, still, strict=True))


def test_without_fresh_releases_it_says_so() -> None:
    view, _ = view_of(torch.rand(64, 5, generator=generator()), lambda x: x, known=32)
    for blind in (replace(view, release=None), answer_alone(view)):
        with pytest.raises(MissingKnowledgeError, match="'defense-aware decoder' needs fresh releases"):
            DefenseAware().attack(blind)


@pytest.mark.parametrize("attack", [Decoder, DefenseAware])
def test_two_widths_have_two_names(attack: type[Decoder] | type[DefenseAware]) -> None:
    assert attack().name == attack(steps=20, seed=3).name == attack.name
    assert attack(width=64).name == f"{attack.name} of width 64"
    assert "width=64" in repr(attack(width=64))
    for settings in ({"steps": 0}, {"width": 0}):
        with pytest.raises(AuditError, match=f"{attack.name}: .*expected at least 1 of each"):
            attack(**settings)
