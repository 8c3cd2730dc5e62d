"""Compressors on the wire with every way of training; and a client's own limits, which end a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from milkglass.errors import EgressError
from milkglass.messages import Message
from milkglass.parties import run_to_end
from milkglass.randomness import Source
from milkglass.recipe import first_difference
from milkglass.server import Server
from milkglass.training.rounds import play_together
from milkglass.training.setup import crossing_shapes, make_desk
from milkglass.training.shares import deal_records
from milkglass.training.split import Setup, play_epoch, set_up
from milkglass.transcript import Transcript
from milkglass.transports.local import LocalHub, LocalTransport
from milkglass.transports.wrappers import RecordingTransport
from tests.helpers import KEY
from tests.training.whole import (
    U_SHAPED,
    all_weights,
    assert_equal_tensors,
    parties,
    recipe_of,
    training,
)

WAYS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "U-shaped": U_SHAPED,
    "relay": {"parties": parties("relay")},
    "relay, U-shaped": U_SHAPED | {"parties": parties("relay")},
    "splitfed1": {"parties": parties("splitfed1")},
    "splitfed1, U-shaped, in pieces": U_SHAPED
    | {"parties": parties("splitfed1"), "training": training(micro_batches=4)},
    "splitfed2": {"parties": parties("splitfed2")},
    "splitfed2, U-shaped, in pieces": U_SHAPED
    | {"parties": parties("splitfed2"), "training": training(micro_batches=2)},
    "vertical": {"parties": parties("vertical", ["ann", "ben"], owner_settings={"hidden": [8]})},
}
PICTURES: dict[str, Any] = {
    "network": {"name": "cnn", "settings": {"width": 8, "hidden": 16}},
    "cut": {"at": "block1"},
    "parties": parties("vertical", ["ann", "ben"], axis=3),
}


class _Watched:
    """A server with all that it was told and all that it said."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.told: list[Message] = []
        self.said: list[Message] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def reply(self, message: Message) -> Message:
        self.told.append(message)
        self.said.append(self._server.reply(message))
        return self.said[-1]


def _watched(setup: Setup) -> tuple[dict[str, _Watched], list[Transcript]]:
    """The servers, and what the clients send and get before it is compressed and after it is made out."""
    watched = {name: _Watched(server) for name, server in setup.desk.servers.items()}
    setup.desk.servers.update(cast(dict[str, Server], watched))
    transcripts = []
    for seat in setup.seats:
        seat.client.transport = RecordingTransport(seat.client.transport)
        transcripts.append(seat.client.transport.transcript)
    return watched, transcripts


@pytest.mark.parametrize("compress", ["fp16", "bf16", "int8", "topk"])
@pytest.mark.parametrize("way", WAYS)
def test_a_compressed_training_runs_and_both_ends_get_the_round_trip(way: str, compress: str) -> None:
    records = deal_records(recipe_of(**WAYS[way]))
    plain, packed = (
        set_up(recipe_of(**WAYS[way], wire=wire), Source(KEY), records=records)
        for wire in ({}, {"compress": compress, "topk_share": 0.3})
    )
    losses = [play_epoch(setup, epoch)[0].loss for setup in (plain, packed) for epoch in (1, 2)]
    assert losses[1] != losses[3]
    assert losses[1] == pytest.approx(losses[3], abs=0.2), "it learns nearly the same"
    flows = [setup.client.transport.traffic.flows for setup in (plain, packed)]
    assert {place: flow.messages for place, flow in flows[0].items()} == {p: f.messages for p, f in flows[1].items()}
    assert flows[1]["to server", "activations"].wire_bytes < flows[0]["to server", "activations"].wire_bytes

    watched, transcripts = _watched(packed)
    play_epoch(packed, 3, test=False)
    trip = packed.client.compressor.round_trip
    for seat, transcript in zip(packed.seats, transcripts, strict=True):
        told, said = _of_one(packed, watched, seat.client.name)
        sent, got = (
            [crossing.message.tensors for crossing in transcript if crossing.direction == direction]
            for direction in ("to server", "to client")
        )
        _assert_round_trips(sent, told, trip)
        _assert_round_trips(said, got, trip)
        assert any("activations" in tensors for tensors in told)


Tensors = Mapping[str, Tensor]


def _of_one(setup: Setup, watched: Mapping[str, _Watched], name: str) -> tuple[list[Tensors], list[Tensors]]:
    """What the server was told by a client, and said to it; of an owner, its columns of what it was told by all."""
    if not setup.recipe.parties.is_vertical:
        server = watched[name]
        both = [(m, a) for m, a in zip(server.told, server.said, strict=True) if m.party == name]
        return [message.tensors for message, _ in both], [answer.tensors for _, answer in both]
    columns = {"ann": slice(0, 8), "ben": slice(8, 16)}[name]
    server = watched[setup.client.name]
    told, said = (
        [{n: t[:, columns] for n, t in message.tensors.items() if t.dim() > 1} for message in messages]
        for messages in (server.told, server.said)
    )
    return list(told), list(said)


