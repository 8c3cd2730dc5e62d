"""Split training whose client takes DP-SGD steps: what it computes, what crosses, what it says of itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import milkglass.training.setup
from milkglass.client import StepResult
from milkglass.errors import CutError, RecipeError
from milkglass.private.dp import SPLIT_COVERS, Mechanism
from milkglass.private.private_optimizer import PrivateOptimizer
from milkglass.randomness import Source
from milkglass.recipe import Recipe
from milkglass.replay import replay
from milkglass.runs import RunFolder
from milkglass.training.split import Setup, play_epoch, set_up, train
from milkglass.transcript import Crossing
from milkglass.transports.wrappers import RecordingTransport
from tests.helpers import KEY, Stop
from tests.training.whole import BATCH_NORM, DROPOUTS, U_SHAPED, parties, recipe_of, training

DP: dict[str, Any] = {"epsilon": 8.0, "accountant": "rdp"}
WAYS: dict[str, dict[str, Any]] = {
    "U-shaped": DROPOUTS | {"cut": {"at": "drop1", "back_at": "drop2"}},
    "relay": {"parties": parties("relay", ["ann", "ben"])},
    "splitfed2": {"parties": parties("splitfed2", ["ann", "ben"])},
}


def _recipe(**tables: Any) -> Recipe:
    return recipe_of(**{"dp": DP, "training": training(batch_size=16), **tables})


def _noiseless(monkeypatch: pytest.MonkeyPatch) -> None:
    """DP-SGD without noise, whose clip touches nothing: Poisson batches and their scale are all that is left."""

    def mechanism(_: object, records: int, batch_size: int, epochs: int) -> Mechanism:
        steps = epochs * (records // batch_size)
        return Mechanism(1.0, 1e-5, 1e9, 0.0, batch_size / records, steps, "rdp", batch_size)

    monkeypatch.setattr(milkglass.training.setup, "mechanism_of", mechanism)


def _tensors(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in run.glob("*.safetensors")}


def _recorded(setup: Setup) -> list[Crossing]:
    return list(cast(RecordingTransport, setup.transport).transcript)


def _client_weights(setup: Setup) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in setup.client.weights().values()])


@pytest.mark.parametrize("cut", [{}, U_SHAPED], ids=["vanilla", "U-shaped"])
def test_without_noise_it_equals_an_unsplit_loop_over_the_same_poisson_batches(
    monkeypatch: pytest.MonkeyPatch, cut: dict[str, Any]
) -> None:
    _noiseless(monkeypatch)
    recipe = _recipe(**cut, training=training(batch_size=16, optimizer="sgd", momentum=0.9, learning_rate=0.1))
    setup, twin = (set_up(recipe, Source(KEY)) for _ in range(2))
    stages = [part for part in (twin.client.stage, twin.server.stage, twin.client.head) if part is not None]
    own = [stage for stage in stages if stage is not twin.server.stage]
    optimizers = [torch.optim.SGD(stage.parameters(), lr=0.1, momentum=0.9) for stage in stages]
    records = twin.seats[0].share.train
    sizes = set()
    for epoch in (1, 2):
        play_epoch(setup, epoch, test=False)
        for rows in twin.seats[0].batches(epoch):
            sizes.add(len(rows))
            out = records.x[rows]
            for stage in stages:
                out = stage.train()(out)
            for optimizer in optimizers:
                optimizer.zero_grad()
            F.cross_entropy(out, records.y[rows]).backward()  # type: ignore[no-untyped-call]
            for stage in own:  # the client divides by the batch that was expected
                for parameter in stage.parameters():
                    cast(Tensor, parameter.grad).mul_(len(rows) / 16)
            for optimizer in optimizers:
                optimizer.step()
    assert len(sizes) > 3
    for party, other in ((setup.client, twin.client), (setup.server, twin.server)):
        for name, tensor in party.weights().items():
            assert torch.allclose(tensor, other.weights()[name], atol=1e-5), name


def test_an_empty_batch_crosses_as_zeros_and_teaches_the_client_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _noiseless(monkeypatch)
    data = {"name": "digits", "train_records": 24, "test_records": 40, "test_share": 0.1}
    recipe = _recipe(data=data, training=training(batch_size=1, optimizer="sgd", momentum=0.0))
    setup = set_up(recipe, Source(KEY), wrap=RecordingTransport)
    seat = setup.seats[0]
    batches = seat.batches(1)
    empty = [step for step, rows in enumerate(batches) if not len(rows)]
    assert 1 < len(empty) < len(batches) - 1
    (result,) = play_epoch(setup, 1, test=False)
    sent = [c.message.tensors for c in _recorded(setup) if c.direction == "to server"]
    assert len(sent) == len(batches) == 24
    assert [len(tensors["labels"]) for tensors in sent] == [max(1, len(rows)) for rows in batches]
    assert result.seen == sum(map(len, batches))
    before, server = _client_weights(setup), setup.server.weights()
    server = {name: tensor.clone() for name, tensor in server.items()}
    x, y_B = seat.share.train.x[:0], seat.share.train.y[:0]
    told = setup.client.step(x, y_B, torch.zeros(0, dtype=torch.int64))
    assert isinstance(told, StepResult)
    assert torch.equal(before, _client_weights(setup))
    assert any(not torch.equal(tensor, server[name]) for name, tensor in setup.server.weights().items())


def test_an_empty_batch_still_takes_a_noise_step() -> None:
    setup = set_up(_recipe(training=training(batch_size=16, optimizer="sgd", momentum=0.0)), Source(KEY))
    part, optimizer = setup.seats[0].share.train, setup.client.optimizer
    assert isinstance(optimizer, PrivateOptimizer)
    before = _client_weights(setup)
    setup.client.step(part.x[:0], part.y[:0])
    mechanism = optimizer.mechanism
    moved = (_client_weights(setup) - before) / 1e-2
    assert float(moved.std()) == pytest.approx(mechanism.noise_multiplier * mechanism.clip / 16, rel=0.1)
    assert (optimizer.block, setup.client.steps) == (1, 1)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_says_what_it_spent_and_resumed_ends_in_the_same_bits(tmp_path: Path, way: str) -> None:
    recipe = _recipe(**WAYS[way])
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    summary = train(recipe, whole, Source(KEY))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, stopped, Source(KEY), resume=True, progress=Stop(2, 2))
    train(recipe, stopped, Source(KEY), resume=True)
    assert _tensors(stopped) == _tensors(whole)
    told = json.loads((whole / "summary.json").read_text())["privacy"]
    assert told == summary["privacy"]
    assert set(told) == set(recipe.parties.clients)
    for name, spent in told.items():
        records = summary["records"]["train"][name]
        assert 7.5 < spent["epsilon"] <= 8.0
        assert (spent["sampling_rate"], spent["steps"]) == (16 / records, 2 * (records // 16))
        assert spent["words"].endswith(SPLIT_COVERS)
        assert "NOT cover the activations" in spent["words"]


def test_a_run_without_dp_says_none(tmp_path: Path) -> None:
    assert train(recipe_of(training=training(epochs=1)), tmp_path / "run")["privacy"] is None


def test_only_the_key_decides_batches_and_noise() -> None:
    """What another client, or whoever is given the weights, does not know, though it has the recipe and the seed."""

    def trained(source: Source | None) -> tuple[list[Tensor], Tensor]:
        setup = set_up(_recipe(), source)
        batches = setup.seats[0].batches(1)
        play_epoch(setup, 1, test=False)
        return batches, _client_weights(setup)

    (batches, weights), (again, same), (other, others) = (
        trained(source) for source in (Source(KEY), Source(KEY), None)
    )
    assert all(torch.equal(*pair) for pair in zip(batches, again, strict=True))
    assert torch.equal(weights, same)
    assert not all(torch.equal(*pair) for pair in zip(batches, other, strict=True))
    assert not torch.equal(weights, others)


def test_a_channel_is_not_fitted_to_records_that_no_noise_covers() -> None:
    channel = {"channel": {"width": 4}}
    first = set_up(_recipe(defense=channel), Source(KEY))
    moved = replace(first.records.train["client"], x=first.records.train["client"].x * 0.5)
    records = replace(first.records, train={"client": moved})
    second = set_up(_recipe(defense=channel), Source(KEY), records=records)
    assert torch.equal(_client_weights(first), _client_weights(second))
    plain = [set_up(recipe_of(defense=channel), Source(KEY), records=each) for each in (first.records, records)]
    assert not torch.equal(*map(_client_weights, plain))  # so the law above could fail
    play_epoch(first, 1)


@pytest.mark.parametrize(
    "tables",
    [BATCH_NORM, BATCH_NORM | {"cut": {"at": "first"}}, BATCH_NORM | {"cut": {"at": "flatten"}}],
    ids=["client's", "server's", "nothing to learn"],
)
def test_what_couples_records_is_refused_before_anything_is_sent(tables: dict[str, Any]) -> None:
    wrong = RecipeError if tables["cut"]["at"] == "flatten" else CutError
    words = "no weight of the client's part learns" if wrong is RecipeError else r"BatchNorm .* use nn\.GroupNorm"
    with pytest.raises(wrong, match=f"^dp: {words}"):
        set_up(_recipe(**tables))


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"defense": {"nopeek": {"weight": 1.0}}}, r"dp does not go with defense\.nopeek: its penalty couples"),
        ({"defense": {"adversary": {"weight": 1.0}}}, r"dp does not go with defense\.adversary"),
        ({"defense": {"entropy": {"weight": 1.0}, "noise": {"sigma": 0.1}}}, r"dp does not go with defense\.entropy"),
        ({"defense": {"learned_noise": {"start": 0.1}}}, r"dp does not go with defense\.learned_noise"),
        ({"defense": {"channel": {"projection": "pca"}}}, r"projection pca: fixed directions are fitted to records"),
        ({"defense": {"channel": {"projection": "random"}}}, r"projection random: .* expected linear, mlp or conv"),
        ({"training": training(micro_batches=2)}, r"of no certain size; it does not go with training\.micro_batches"),
        ({"training": training(drop_last_batch=False)}, r"training\.drop_last_batch = false"),
        ({"guard": {"hijack": {}}}, r"guard\.hijack, whose false batches"),
        ({"parties": parties("vertical", ["ann", "ben"])}, r"without hops; it is vertical"),
        ({"dp": DP | {"epsilon": 1000.0}}, r"dp\.epsilon"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_proof_does_not_cover_is_refused_with_the_reason(tables: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        _recipe(**tables)


def test_the_reference_of_a_private_run_has_no_privacy() -> None:
    """Else an audit would measure what a server is entitled to by a network that noise has blunted."""
    assert _recipe().undefended().dp is None
    assert _recipe().undefended().digest() == recipe_of(training=training(batch_size=16)).digest()


def test_a_training_with_empty_batches_can_be_replayed_and_attacked(tmp_path: Path) -> None:
    """What the server saw of a record is there wherever the record was drawn; an empty batch shows nothing."""
    data = {"name": "digits", "train_records": 24, "test_records": 40, "test_share": 0.1}
    recipe = _recipe(data=data, training=training(batch_size=1))
    assert any(not len(rows) for rows in set_up(recipe).seats[0].batches(1))
    train(recipe, tmp_path / "run")
    train(recipe.undefended(), tmp_path / "reference")
    runs = (RunFolder.open_finished(tmp_path / name) for name in ("run", "reference"))
    trials = replay(*runs, repeated=False, trained_on=True).trials
    assert {trial.view.exposure for trial in trials} == {"fresh", "trained-on"}
    assert all(bool(torch.isfinite(trial.view.target.activations).all()) for trial in trials)
