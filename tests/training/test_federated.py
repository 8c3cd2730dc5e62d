"""Federated training on Flower is a plain loop of averaging, through drop-outs and stops, and nothing leaves."""

from __future__ import annotations

import json
import socket
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.errors import LinkError, MissingExtraError
from milkglass.flower import flower
from milkglass.handover import average
from milkglass.networks import build
from milkglass.randomness import Source, drawing_from, public_source, rehearsal_source
from milkglass.recipe import Recipe, parse_recipe
from milkglass.runs import RunFolder
from milkglass.training.federated import LocalRound, Member, local_update, member, train
from milkglass.training.federated_rounds import Rounds
from milkglass.training.shares import deal_records
from milkglass.training.split import Silence
from tests.helpers import KEY

NAMES = ("north", "east", "south")
NUMBERS = 64 * 16 + 16 + 16 * 10 + 10


def recipe(*, names: tuple[str, ...] = NAMES, **changes: Any) -> Recipe:
    """101, 100 and 100 records, batches of 16, three rounds; `changes` go into their tables."""
    tables: dict[str, dict[str, Any]] = {
        "data": {"name": "digits", "train_records": 301, "test_records": 50, "test_share": 0.1},
        "network": {"name": "mlp", "settings": {"hidden": [16]}},
        "training": {"epochs": 3, "batch_size": 16, "optimizer": "sgd", "learning_rate": 0.1},
        "attacker": {"auxiliary_share": 0.1, "validation_share": 0.1},
        "parties": {"clients": list(names), "mode": "federated"},
        "federated": {},
    }
    for table, values in changes.items():
        tables[table] = tables.get(table, {}) | values
    return parse_recipe(tables)


def dropping(shape: tuple[int, ...], classes: int) -> nn.Module:
    """With dropout, and a counter that is no floating-point number."""
    width = int(torch.tensor(shape).prod())
    return nn.Sequential(
        nn.Flatten(), nn.Linear(width, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, classes)
    )


