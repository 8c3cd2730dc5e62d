"""What crosses in split training, what it follows from, and that a run stopped and resumed ends in the same bits."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from milkglass.cli import main
from milkglass.client import StepResult
from milkglass.errors import CutError, DataError, EgressError, HijackError, MilkglassError, RunError
from milkglass.messages import Message
from milkglass.randomness import Source, public_source, rehearsal_source
from milkglass.recipe import Recipe
from milkglass.runs import RunFolder
from milkglass.server import Server
from milkglass.training.shares import deal_records
from milkglass.training.split import (
    Setup,
    Silence,
    digest_of,
    evaluate_on_test,
    set_up,
    train,
    train_epoch,
)
from milkglass.transcript import Crossing, Transcript
from milkglass.transports.base import Transport
from milkglass.transports.wrappers import RecordingTransport
from tests.helpers import KEY, small_recipe

DEFENDED = {"nopeek": {"weight": 1.0}, "noise": {"sigma": 0.5}}


def _recorded(recipe: Recipe, source: Source | None = None) -> tuple[Setup, Transcript]:
    setup = set_up(recipe, source, wrap=RecordingTransport)
    return setup, cast(RecordingTransport, setup.transport).transcript


def _run_epoch(setup: Setup, epoch: int) -> None:
    train_epoch(setup, epoch)
    evaluate_on_test(setup, epoch)


# -- what crosses


def test_the_transcript_holds_exactly_what_was_agreed() -> None:
    setup, transcript = _recorded(small_recipe(defense=DEFENDED))
    _run_epoch(setup, 1)
    assert transcript.kinds() == [("to server", "activations"), ("to client", "gradients")] * 3 + [
        ("to server", "queries"),
        ("to client", "predictions"),
    ]
    expected = {
        "activations": {"activations", "labels"},
        "gradients": {"gradient", "loss", "right"},
        "queries": {"activations"},
        "predictions": {"logits"},
    }
    for crossing in transcript:
        assert set(crossing.message.tensors) == expected[crossing.message.kind]
    sent = sum(crossing.wire_bytes for crossing in transcript if crossing.direction == "to server")
    assert sent == setup.transport.traffic.wire_bytes("to server")
    assert setup.transport.traffic.messages == len(transcript)


def test_no_sent_tensor_holds_a_record() -> None:
    setup, transcript = _recorded(small_recipe())
    _run_epoch(setup, 1)
    raw = torch.cat([setup.records.train["client"].x, setup.records.test.x]).flatten(1)
    for crossing in transcript:
        for tensor in crossing.message.tensors.values():
            if tensor.dim() == 2 and tensor.shape[1] == raw.shape[1]:
                assert not (tensor[:, None] == raw[None]).all(dim=2).any()


def test_a_stage_that_only_reshapes_is_refused_before_anything_leaves() -> None:
    setup, transcript = _recorded(small_recipe(cut={"at": "flatten"}))
    with pytest.raises(EgressError, match="a record as it is"):
        train_epoch(setup, 1)
    assert len(transcript) == 0


# -- every activation follows from checkpoint and private key; nothing else was sent


class _Replayed(Transport):
    """Answers from a transcript, and fails if a client sends anything but what the transcript says it sent."""

    def __init__(self, transcript: list[Crossing]) -> None:
        super().__init__()
        self._left = list(transcript)
        self._answers: list[Message] = []

    def send(self, message: Message) -> None:
        said = self._left.pop(0).message
        assert (said.kind, said.party, said.step) == (message.kind, message.party, message.step)
        assert said.tensors.keys() == message.tensors.keys()
        for name, tensor in said.tensors.items():
            assert torch.equal(tensor, message.tensors[name]), f"{name} of step {message.step} does not follow"
        self._answers.append(self._left.pop(0).message)

    def receive(self) -> Message:
        return self._answers.pop(0)

    def assert_all_used(self) -> None:
        assert not self._left, "the transcript holds more messages than the client's stage and key explain"


def _assert_explained(
    transcript: list[Crossing], recipe: Recipe, source: Source, checkpoint: dict[str, Tensor]
) -> None:
    setup = set_up(recipe, source)
    replayed = _Replayed(transcript)
    setup.client.transport = replayed
    setup.client.load_state(checkpoint)
    _run_epoch(setup, 2)
    replayed.assert_all_used()


def test_every_activation_follows_from_checkpoint_and_key() -> None:
    recipe, source = small_recipe(defense=DEFENDED, training={"epochs": 2, "batch_size": 32}), Source(KEY)
    setup, transcript = _recorded(recipe, source)
    _run_epoch(setup, 1)
    checkpoint, before = {k: v.clone() for k, v in setup.client.state().items()}, len(transcript)
    _run_epoch(setup, 2)
    epoch = list(transcript)[before:]
    _assert_explained(epoch, recipe, source, checkpoint)

    with pytest.raises(AssertionError, match="more messages"):
        _assert_explained([*epoch, *epoch[:2]], recipe, source, checkpoint)
    changed = epoch[2].message.tensors["activations"].clone()
    changed[0, 0] += 1e-3
    tensors = dict(epoch[2].message.tensors) | {"activations": changed}
    forged = [*epoch[:2], replace(epoch[2], message=replace(epoch[2].message, tensors=tensors)), *epoch[3:]]
    with pytest.raises(AssertionError, match="does not follow"):
        _assert_explained(forged, recipe, source, checkpoint)
    with pytest.raises(RunError, match="another private key"):
        _assert_explained(epoch, recipe, Source(b"x" * 32), checkpoint)


# -- the server, with recipe and seed, against a client with a key


def test_a_server_with_recipe_and_seed_predicts_neither_noise_nor_weights() -> None:
    recipe = small_recipe(defense={"noise": {"sigma": 0.5}})
    secret, _ = _recorded(recipe, Source(KEY))
    z = torch.rand(64, 16, generator=torch.Generator().manual_seed(0))
    noise = secret.client.noise.gaussian_like(z, "noise")
    guesses = [
        public_source(recipe.seed),
        rehearsal_source(recipe.seed, "client"),
        rehearsal_source(recipe.seed, recipe.parties.server),
        public_source(recipe.seed).derive("audit"),
    ]
    for guess in guesses:
        played = set_up(recipe, guess)
        guessed = played.client.noise.gaussian_like(z, "noise")
        assert not (guessed == noise).any()
        assert abs(torch.corrcoef(torch.stack([guessed.flatten(), noise.flatten()]))[0, 1]) < 0.1
        for name, weights in played.client.stage.state_dict().items():
            assert not (weights == secret.client.stage.state_dict()[name]).any()
        orders = [torch.randperm(96, generator=each.client.source.generator("order", 1)) for each in (played, secret)]
        assert not torch.equal(*orders)
    # what is public is the same for all: the deal and the server's weights; and the rehearsal is predictable
    open_run, again = set_up(recipe), set_up(recipe, rehearsal_source(recipe.seed, "client"))
    assert torch.equal(open_run.records.train["client"].x, secret.records.train["client"].x)
    for name, weights in open_run.server.stage.state_dict().items():
        assert torch.equal(weights, secret.server.stage.state_dict()[name])
    assert torch.equal(*(each.client.noise.gaussian_like(z, "noise") for each in (open_run, again)))


def test_the_key_is_nowhere_in_the_run_folder_or_on_the_wire(tmp_path: Path) -> None:
    train(small_recipe(defense=DEFENDED), tmp_path / "run", Source(KEY))
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert KEY not in content
            assert KEY.hex().encode() not in content


# -- stopped and resumed


class _Stop(Silence):
    """Stops a training from outside, as a signal would."""

    def __init__(self, when: Callable[[int, int], bool]) -> None:
        self._when = when

    def batch(self, epoch: int, step: int, steps: int, result: StepResult) -> None:
        if self._when(epoch, step):
            raise KeyboardInterrupt


def _files(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("bottom.safetensors", "top.safetensors")}


def _without_seconds(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith("seconds")}


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [_without_seconds(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resume_ends_in_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    recipe = small_recipe(
        network={"name": "tests.training.test_split:with_dropout"},
        cut={"at": "drop"},
        defense=DEFENDED,
        training={"epochs": 4, "batch_size": 32, "optimizer": optimizer, "learning_rate": 1e-2},
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    summary = train(recipe, whole, Source(KEY))
    for when in (lambda epoch, step: (epoch, step) == (1, 2), lambda epoch, step: (epoch, step) == (3, 1)):
        with pytest.raises(KeyboardInterrupt):
            train(recipe, stopped, Source(KEY), resume=True, progress=_Stop(when))
    assert len(_metrics(stopped)) == 2
    resumed = train(recipe, stopped, Source(KEY), resume=True)
    assert _files(stopped) == _files(whole)
    assert _metrics(stopped) == _metrics(whole)
    assert _without_seconds(resumed) == _without_seconds(summary)
    assert train(recipe, stopped, Source(KEY), resume=True) == resumed  # already finished: nothing to do


def with_dropout(record_shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    """A factory of a user's own, with dropout on both sides of the cut."""
    layers = {
        "flatten": torch.nn.Flatten(),
        "first": torch.nn.Linear(torch.Size(record_shape).numel(), 12),
        "drop": torch.nn.Dropout(0.2),
        "act": torch.nn.ReLU(),
        "drop2": torch.nn.Dropout(0.2),
        "last": torch.nn.Linear(12, classes),
    }
    model = torch.nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def tied(record_shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    """A factory whose first and third layer are one."""
    model = with_dropout(record_shape, classes)
    square = torch.nn.Linear(12, 12)
    layers = [*[*model.children()][:2], square, torch.nn.ReLU(), square, torch.nn.Linear(12, classes)]
    names = ("flatten", "first", "one", "act", "same", "last")
    return torch.nn.Sequential(OrderedDict(zip(names, layers, strict=True)))


def normed(record_shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    """A factory with BatchNorm in the client's stage."""
    layers = [*with_dropout(record_shape, classes).children()]
    named = {"flatten": layers[0], "first": layers[1], "norm": torch.nn.BatchNorm1d(12), "last": layers[-1]}
    return torch.nn.Sequential(OrderedDict(named))


def test_weights_shared_across_the_cut_are_refused_and_batchnorm_is_told(tmp_path: Path) -> None:
    recipe = small_recipe(network={"name": "tests.training.test_split:tied"}, cut={"at": "one"})
    with pytest.raises(CutError, match=r"one.*|same"):
        train(recipe, tmp_path / "tied")
    recipe = small_recipe(network={"name": "tests.training.test_split:normed"}, cut={"at": "norm"})
    summary = train(recipe, tmp_path / "normed")
    assert any("norm: BatchNorm in the client's stage" in caution for caution in summary["cautions"])


def seeded(record_shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    """A factory that seeds torch itself, against its user's interest."""
    torch.manual_seed(0)
    return with_dropout(record_shape, classes)


def test_weights_that_no_key_changes_are_told() -> None:
    for function, told in (("seeded", True), ("with_dropout", False)):
        recipe = small_recipe(network={"name": f"tests.training.test_split:{function}"}, cut={"at": "act"})
        setup = set_up(recipe, Source(KEY))
        assert any("same first weights under every key" in caution.reason for caution in setup.cautions) == told


def test_one_record_left_over_under_batchnorm(tmp_path: Path) -> None:
    recipe = small_recipe(
        network={"name": "tests.training.test_split:normed"},
        cut={"at": "norm"},
        training={"epochs": 1, "batch_size": 19, "drop_last_batch": False},  # 96 = 5 x 19 + 1
    )
    with pytest.raises(DataError, match="the last batch has one record, and BatchNorm"):
        train(recipe, tmp_path / "run")


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), tmp_path / "run", progress=_Stop(lambda epoch, _: epoch == 2))
    checkpoint = tmp_path / "run" / "checkpoint" / "0001"
    whole = (checkpoint / "progress.json").read_text()
    (checkpoint / "progress.json").write_text("{}")
    with pytest.raises(RunError, match="damaged or half-written"):
        train(small_recipe(), tmp_path / "run", resume=True)
    (checkpoint / "progress.json").write_text(whole)
    (checkpoint / "client.safetensors").unlink()
    with pytest.raises(RunError, match="damaged or half-written"):
        train(small_recipe(), tmp_path / "run", resume=True)


def test_resume_with_other_records_is_refused(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        rng = np.random.default_rng(seed)
        np.savez(tmp_path / f"{name}.npz", images=rng.random((300, 4, 4)), labels=np.arange(300) % 3)
    recipes = [small_recipe(data={"path": str(tmp_path / f"{name}.npz"), "train_records": 96}) for name in "ab"]
    with pytest.raises(KeyboardInterrupt):
        train(recipes[0], tmp_path / "run", progress=_Stop(lambda epoch, _: epoch == 2))
    with pytest.raises(RunError, match="the records are not those that the run began with"):
        train(recipes[1], tmp_path / "run", resume=True)


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    class Intruder(Silence):
        def batch(self, epoch: int, step: int, steps: int, result: StepResult) -> None:
            with pytest.raises(RunError, match="another process is training in it"):
                train(small_recipe(), tmp_path / "run", resume=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), tmp_path / "run", progress=Intruder())


def test_resume_under_another_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), tmp_path / "run", Source(KEY), progress=_Stop(lambda epoch, _: epoch == 2))
    with pytest.raises(RunError, match="another private key"):
        train(small_recipe(), tmp_path / "run", resume=True)


