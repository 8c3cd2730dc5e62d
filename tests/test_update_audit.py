"""What an update shows: an open door is walked through, a useless attack shows nothing, a sum hides each part."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.compare_updates import federated_share, moved_share
from milkglass.contributions import Subject, gradients_of, trusted
from milkglass.data import Candidates
from milkglass.errors import AuditError
from milkglass.networks import build
from milkglass.randomness import public_source
from milkglass.recipe import Recipe, parse_recipe
from milkglass.update_audit import audit_updates, mean_of

SHAPE, CLASSES = (1, 8, 8), 4


def pictures(count: int, name: str) -> tuple[Tensor, Tensor]:
    draws = public_source(3).generator(name)
    y = torch.arange(count) % CLASSES
    x = torch.rand(count, *SHAPE, generator=draws) * 0.2
    for row, label in enumerate(y):
        x[row, 0, 2 * int(label) : 2 * int(label) + 2] += 0.7  # a bar whose place tells the class
    return x, y


def network(name: str = "first") -> nn.Module:
    return build("mlp", SHAPE, CLASSES, {"hidden": [16]}, public_source(0).generator(name))


def learned_by_heart(x: Tensor, y: Tensor) -> nn.Module:
    made = network()
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(made(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return made


def subject(**changes: object) -> Subject:
    x, y = pictures(16, "test")
    fields: dict[str, object] = {"first": network(), "last": network(), "x": x, "y": y, "mean": x.mean(0)}
    return Subject(**(fields | changes))  # type: ignore[arg-type]


def candidates(members: tuple[Tensor, Tensor]) -> Candidates:
    (x, y), (outside_x, outside_y) = pictures(len(members[1]), "others"), pictures(24, "outside")
    member = torch.arange(2 * len(y)) < len(y)
    return Candidates(torch.cat([members[0], x]), torch.cat([members[1], y]), member, outside_x, outside_y)


def a_recipe(**training: object) -> Recipe:
    tables = {"epochs": 2, "batch_size": 4, "optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.1} | training
    return parse_recipe(
        {
            "data": {"name": "digits"},
            "network": {"name": "mlp", "settings": {"hidden": [16]}},
            "parties": {"mode": "federated"},
            "training": tables,
        }
    )


def test_an_update_of_one_record_is_read_off() -> None:
    """Behind a first fully connected layer the record stands in the gradient, exactly."""
    found = audit_updates(subject(), 1, candidates(pictures(16, "members")), "quick")
    assert found.peek.value > 0.99
    assert found.sound
    assert found.to_dict()["contributions"] == [1]


def test_an_attack_that_finds_nothing_is_not_believed() -> None:
    """Noise in place of gradients: the attacker learns on its own records to stay with the mean record."""

    def noise(network: nn.Module, *batch: Any) -> tuple[Tensor, ...]:
        return tuple(torch.randn(each.shape, generator=batch[-1]) for each in network.parameters())

    found = audit_updates(subject(shared=noise), 8, candidates(pictures(16, "members")), "quick")
    assert abs(found.peek.value) < 0.05
    assert all(score.trust < 0.2 for score in found.contributions.scores)


def test_records_known_by_heart_are_told_from_others() -> None:
    members = pictures(24, "members")
    shuffled = members[0], members[1][torch.randperm(24, generator=public_source(1).generator("labels"))]
    found = audit_updates(subject(last=learned_by_heart(*shuffled)), 1, candidates(shuffled), "quick")
    (area,) = [row for row in found.membership if row.measure == "membership.auc"]
    assert area.low > 0.6
    untrained = audit_updates(subject(), 1, candidates(shuffled), "quick").membership[0]
    assert untrained.low < 0.5 < untrained.high
    assert found.to_dict()["measures"]["membership.auc"]["value"] == area.value


def test_large_updates_are_attacked_smaller_and_that_is_told() -> None:
    found = audit_updates(subject(), 100, candidates(pictures(16, "members")), "quick")
    assert found.contributions.scores[0].contribution_records == 8  # half of the test records
    assert any("of 100 records, those attacked of 8" in note for note in found.notes)
    with pytest.raises(AuditError, match="1 test records; expected two"):
        audit_updates(subject(x=torch.rand(1, *SHAPE), y=torch.zeros(1).long()), 4, candidates(pictures(16, "m")))


@pytest.mark.parametrize(("rebuilt", "trust"), [(1.0, 1.0), (-1.0, 0.0), (2.0, 0.5), (0.0, 0.0)])
def test_trust_is_the_share_of_the_way_that_served(rebuilt: float, trust: float) -> None:
    mean, truth = torch.full((3,), 0.5), torch.tensor([[0.7, 0.2, 0.5]])
    assert trusted(mean + rebuilt * (truth - mean), truth, mean) == pytest.approx(trust)


def test_a_sum_of_updates_is_the_mean_over_equal_parts() -> None:
    x, y = pictures(8, "test")
    whole = gradients_of(network(), x, y, torch.Generator())
    parts = mean_of(gradients_of, 4)(network(), x, y, torch.Generator())
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(whole, parts, strict=True))


def test_one_plain_step_moves_weights_by_the_gradient() -> None:
    """Both shares are the gradient itself where the client takes one step of SGD on one batch."""
    x, y = pictures(4, "test")
    wanted = gradients_of(network(), x, y, torch.Generator())
    for share in (moved_share(a_recipe()), federated_share(a_recipe(), 4)):
        made = network()
        before = copy.deepcopy(made.state_dict())
        found = share(made, x, y, torch.Generator())
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True))
        assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
