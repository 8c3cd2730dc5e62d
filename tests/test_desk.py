"""The desk: in whatever order clients' messages come, and wherever it is stopped, the same bits."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any, final

import pytest
import torch
from torch import Tensor

from milkglass.codec import decode, encode
from milkglass.desk import Desk
from milkglass.messages import Message
from milkglass.randomness import rehearsal_source
from milkglass.training.rounds import EpochResult, Seat, playing_epoch
from milkglass.training.setup import crossing_shapes, make_desk
from milkglass.training.split import Setup, play_epoch, set_up
from milkglass.transports.base import Transport
from tests.training.whole import (
    DROPOUTS,
    all_weights,
    assert_equal_tensors,
    parties,
    recipe_of,
    training,
    unequal,
)

EPOCHS = 3
BACK = {"cut": {"at": "drop1", "back_at": "drop2"}}
WAYS: dict[str, dict[str, Any]] = {
    "relay": DROPOUTS | {"parties": parties("relay")},
    "splitfed1": DROPOUTS | {"parties": parties("splitfed1")},
    "splitfed1, U-shaped, in pieces": DROPOUTS
    | BACK
    | {"parties": parties("splitfed1"), "training": training(micro_batches=2)},
    "splitfed2": DROPOUTS | {"parties": parties("splitfed2")},
    "splitfed2, U-shaped, in pieces": DROPOUTS
    | BACK
    | {"parties": parties("splitfed2"), "training": training(micro_batches=2)},
    "vertical": {
        "parties": parties("vertical", ["ann", "ben", "cas", "dan"], owner_settings={"hidden": [4]}),
        "training": training(micro_batches=2),
    },
}


@final
class _Post(Transport):
    """A client's letters, which lie until somebody carries them."""

    def __init__(self) -> None:
        super().__init__()
        self.outgoing: deque[bytes] = deque()
        self.incoming: deque[bytes] = deque()

    def send(self, message: Message) -> None:
        self.outgoing.append(encode(message))

    def receive(self) -> Message:
        return decode(self.incoming.popleft())

    @property
    def ready(self) -> bool:
        return bool(self.incoming)


def _made(way: str) -> Setup:
    recipe = recipe_of(**WAYS[way], defense={"noise": {"sigma": 0.3}})
    return set_up(recipe) if way == "vertical" else unequal(recipe, (64, 40, 96))


def _epochs(seat: Seat) -> Generator[None, None, list[EpochResult]]:
    results = []
    for _ in range(EPOCHS):
        results.append((yield from playing_epoch(seat)))
    return results


@final
class _Carrier:
    """Carries letters in a random order, but each client's in its own; and may put another desk in the desk's place."""

    def __init__(self, setup: Setup, seed: int, crash_rate: float = 0.0) -> None:
        self.setup = setup
        self.moments: list[str] = []
        self._random = random.Random(seed)
        self._crash_rate = crash_rate
        self._posts = {seat.client.name: _Post() for seat in setup.seats}
        for seat in setup.seats:
            seat.client.transport = self._posts[seat.client.name]

    def run(self) -> dict[str, list[EpochResult]]:
        """All epochs of all clients; what each says of them."""
        players = {seat.client.name: _epochs(seat) for seat in self.setup.seats}
        results: dict[str, list[EpochResult]] = {}
        started: set[str] = set()
        while len(results) < len(players):
            moves = [("carry", name) for name, post in self._posts.items() if post.outgoing]
            moves += [("play", n) for n in players if n not in results and (n not in started or self._posts[n].ready)]
            assert moves, "somebody can always go on"
            move, name = self._random.choice(moves)
            if move == "carry":
                self._deliver(decode(self._posts[name].outgoing.popleft()))
                continue
            started.add(name)
            try:
                next(players[name])
            except StopIteration as end:
                results[name] = end.value
        assert not self.setup.desk.held()
        return results

    def _deliver(self, message: Message) -> None:
        for party, answer in self.setup.desk.receive(message):
            self._posts[party].incoming.append(encode(answer))
        if self.setup.desk.resting and self._random.random() < self._crash_rate:
            self._crash(message)

    def _crash(self, last: Message) -> None:
        old = self.setup.desk
        state = {name: tensor.clone() for name, tensor in old.state().items()}
        held = [encode(message) for message in old.held()]
        self.moments.append(f"{last.kind}, {len(held)} held" if held else last.kind)
        desk = _desk(self.setup)
        desk.load_state(state)
        for frame in held:
            assert not list(desk.receive(decode(frame))), "nothing is due that was not due before"
        assert [encode(message) for message in desk.held()] == held
        assert_equal_tensors(desk.state(), state)
        self.setup = replace(self.setup, desks={self.setup.recipe.parties.server: desk})


