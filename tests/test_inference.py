"""Rows of what was guessed: attributes, membership, labels; and what they refuse."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import ClassVar, final

import pytest
import torch
from torch import Tensor

from milkglass.attacks.attributes import AttributeGuess, AttributeProbe, LinearProbe
from milkglass.attacks.base import Tick, silent
from milkglass.attacks.labels import GradientDirection, ModelCompletion
from milkglass.attacks.membership import Lira, MembershipAttack, MembershipScores
from milkglass.errors import AuditError
from milkglass.inference import InferenceScore, audit_attributes, audit_labels, audit_membership
from milkglass.transcript import (
    Known,
    LabelTrial,
    LabelView,
    MembershipTrial,
    MembershipView,
    Pairs,
    Release,
    Trial,
    View,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attribute_trial() -> Trial:
    """`crossing` is in the activations, `answered` in the entitled values, `coin` in neither; 200 targets."""
    draws, count = generator(), 800
    values = {name: torch.randint(2, (count,), generator=draws) for name in ("crossing", "answered", "coin")}
    z_ND = torch.randn(count, 10, generator=draws) + 4 * values["crossing"][:, None]
    answer_N1 = 0.2 + 0.6 * values["answered"][:, None].float()

    def pairs(rows: slice) -> Pairs:
        attributes = {name: column[rows] for name, column in values.items()}
        return Pairs(z_ND[rows], z_ND[rows], answer_N1[rows], attributes=attributes)

    target = slice(600, None)
    view = View(pairs(slice(400)), pairs(slice(400, 600)), Release(z_ND[target], answer_N1[target]))
    return Trial(view, z_ND[target], {name: column[target] for name, column in values.items()})


def test_each_attribute_has_a_row_a_probe_and_one_for_the_answer_alone() -> None:
    steps: list[tuple[int, int]] = []
    rows = audit_attributes(attribute_trial(), tick=lambda *step: steps.append(step))
    by_attribute = {
        name: [row for row in rows if row.measure == f"attribute.{name}"] for name in ("crossing", "answered", "coin")
    }
    assert len(rows) == 9
    for found in by_attribute.values():
        assert [row.details["chosen"] for row in found] == [1.0, 0.0, 0.0]
        assert found[0].details["validation"] == max(row.details["validation"] for row in found)
        assert sum(row.name.endswith(", answer alone") for row in found) == 1
        assert {row.name for row in found} >= {"linear probe", "mlp probe"}
        for row in found:
            assert row.details["balanced_accuracy"] - row.details["prior"] == pytest.approx(row.value)
            assert (row.n, row.exposure, row.knows) == (200, "fresh", ("pairs",))

    def alone(name: str) -> InferenceScore:
        return next(row for row in by_attribute[name] if row.name.endswith("answer alone"))

    assert by_attribute["crossing"][0].low > 0.4
    assert alone("crossing").low <= 0.0 <= alone("crossing").high
    assert alone("answered").low > 0.4
    assert by_attribute["coin"][0].low <= 0.0 <= by_attribute["coin"][0].high
    assert steps == sorted(steps)
    assert steps[-1][0] <= steps[-1][1]


def test_a_trial_without_attributes_has_no_rows() -> None:
    assert audit_attributes(replace(attribute_trial(), attributes={})) == ()


def test_rows_are_json() -> None:
    trial = membership_trial()
    row = audit_membership(trial, [Oracle(trial.member)])[1].to_dict()
    assert json.loads(json.dumps(row)) == row
    assert set(row) == set(InferenceScore.__dataclass_fields__)


def test_bad_attributes_are_refused() -> None:
    trial = attribute_trial()
    for values, match in (
        (torch.ones(200, dtype=torch.int64), "'crossing' of the target: 200 records, 1 different values"),
        (torch.full((200,), torch.nan), "'crossing' of the target: torch.float32"),
        (-torch.arange(200), "from -199 to 0; expected classes from 0 on"),
    ):
        with pytest.raises(AuditError, match=match):
            audit_attributes(replace(trial, attributes={"crossing": values}))
    left_out: dict[str, Exception] = {}
    other = replace(trial, attributes={"other": trial.attributes["coin"]})
    assert audit_attributes(other, skipped=left_out.__setitem__) == ()
    assert "'other': the known pairs do not have it" in str(left_out["linear probe"])


@final
@dataclass(frozen=True)
class Oracle(MembershipAttack):
    """Normal scores, those of members higher by `shift`; or whatever is given."""

    member: Tensor
    shift: float = 1.0
    spoiled: float = 0.0

    name: ClassVar[str] = "oracle"
    paper: ClassVar[str] = "none"
    knows: ClassVar[tuple[Known, ...]] = ("pairs",)

    def attack(self, view: MembershipView, tick: Tick = silent) -> MembershipScores:
        tick(1, 1)
        scores_T = torch.randn(len(self.member), generator=generator(1)) + self.shift * self.member + self.spoiled
        return MembershipScores(scores_T, torch.randn(len(view.outsiders), generator=generator(2)), 0.5)


def membership_trial(members: int = 400, others: int = 300, outsiders: int = 500) -> MembershipTrial:
    count, draws = members + others, generator(3)
    candidates = Release(
        torch.randn(count, 4, generator=draws), torch.zeros(count, 0), torch.randint(2, (count,), generator=draws)
    )
    own_ND = torch.randn(outsiders, 4, generator=draws)
    own = Pairs(own_ND, own_ND, torch.zeros(outsiders, 0), torch.randint(2, (outsiders,), generator=draws))
    return MembershipTrial(MembershipView(candidates, own), torch.arange(count) < members)


def test_membership_has_an_area_and_a_rate_with_the_false_alarms_it_came_with() -> None:
    trial = membership_trial()
    area, rate = audit_membership(trial, [Oracle(trial.member, shift=3.0)])
    assert (area.measure, rate.measure) == ("membership.auc", "tpr@1%")
    assert area.low <= 0.983 <= area.high  # Phi(3 / sqrt 2)
    assert rate.value > 0.5
    assert rate.n == 400
    assert rate.details["false_positive_rate_low"] <= 0.01 <= rate.details["false_positive_rate_high"]


@pytest.mark.parametrize(
    ("outsiders", "measures"),
    [
        (98, ["membership.auc"]),
        (99, ["membership.auc", "tpr@1%"]),
        (9_999, ["membership.auc", "tpr@1%"]),
        (10_000, ["membership.auc", "tpr@1%", "tpr@0.1%"]),
    ],
)
def test_a_rate_is_told_only_where_there_are_enough_outsiders(outsiders: int, measures: list[str]) -> None:
    trial = membership_trial(outsiders=outsiders)
    assert [row.measure for row in audit_membership(trial, [Oracle(trial.member)])] == measures


def test_an_attack_that_lacks_something_is_left_out_and_named() -> None:
    trial = membership_trial()
    left_out: dict[str, Exception] = {}
    rows = audit_membership(trial, [Lira(), Oracle(trial.member)], skipped=left_out.__setitem__)
    assert {row.name for row in rows} == {"oracle"}
    assert left_out.keys() == {"lira"}
    assert "architecture" in str(left_out["lira"])
    rows = audit_membership(trial, skipped=left_out.__setitem__)
    assert {row.name for row in rows} == {"class distance"}
    assert rows[0].low <= 0.5 <= rows[0].high
    assert left_out.keys() == {"lira", "loss threshold"}


def test_bad_membership_trials_are_refused() -> None:
    trial = membership_trial()
    for member in (torch.ones(700, dtype=torch.bool), torch.arange(700) < 7, torch.ones(700)):
        with pytest.raises(AuditError, match="expected at least 8 of each"):
            audit_membership(replace(trial, member=member))
    with pytest.raises(AuditError, match="not all scores are finite"):
        audit_membership(trial, [Oracle(trial.member, spoiled=torch.nan)])
    with pytest.raises(AuditError, match="7 outsiders; expected at least 8"):
        audit_membership(membership_trial(outsiders=7))
    with pytest.raises(AuditError, match="do not match row by row"):
        replace(trial, member=trial.member[1:])


def label_trial() -> LabelTrial:
    """Gradients along one direction, up for label 1 and down for 0; four rows are known."""
    draws = generator(4)
    labels_T = torch.randint(2, (300,), generator=draws)
    way_D = torch.randn(6, generator=draws)
    gradients_TD = (labels_T[:, None] - torch.rand(300, 1, generator=draws)) * way_D
    rows_k = torch.cat([(labels_T == label).nonzero()[:2, 0] for label in (0, 1)])
    view = LabelView(gradients_TD, torch.randn(300, 5, generator=draws), rows_k, labels_T[rows_k], 2)
    return LabelTrial(view, labels_T)


def test_labels_have_an_area_and_an_accuracy_over_the_rows_that_are_not_known() -> None:
    rows = audit_labels(label_trial())
    assert [(row.name, row.measure) for row in rows] == [
        (name, measure)
        for name in ("gradient norm", "gradient direction", "model completion")
        for measure in ("label.auc", "label.accuracy")
    ]
    assert {(row.n, row.exposure) for row in rows} == {(296, "trained-on")}
    direction = {row.measure: row for row in rows if row.name == "gradient direction"}
    assert direction["label.auc"].value == 1.0
    assert direction["label.accuracy"].value == pytest.approx(0.5)
    assert direction["label.accuracy"].details == pytest.approx({"balanced_accuracy": 1.0, "prior": 0.5})
    completed = {row.measure: row for row in rows if row.name == "model completion"}
    assert completed["label.accuracy"].low <= 0.0 <= completed["label.accuracy"].high


def test_a_label_attack_that_lacks_something_is_left_out_and_named() -> None:
    trial = label_trial()
    left_out: dict[str, Exception] = {}
    blind = replace(trial, view=replace(trial.view, activations=None))
    rows = audit_labels(blind, [ModelCompletion(), GradientDirection()], skipped=left_out.__setitem__)
    assert {row.name for row in rows} == {"gradient direction"}
    assert left_out.keys() == {"model completion"}


def test_bad_label_trials_are_refused() -> None:
    trial, attacks = label_trial(), [GradientDirection()]
    one = replace(trial.view, known_rows=torch.tensor([0]), known_labels=torch.tensor([1]))
    with pytest.raises(AuditError, match="unknown labels: 299 records, 1 different values"):
        audit_labels(LabelTrial(one, torch.ones(300, dtype=torch.int64)), attacks)
    with pytest.raises(AuditError, match="the known labels are not those of the known rows"):
        audit_labels(replace(trial, labels=1 - trial.labels), attacks)
    with pytest.raises(AuditError, match="labels: from 0 to 3; expected classes from 0 to 1"):
        audit_labels(replace(trial, labels=3 * trial.labels), attacks)
    with pytest.raises(AuditError, match="gradients: not all values are finite"):
        audit_labels(replace(trial, view=replace(trial.view, gradients=trial.view.gradients * torch.inf)), attacks)


def test_attributes_leave_the_process_wide_random_state_alone() -> None:
    trial = attribute_trial()
    only = replace(trial, attributes={"coin": trial.attributes["coin"]})
    before = torch.get_rng_state()
    values = [row.value for row in audit_attributes(only)]
    assert torch.equal(torch.get_rng_state(), before)
    assert values == [row.value for row in audit_attributes(only)]


@final
class Broken(AttributeProbe):
    """Fails in the middle of its work."""

    name: ClassVar[str] = "broken"

    def attack(self, view: View, attribute: str, tick: Tick = silent) -> AttributeGuess:
        raise RuntimeError("out of memory")


def test_a_probe_that_breaks_takes_no_other_with_it() -> None:
    left_out: dict[str, Exception] = {}
    trial = attribute_trial()
    alone = replace(trial, attributes={"crossing": trial.attributes["crossing"]})
    rows = audit_attributes(alone, [Broken(), LinearProbe()], skipped=left_out.__setitem__)
    assert [row.name for row in rows] == ["linear probe", "linear probe, answer alone"]
    assert left_out.keys() == {"broken"}
    assert audit_attributes(alone, [Broken()]) == ()