def _assert_round_trips(begun: Sequence[Tensors], arrived: Sequence[Tensors], trip: Callable[[Tensor], Tensor]) -> None:
    """What arrived of the cut's tensors is what was sent, compressed and made out."""
    for name in ("activations", "features", "gradient"):
        before, after = ([tensors[name] for tensors in each if name in tensors] for each in (begun, arrived))
        assert len(before) == len(after)
        assert all(torch.equal(trip(one), other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("compress", ["fp16", "bf16", "int8", "topk"])
def test_the_server_gets_what_a_client_says_it_releases(compress: str) -> None:
    for cut in ({}, U_SHAPED):
        setup = set_up(recipe_of(**cut, wire={"compress": compress}))
        watched, _ = _watched(setup)
        play_epoch(setup, 1)
        x = setup.records.test.x
        _, sent = setup.client.predict(x)
        assert torch.equal(watched["client"].told[-1].tensors["activations"], sent)
        assert torch.equal(sent, setup.client.release(x))
        assert not torch.equal(sent, setup.client.stage(x))


@pytest.mark.parametrize("compress", ["none", "int8"])
def test_owners_parts_are_joined_as_they_release_them(compress: str) -> None:
    setup = set_up(recipe_of(**PICTURES, wire={"compress": compress}))
    watched, _ = _watched(setup)
    play_epoch(setup, 1)
    xs = [seat.share.test.x for seat in setup.seats]
    play_together([(s.client, s.client.predicting(x)) for s, x in zip(setup.seats, xs, strict=True)])
    parts = [seat.client.release(x) for seat, x in zip(setup.seats, xs, strict=True)]
    assert torch.equal(watched["ann"].told[-1].tensors["activations"], torch.cat(parts, dim=3))


# -- a client's own limits


def _recorded(setup: Setup) -> Transcript:
    return cast(RecordingTransport, setup.transport).transcript


@pytest.mark.parametrize("way", [way for way in WAYS if "relay" not in way])
def test_a_ledger_stops_before_a_record_is_sent_too_often(way: str) -> None:
    recipe = recipe_of(**WAYS[way], client={"most_releases": 2})
    setup = set_up(recipe, wrap=RecordingTransport)
    steps = len(setup.seats[0].batches(1))
    for epoch in (1, 2):
        play_epoch(setup, epoch)
    weights = all_weights(setup)
    before = len(_recorded(setup))
    size = recipe.training.batch_size
    words = rf"step {2 * steps}: {size} of {size} records would be released up to 3 times; the client's limit is 2"
    with pytest.raises(EgressError, match=words):
        play_epoch(setup, 3)
    assert len(_recorded(setup)) == before, "nothing of that batch left"
    assert setup.client.steps == 2 * steps
    assert_equal_tensors(all_weights(setup), weights)
    for seat in setup.seats:
        assert seat.client.guards.ledger is not None
        assert seat.client.guards.ledger.summary() == {"largest": 2, "mean": 2.0, "total": 2 * len(seat.share.train)}


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("tables", [{}, U_SHAPED], ids=["vanilla", "U-shaped"])
def test_a_leakage_limit_stops_before_the_batch_that_tells_too_much(tables: dict[str, Any], pieces: int) -> None:
    limit = {"leakage": {"limit": 0.05, "window": 64}}
    recipe = recipe_of(**tables, client=limit, training=training(micro_batches=pieces))
    setup = set_up(recipe, wrap=RecordingTransport)
    with pytest.raises(EgressError, match=r"step 1: what is sent depends on the records.*the client's limit is 0.05"):
        play_epoch(setup, 1)
    assert {crossing.message.step for crossing in _recorded(setup)} == {0}, "the second batch fills the window"
    before = len(_recorded(setup))
    for again in (
        lambda: setup.client.predict(setup.records.test.x),
        lambda: run_to_end(setup.client.stepping(setup.records.train["client"].x[:32], torch.zeros(32).long())),
        lambda: setup.client.leave("collect", 1, {"of": torch.tensor([0])}),
    ):
        with pytest.raises(EgressError, match="step 1: what is sent depends on the records"):
            again()
    assert len(_recorded(setup)) == before, "and from then on nothing leaves"


def test_the_server_cannot_raise_a_clients_limits() -> None:
    strict = recipe_of(client={"most_releases": 1, "leakage": {"limit": 0.05, "window": 64}})
    loose = recipe_of(client={"most_releases": 99, "leakage": {"limit": 1.0}})
    for other in (loose, recipe_of()):
        assert strict.digest() == other.digest()
        assert strict.agreed() == other.agreed()
        assert first_difference(strict, other) is None
    assert "client" not in strict.agreed()
    setup = set_up(strict)
    records = setup.records
    shapes = crossing_shapes(loose, records.record_shape, records.classes)
    desk = make_desk(loose, records.record_shape, records.classes, shapes, Source(KEY))
    setup.client.transport = LocalTransport(LocalHub(desk), "client")
    with pytest.raises(EgressError, match=r"limit is 0\.05"):
        play_epoch(setup, 1)


def test_each_clients_limits_hold_in_a_training_of_several() -> None:
    setup = set_up(recipe_of(**WAYS["splitfed2"], client={"most_releases": 1}), wrap=RecordingTransport)
    play_epoch(setup, 1)
    with pytest.raises(EgressError, match=r"would be released up to 2 times"):
        play_epoch(setup, 2)
