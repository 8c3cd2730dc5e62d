"""Membership attacks on a little network fitted to its members' random labels, and on one that never saw them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.attacks.membership import (
    ClassDistance,
    Lira,
    LossThreshold,
    MembershipAttack,
    _solved_by_shrunk_covariance,
)
from milkglass.errors import AuditError, MissingKnowledgeError
from milkglass.leakage.membership import auc
from milkglass.randomness import drawing_from
from milkglass.transcript import Knowledge, MembershipView, Pairs, Release

VALUES, CLASSES, MEMBERS, OUTSIDERS = 16, 3, 150, 200
LIRA = Lira(shadows=4, epochs=40)
ATTACKS = (LossThreshold(), ClassDistance(), LIRA)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def architecture(draws: torch.Generator) -> tuple[nn.Module, nn.Module]:
    with drawing_from(draws):
        hidden = nn.Linear(VALUES, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU()
        return nn.Sequential(*hidden), nn.Sequential(nn.Linear(16, CLASSES))


def records(count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every second record, by its last value, tells its label plainly; the other ones have labels drawn by lot."""
    x, y = torch.randn(count, VALUES, generator=draws), torch.randint(CLASSES, (count,), generator=draws)
    return x + 4 * F.one_hot(y, VALUES) * (x[:, -1:] > 0), y