def plain(run: Recipe, missing: dict[int, str] | None = None) -> dict[str, Tensor]:
    """The obviously right loop. missing: by round, who does not take part."""
    records, settings, training = deal_records(run), run.network.settings, run.training
    size = training.batch_size

    def network() -> nn.Module:
        start = public_source(run.seed).generator("weights")
        return build(run.network.name, records.record_shape, records.classes, settings, start)

    weights = network().state_dict()
    for first in range(1, training.epochs + 1, run.federated.local_epochs):
        ends, counts = [], []
        for name in run.parties.clients:
            own, source, data = network(), rehearsal_source(run.seed, name), records.train[name]
            own.load_state_dict(weights)
            steps: torch.optim.Optimizer = torch.optim.SGD(own.parameters(), training.learning_rate, training.momentum)
            if training.optimizer == "adam":
                steps = torch.optim.Adam(own.parameters(), training.learning_rate)
            for epoch in range(first, first + run.federated.local_epochs):
                order = torch.randperm(len(data), generator=source.generator("order", epoch))
                dropout = source.generator("dropout", epoch)
                for rows in order[: len(data) // size * size].view(-1, size):
                    steps.zero_grad()
                    with drawing_from(dropout):
                        out = own(data.x[rows])
                    F.cross_entropy(out, data.y[rows]).backward()  # type: ignore[no-untyped-call]
                    steps.step()
            if (missing or {}).get((first - 1) // run.federated.local_epochs + 1) != name:
                ends.append(own.state_dict())
                counts.append(len(data))
        weights = average(ends, counts)
    return weights


def result(out: Path) -> dict[str, Tensor]:
    return load_file(out / "network.safetensors")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, epoch: int, answer: LocalRound | None = None) -> None:
    """From here on this client gives `answer`, or raises, in the round that begins with that epoch."""
    honest = Member.round

    def round_(self: Member, weights: Any, first: int, on_batch: Any = None) -> LocalRound:
        if (self.name, first) == (name, epoch):
            if answer is None:
                raise ZeroDivisionError("the disk is full\nof dust")
            return answer
        return honest(self, weights, first, on_batch)

    monkeypatch.setattr(Member, "round", round_)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `recipe()`."""
    out = tmp_path_factory.mktemp("federated") / "run"
    train(recipe(), out)
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": {"optimizer": "adam", "learning_rate": 0.01, "epochs": 4}, "federated": {"local_epochs": 2}},
        {"network": {"name": "tests.training.test_federated:dropping", "settings": {}}},
    ],
    ids=["sgd", "adam, two epochs a round", "dropout and BatchNorm"],
)
def test_federated_training_is_a_plain_loop_of_averages(changes: dict[str, Any], tmp_path: Path) -> None:
    train(recipe(**changes), tmp_path / "run")
    found, expected = result(tmp_path / "run"), plain(recipe(**changes))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_client_update_leaves_the_network_and_follows_from_source_and_epoch() -> None:
    run = recipe()
    records = deal_records(run)
    client = member(run, "north", records, Source(KEY))
    before = {name: t.clone() for name, t in client.network.state_dict().items()}
    train_records = client.share.train

    def update(key: bytes, epoch: int) -> dict[str, Tensor]:
        return local_update(client.network, train_records.x, train_records.y, run, source=Source(key), epoch=epoch)

    first = update(KEY, 1)
    assert same(dict(client.network.state_dict()), before)
    assert same(first, update(KEY, 1))
    assert not same(first, update(KEY, 2))
    assert not same(first, update(bytes(32), 1))
    assert same(first, client.round(before, 1).weights)


def test_a_run_folder_has_the_form_of_the_others(trained: Path) -> None:
    summary = RunFolder(trained, recipe()).read_json("summary.json")
    assert [line["epoch"] for line in lines(trained)] == [1, 2, 3]
    assert summary["accuracy"] == lines(trained)[-1]["accuracy"] > 0.3
    assert (summary["rounds"], summary["clients"], summary["privacy"]) == (3, 3, None)
    assert summary["secure_aggregation"] is False
    assert summary["recipe_digest"] == recipe().digest()
    assert summary["records"]["train"] == {"north": 101, "east": 100, "south": 100}
    assert all(line["missing"] == {} and line["clients"] == 3 for line in lines(trained))
    for name in ("recipe.toml", "records.json", "records.sha256"):
        assert (trained / name).is_file()


def test_the_accuracy_of_a_line_is_that_of_the_weights_after_its_round(trained: Path) -> None:
    """What clients tell of the weights that they receive, and in the closing test, against a test of our own."""
    test = deal_records(recipe()).test
    for epochs, line in enumerate(lines(trained), start=1):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        found = plain(recipe(training={"epochs": epochs}))
        network.load_state_dict(dict(zip(network.state_dict(), found.values(), strict=True)))
        right = int((network(test.x).argmax(dim=1) == test.y).sum())
        assert line["accuracy"] == right / len(test)


def test_a_round_costs_two_networks_for_each_client_and_the_end_one_more(trained: Path) -> None:
    summary = RunFolder(trained, recipe()).read_json("summary.json")
    payload = {(flow["direction"], flow["kind"]): flow["payload_bytes"] for flow in summary["wire"]}
    network = 4 * NUMBERS
    assert payload == {
        ("to client", "greeting"): 0,
        ("to server", "greeting"): 0,
        ("to client", "weights"): 3 * 3 * network,
        ("to server", "weights"): 3 * 3 * network,
        ("to client", "test"): 3 * network,
        ("to server", "test"): 0,
    }
    assert summary["parameters"] == NUMBERS
    framing = sum(flow["bytes"] - flow["payload_bytes"] for flow in summary["wire"])
    assert 0 < framing / summary["messages"] < 2000
    assert [sum(part) for part in zip(*summary["bytes_by_client"].values(), strict=True)] == [
        summary["bytes_sent"],
        summary["bytes_received"],
    ]


def test_the_same_recipe_and_key_give_the_same_bits(trained: Path, tmp_path: Path) -> None:
    train(recipe(), tmp_path / "again")
    assert same(result(tmp_path / "again"), result(trained))
    for name in ("one", "other"):
        train(recipe(), tmp_path / name, Source(KEY))
    assert same(result(tmp_path / "one"), result(tmp_path / "other"))
    assert not same(result(tmp_path / "one"), result(trained))


class Stopping(Silence):
    """Somebody presses Ctrl-C as the accuracy of a round comes in: that round and those before are kept."""

    def __init__(self, epoch: int) -> None:
        self.stop_at = epoch

    def epoch(self, line: dict[str, Any]) -> None:
        if line["epoch"] == self.stop_at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_run_that_was_stopped_ends_in_the_same_bits(trained: Path, epoch: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(recipe(), tmp_path / "run", progress=Stopping(epoch))
    train(recipe(), tmp_path / "run", resume=True)
    assert same(result(tmp_path / "run"), result(trained))
    untimed = [[{**line, "seconds": 0} for line in lines(out)] for out in (tmp_path / "run", trained)]
    assert untimed[0] == untimed[1]


def test_a_round_goes_on_without_a_client_that_fails_where_the_recipe_lets_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing(monkeypatch, "east", 2)
    run = recipe(federated={"least_clients": 2})
    train(run, tmp_path / "run")
    assert [line["missing"] for line in lines(tmp_path / "run")] == [
        {}, {"east": "ZeroDivisionError, whose words stay with the client"}, {},
    ]  # fmt: skip
    assert [line["clients"] for line in lines(tmp_path / "run")] == [3, 2, 3]
    found, expected = result(tmp_path / "run"), plain(run, {2: "east"})
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_too_few_clients_end_a_run_that_names_them_and_goes_on_later(
    trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as for_now:
        failing(for_now, "east", 2)
        with pytest.raises(
            LinkError, match=r"round 2: without east .ZeroDivisionError, whose words stay with the client.; 2 of 3"
        ) as e:
            train(recipe(), tmp_path / "run")
    assert "\n" not in str(e.value)
    assert (tmp_path / "run" / "checkpoint" / "0001").is_dir()
    train(recipe(), tmp_path / "run", resume=True)
    assert same(result(tmp_path / "run"), result(trained))


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("hidden1.weight", torch.full((16, 64), float("nan")), "its weights are not finite"),
        ("hidden1.weight", torch.zeros(16, 65), "its weights are another network's"),
        ("more", torch.zeros(1), "its weights are another network's"),
    ],
    ids=["not finite", "another shape", "one more"],
)
def test_weights_that_do_not_fit_are_refused_and_their_client_named(
    key: str, change: Tensor, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weights = plain(recipe(training={"epochs": 1}))
    key = next(iter(weights)) if key.startswith("hidden") else key
    failing(monkeypatch, "south", 1, LocalRound({**weights, key: change}, 1.0, 0.5))
    with pytest.raises(LinkError, match=f"round 1: without south .{words}"):
        train(recipe(), tmp_path / "run")


def test_a_client_that_never_answers_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flower()
    from milkglass.training.flower_simulation import _PushingGrid

    whole, calls = _PushingGrid.send_and_receive, []

    def losing(self: Any, messages: Any, *, timeout: float | None = None) -> Any:
        calls.append(timeout)
        answers = sorted(whole(self, messages, timeout=timeout), key=lambda m: len(str(m.metadata.src_node_id)))
        return answers[1:] if len(calls) == 3 else answers  # the greeting, round 1, round 2

    monkeypatch.setattr(_PushingGrid, "send_and_receive", losing)
    train(recipe(federated={"least_clients": 2, "round_seconds": 45.0}), tmp_path / "run")
    assert [list(line["missing"].values()) for line in lines(tmp_path / "run")] == [[], ["no answer in 45 seconds"], []]
    assert set(calls) == {45.0}


@pytest.mark.parametrize(
    ("rate", "called", "words"),
    [
        (0.2, NAMES, r"learning_rate is 0\.2 here and 0\.1 there"),
        (0.1, ("north", "east", "west"), "a client calls itself 'west': no client of the recipe, or one that is here"),
        (
            0.1,
            ("north", "east", "north"),
            "a client calls itself 'north': no client of the recipe, or one that is here",
        ),
    ],
    ids=["another recipe", "another name", "one name twice"],
)
def test_nobody_trains_before_all_agree_who_they_are_and_on_the_recipe(
    rate: float, called: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    flower()
    from milkglass.training.flower_apps import client_app, server_app
    from milkglass.training.flower_simulation import simulate

    run, theirs = recipe(), recipe(training={"learning_rate": rate})
    records = deal_records(run)
    members = [member(theirs, name, records, rehearsal_source(0, name)) for name in NAMES]
    members = [replace(each, name=name) for each, name in zip(members, called, strict=True)]
    folder = RunFolder.create(tmp_path / "run", run, "")
    rounds = Rounds(run, members[0].network.state_dict(), folder, Silence())
    app = client_app(theirs, lambda context: members[int(context.node_config["partition-id"])])
    with pytest.raises(LinkError, match=words):
        simulate(server_app(rounds), app, len(NAMES))
    assert rounds.lines == []


def test_nothing_leaves_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[object] = []  # counted, for what is raised might be caught on the way

    def refuse(*arguments: Any) -> None:
        calls.append(arguments[1:])
        raise OSError("no way out")

    flower()
    from flwr.supercore import telemetry

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(telemetry, "event", refuse)
    monkeypatch.setattr(telemetry, "create_event", refuse)
    train(recipe(training={"epochs": 1}), tmp_path / "run")
    assert calls == []


def test_flower_is_silent_even_if_somebody_imported_it_before(monkeypatch: pytest.MonkeyPatch) -> None:
    flower()
    from flwr.supercore import telemetry

    monkeypatch.setattr(telemetry, "FLWR_TELEMETRY_ENABLED", "1")
    flower()

    monkeypatch.setattr(urllib.request, "urlopen", lambda *arguments, **settings: pytest.fail(f"{arguments}{settings}"))
    monkeypatch.setattr(telemetry, "_get_source_id", lambda: "")  # it would write into the home folder
    assert telemetry.create_event(telemetry.EventType.PING, None) == "disabled"


def test_without_flower_the_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "flwr"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'milkglass\[federated\]'"):
        train(recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_clients_with_differential_privacy_say_what_they_spend(tmp_path: Path) -> None:
    run = recipe(training={"epochs": 2}, dp={"epsilon": 8.0, "delta": 1e-3, "accountant": "rdp"})
    summary = train(run, tmp_path / "run")
    assert list(summary["privacy"]) == list(NAMES)
    for name in NAMES:
        spent = summary["privacy"][name]
        assert spent["epsilon"] <= 8.0
        assert spent["steps"] == 2 * (summary["records"]["train"][name] // 16)
        assert "in all rounds together" in spent["words"]
    train(run, tmp_path / "again")
    assert same(result(tmp_path / "run"), result(tmp_path / "again"))


def test_noise_that_hides_records_is_new_for_other_weights() -> None:
    """Else who asks twice, from other weights, takes it out by a subtraction."""
    run = recipe(training={"epochs": 1}, dp={"epsilon": 1.0, "delta": 1e-3, "accountant": "rdp"})
    client = member(run, "north", deal_records(run), Source(KEY))
    weights = client.network.state_dict()
    nudged = {name: tensor + 1e-6 for name, tensor in weights.items()}
    once, again, other = (client.round(start, 1).weights for start in (weights, weights, nudged))
    name = next(iter(weights))
    torch.testing.assert_close(once[name], again[name], rtol=0, atol=0)
    apart = ((once[name] - weights[name]) - (other[name] - nudged[name])).std()
    assert apart > 0.5 * (once[name] - weights[name]).std()
