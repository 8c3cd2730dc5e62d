"""A party in the middle: split in three equals split in two, and what the next party does wrong is not the client's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from milkglass.errors import LinkError, MessageError
from milkglass.hop import Hop
from milkglass.messages import Message, Responder
from milkglass.recipe import Recipe
from milkglass.server import Server
from milkglass.training.split import Setup, play_epoch, set_up
from milkglass.transports.local import LocalTransport
from milkglass.transports.wrappers import RecordingTransport
from tests.helpers import small_recipe

NETWORK = {"name": "mlp", "settings": {"hidden": [16, 12, 10]}}
WAYS: dict[str, dict[str, Any]] = {
    "two parties": {"cut": {"at": "hidden1"}},
    "one hop": {"cut": {"at": "hidden1", "hops": ["hidden2"]}, "parties": {"hops": ["b"]}},
    "two hops": {"cut": {"at": "hidden1", "hops": ["hidden2", "hidden3"]}, "parties": {"hops": ["b", "c"]}},
}


def _recipe(way: str, **changes: Any) -> Recipe:
    return small_recipe(network=NETWORK, **WAYS[way], **changes)


def _server_weights(setup: Setup) -> dict[str, torch.Tensor]:
    """Of all stages behind the client's: their layers keep the whole network's names."""
    servers = [server for desk in setup.desks.values() for server in desk.servers.values()]
    return {name: tensor for server in servers for name, tensor in server.stage.state_dict().items()}


@pytest.mark.parametrize("way", ["one hop", "two hops"])
@pytest.mark.parametrize("pieces", [1, 4])
def test_the_bits_are_those_of_two_parties(way: str, pieces: int) -> None:
    training = {"epochs": 2, "batch_size": 32, "learning_rate": 1e-2, "micro_batches": pieces}
    defense = {"nopeek": {"weight": 1.0}, "noise": {"sigma": 0.1}}
    setups = [set_up(_recipe(each, training=training, defense=defense)) for each in ("two parties", way)]
    results = [[play_epoch(setup, epoch)[0] for epoch in (1, 2)] for setup in setups]
    assert [(r.loss, r.evaluation) for r in results[0]] == [(r.loss, r.evaluation) for r in results[1]]
    expected, found = (_server_weights(setup) for setup in setups)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    for name, tensor in setups[0].client.stage.state_dict().items():
        assert torch.equal(tensor, setups[1].client.stage.state_dict()[name]), name


def test_what_a_hop_sends_on_is_what_its_stage_makes_and_the_labels() -> None:
    setup = set_up(_recipe("one hop"), wrap=RecordingTransport)
    hop = setup.desks["b"]._hop
    assert hop is not None
    hop.onward = RecordingTransport(hop.onward)
    stage = hop.server.stage
    rows = setup.seats[0].batches(1)[0]
    part = setup.seats[0].share.train
    expected = stage(setup.client.stage(part.x[rows]))
    setup.client.step(part.x[rows], part.y[rows])
    (sent, answered) = list(hop.onward.transcript)
    assert sent.message.tensors.keys() == {"activations", "labels"}
    assert torch.equal(sent.message.tensors["activations"], expected.detach())
    assert sent.message.party == "b"
    assert answered.message.kind == "gradients"


class _Saying:
    def __init__(self, kind: Any, tensors: dict[str, torch.Tensor]) -> None:
        self._kind, self._tensors = kind, tensors

    def reply(self, message: Message) -> Message:
        if self._kind is None:
            raise MessageError("not like this")
        return Message(self._kind, "server", message.step, self._tensors)


@pytest.mark.parametrize(
    ("next_party", "words"),
    [
        (_Saying("predictions", {}), "expected 'gradients', server sent 'predictions'"),
        (_Saying(None, {}), "not like this"),
        (_Saying("gradients", {}), "expected a gradient of shape"),
        (_Saying("gradients", {"gradient": torch.full((2, 4), torch.nan)}), "not finite"),
    ],
)
def test_a_fault_of_the_next_party_is_not_laid_to_the_client(next_party: Responder, words: str) -> None:
    hop = Hop(Server(torch.nn.Linear(3, 4), None, loss=None, name="b"), LocalTransport(next_party))
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(LinkError, match=f"b cannot go on with .*{words}"):
        hop.reply(Message("activations", "a", 0, {"activations": torch.ones(2, 3), "labels": labels}))


def test_a_hop_answers_batches_and_queries_alone() -> None:
    hop = Hop(Server(torch.nn.Linear(3, 4), None, loss=None, name="b"), LocalTransport(_Saying(None, {})))
    with pytest.raises(MessageError, match="a hop does not answer 'returns'"):
        hop.reply(Message("returns", "a", 0))


@pytest.mark.parametrize("y_B", [torch.tensor([0, 9]), torch.tensor([0, -1]), torch.tensor([0]), torch.zeros(2)])
def test_labels_that_cannot_be_are_refused_before_anything_goes_on(y_B: torch.Tensor) -> None:
    hop = Hop(Server(torch.nn.Linear(3, 4), None, loss=None, name="b"), LocalTransport(_Saying(None, {})), classes=3)
    with pytest.raises(MessageError, match=r"'activations' of a: .*label"):
        hop.reply(Message("activations", "a", 0, {"activations": torch.ones(2, 3), "labels": y_B}))
    assert hop.server.resting
