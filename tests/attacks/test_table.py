"""The table: every attack x {identity cut, undefended, NoPeek, releases of other records}, with expected ranges.

One row is one instance of an attack. On the identity cut and on other records' releases the attack's own `open_door`
and `closed_door` are the ranges; the other two stand in the row, found by running with room to either side.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from milkglass import controls
from milkglass.attacks.base import Attack
from milkglass.attacks.decoder import Decoder
from milkglass.attacks.deep_image_prior import DeepImagePrior
from milkglass.attacks.defense_aware import DefenseAware
from milkglass.attacks.features import answer_alone
from milkglass.attacks.fsha import FsHijack, Plan
from milkglass.attacks.kernel_ridge import KernelRidge
from milkglass.attacks.likelihood import LikelihoodFromGrey, LikelihoodFromRidge
from milkglass.attacks.mean_record import MeanRecord
from milkglass.attacks.nearest_neighbor import NearestNeighbor
from milkglass.attacks.ridge import Ridge
from milkglass.attacks.sdar import Sdar
from milkglass.attacks.shadow import Shadow
from milkglass.attacks.stack import Stack
from milkglass.attacks.unsplit import UnSplit
from milkglass.leakage.reconstruction import squared_errors
from milkglass.networks import mlp
from milkglass.replay import replay
from milkglass.runs import RunFolder
from milkglass.training.split import train
from milkglass.transcript import Driven, Trial
from tests.helpers import small_recipe

Range = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """An attack, and the peek expected of it on the undefended network and behind NoPeek."""

    attack: Attack
    undefended: Range
    nopeek: Range


ROWS = (
    Row(MeanRecord(), (-3, -1.5), (-3, -1.5)),  # the answer alone tells more than nothing
    Row(NearestNeighbor(), (0.22, 0.37), (0.09, 0.24)),
    Row(Ridge(), (0.66, 0.76), (0.55, 0.66)),
    Row(KernelRidge(), (0.75, 0.85), (0.65, 0.76)),
    Row(Decoder(steps=100, width=16), (0.69, 0.80), (0.57, 0.69)),
    Row(DefenseAware(steps=100, width=16), (0.69, 0.80), (0.57, 0.69)),
    Row(Stack((Ridge(), NearestNeighbor())), (0.66, 0.77), (0.55, 0.67)),
)
SLOW = (
    Row(LikelihoodFromRidge(steps=60, records=16), (0.84, 0.94), (0.69, 0.80)),
    # Those that know no pairs do worse here than who has the answer and pairs: their upper ends say so, and a weak
    # attack that is seen to be one is no surprise; it would be if it turned out strong, or reached through the wall.
    Row(LikelihoodFromGrey(steps=100, records=16), (-5, -1), (-10, -2)),
    Row(DeepImagePrior(steps=300, records=6, width=16), (-3, -0.5), (-6, -1)),
    Row(Shadow(shadows=2, steps=100, decoder=Decoder(steps=50)), (-1.5, -0.3), (-1.5, -0.3)),
    Row(UnSplit(records=16, steps=300), (-10, -3), (-18, -3)),
    Row(Sdar(iterations=200, width=16), (-4, 0), (-5, 0)),
    Row(FsHijack(Plan(iterations=300, head_start=300, width=16)), (0.2, 0.55), (0.2, 0.55)),
)

CUTS: dict[str, dict[str, Any]] = {
    "identity": {"network": {"name": "tests.attacks.test_table:halving"}, "cut": {"at": "halved"}},
    "wide": {"network": {"name": "resnet", "settings": {"width": 8}}, "cut": {"at": "stem"}},
    "undefended": {},
    "NoPeek": {"defense": {"nopeek": {"weight": 5.0}}},
}
"""Half of the record is the record, and passes the client's own guard against sending it. The wide one is the open door
of a malicious server: there the client can be taught to send everything."""


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def halving(record_shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """A client that has no weights and sends half of the record; the rest is a perceptron."""
    return nn.Sequential(OrderedDict(halved=Half(), top=mlp(record_shape, classes, hidden=(32,))))


@dataclass(frozen=True)
class Tried:
    """A trial, and the errors (T,) of what its receiver is entitled to."""

    trial: Trial
    entitled_T: Tensor


class Table:
    """Trials on digits, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: dict[str, RunFolder] = {}
        self._tried: dict[str, Tried] = {}

    def run(self, cut: str) -> RunFolder:
        if cut not in self._runs:
            recipe = small_recipe(
                **{
                    "data": {"name": "digits", "train_records": 500, "test_share": 0.1},
                    "network": {"name": "cnn", "settings": {"width": 8, "hidden": 32}},
                    "cut": {"at": "block1"},
                    "training": {"epochs": 5, "batch_size": 32, "learning_rate": 5e-3},
                    "attacker": {"auxiliary_share": 0.4, "validation_share": 0.1},
                }
                | CUTS[cut]
            )
            train(recipe, self._folder / cut)
            self._runs[cut] = RunFolder.open_finished(self._folder / cut)
        return self._runs[cut]

    def tried(self, cut: str) -> Tried:
        if cut not in self._tried:
            if cut == "others":
                whole = self.tried("undefended")
                self._tried[cut] = Tried(of_others(whole.trial), whole.entitled_T)
            else:
                reference = self.run("undefended" if cut == "NoPeek" else cut)
                (trial,) = replay(self.run(cut), reference).trials
                self._tried[cut] = Tried(trial, entitled_errors(trial))
        return self._tried[cut]

    def peek(self, attack: Attack, cut: str) -> float:
        """Of the target records that the attack rebuilds."""
        tried = self.tried("wide" if attack.adversary == "malicious" and cut == "identity" else cut)
        target = attack.attack(tried.trial.view).target
        errors_t = squared_errors(target, tried.trial.truth[: len(target)])
        return 1 - (errors_t.mean() / tried.entitled_T[: len(target)].mean()).item()


