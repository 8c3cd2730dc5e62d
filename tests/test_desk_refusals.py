"""What a desk does not take, from whom, and that those who are refused change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.client import Client
from milkglass.desk import Desk
from milkglass.errors import EgressError, MessageError
from milkglass.messages import Kind, Message
from milkglass.randomness import Source, drawing_from, public_source
from milkglass.sections import Mode
from milkglass.server import Server
from milkglass.training.split import set_up
from milkglass.transports.local import LocalHub, LocalTransport
from tests.helpers import KEY
from tests.training.whole import parties, recipe_of

NAMES = ("ann", "ben", "cas")
Z = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
SEALED = torch.arange(32, dtype=torch.uint8)


def _desk(mode: Mode, *, u_shaped: bool = False, names: tuple[str, ...] = NAMES, width: int = 4) -> Desk:
    def server() -> Server:
        with drawing_from(public_source(0).generator("w")):
            stage = nn.Linear(width, 3)
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        return Server(
            stage,
            optimizer,
            loss=None if u_shaped else F.cross_entropy,
            cut_shape=(width,),
            classes=3,
            source=Source(KEY),
        )

    if mode == "splitfed1":
        return Desk({name: server() for name in names}, mode, public=public_source(0))
    return Desk(dict.fromkeys(names, server()), mode, public=public_source(0))


def _batch(party: str, step: int = 0, piece: int = 0, pieces: int = 1, **more: Tensor) -> Message:
    return Message("activations", party, step, {"activations": Z, "labels": Y, **more}, piece, pieces)


def _bare(party: str, step: int = 0, piece: int = 0, pieces: int = 1) -> Message:
    return Message("activations", party, step, {"activations": Z}, piece, pieces)


def _weights(party: str, epoch: int = 1) -> Message:
    return Message("weights", party, epoch, {"sealed": SEALED})


def _enter_all(desk: Desk, batches: int = 1) -> None:
    for name in desk.clients:
        desk.receive(Message("enters", name, 0, {"batches": torch.tensor([batches])}))


def _refused(desk: Desk, message: Message, words: str) -> None:
    """It is refused, and nothing of what the desk has learned or holds is another than before."""
    before = {name: tensor.clone() for name, tensor in desk.state().items()}
    held = desk.held()
    with pytest.raises(MessageError, match=words) as caught:
        desk.receive(message)
    assert "\n" not in str(caught.value)
    after = desk.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert desk.held() == held


def test_a_client_out_of_turn_in_a_relay() -> None:
    desk = _desk("relay")
    for name in ("ben", "cas"):
        _refused(desk, _batch(name), f"'activations' of {name}: it is the turn of ann")
        _refused(desk, _weights(name), f"'weights' of {name}: it is the turn of ann")
    for name, following in zip(NAMES, (*NAMES[1:], "ann"), strict=True):
        desk.receive(_batch(name))
        desk.receive(_weights(name))
        if name != "cas":
            _refused(desk, _batch(name, 1), rf"'activations' of {name}: it has left its weights in epoch 1")
            _refused(desk, _batch("cas" if name == "ann" else "ann"), "it is the turn of ben|it has left its weights")
        else:
            _refused(desk, _batch(name, 1), f"it is the turn of {following}")
    assert [party for party, _ in desk.receive(_batch("ann", 1))] == ["ann"]


@pytest.mark.parametrize("mode", ["relay", "splitfed1", "splitfed2"])
def test_weights_of_another_epoch_twice_or_before_batches(mode: Mode) -> None:
    desk = _desk(mode)
    _enter_all(desk)
    for epoch in (0, 2, 7):
        _refused(desk, _weights("ann", epoch), f"'weights' of ann: of epoch {epoch}, expected 1")
    for name in NAMES:
        desk.receive(_batch(name))
        if mode == "relay":
            desk.receive(_weights(name))
    if mode != "relay":
        desk.receive(_weights("ann"))
        _refused(desk, _weights("ann"), "'weights' of ann: it has left its weights in epoch 1")
        _refused(desk, _batch("ann", 1), "'activations' of ann: it has left its weights in epoch 1")
        for name in NAMES[1:]:
            desk.receive(_weights(name))
    _refused(desk, _weights("ann"), "'weights' of ann: of epoch 1, expected 2")


@pytest.mark.parametrize("mode", ["relay", "splitfed1", "splitfed2", "vertical"])
def test_a_party_that_takes_no_part(mode: Mode) -> None:
    desk = _desk(mode)
    for message in (_batch("eve"), _weights("eve"), Message("queries", "eve", 0, {"activations": Z})):
        _refused(desk, message, "'eve' takes no part; those who do: ann, ben, cas")


def test_weights_before_all_steps_in_splitfed2() -> None:
    desk = _desk("splitfed2")
    _refused(desk, _weights("ann"), "'weights' of ann: it still has batches in epoch 1")
    _enter_all(desk, 2)
    for name in NAMES:
        desk.receive(_batch(name))
        _refused(desk, _weights(name), f"'weights' of {name}: it still has batches in epoch 1")
    for name in NAMES[:2]:
        desk.receive(_batch(name, 1))
    desk.receive(_batch("cas", 1))
    for name in NAMES:
        assert ("receipt", name) in [(answer.kind, to) for to, answer in desk.receive(_weights(name))]


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"sealed": Z},
        {"sealed": SEALED.long()},
        {"sealed": SEALED[None]},
        {"sealed": SEALED, "stage.weight": Z},
        {"stage.weight": Z},
    ],
    ids=["none", "floats", "int64", "two dimensions", "and more", "as they are"],
)
def test_weights_that_are_not_sealed(tensors: dict[str, Tensor]) -> None:
    _refused(_desk("relay"), Message("weights", "ann", 1, tensors), "'weights' of ann: expected sealed bytes and noth")


def test_a_client_leaves_nothing_that_is_not_sealed() -> None:
    transport = LocalTransport(LocalHub(_desk("relay")), "ann")
    client = Client(nn.Linear(4, 4), None, transport, name="ann", source=Source(KEY))
    for tensor in (Z, Z.double(), Z.half(), Z > 0, Y.int()):
        with pytest.raises(EgressError, match=r"'weights': stage\.weight is not sealed; expected bytes"):
            client.leave("weights", 1, {"sealed": SEALED, "stage.weight": tensor})
    assert transport.traffic.messages == 0


@pytest.mark.parametrize("mode", ["relay", "splitfed1"])
def test_weights_in_the_middle_of_a_step(mode: Mode) -> None:
    for u_shaped, message in ((True, _bare("ann")), (False, _batch("ann", pieces=2))):
        desk = _desk(mode, u_shaped=u_shaped)
        desk.receive(message)
        assert not desk.resting
        with pytest.raises(MessageError, match="'weights' of ann: a training step of its is half done"):
            desk.receive(_weights("ann"))


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (_batch("ann", 0, 2, 4), "piece 2 of 4; expected piece 1 of 4, of step 0"),
        (_batch("ann", 0, 0, 4), "piece 0 of 4; expected piece 1"),
        (_batch("ann", 0, 1, 2), "piece 1 of 2; expected piece 1 of 4"),
        (_batch("ann", 1, 1, 4), "step 1 of ann: piece 1 of 4; expected piece 1 of 4, of step 0"),
    ],
)
def test_pieces_that_do_not_follow(message: Message, words: str) -> None:
    for mode in ("relay", "splitfed1"):
        desk = _desk(mode)
        _refused(desk, _batch("ann", 0, 1, 4), "piece 1 of 4; expected piece 0")
        desk.receive(_batch("ann", 0, 0, 4))
        _refused(desk, message, words)
        for piece in (1, 2, 3):
            assert not desk.resting
            desk.receive(_batch("ann", 0, piece, 4))
        assert desk.resting


def test_returns_without_features_or_of_other_ones() -> None:
    def returned(step: int = 0, piece: int = 0, pieces: int = 2, rows: int = 6) -> Message:
        return Message("returns", "ann", step, {"gradient": torch.zeros(rows, 3)}, piece, pieces)

    desk = _desk("relay", u_shaped=True)
    _refused(desk, returned(), "'returns' of ann: no features of step 0, piece 0 of 2, are out")
    desk.receive(_bare("ann", 0, 0, 2))
    _refused(desk, returned(piece=1), "no features of step 0, piece 1 of 2, are out")
    desk.receive(_bare("ann", 0, 1, 2))
    _refused(desk, returned(step=1), "no features of step 1, piece 0 of 2, are out")
    _refused(desk, returned(pieces=1), "no features of step 0, piece 0 of 1, are out")
    _refused(desk, returned(piece=1), "piece 1 came before piece 0")
    _refused(desk, returned(rows=5), r"expected a gradient of shape \(6, 3\)")
    for value in (torch.nan, torch.inf, 1e30):
        bad = Message("returns", "ann", 0, {"gradient": torch.full((6, 3), value)}, 0, 2)
        _refused(desk, bad, "the gradient is not finite, or far too large")
    _refused(desk, _batch("ann", 1), "labels, where they stay with the client")
    desk.receive(returned())
    _refused(desk, returned(), "no features of step 0, piece 0 of 2, are out")
    assert [answer.kind for _, answer in desk.receive(returned(piece=1))] == ["gradients"]
    assert desk.resting


def _changes() -> Iterator[tuple[str, Message]]:
    yield "of step 1", _bare("ben", 1)
    yield "piece 1", _bare("ben", 0, 1, 2)
    yield "'queries' of step 0", Message("queries", "ben", 0, {"activations": Z})
    yield "do not send the same batch", Message("activations", "ben", 0, {"activations": Z[:5]})
    yield "expected activations", Message("activations", "ben", 0, {})
    yield "expected activations", Message("activations", "ben", 0, {"activations": torch.tensor(1.0)})
    yield "cannot be joined along dimension 1", Message("activations", "ben", 0, {"activations": Z[..., None]})
    yield "do not have the shape agreed on", Message("activations", "ben", 0, {"activations": Z[:, :3]})
    yield "not finite", Message("activations", "ben", 0, {"activations": Z * torch.nan})


@pytest.mark.parametrize(("words", "message"), list(_changes()), ids=[words for words, _ in _changes()])
def test_owners_who_send_different_batches(words: str, message: Message) -> None:
    desk = _desk("vertical", names=("ann", "ben"), width=8)
    assert desk.receive(_batch("ann")) == []
    _refused(desk, message, words)
    assert [to for to, _ in desk.receive(_bare("ben"))] == ["ann", "ben"], "who was refused may do better"
    desk = _desk("vertical", names=("ann", "ben"), width=8)
    if words in ("expected activations", "not finite"):
        _refused(desk, message, words)  # at once: the other owner is not told of this one's fault
        return
    assert desk.receive(message) == []
    _refused(desk, _batch("ann"), words)


def _faults() -> Iterator[tuple[str, Message]]:
    yield "piece 1 of 2; expected piece 0 of 2", _batch("ben", 0, 1, 2)
    yield "labels from 0 to 3; expected 0 to 2", _batch("ben", labels=Y + (Y == 2))
    yield "expected an int64 label", _bare("ben")
    yield "not finite", _batch("ben", activations=Z / 0)
    yield "do not have the shape agreed on", _batch("ben", activations=Z[:, :3])
    yield "expected activations", Message("activations", "ben", 0, {"labels": Y})
    yield "its features of step 0 are not out", Message("returns", "ben", 0, {"gradient": Z})


@pytest.mark.parametrize(("words", "message"), list(_faults()), ids=[words for words, _ in _faults()])
def test_in_drawn_turns_a_fault_is_told_to_whoever_made_it(words: str, message: Message) -> None:
    desk = _desk("splitfed2")
    _refused(desk, message, words)
    desk.receive(_batch("ben", 0, 0, 2))
    _refused(desk, _batch("ben", 1), "step 1 of ben: piece 0 of 1; expected piece 1 of 2, of step 0")
    desk.receive(_batch("ben", 0, 1, 2))
    _refused(desk, message, words)
    _enter_all(desk)
    told = [to for name in ("ann", "cas") for to, _ in desk.receive(_batch(name))]
    assert sorted(told) == ["ann", "ben", "ben", "cas"]


def test_in_drawn_turns_a_second_batch_waits_for_the_gradient_of_the_first_ones_features() -> None:
    desk = _desk("splitfed2", u_shaped=True)
    desk.receive(_bare("ben"))
    _refused(desk, _bare("ben", 1), "'activations' of ben: its features of step 1 are not out")
    _refused(desk, _batch("ann"), "labels, where they stay with the client")


def test_nobody_says_twice_how_many_batches_it_has() -> None:
    desk = _desk("splitfed2")
    desk.receive(Message("enters", "ann", 0, {"batches": torch.tensor([2**40 - 1])}))
    _refused(desk, Message("enters", "ann", 0, {"batches": torch.tensor([1])}), "it has said so already")
    _refused(desk, _weights("ann"), "it still has batches in epoch 1")  # in no time, however many it claims
    for name in ("ben", "cas"):
        desk.receive(Message("enters", name, 0, {"batches": torch.tensor([1])}))
    _refused(desk, _weights("ann"), "it still has batches in epoch 1")


@pytest.mark.parametrize("kind", ["returns", "features", "predictions", "gradients"])
def test_owners_send_activations_alone(kind: Kind) -> None:
    desk = _desk("vertical", names=("ann", "ben"), width=8)
    for name in desk.clients:
        _refused(desk, Message(kind, name, 0, {"activations": Z}), f"does not answer '{kind}'")


def test_owners_parts_of_another_width_than_agreed_are_refused_from_the_first_one_on() -> None:
    who = parties("vertical", ["ann", "ben"], owner_settings={"hidden": [8]})
    desk = set_up(recipe_of(parties=who)).desk
    desk.receive(_batch("ann"))
    with pytest.raises(MessageError, match="activations float32 6x8 do not have the shape agreed on"):
        desk.receive(_bare("ben"))


def test_the_first_owner_alone_has_labels() -> None:
    desk = _desk("vertical", names=("ann", "ben"), width=8)
    _refused(desk, _bare("ann"), "expected an int64 label for each of 6 records")
    desk.receive(_batch("ann"))
    answers = dict(desk.receive(_bare("ben")))
    assert set(answers["ann"].tensors) == {"gradient", "loss", "right"}
    assert set(answers["ben"].tensors) == {"gradient"}
    assert answers["ann"].tensors["gradient"].shape == answers["ben"].tensors["gradient"].shape == Z.shape


@pytest.mark.parametrize(
    ("kind", "tensors", "step", "words"),
    [
        ("collect", {}, 1, "expected the numbers of clients"),
        ("collect", {"of": torch.tensor([0.0])}, 1, "expected the numbers of clients"),
        ("collect", {"of": torch.tensor([[0]])}, 1, "expected the numbers of clients"),
        ("collect", {"of": torch.tensor([3])}, 1, "expected numbers from 0 to 2"),
        ("collect", {"of": torch.tensor([-1])}, 1, "expected numbers from 0 to 2"),
        ("collect", {"of": torch.tensor([0, 1, 2, 0])}, 1, "expected numbers from 0 to 2"),
        ("collect", {"of": torch.tensor([0])}, 3, "of epoch 3, expected 1"),
        ("enters", {}, 0, "expected how many batches"),
        ("enters", {"batches": torch.tensor([0])}, 0, "expected how many batches"),
        ("enters", {"batches": torch.tensor([2**40])}, 0, "expected how many batches"),
        ("enters", {"batches": torch.tensor([1.0])}, 0, "expected how many batches"),
        ("enters", {"batches": torch.tensor([1, 1])}, 0, "expected how many batches"),
        ("hashes", {"hashes": torch.zeros(3, 32, dtype=torch.uint8)}, 0, "not expected here"),
        ("gradients", {"gradient": Z}, 0, "a server does not answer 'gradients'"),
        ("predictions", {"logits": Z}, 0, "a server does not answer 'predictions'"),
    ],
)
def test_what_no_client_sends(kind: Kind, tensors: dict[str, Tensor], step: int, words: str) -> None:
    for mode in ("relay", "splitfed1", "splitfed2"):
        _refused(_desk(mode), Message(kind, "ann", step, tensors), words)


def test_a_question_of_another_shape_after_an_epoch_is_refused_and_harms_nobody() -> None:
    desk = _desk("splitfed1")
    _enter_all(desk)
    for name in NAMES:
        desk.receive(_batch(name))
    for name in NAMES:
        desk.receive(_weights(name))
    for wrong in (Z[:, :3], Z.double(), Z[:, None]):
        _refused(desk, Message("queries", "ann", 1, {"activations": wrong}), "do not have the shape agreed on")
    (_, answer), *_ = desk.receive(Message("queries", "ben", 1, {"activations": Z}))
    assert answer.kind == "predictions"


def test_what_is_asked_for_early_is_handed_when_it_is_there() -> None:
    desk = _desk("relay")
    asked: dict[str, Any] = {"of": torch.tensor([0])}
    assert desk.receive(Message("collect", "ben", 1, asked)) == []
    assert [message.party for message in desk.held()] == ["ben"]
    desk.receive(_batch("ann"))
    answers = desk.receive(_weights("ann"))
    assert [(to, answer.kind) for to, answer in answers] == [("ann", "receipt"), ("ben", "handed")]
    assert [tensor.tolist() for tensor in answers[1][1].tensors.values()] == [SEALED.tolist()]
    assert desk.held() == []


def test_a_query_in_the_middle_of_ones_own_step_is_refused() -> None:
    stage = nn.Linear(3, 2)
    desk = Desk({"a": Server(stage, None)}, public=public_source(0))
    z = torch.ones(4, 3)
    first = Message("activations", "a", 0, {"activations": z, "labels": torch.zeros(4, dtype=torch.int64)}, 0, 2)
    desk.receive(first)
    assert not desk.resting
    with pytest.raises(MessageError, match="a training step of its is half done"):
        desk.receive(Message("queries", "a", 0, {"activations": z}))


def test_a_server_of_one_client_waits_for_nobody_else() -> None:
    assert Desk({"a": Server(nn.Linear(3, 2), None)}, public=public_source(0)).awaited() == []