def test_summary_has_what_the_design_promises(tmp_path: Path) -> None:
    summary = train(small_recipe(), tmp_path / "run")
    assert summary == RunFolder.open_finished(tmp_path / "run").read_json("summary.json")
    assert {"squared_unbiased", "biased", "n", "permutation_floor"} == set(summary["distance_correlation"])
    flows = summary["wire"]
    assert summary["bytes_sent"] == sum(flow["bytes"] for flow in flows if flow["direction"] == "to server")
    assert summary["bytes_received"] == sum(flow["bytes"] for flow in flows if flow["direction"] == "to client")
    assert summary["messages"] == sum(flow["messages"] for flow in flows) == 2 * (2 * 3 + 2)
    assert summary["client_flops_per_sample"] == 2 * 2 * 64 * 16  # forward, and the weights' gradient: 2 m n each
    assert summary["keys"] == "keys derived from the seed: a rehearsal"
    assert summary["seed"] == 0
    assert summary["seconds"] >= summary["seconds_per_epoch"] > 0
    assert 0 < summary["accuracy"] <= 1
    # a batch of 32 activations of width 16 with their labels, and frames of some 100 bytes
    activations = next(flow for flow in flows if flow["kind"] == "activations")
    assert activations["messages"] == 6
    assert 0 < activations["bytes"] / 6 - 32 * (16 * 4 + 8) < 256


