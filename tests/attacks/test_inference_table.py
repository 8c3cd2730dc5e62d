"""The second table: attacks that guess facts x {identity cut, undefended, NoPeek, releases of other records}.

What the columns are differs a little, as what leaks does. Attributes and matching: as in test_table.py. Labels: the
identity cut is that of the logits, and NoPeek a penalty on records, which does nothing for labels. Membership: the door
is a network that knows its few members by heart; the others' releases stand in for those of members.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from milkglass.attacks.attributes import AttributeProbe, LinearProbe, MlpProbe
from milkglass.attacks.base import Method
from milkglass.attacks.fsha import FsAttribute, Plan
from milkglass.attacks.labels import GradientDirection, GradientNorm, LabelAttack, ModelCompletion
from milkglass.attacks.membership import ClassDistance, Lira, LossThreshold, MembershipAttack
from milkglass.inference import InferenceScore, audit_attributes, audit_labels, audit_matching, audit_membership
from milkglass.messages import Message
from milkglass.replay import Replay, load_parties, replay
from milkglass.runs import RunFolder
from milkglass.training.split import train
from milkglass.transcript import Driven, LabelTrial, LabelView, Release, Trial
from tests.attacks.test_table import CUTS
from tests.helpers import small_recipe

MALICIOUS = "malicious"
KNOWN_LABELS = 60


class Runs:
    """Trainings on digits, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: dict[str, RunFolder] = {}
        self._replays: dict[str, Replay] = {}

    def run(self, cut: str, **changes: Any) -> RunFolder:
        name = cut + "-" + "-".join(changes)
        if name not in self._runs:
            tables = {
                "data": {"name": "digits", "train_records": 500, "test_share": 0.15},
                "network": {"name": "cnn", "settings": {"width": 8, "hidden": 32}},
                "cut": {"at": "block1"},
                "training": {"epochs": 5, "batch_size": 32, "learning_rate": 5e-3},
                "attacker": {"auxiliary_share": 0.4, "validation_share": 0.1},
            }
            train(small_recipe(**(tables | CUTS[cut] | changes)), self._folder / name)
            self._runs[name] = RunFolder.open_finished(self._folder / name)
        return self._runs[name]

    def replayed(self, cut: str, **changes: Any) -> Replay:
        name = cut + "-" + "-".join(changes)
        if name not in self._replays:
            run = self.run(cut, **changes)
            self._replays[name] = replay(run, self.run("undefended", **changes) if cut == "NoPeek" else run)
        return self._replays[name]

    def trial(self, cut: str) -> Trial:
        """With one attribute, "high": whether the digit is above 4; nobody is entitled to anything."""
        others = cut == "others"
        trial = self.replayed("undefended" if others else cut).trials[0]
        view, records = trial.view, load_parties(self.run("undefended" if others else cut)).records
        known, validation = (
            replace(pairs, entitled=pairs.entitled[:, :0], attributes={"high": (part.y > 4).long()})
            for pairs, part in ((view.known, records.auxiliary), (view.validation, records.validation))
        )
        target, knowledge = replace(view.target, entitled=view.target.entitled[:, :0]), view.knowledge
        if others:
            honest_training = knowledge.train
            assert honest_training is not None

            def train_others(*settings: Any) -> Driven:
                driven = honest_training(*settings)
                return replace(driven, validation=driven.validation.roll(1, 0), target=driven.target.roll(1, 0))

            known, validation = (
                replace(pairs, activations=pairs.activations.roll(1, 0)) for pairs in (known, validation)
            )
            target = Release(target.activations.roll(1, 0), target.entitled, target.labels)
            knowledge = replace(knowledge, train=train_others)
        view = replace(view, known=known, validation=validation, target=target, knowledge=knowledge)
        return replace(trial, view=view, attributes={"high": (records.test.y > 4).long()})

    def gradients(self, cut: str) -> LabelTrial:
        """What the server returns for one batch of test records, and a few labels that got about."""
        setup = load_parties(self.run("undefended" if cut == "others" else cut))
        x, y = setup.records.test.x, setup.records.test.y
        with torch.no_grad():
            z = setup.client.stage(x)
        sent = z.clone().requires_grad_()
        loss = F.cross_entropy(setup.server.stage(sent), y)
        (dz,) = torch.autograd.grad(loss, sent)
        if cut == "others":
            dz, z = dz.roll(1, 0), z.roll(1, 0)
        rows = torch.arange(KNOWN_LABELS)
        return LabelTrial(LabelView(dz, z, rows, y[rows], 10), y)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("inference"))


@dataclass(frozen=True)
class Expected:
    """The least value undefended and behind NoPeek. The attack itself says what its open and its closed door are."""

    undefended: float
    nopeek: float


def holds(attack: Method, expected: Expected, measure: Callable[[str], InferenceScore]) -> None:
    found = {cut: measure(cut) for cut in ("identity", "undefended", "NoPeek", "others")}
    told = {cut: (score.value, score.low, score.high) for cut, score in found.items()}
    least = {"identity": attack.open_door, "undefended": expected.undefended, "NoPeek": expected.nopeek}
    assert all(found[cut].value >= value for cut, value in least.items()), told
    assert found["others"].low <= attack.closed_door, told


