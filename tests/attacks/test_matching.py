"""The matching game against its closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import binom, norm
from torch import Tensor

from milkglass.attacks import matching
from milkglass.attacks.matching import Matching, MatchingGame
from milkglass.errors import AuditError, MissingKnowledgeError
from milkglass.transcript import Knowledge, Pairs, Release, View

MIXING = torch.randn(6, 6, generator=torch.Generator().manual_seed(7))


def client(records: Tensor) -> Tensor:
    return records @ MIXING.T.to(records.dtype) + 1


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def view_of(sent: Tensor, sigma: float = 0.0, repeats: Tensor | None = None) -> View:
    records = draw(10, 6, seed=1)
    pairs = Pairs(client(records), records, torch.zeros(10, 0))
    target = Release(sent, torch.zeros(len(sent), 0), repeats=repeats)
    return View(pairs, pairs, target, knowledge=Knowledge(client=client, noise_sigma=sigma))


def test_without_noise_it_is_always_right_and_with_others_activations_at_chance() -> None:
    records = draw(400, 6, seed=0)
    game = MatchingGame().attack(view_of(client(records)), records)
    assert game.top1(torch.arange(400)) == 1.0
    assert game.top1(torch.arange(400).roll(1)) <= MatchingGame.closed_door
    others = torch.randperm(400, generator=torch.Generator().manual_seed(2))
    assert MatchingGame().attack(view_of(client(records)[others]), records).top1(torch.arange(400)) < 0.02
    assert game.seconds >= 0


@pytest.mark.parametrize("releases", [1, 4])
def test_two_candidates_meet_the_closed_form(releases: int) -> None:
    """The right one of two is nearer with probability Phi(d sqrt(R) / (2 sigma)), d their distance."""
    candidates, times = draw(2, 6, seed=3), 2000
    sigma = (client(candidates)[0] - client(candidates)[1]).norm().item()
    sent = client(candidates[:1]).expand(releases, times, 6) + sigma * draw(releases, times, 6, seed=4)
    view = view_of(sent.mean(0), sigma, sent if releases > 1 else None)
    right = MatchingGame().attack(view, candidates).top1(torch.zeros(times, dtype=torch.int64))
    expected = float(norm.cdf(releases**0.5 / 2))
    low, high = binom.ppf([0.0005, 0.9995], times, expected) / times
    assert low <= right <= high


def test_scores_are_log_likelihoods_up_to_a_constant() -> None:
    candidates, sent = draw(5, 6, seed=0), draw(3, 4, 6, seed=1)
    scores = MatchingGame().attack(view_of(sent.mean(0), 0.7, sent), candidates).scores_TN
    errors = (sent[:, :, None] - client(candidates)).numpy()  # releases, targets, candidates, values
    exact = torch.from_numpy(norm.logpdf(errors, scale=0.7).sum((0, 3))).double()
    torch.testing.assert_close(scores - scores[:, :1], exact - exact[:, :1], atol=1e-3, rtol=1e-4)


def test_chunks_change_nothing_and_large_numbers_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = draw(50, 6, seed=0)
    view = view_of(client(candidates[:20]))
    whole = MatchingGame().attack(view, candidates).scores_TN
    ticks: list[tuple[int, int]] = []
    monkeypatch.setattr(matching, "CANDIDATES_AT_ONCE", 7)
    parts = MatchingGame().attack(view, candidates, lambda done, total: ticks.append((done, total))).scores_TN
    torch.testing.assert_close(parts, whole)
    assert ticks[-1] == (50, 50)
    assert len(ticks) == 8
    far = replace(view.knowledge, client=lambda x: client(x.double()) + 1e6)
    shifted = replace(view, target=replace(view.target, activations=client(candidates[:20].double()) + 1e6))
    moved = MatchingGame().attack(replace(shifted, knowledge=far), candidates)
    assert moved.top1(torch.arange(20)) == 1.0
    torch.testing.assert_close(moved.scores_TN, whole, atol=1e-4, rtol=1e-4)


def test_constant_activations_say_nothing() -> None:
    view = view_of(torch.ones(5, 6))
    constant = replace(view, knowledge=Knowledge(client=torch.ones_like))
    assert MatchingGame().attack(constant, draw(9, 6, seed=0)).scores_TN.abs().max() == 0


def test_bad_input_is_refused() -> None:
    view = view_of(torch.ones(5, 6))
    with pytest.raises(MissingKnowledgeError, match="'matching game' needs client weights"):
        MatchingGame().attack(replace(view, knowledge=Knowledge()), draw(9, 6, seed=0))
    for candidates in (draw(9, 5, seed=0), torch.zeros(0, 6)):
        with pytest.raises(AuditError, match=r"expected \(N, 6\)"):
            MatchingGame().attack(view, candidates)
    with pytest.raises(AuditError, match=r"right rows of shape \(2,\); expected \(3,\)"):
        Matching(torch.zeros(3, 4), 0.0).top1(torch.zeros(2, dtype=torch.int64))
    assert repr(MatchingGame()) == "MatchingGame()"