def game(fitted_to_members: bool) -> tuple[MembershipView, Tensor]:
    """As many members as others. The network is fitted to the members, or to as many records that are not there."""
    draws = generator(1)
    (x, y), (own, own_y), (elsewhere, elsewhere_y) = (records(n, draws) for n in (2 * MEMBERS, OUTSIDERS, MEMBERS))
    bottom, top = architecture(generator(2))
    seen, seen_y = (x[:MEMBERS], y[:MEMBERS]) if fitted_to_members else (elsewhere, elsewhere_y)
    optimizer = torch.optim.Adam([*bottom.parameters(), *top.parameters()], lr=1e-2)
    for _ in range(150):
        loss = F.cross_entropy(top(bottom(seen)), seen_y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        candidates = Release(bottom(x), torch.zeros(len(x), 0), y)
        outsiders = Pairs(bottom(own), own, torch.zeros(OUTSIDERS, 0), own_y)
    knowledge = Knowledge(architecture=architecture, server=top)
    return MembershipView(candidates, outsiders, knowledge, records=x), torch.arange(2 * MEMBERS) < MEMBERS


@pytest.fixture(scope="module")
def overfitted() -> tuple[MembershipView, Tensor]:
    return game(fitted_to_members=True)


@pytest.fixture(scope="module")
def innocent() -> tuple[MembershipView, Tensor]:
    return game(fitted_to_members=False)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_members_of_an_overfitted_network_are_found(
    attack: MembershipAttack, overfitted: tuple[MembershipView, Tensor]
) -> None:
    view, member_T = overfitted
    scores = attack.attack(view)
    assert scores.candidates_T.shape == member_T.shape
    found = auc(scores.candidates_T, member_T)
    assert found.value >= attack.open_door
    assert found.low > 0.5
    assert auc(attack.attack(view).candidates_T, member_T) == auc(scores.candidates_T, member_T)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_nobody_is_found_where_the_network_saw_nobody(
    attack: MembershipAttack, innocent: tuple[MembershipView, Tensor]
) -> None:
    view, member_T = innocent
    scores = attack.attack(view)
    found = auc(scores.candidates_T, member_T)
    assert found.low <= attack.closed_door <= found.high
    # outsiders are scored as candidates are: a threshold set on them keeps its rate
    everyone_T = torch.cat([scores.candidates_T, scores.outsiders_N])
    alike = auc(everyone_T, torch.arange(len(everyone_T)) < len(member_T))
    assert alike.low <= 0.5 <= alike.high


def _labels(part: Pairs | Release) -> Tensor:
    assert part.labels is not None
    return part.labels


def test_class_distance_scores_no_outsider_by_a_fit_that_saw_it() -> None:
    """Noise with 80 values: a fit to 150 records tells their labels well, and those of others not at all."""
    draws, count = generator(6), 150
    z, labels = torch.randn(2 * count, 80, generator=draws), torch.randint(CLASSES, (2 * count,), generator=draws)
    own = Pairs(z[:count], z[:count], torch.zeros(count, 0), labels[:count])
    view = MembershipView(Release(z[count:], torch.zeros(count, 0), labels[count:]), own)
    scores = ClassDistance().attack(view)
    alike = auc(torch.cat([scores.candidates_T, scores.outsiders_N]), torch.arange(2 * count) < count)
    assert alike.low <= 0.5 <= alike.high


def test_lira_without_the_records_works_on_what_crossed(overfitted: tuple[MembershipView, Tensor]) -> None:
    view, member_T = overfitted
    done: list[tuple[int, int]] = []
    scores = Lira(shadows=2, epochs=15).attack(replace(view, records=None), lambda *step: done.append(step))
    assert auc(scores.candidates_T, member_T).low > 0.5
    assert done == [(1, 2), (2, 2)]


def test_lira_does_not_take_an_easy_record_for_a_member(overfitted: tuple[MembershipView, Tensor]) -> None:
    """A non-member with the label that anybody would guess has a small loss all the same."""
    view, member_T = overfitted
    assert view.records is not None
    easy_T = (view.records[:, -1] > 0)[~member_T]
    by_loss = auc(LossThreshold().attack(view).candidates_T[~member_T], easy_T)
    by_lira = auc(LIRA.attack(view).candidates_T[~member_T], easy_T)
    assert by_loss.low > 0.8
    assert by_lira.value < by_loss.value - 0.1
    everyone = (auc(attack.attack(view).candidates_T, member_T).value for attack in (LossThreshold(), LIRA))
    assert next(everyone) < next(everyone) - 0.05


def test_constant_activations_say_nothing(overfitted: tuple[MembershipView, Tensor]) -> None:
    view, member_T = overfitted
    still = replace(
        view,
        candidates=replace(view.candidates, activations=torch.ones(len(member_T), 5)),
        outsiders=replace(view.outsiders, activations=torch.ones(OUTSIDERS, 5)),
    )
    found = auc(ClassDistance().attack(still).candidates_T, member_T)
    assert found.low <= 0.5 <= found.high


def test_what_is_missing_is_named(overfitted: tuple[MembershipView, Tensor]) -> None:
    view, _ = overfitted
    with pytest.raises(MissingKnowledgeError, match="'lira' needs architecture, server weights"):
        Lira().attack(replace(view, knowledge=Knowledge()))
    with pytest.raises(MissingKnowledgeError, match="'class distance' needs labels"):
        ClassDistance().attack(replace(view, candidates=replace(view.candidates, labels=None)))


def test_bad_input_is_refused(overfitted: tuple[MembershipView, Tensor]) -> None:
    view, _ = overfitted
    holed = view.candidates.activations.clone()
    holed[0, 0] = torch.nan
    with pytest.raises(AuditError, match="activations of the candidates: not all values are finite"):
        LossThreshold().attack(replace(view, candidates=replace(view.candidates, activations=holed)))
    own = view.outsiders
    few = Pairs(own.activations[:7], own.records[:7], own.entitled[:7], _labels(own)[:7])
    with pytest.raises(AuditError, match="7 outsiders; expected at least 8"):
        LossThreshold().attack(replace(view, outsiders=few))
    labels = _labels(view.candidates).clone()
    labels[0] = CLASSES
    with pytest.raises(AuditError, match="labels of the candidates: from 0 to 3; expected classes from 0 to 2"):
        LossThreshold().attack(replace(view, candidates=replace(view.candidates, labels=labels)))
    with pytest.raises(AuditError, match="shadows = 3"):
        Lira(shadows=3)


@pytest.mark.parametrize("values", [20, 80])
def test_the_shrunk_covariance_is_scikit_learns_by_the_smaller_of_two_products(values: int) -> None:
    z_ND, means_DP = torch.randn(50, values, generator=generator(7)).double(), torch.randn(values, 3).double()
    z_ND -= z_ND.mean(0)
    expected = np.linalg.solve(OAS(assume_centered=True).fit(z_ND.numpy()).covariance_, means_DP.numpy())
    found = _solved_by_shrunk_covariance(z_ND, means_DP)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-5, atol=1e-8)


def test_lira_leaves_out_a_last_batch_of_one_record(overfitted: tuple[MembershipView, Tensor]) -> None:
    view, member_T = overfitted
    own = view.outsiders
    assert own.labels is not None
    assert view.records is not None
    rows = slice(130)  # half of them and a batch of 64: one is left
    fewer = Pairs(own.activations[rows], own.records[rows], own.entitled[rows], own.labels[rows])

    def normalizing(draws: torch.Generator) -> tuple[nn.Module, nn.Module]:
        bottom, top = architecture(draws)
        return nn.Sequential(nn.BatchNorm1d(VALUES), bottom), top

    knowledge = replace(view.knowledge, architecture=normalizing)
    scores = Lira(shadows=2, epochs=1).attack(replace(view, outsiders=fewer, knowledge=knowledge))
    assert scores.candidates_T.shape == member_T.shape