# -- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cut": {"at": "hiden1"}}, "hidden1"),
        ({"cut": {"at": "classifier"}}, "classifier"),
        ({"cut": {"at": "flatten"}}, "holds a record as it is"),
        ({"network": {"name": "cn"}}, "'cnn'"),
        ({"network": {"name": "mlp", "settings": {"hiddn": [3]}}}, "'hidden'"),
        ({"data": {"name": "digit"}}, "digits"),
        ({"data": {"name": "digits", "train_records": 20}}, "make no batch of 32"),
        ({"attacker": {"auxiliary_share": 0.8, "validation_share": 0.1}}, "records"),
    ],
)
def test_what_cannot_run_leaves_no_trace(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(MilkglassError) as caught:
        train(small_recipe(**changes), tmp_path / "run")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_short_last_batch_under_a_penalty(tmp_path: Path) -> None:
    training = {"epochs": 1, "batch_size": 31, "drop_last_batch": False}  # 96 = 3 x 31 + 3
    with pytest.raises(DataError, match="the last batch has 3 records; NoPeek's penalty needs at least 4"):
        train(small_recipe(training=training, defense=DEFENDED), tmp_path / "run")
    summary = train(small_recipe(training=training), tmp_path / "undefended")
    assert next(flow for flow in summary["wire"] if flow["kind"] == "activations")["messages"] == 4


def test_diverged_training_says_so(tmp_path: Path) -> None:
    training = {"epochs": 3, "batch_size": 32, "optimizer": "sgd", "learning_rate": 1e30}
    with pytest.raises(MilkglassError, match="diverged"):
        train(small_recipe(training=training), tmp_path / "run")


# -- the guard against a hijacking server

GUARDED: dict[str, Any] = {"guard": {"hijack": {"fake_share": 0.25, "warm_up": 3}}}
LONGER: dict[str, Any] = {"training": {"epochs": 6, "batch_size": 32, "learning_rate": 1e-2}}


def test_a_guarded_run_resumes_in_the_same_bits_and_an_unguarded_one_is_as_ever(tmp_path: Path) -> None:
    guarded, plain = small_recipe(**LONGER, **GUARDED), small_recipe(**LONGER)
    train(guarded, tmp_path / "whole", Source(KEY))
    with pytest.raises(KeyboardInterrupt):
        train(guarded, tmp_path / "run", Source(KEY), progress=_Stop(lambda epoch, step: (epoch, step) == (5, 2)))
    train(guarded, tmp_path / "run", Source(KEY), resume=True)
    assert _files(tmp_path / "run") == _files(tmp_path / "whole")
    assert _metrics(tmp_path / "run") == _metrics(tmp_path / "whole")
    train(plain, tmp_path / "plain", Source(KEY))
    assert _files(tmp_path / "plain") != _files(tmp_path / "whole")
    # the guard is the client's own: a server is not told, a reference has none, a run may go on with or without it
    assert guarded.digest() == plain.digest()
    assert guarded.undefended() == plain
    with pytest.raises(KeyboardInterrupt):
        train(plain, tmp_path / "then", Source(KEY), progress=_Stop(lambda epoch, step: (epoch, step) == (3, 1)))
    train(guarded, tmp_path / "then", Source(KEY), resume=True)


def test_mislabeled_batches_count_neither_as_loss_nor_as_accuracy() -> None:
    setup = set_up(small_recipe(**LONGER, **GUARDED))
    seen: list[StepResult] = []

    class Watch(Silence):
        def batch(self, epoch: int, step: int, steps: int, result: StepResult) -> None:
            seen.append(result)

    for epoch in range(1, 7):
        seen.clear()
        loss, accuracy = train_epoch(setup, epoch, Watch())
        honest = [result for result in seen if not result.mislabeled]
        assert loss == pytest.approx(sum(result.loss for result in honest) / len(honest))
        assert accuracy == pytest.approx(sum(result.accuracy for result in honest) / len(honest))
    assert len(honest) < len(seen), "the last epoch had a mislabeled one"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"epochs": 9, "batch_size": 96}}, "guard.hijack needs at least 2 batches an epoch"),
        ({"training": {"epochs": 4, "batch_size": 32}}, "judges the server after 15 batches, and 4 epochs have 12"),
    ],
)
def test_a_guard_that_could_not_judge_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        train(small_recipe(**changes, **GUARDED), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class _Hijacker:
    """In the server's place: an honest one's words, and gradients that do not depend on the labels."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._server = Server(*arguments, **named)
        self.name, self.stage = self._server.name, self._server.stage
        self.state, self.load_state = self._server.state, self._server.load_state
        self.resting = True

    def reply(self, message: Message) -> Message:
        answer = self._server.reply(message)
        if message.kind != "activations":
            return answer
        return replace(answer, tensors={**answer.tensors, "gradient": message.tensors["activations"] / 32})


def test_a_hijacked_run_stops_with_one_line_and_keeps_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("milkglass.training.setup.Server", _Hijacker)
    recipe, run = small_recipe(**LONGER, **GUARDED), tmp_path / "run"
    with pytest.raises(HijackError, match=r"step 1\d: .* hardly depend on the labels"):
        train(recipe, run)
    kept = [path.name for path in (run / "checkpoint").iterdir()]
    assert len(kept) == 1
    assert set(kept) <= {"0003", "0004"}, "the last whole epoch before the alarm"
    assert not (run / "summary.json").exists()

    with pytest.raises(HijackError, match=r"alarm.txt must be removed to go on: step 1\d: .* hardly depend"):
        train(recipe, run, resume=True)
    (run / "alarm.txt").unlink()
    with pytest.raises(HijackError, match=r"^step 1\d: "):  # on from the checkpoint, and judged anew
        train(recipe, run, resume=True)

    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "other")])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("milkglass: step 1")
    assert "Traceback" not in "".join(lines)


# -- sensitive columns


def test_sensitive_columns_are_part_of_what_the_records_hash_to(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    features, labels, drawn = draw.normal(size=(200, 5)), np.arange(200) % 2, draw.integers(0, 2, 200)
    digests = []
    for name, sex in (("a.npz", drawn), ("b.npz", 1 - drawn)):
        np.savez(tmp_path / name, features=features, labels=labels, sex=sex)
        for data in ({"path": str(tmp_path / name), "sensitive": ["sex"]}, {"path": str(tmp_path / name)}):
            records = deal_records(small_recipe(data=data))
            assert set(records.auxiliary.attributes) == set(data.get("sensitive", ()))
            digests.append(digest_of(records))
    assert digests[1] == digests[3], "nobody named it"
    assert len(set(digests)) == 3