def _desk(setup: Setup) -> Desk:
    """A new one, as a server makes it that starts again."""
    recipe, records = setup.recipe, setup.records
    shapes = crossing_shapes(recipe, records.record_shape, records.classes)
    source = rehearsal_source(recipe.seed, recipe.parties.server)
    return make_desk(recipe, records.record_shape, records.classes, shapes, source)


def _told(results: Mapping[str, list[EpochResult]]) -> list[Any]:
    return [[(r.loss, r.accuracy, r.seen, r.tested, r.evaluation) for r in results[name]] for name in sorted(results)]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, tuple[dict[str, Tensor], list[Any]]]:
    """For each way: all weights after all epochs, and what each client was told of them."""
    done = {}
    for way in WAYS:
        setup = _made(way)
        epochs = [play_epoch(setup, epoch) for epoch in range(1, EPOCHS + 1)]
        names = [seat.client.name for seat in setup.seats]
        done[way] = all_weights(setup), _told(dict(zip(names, map(list, zip(*epochs, strict=True)), strict=True)))
    return done


Undisturbed = dict[str, tuple[dict[str, Tensor], list[Any]]]


@pytest.mark.parametrize("way", WAYS)
def test_any_order_between_clients_gives_the_same_bits(way: str, undisturbed: Undisturbed) -> None:
    for seed in range(6):
        carrier = _Carrier(_made(way), seed)
        results = carrier.run()
        assert_equal_tensors(all_weights(carrier.setup), undisturbed[way][0])
        assert _told(results) == undisturbed[way][1], "also what each is told in its tests"


@pytest.mark.parametrize("way", WAYS)
def test_a_desk_that_is_replaced_at_any_moment_goes_on_in_the_same_bits(way: str, undisturbed: Undisturbed) -> None:
    moments: set[str] = set()
    for seed in range(6):
        carrier = _Carrier(_made(way), seed, crash_rate=0.3)
        results = carrier.run()
        assert_equal_tensors(all_weights(carrier.setup), undisturbed[way][0])
        assert _told(results) == undisturbed[way][1]
        moments |= {moment.split(",")[0] for moment in carrier.moments}
        moments |= {"held" for moment in carrier.moments if "held" in moment}
    expected = {"held", "queries"}
    expected |= {"hashes", "activations"} if way == "vertical" else {"enters", "weights", "collect"}
    expected |= {"returns"} if "U-shaped" in way else {"activations"}
    assert expected <= moments, "it happened at every kind of moment"


@pytest.mark.parametrize("mode", ["relay", "splitfed1", "splitfed2"])
def test_after_an_epoch_questions_are_answered_as_the_epoch_left_it(mode: str) -> None:
    setup = set_up(recipe_of(parties=parties(mode)))
    question = Message("queries", "ben", 0, {"activations": setup.seats[1].client.release(setup.records.test.x)})
    (_, untrained), *_ = setup.desk.receive(question)
    play_epoch(setup, 1, test=False)
    question = Message("queries", "ben", 3, {"activations": setup.seats[1].client.release(setup.records.test.x)})
    (_, before), *_ = setup.desk.receive(question)
    assert not torch.equal(before.tensors["logits"], untrained.tensors["logits"])
    weights = setup.server.stage.state_dict()["classifier.weight"].clone()
    for seat in setup.seats[: 1 if mode == "relay" else 2 if mode == "splitfed1" else 3]:
        train = seat.share.train
        next(seat.client.stepping(train.x[:32], train.y[:32]))  # in the next epoch already
    assert not torch.equal(setup.server.stage.state_dict()["classifier.weight"], weights)
    (to, after), *_ = setup.desk.receive(question)
    assert to == "ben"
    assert torch.equal(after.tensors["logits"], before.tensors["logits"])