def entitled_errors(trial: Trial) -> Tensor:
    """Of the better of two regressions on what the receiver is entitled to."""
    view = answer_alone(trial.view)
    made = [attack.attack(view) for attack in (Ridge(), KernelRidge())]
    best = min(made, key=lambda each: squared_errors(each.validation, view.validation.records).mean().item())
    return squared_errors(best.target, trial.truth)


def of_others(trial: Trial) -> Trial:
    """What crosses belongs to another record, also where the attacker asks for a release, or drives a training."""
    draws = torch.Generator().manual_seed(0)
    view, knowledge = trial.view, trial.view.knowledge
    release, honest_training = view.release, knowledge.train
    assert release is not None
    assert honest_training is not None

    def release_others(x: Tensor) -> Tensor:
        return release(view.known.records[torch.randint(len(view.known), (len(x),), generator=draws)])

    def train_others(*settings: Any) -> Driven:
        driven = honest_training(*settings)
        return replace(driven, validation=driven.validation.roll(1, 0), target=driven.target.roll(1, 0))

    closed = controls.independent(trial, draws)
    knowledge = replace(knowledge, train=train_others)
    return replace(closed, view=replace(closed.view, release=release_others, knowledge=knowledge))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return Table(tmp_path_factory.mktemp("table"))


def name_of(row: Row) -> str:
    return row.attack.name


def holds(row: Row, table: Table) -> None:
    attack = row.attack
    expected: dict[str, Callable[[float], bool]] = {
        "identity": lambda peek: peek >= attack.open_door,
        "undefended": lambda peek: row.undefended[0] <= peek <= row.undefended[1],
        "NoPeek": lambda peek: row.nopeek[0] <= peek <= row.nopeek[1],
        "others": lambda peek: peek <= attack.closed_door,
    }
    peeks = {cut: table.peek(attack, cut) for cut in expected}
    wrong = {cut: peek for cut, peek in peeks.items() if not expected[cut](peek)}
    assert not wrong, f"{attack!r}: {peeks}"


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_every_attack_is_where_it_should_be(row: Row, table: Table) -> None:
    holds(row, table)


@pytest.mark.slow
@pytest.mark.parametrize("row", SLOW, ids=name_of)
def test_every_slow_attack_is_where_it_should_be(row: Row, table: Table) -> None:
    holds(row, table)
