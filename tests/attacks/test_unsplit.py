"""UnSplit: records from activations and the client's layers alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from milkglass.attacks.unsplit import UnSplit, total_variation
from milkglass.errors import AuditError, MissingKnowledgeError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.randomness import drawing_from, public_source
from milkglass.transcript import Knowledge, Pairs, Release, View


def blobs(count: int, side: int = 10) -> Tensor:
    """Bright discs on black."""
    draws = public_source(3).generator("blobs")
    center = torch.rand(count, 2, 1, 1, generator=draws) * (side - 4) + 2
    radius = 1.5 + 1.5 * torch.rand(count, 1, 1, generator=draws)
    rows, columns = torch.arange(side)[:, None], torch.arange(side)[None, :]
    distance = ((rows - center[:, 0]) ** 2 + (columns - center[:, 1]) ** 2).sqrt()
    return (radius + 0.5 - distance).clamp(0, 1)[:, None]


def linear_client() -> nn.Module:
    return nn.Conv2d(1, 6, 3, padding=1, bias=False)  # with one, a picture and its negative explain as much


def view_of(make: Callable[[], nn.Module], records: Tensor, knows: bool = True) -> tuple[View, Tensor]:
    """A client with weights of its own; its layers are known. Half known, a quarter validation, a quarter target."""

    def architecture(generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
        with drawing_from(generator):
            return make(), nn.Identity()

    client, _ = architecture(public_source(8).generator("client"))
    with torch.no_grad():
        sent = client(records)
    nothing = torch.zeros(len(records), 0)
    half, rest = len(records) // 2, 3 * len(records) // 4
    pairs = [Pairs(sent[rows], records[rows], nothing[rows]) for rows in (slice(half), slice(half, rest))]
    knowledge = Knowledge(architecture=architecture if knows else None)
    return View(pairs[0], pairs[1], Release(sent[rest:], nothing[rest:]), knowledge=knowledge), records[rest:]


def error(made: Tensor, truth: Tensor) -> float:
    return squared_errors(made, truth[: len(made)]).mean().item()


def test_a_shallow_linear_client_is_undone() -> None:
    view, truth = view_of(linear_client, blobs(64))
    mean = error(view.known.records.mean(0).expand_as(truth), truth)
    made = UnSplit(records=16, clones=2, steps=200).attack(view)
    assert error(made.target, truth) < 0.3 * mean
    assert error(made.validation, view.validation.records) < 0.3 * mean


@pytest.mark.parametrize("shape", [(1, 6, 6), (7,)])
def test_the_open_door_and_the_closed_one(shape: tuple[int, ...]) -> None:
    draws = public_source(0).generator("records")
    records = torch.rand(64, *shape, generator=draws)
    view, truth = view_of(nn.Flatten, records)  # the raw record crosses; nothing to clone
    attack = UnSplit(clones=1, steps=150, smoothness=0.001)
    mean = error(view.known.records.mean(0).expand_as(truth), truth)
    assert error(attack.attack(view).target, truth) < 0.05 * mean
    closed = replace(view, target=replace(view.target, activations=view.target.activations.roll(1, dims=0)))
    assert error(attack.attack(closed).target, truth) > 0.95 * mean


def test_it_rebuilds_the_first_records_alone_and_looks_at_no_pair() -> None:
    view, truth = view_of(linear_client, blobs(64))
    attack = UnSplit(records=3, clones=2, steps=5)
    first = attack.attack(view)
    assert first.target.shape == (3, *truth.shape[1:])
    assert first.validation.shape == (3, *truth.shape[1:])
    blind = replace(
        view,
        known=replace(view.known, activations=torch.zeros_like(view.known.activations)),
        validation=replace(view.validation, records=torch.zeros_like(view.validation.records)),
    )
    again = attack.attack(blind)  # also: the same seed gives the same bits
    assert torch.equal(first.target, again.target)
    assert torch.equal(first.validation, again.validation)
    assert not torch.equal(first.target, UnSplit(records=3, clones=2, steps=5, seed=1).attack(view).target)
    assert first.target.min() >= 0
    assert first.target.max() <= 1


def test_more_smoothness_makes_smoother_pictures() -> None:
    view, _ = view_of(linear_client, blobs(32))
    rough, smooth = (UnSplit(clones=1, steps=60, smoothness=weight).attack(view).target for weight in (0.0, 1.0))
    assert total_variation(smooth) / smooth.std() < 0.8 * total_variation(rough) / rough.std()


def test_total_variation_by_hand() -> None:
    picture = torch.tensor([[0.0, 1.0], [3.0, 3.0]])[None, None]
    assert total_variation(picture).item() == pytest.approx((3 + 2) / 2 + (1 + 0) / 2)


def test_ticks_missing_knowledge_and_settings() -> None:
    view, _ = view_of(linear_client, blobs(32))
    seen: list[tuple[int, int]] = []
    UnSplit(records=1, clones=2, steps=10).attack(view, lambda done, total: seen.append((done, total)))
    assert seen == [(10, 20), (20, 20)]
    ignorant, _ = view_of(linear_client, blobs(32), knows=False)
    with pytest.raises(MissingKnowledgeError, match="'unsplit' needs architecture"):
        UnSplit().attack(ignorant)
    assert repr(UnSplit(steps=9)) == "UnSplit(records=64, clones=3, steps=9, smoothness=0.1, seed=0)"
    with pytest.raises(AuditError, match="at least one record, clone"):
        UnSplit(records=0)


def test_a_client_that_drops_values_is_attacked_the_same_way_twice() -> None:
    view, _ = view_of(lambda: nn.Sequential(linear_client(), nn.Dropout(0.3)), blobs(32))
    attack = UnSplit(records=4, clones=1, steps=5)
    first = attack.attack(view)
    state = torch.get_rng_state()
    assert torch.equal(attack.attack(view).target, first.target)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not asked
