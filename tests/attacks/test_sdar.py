"""SDAR: it changes nothing of what it watches, uses only what it says it knows, and reads what the client sends.

Legend: N records; the door's records have shape (12,) or (1, 6, 6).
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from milkglass.attacks.sdar import Sdar
from milkglass.client import Client
from milkglass.errors import AuditError, MissingKnowledgeError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.messages import Responder
from milkglass.randomness import Source, drawing_from
from milkglass.replay import replay
from milkglass.runs import RunFolder
from milkglass.server import Server
from milkglass.training.split import set_up, train, train_epoch
from milkglass.transcript import Driven, HonestServer, Knowledge, Pairs, Release, View
from milkglass.transports.local import LocalTransport
from tests.helpers import KEY, small_recipe

STEPS = 6  # two epochs of three batches: all of the small recipe's training
QUICK = Sdar(iterations=STEPS, decoder_weight=1e-3, width=8)


def restless(record_shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Dropout and BatchNorm on both sides of the cut after `bottom`: it draws, and has state beside its weights."""
    network = nn.Sequential()
    network.add_module("flatten", nn.Flatten())
    network.add_module(
        "bottom", nn.Sequential(nn.Linear(math.prod(record_shape), 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2))
    )
    network.add_module("middle", nn.Sequential(nn.Dropout(0.3), nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU()))
    network.add_module("classifier", nn.Linear(12, classes))
    return network


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished training of the restless network."""
    path: Path = tmp_path_factory.mktemp("sdar") / "run"
    recipe = small_recipe(network={"name": "tests.attacks.test_sdar:restless"}, cut={"at": "bottom"})
    train(recipe, path)
    return RunFolder.open_finished(path)


@pytest.fixture(scope="module")
def view(run: RunFolder) -> View:
    """What an attacker of that run is given."""
    return replay(run, run).trials[0].view


def watched(view: View) -> tuple[View, list[HonestServer], list[Driven]]:
    """The same view; what it hands out is kept in the two lists."""
    servers: list[HonestServer] = []
    trainings: list[Driven] = []
    knows = view.knowledge
    assert knows.honest_server is not None
    assert knows.train is not None
    make, drive = knows.honest_server, knows.train

    def honest_server() -> HonestServer:
        servers.append(make())
        return servers[-1]

    def training(server: Responder, steps: int) -> Driven:
        trainings.append(drive(server, steps))
        return trainings[-1]

    return replace(view, knowledge=replace(knows, honest_server=honest_server, train=training)), servers, trainings


def test_the_training_ends_in_the_same_bits_as_without_the_attacker(run: RunFolder, view: View) -> None:
    open_view, servers, trainings = watched(view)
    before = torch.get_rng_state()
    QUICK.attack(open_view)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(trainings[0].target, view.target.activations)  # of the run that nobody watched
    assert torch.equal(trainings[0].validation, view.validation.activations)
    alone = set_up(run.recipe)
    for epoch in (1, 2):
        train_epoch(alone, epoch)
    server = servers[0]
    assert isinstance(server, Server)
    ours, theirs = server.state(), alone.server.state()  # weights, BatchNorm's statistics, Adam's moments, generator
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for watched_one, unwatched in zip(server.stage.parameters(), alone.server.stage.parameters(), strict=True):
        assert watched_one.requires_grad
        assert watched_one.grad is not None
        assert unwatched.grad is not None
        assert torch.equal(watched_one.grad, unwatched.grad)
    assert {name: module.training for name, module in server.stage.named_modules()} == {
        name: module.training for name, module in alone.server.stage.named_modules()
    }


def test_it_reads_nothing_but_what_it_says_it_knows(view: View) -> None:
    made = QUICK.attack(view)

    def spoiled(values: Tensor) -> Tensor:
        return torch.full_like(values, float("nan"))

    def unknown(pairs: Pairs, records: Tensor) -> Pairs:
        return replace(pairs, activations=spoiled(pairs.activations), entitled=spoiled(pairs.entitled), records=records)

    target, knows = view.target, view.knowledge
    blind = replace(
        view,
        known=unknown(view.known, view.known.records),
        validation=unknown(view.validation, spoiled(view.validation.records)),
        target=replace(target, activations=spoiled(target.activations), entitled=spoiled(target.entitled)),
        release=None,
        knowledge=replace(knows, client=None, server=None),
    )
    again = QUICK.attack(blind)  # the same seed: the same bits
    assert torch.equal(made.target, again.target)
    assert torch.equal(made.validation, again.validation)
    other = Sdar(iterations=STEPS, decoder_weight=1e-3, width=8, seed=1).attack(blind)
    assert not torch.equal(made.target, other.target)


def test_the_simulator_has_the_penalty_that_the_client_is_known_to_have(view: View) -> None:
    asked: list[tuple[Tensor, Tensor]] = []

    def penalty(x_B: Tensor, z_B: Tensor) -> Tensor:
        asked.append((x_B, z_B))
        return 100 * z_B.square().mean()

    plain = QUICK.attack(view).target
    made = QUICK.attack(replace(view, knowledge=replace(view.knowledge, penalty=penalty))).target
    assert len(asked) == STEPS
    assert not torch.equal(made, plain)
    first, last = (z_B.square().mean().item() for _, z_B in (asked[0], asked[-1]))
    assert last < first


def test_it_rebuilds_every_record_within_the_known_ones_range_and_ticks(view: View) -> None:
    ticks: list[tuple[int, int]] = []
    made = QUICK.attack(view, lambda done, total: ticks.append((done, total)))
    assert ticks == [(step, STEPS) for step in range(1, STEPS + 1)]
    assert made.validation.shape == view.validation.records.shape
    assert made.target.shape == (len(view.target), *view.known.records.shape[1:])
    assert made.target.dtype == view.known.records.dtype
    assert made.target.min() >= view.known.records.min()
    assert made.target.max() <= view.known.records.max()


@pytest.mark.parametrize("lacks", ["labels", "validation labels", "architecture", "training"])
def test_missing_knowledge_is_one_clear_error(view: View, lacks: str) -> None:
    less = {
        "labels": replace(view, target=replace(view.target, labels=None)),
        "validation labels": replace(view, validation=replace(view.validation, labels=None)),
        "architecture": replace(view, knowledge=replace(view.knowledge, architecture=None)),
        "training": replace(view, knowledge=replace(view.knowledge, train=None)),
    }[lacks]
    with pytest.raises(MissingKnowledgeError, match=f"'sdar' needs .*{lacks.split()[-1]}"):
        QUICK.attack(less)


@pytest.mark.parametrize(
    "settings",
    [{"iterations": 0}, {"width": 0}, {"simulator_weight": -1.0}, {"critic_rate": 0.0}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(AuditError, match=f"sdar: .*{next(iter(settings))} = .*expected"):
        Sdar(**settings)  # type: ignore[arg-type]


def test_every_setting_shows() -> None:
    shown = repr(Sdar(iterations=7, simulator_weight=0.25, decoder_rate=0.5, seed=3))
    again = eval(shown)
    assert repr(again) == shown
    assert shown != repr(Sdar())


class Scaled(nn.Module):
    """An open door: every value under a scale of its own, trained. Only the scales are the client's secret."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(0.5 + torch.rand(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def door(shape: tuple[int, ...], *, of_others: bool = False) -> tuple[View, Tensor]:
    """A client behind the open door, trained by the real parties; and the target's records.

    of_others: what is released in the end are other records of the same part.
    """
    x = torch.rand(1200, *shape, generator=torch.Generator().manual_seed(0))
    y = (x.flatten(1)[:, :6].mean(1) > 0.5).long()
    private, known, validation, target = (slice(*ends) for ends in ((0, 500), (500, 1100), (1100, 1150), (1150, 1200)))

    def architecture(generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
        values = torch.Size(shape).numel()
        with drawing_from(generator):
            top = nn.Sequential(nn.Flatten(), nn.Linear(values, 16), nn.ReLU(), nn.Linear(16, 2))
            return Scaled(shape), top

    def adam(stage: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(stage.parameters(), lr=1e-2)

    def honest_server() -> HonestServer:
        stage = architecture(torch.Generator().manual_seed(1))[1]
        return Server(stage, adam(stage), source=Source(KEY))

    def training(server: Responder, steps: int) -> Driven:
        stage = architecture(torch.Generator().manual_seed(2))[0]
        client = Client(stage, adam(stage), LocalTransport(server), source=Source(KEY))
        order = torch.Generator().manual_seed(3)
        for _ in range(steps):
            rows = torch.randint(500, (32,), generator=order)
            client.step(x[private][rows], y[private][rows])
        moved = 1 if of_others else 0
        return Driven(client.release(x[validation]).roll(moved, 0), client.release(x[target]).roll(moved, 0), steps)

    def pairs(part: slice) -> Pairs:
        return Pairs(x[part] * 0, x[part], x[part].flatten(1)[:, :0], labels=y[part])

    release = Release(x[target] * 0, x[target].flatten(1)[:, :0], labels=y[target])
    knowledge = Knowledge(architecture=architecture, train=training, honest_server=honest_server)
    return View(pairs(known), pairs(validation), release, knowledge=knowledge), x[target]


def peek_over_mean(attack: Sdar, view: View, truth: Tensor) -> float:
    mean = view.known.records.mean(0).expand_as(truth)
    made = attack.attack(view).target
    return 1 - (squared_errors(made, truth).mean() / squared_errors(mean, truth).mean()).item()


def eager(simulator_weight: float, iterations: int = 200) -> Sdar:
    """Rates for a training of a few hundred tiny batches."""
    return Sdar(
        iterations=iterations,
        simulator_weight=simulator_weight,
        decoder_weight=1e-3,
        simulator_rate=1e-2,
        decoder_rate=5e-3,
        critic_rate=3e-3,
        width=16,
    )


def test_an_open_door_is_walked_through_and_the_critic_shows_the_way() -> None:
    view, truth = door((12,))
    guided = peek_over_mean(eager(0.3), view, truth)
    assert guided > 0.9
    assert guided > peek_over_mean(eager(0.0), view, truth) + 0.05


def test_maps_are_read_too() -> None:
    assert peek_over_mean(eager(0.3, iterations=60), *door((1, 6, 6))) > 0.4


def test_releases_of_other_records_give_nothing() -> None:
    assert peek_over_mean(eager(0.3, iterations=100), *door((12,), of_others=True)) <= Sdar.closed_door