ATTRIBUTES: tuple[tuple[AttributeProbe, Expected], ...] = (
    (LinearProbe(), Expected(0.3, 0.3)),
    (MlpProbe(), Expected(0.3, 0.3)),
)


@pytest.mark.parametrize(("probe", "expected"), ATTRIBUTES, ids=lambda value: getattr(value, "name", ""))
def test_attributes(probe: AttributeProbe, expected: Expected, runs: Runs) -> None:
    holds(probe, expected, lambda cut: audit_attributes(runs.trial(cut), [probe])[0])


@pytest.mark.slow
def test_attributes_of_a_hijacked_client(runs: Runs) -> None:
    probe = FsAttribute(Plan(iterations=300, head_start=300, width=16))

    def measure(cut: str) -> InferenceScore:
        # the open door of a malicious server is a client that can learn to send everything
        return audit_attributes(runs.trial("wide" if cut == "identity" else cut), [probe])[0]

    assert measure("identity").adversary == MALICIOUS
    holds(probe, Expected(0.2, 0.2), measure)


def test_matching(runs: Runs) -> None:
    rows = {cut: audit_matching(runs.trial(cut))[0] for cut in ("identity", "undefended", "NoPeek", "others")}
    assert all(rows[cut].value > 0.95 for cut in ("identity", "undefended", "NoPeek"))
    assert rows["others"].value <= 2 / rows["others"].details["candidates"]
    assert rows["others"].details["chance"] == pytest.approx(1 / len(runs.trial("others").truth))


LABELS: tuple[tuple[LabelAttack, Expected], ...] = (
    (GradientDirection(), Expected(0.9, 0.9)),
    (GradientNorm(), Expected(0.5, 0.5)),
    (ModelCompletion(), Expected(0.9, 0.9)),
)


@pytest.mark.parametrize(("attack", "expected"), LABELS, ids=lambda value: getattr(value, "name", ""))
def test_labels(attack: LabelAttack, expected: Expected, runs: Runs) -> None:
    holds(attack, expected, lambda cut: audit_labels(runs.gradients(cut), [attack])[0])


@dataclass(frozen=True)
class Areas:
    """The least area under the ROC curve on the identity cut, undefended and behind NoPeek."""

    attack: MembershipAttack
    identity: float
    undefended: float
    nopeek: float


MEMBERSHIP = (
    Areas(ClassDistance(), 0.45, 0.45, 0.45),  # about chance: one convolution has nobody by heart, the server has
    Areas(LossThreshold(), 0.58, 0.75, 0.68),
    Areas(Lira(shadows=2, epochs=10), 0.58, 0.75, 0.68),
)


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Changes of the recipe: every second label is drawn by lot, so a network that knows it has it by heart."""
    digits, draws = load_digits(), np.random.default_rng(0)
    labels = np.where(draws.random(len(digits.target)) < 0.5, draws.integers(0, 10, len(digits.target)), digits.target)
    path = tmp_path_factory.mktemp("data") / "lots.npz"
    np.savez(path, images=digits.images / 16, labels=labels)
    return {
        "data": {"path": str(path), "train_records": 250, "test_share": 0.15},
        "training": {"epochs": 30, "batch_size": 32, "learning_rate": 5e-3},
    }


@pytest.mark.parametrize("row", MEMBERSHIP, ids=lambda row: row.attack.name)
def test_membership(row: Areas, runs: Runs, by_heart: dict[str, Any]) -> None:
    def area(cut: str, *, of_others: bool = False) -> InferenceScore:
        trial = runs.replayed(cut, **by_heart).membership
        assert trial is not None
        if of_others:  # another candidate's release, and record, and label: every second one a member's
            half = len(trial.member) // 2
            other = torch.stack([torch.arange(half), half + torch.arange(half)], dim=1).flatten()
            seen, records = trial.view.candidates, trial.view.records
            assert seen.labels is not None
            assert records is not None
            mixed = Release(seen.activations[other], seen.entitled[other], seen.labels[other])
            trial = replace(trial, view=replace(trial.view, candidates=mixed, records=records[other]))
        return next(found for found in audit_membership(trial, [row.attack]) if found.measure == "membership.auc")

    for cut, least in (("identity", row.identity), ("undefended", row.undefended), ("NoPeek", row.nopeek)):
        assert area(cut).value >= least, (cut, area(cut))
    others = area("undefended", of_others=True)
    assert others.low <= 0.5 <= others.high


def test_the_gradients_of_a_run_are_those_that_its_server_returns(runs: Runs) -> None:
    setup, trial = load_parties(runs.run("undefended")), runs.gradients("undefended")
    assert trial.view.activations is not None
    for parameter in setup.server.stage.parameters():
        parameter.requires_grad_()
    setup.server.optimizer = None
    message = Message("activations", "client", 0, {"activations": trial.view.activations, "labels": trial.labels})
    torch.testing.assert_close(trial.view.gradients, setup.server.reply(message).tensors["gradient"])
