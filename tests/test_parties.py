"""Client and server, message by message, also with a server that does not keep to the protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from milkglass.client import Client, Guards
from milkglass.defenses.noise import Noise
from milkglass.errors import DataError, HijackError, MessageError, MilkglassError
from milkglass.hijack import HijackGuard
from milkglass.messages import Kind, Message
from milkglass.randomness import Source, drawing_from, public_source
from milkglass.server import Server
from milkglass.transports.local import LocalTransport
from milkglass.transports.wrappers import RecordingTransport
from tests.helpers import KEY

X = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def _stages() -> tuple[nn.Linear, nn.Linear]:
    generator = public_source(0).generator("w")
    bottom, top = nn.Linear(4, 3), nn.Linear(3, 3)
    for parameter in [*bottom.parameters(), *top.parameters()]:
        nn.init.normal_(parameter, generator=generator)
    return bottom, top


def _sgd(stage: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(stage.parameters(), lr=0.1)


class _Answering:
    """A server that answers as the test says."""

    def __init__(self, kind: Kind, tensors: Mapping[str, Tensor], step: int = 0) -> None:
        self._answer = Message(kind, "server", step, tensors)

    def reply(self, message: Message) -> Message:
        return self._answer


GOOD = {"gradient": torch.zeros(6, 3), "loss": torch.tensor(1.0), "right": torch.tensor(3)}


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("predictions", {}, "expected 'gradients', the server sent 'predictions'"),
        ("gradients", {"step": 4}, "of step 4"),
        ("gradients", {"gradient": None}, "expected a gradient of shape"),
        ("gradients", {"gradient": torch.zeros(6, 4)}, "gradient float32 6x4"),
        ("gradients", {"gradient": torch.zeros(6, 3).double()}, "gradient float64 6x3"),
        ("gradients", {"gradient": torch.full((6, 3), torch.nan)}, "a gradient that is not finite"),
        ("gradients", {"loss": None}, "expected a number 'loss'"),
        ("gradients", {"right": torch.zeros(2)}, "expected a number 'right'"),
        ("gradients", {"right": torch.tensor(7)}, "says that 7 of 6 records were right"),
        ("gradients", {"right": torch.tensor(torch.nan)}, "says that nan of 6"),
        ("gradients", {"gradient": torch.full((6, 3), 1e38)}, "far too large"),
    ],
)
def test_a_client_checks_every_answer(kind: Kind, changes: dict[str, Any], words: str) -> None:
    tensors = {name: tensor for name, tensor in (GOOD | changes).items() if isinstance(tensor, Tensor)}
    bottom, _ = _stages()
    before = bottom.weight.clone()
    client = Client(bottom, _sgd(bottom), LocalTransport(_Answering(kind, tensors, changes.get("step", 0))))
    with pytest.raises(MessageError, match=words):
        client.step(X, Y)
    assert torch.equal(bottom.weight, before)


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    bottom, _ = _stages()
    before = bottom.weight.clone()
    answer = _Answering("gradients", GOOD | {"loss": torch.tensor(float("nan"))})
    with pytest.raises(MilkglassError, match="the loss is nan; training has diverged"):
        Client(bottom, _sgd(bottom), LocalTransport(answer)).step(X, Y)
    assert torch.equal(bottom.weight, before)


def test_predictions_are_checked() -> None:
    bottom, _ = _stages()
    for tensors, words in (
        ({}, "expected logits of 6 records"),
        ({"logits": torch.zeros(5, 3)}, "expected logits of 6 records"),
        ({"logits": torch.zeros(6)}, "expected logits of 6 records"),
        ({"logits": torch.zeros(6, 0)}, "expected logits of 6 records"),
        ({"logits": torch.zeros(6, 3, dtype=torch.int64)}, "expected logits of 6 records"),
        ({"logits": torch.full((6, 3), torch.nan)}, "not finite numbers"),
    ):
        with pytest.raises(MessageError, match=words):
            Client(bottom, _sgd(bottom), LocalTransport(_Answering("predictions", tensors))).predict(X)


@pytest.mark.parametrize(
    ("kind", "tensors", "words"),
    [
        ("activations", {}, "expected activations"),
        ("activations", {"activations": torch.zeros(6, 3)}, "expected an int64 label for each of 6"),
        ("activations", {"activations": torch.zeros(6, 3), "labels": Y[:2]}, "expected an int64 label for each of 6"),
        ("activations", {"activations": torch.zeros(6, 3), "labels": Y.float()}, "expected an int64 label"),
        ("activations", {"activations": torch.zeros(6, 3), "labels": Y + 1}, "labels from 1 to 3; expected 0 to 2"),
        ("activations", {"activations": torch.zeros(6, 3), "labels": Y - 1}, "labels from -1 to 1"),
        ("activations", {"activations": torch.full((6, 3), torch.nan), "labels": Y}, "not finite"),
        ("activations", {"activations": torch.zeros(0, 3), "labels": Y[:0]}, "shape agreed on"),
        ("activations", {"activations": torch.zeros(6), "labels": Y}, "shape agreed on"),
        ("queries", {"activations": torch.full((6, 3), torch.inf)}, "not finite"),
        ("activations", {"activations": Y, "labels": Y}, "expected activations"),
        ("gradients", {"activations": torch.zeros(6, 3)}, "does not answer 'gradients'"),
    ],
)
def test_a_server_checks_every_question(kind: Kind, tensors: dict[str, Tensor], words: str) -> None:
    _, top = _stages()
    before = top.weight.clone()
    with pytest.raises(MessageError, match=words):
        Server(top, _sgd(top)).reply(Message(kind, "client", 0, tensors))
    assert torch.equal(top.weight, before)


def test_the_shape_agreed_on_is_that_of_the_first_message() -> None:
    _, top = _stages()
    server = Server(top, _sgd(top))
    server.reply(Message("queries", "client", 0, {"activations": torch.zeros(6, 3)}))
    for other in (torch.zeros(6, 4), torch.zeros(6, 3).double(), torch.zeros(6, 1, 3)):
        with pytest.raises(MessageError, match="shape agreed on"):
            server.reply(Message("queries", "client", 0, {"activations": other}))


def test_labels_are_checked_before_anything_is_sent() -> None:
    bottom, top = _stages()
    transport = LocalTransport(Server(top, _sgd(top)))
    for labels in (Y.float(), Y[:2], Y[:, None]):
        with pytest.raises(DataError, match="expected one int64 number for each of 6 records"):
            Client(bottom, _sgd(bottom), transport).step(X, labels)
    assert transport.traffic.messages == 0


def test_prediction_is_the_whole_network_in_evaluation_mode_and_trains_nothing() -> None:
    bottom, last = _stages()
    top = nn.Sequential(nn.Dropout(0.5), last)
    server = Server(top, _sgd(top))
    client = Client(bottom, _sgd(bottom), LocalTransport(server))
    before = {name: tensor.clone() for name, tensor in top.state_dict().items()}
    logits, z = client.predict(X)
    assert torch.equal(z, bottom(X))
    assert torch.equal(logits, top.eval()(z))
    assert all(torch.equal(tensor, before[name]) for name, tensor in top.state_dict().items())


def test_a_frozen_client_and_a_top_stage_that_works_in_place() -> None:
    bottom, last = _stages()
    top = nn.Sequential(nn.ReLU(inplace=True), last)
    client = Client(bottom, None, LocalTransport(Server(top, _sgd(top))))
    before = {name: tensor.clone() for name, tensor in bottom.state_dict().items()}
    losses = [client.step(X, Y).loss for _ in range(30)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in bottom.state_dict().items())


def test_without_a_source_two_clients_differ() -> None:
    bottom, top = _stages()
    transport = LocalTransport(Server(top, _sgd(top)))
    draws = [Client(bottom, None, transport).noise.gaussian_like(X, "noise") for _ in range(2)]
    assert not torch.equal(*draws)


# -- the guard against a hijacking server


def _guarded(server: object) -> tuple[Client, RecordingTransport]:
    bottom, _ = _stages()
    transport = RecordingTransport(LocalTransport(server))  # type: ignore[arg-type]
    guard = HijackGuard(Source(KEY), 3, fake_share=0.25, warm_up=4)
    return Client(bottom, _sgd(bottom), transport, guards=Guards(hijack=guard), source=Source(KEY)), transport


def test_a_client_learns_from_every_batch_but_the_mislabeled_ones() -> None:
    _, top = _stages()
    client, transport = _guarded(Server(top, _sgd(top)))
    plan = HijackGuard(Source(KEY), 3, fake_share=0.25, warm_up=4)
    for step in range(20):
        before = {name: tensor.clone() for name, tensor in client.stage.state_dict().items()}
        result = client.step(X, Y)
        told = [crossing.message for crossing in transport.transcript if crossing.direction == "to server"][-1]
        same = all(torch.equal(tensor, before[name]) for name, tensor in client.stage.state_dict().items())
        assert result.mislabeled == plan.mislabels(step) == same
        expected = plan.wrong_labels(step, Y) if result.mislabeled else Y
        assert torch.equal(told.tensors["labels"], expected)
        assert set(told.tensors) == {"activations", "labels"}, "nothing tells the batch apart"
    assert client.steps == 20


class _Hijacker:
    """Pulls every activation to zero, whatever its label, and says that all is well."""

    def __init__(self, loss: float, right: int) -> None:
        self._claims = {"loss": torch.tensor(loss), "right": torch.tensor(right)}

    def reply(self, message: Message) -> Message:
        gradient = message.tensors["activations"].clone()
        return Message("gradients", "server", message.step, {"gradient": gradient, **self._claims})


def _steps(client: Client, count: int) -> None:
    for _ in range(count):
        client.step(X, Y)


def test_a_hijacker_is_refused_whatever_it_claims() -> None:
    said = []
    for claims in ((0.0, 6), (2.5, 0)):
        client, transport = _guarded(_Hijacker(*claims))
        with pytest.raises(HijackError, match="hardly depend on the labels") as caught:
            _steps(client, 16)
        assert transport.traffic.messages == 2 * (client.steps + 1), "the last message is the one that told"
        said.append(str(caught.value))
    assert said[0] == said[1], "gradients alone count"


def test_a_rehearsal_shows_what_training_would_send_and_leaves_no_trace() -> None:
    def client_of() -> Client:
        with drawing_from(public_source(0).generator("w")):
            stage = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
            server = Server(nn.Linear(3, 3), None)
        return Client(stage, _sgd(stage), LocalTransport(server), defenses=[Noise(0.1)], source=Source(KEY))

    plain, rehearsed = client_of(), client_of()
    sent = [rehearsed.rehearse(X, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(sent[0], sent[1])
    assert not torch.equal(sent[0], sent[2])  # dropout is on, from the generator that was given
    assert not torch.equal(sent[0], rehearsed.release(X))
    rehearsed.noise.block = plain.noise.block
    plain.step(X, Y)
    rehearsed.step(X, Y)
    before, after = plain.state(), rehearsed.state()
    assert all(torch.equal(before[name], after[name]) for name in before)
