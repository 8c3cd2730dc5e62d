"""Nearest neighbors against cuts whose answer is known, and against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn.neighbors import KNeighborsRegressor
from torch import Tensor

from milkglass.attacks.features import features
from milkglass.attacks.nearest_neighbor import NearestNeighbor
from milkglass.attacks.ridge import Ridge
from milkglass.errors import AuditError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.transcript import Pairs, Release, View


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def view_of(activations: Tensor, records: Tensor) -> tuple[View, Tensor]:
    """Half known, a quarter validation, a quarter target."""
    half, rest = len(records) // 2, 3 * len(records) // 4
    nothing = torch.zeros(len(records), 0)

    def pairs(rows: slice) -> Pairs:
        return Pairs(activations[rows], records[rows], nothing[rows])

    target = Release(activations[rest:], nothing[rest:])
    return View(pairs(slice(half)), pairs(slice(half, rest)), target), records[rest:]


def test_it_is_scikit_learns_with_the_best_number_of_neighbors() -> None:
    sent = torch.randn(800, 3, generator=generator(), dtype=torch.float64)
    records = sent.sin() @ torch.rand(3, 5, generator=generator(1), dtype=torch.float64)
    records += 0.3 * torch.randn(800, 5, generator=generator(2), dtype=torch.float64)
    view, truth = view_of(sent, records.reshape(800, 1, 1, 5))
    made = NearestNeighbor().attack(view)
    tried = []
    for by_coordinate in (False, True):
        x = features(view, by_coordinate)
        for count in (1, 2, 4, 8, 16, 32, 64):
            fit = KNeighborsRegressor(count).fit(x.known_NF.numpy(), view.known.records.flatten(1).numpy())
            guess, target = (torch.from_numpy(fit.predict(part.numpy())) for part in (x.validation_NF, x.target_TF))
            error = squared_errors(guess, view.validation.records.flatten(1)).mean().item()
            tried.append((error, guess, target, count))
    _, guess, target, count = min(tried, key=lambda each: each[0])
    assert 1 < count < 64  # one neighbor is too noisy, many are too far
    lowest, highest = view.known.records.min().item(), view.known.records.max().item()
    torch.testing.assert_close(made.validation.flatten(1), guess.clamp(lowest, highest))
    torch.testing.assert_close(made.target.flatten(1), target.clamp(lowest, highest))
    assert made.target.shape == truth.shape


def test_groups_sent_without_order_are_given_away_where_a_linear_map_is_lost() -> None:
    groups = torch.rand(100, 6, generator=generator())
    codes = torch.randn(100, 4, generator=generator(1))
    which = torch.randint(100, (3000,), generator=generator(2))
    view, truth = view_of(codes[which], groups[which])
    neighbor, ridge = (
        squared_errors(attack.attack(view).target, truth).mean().item() for attack in (NearestNeighbor(), Ridge())
    )
    assert neighbor < 1e-3 * truth.var().item()
    assert ridge > 0.8 * truth.var().item()


def test_a_faint_coordinate_beside_loud_noise_is_read() -> None:
    faint = torch.rand(1600, 1, generator=generator(), dtype=torch.float64)
    noise = torch.randn(1600, 1, generator=generator(1), dtype=torch.float64)
    view, truth = view_of(torch.cat([1e-8 * faint, noise], dim=1), faint.repeat(1, 3))
    assert squared_errors(NearestNeighbor().attack(view).target, truth).mean().item() < 0.05 * truth.var().item()


def test_who_saw_nothing_does_little_worse_than_the_mean() -> None:
    view, truth = view_of(torch.zeros(400, 0), torch.rand(400, 6, generator=generator()))
    made = NearestNeighbor().attack(view)
    floor = squared_errors(view.known.records.mean(0).expand_as(truth), truth).mean().item()
    assert squared_errors(made.target, truth).mean().item() == pytest.approx(floor, rel=0.05)


def test_more_neighbors_than_pairs_are_not_asked_for_and_none_at_all_is_refused() -> None:
    view, truth = view_of(torch.randn(40, 3, generator=generator()), torch.rand(40, 2, generator=generator(1)))
    assert NearestNeighbor(most=1000).attack(view).target.shape == truth.shape
    with pytest.raises(AuditError, match="most = 0; expected at least 1"):
        NearestNeighbor(most=0)
