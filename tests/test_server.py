"""A server by itself: with labels or without, whole batches and pieces, and that who is refused changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.errors import MessageError, MilkglassError
from milkglass.messages import Message
from milkglass.randomness import Source, drawing_from, public_source
from milkglass.server import Server
from tests.helpers import KEY

Z = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


def _server(*, u_shaped: bool = False, dropout: float = 0.0) -> Server:
    with drawing_from(public_source(0).generator("w")):
        stage = nn.Sequential(nn.Linear(4, 5), nn.Dropout(dropout), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1, momentum=0.9)
    return Server(stage, optimizer, loss=None if u_shaped else F.cross_entropy, cut_shape=(4,), source=Source(KEY))


def _batch(piece: int = 0, pieces: int = 1, step: int = 0, *, labels: bool = True) -> Message:
    z, y = Z.tensor_split(pieces)[piece], Y.tensor_split(pieces)[piece]
    return Message("activations", "ann", step, {"activations": z, **({"labels": y} if labels else {})}, piece, pieces)


def _state(server: Server) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in server.state().items()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_a_step_is_taken_once_after_the_last_piece(pieces: int) -> None:
    server = _server()
    stage, optimizer = copy.deepcopy(server.stage), torch.optim.SGD
    twin = optimizer(stage.parameters(), lr=0.1, momentum=0.9)
    before = _state(server)
    for step in range(3):
        twin.zero_grad()
        for piece in range(pieces):
            assert server.resting == (piece == 0)
            assert _same(_state(server), before)
            answer = server.reply(_batch(piece, pieces, step))
            assert (answer.kind, answer.step, answer.piece, answer.pieces) == ("gradients", step, piece, pieces)
            z = Z.tensor_split(pieces)[piece].clone().requires_grad_()
            loss = F.cross_entropy(stage(z), Y.tensor_split(pieces)[piece])
            (loss / pieces).backward()  # type: ignore[no-untyped-call]
            assert torch.equal(answer.tensors["loss"], loss.detach())
            assert z.grad is not None
            assert torch.equal(answer.tensors["gradient"], z.grad)
        twin.step()
        assert server.resting
        assert not _same(_state(server), before)
        before = _state(server)
        assert all(torch.equal(tensor, server.stage.state_dict()[name]) for name, tensor in stage.state_dict().items())


@pytest.mark.parametrize("early", [True, False], ids=["returns as features come", "returns at the end"])
def test_u_shaped_the_step_waits_for_the_last_gradient(early: bool) -> None:
    pieces = 4
    server = _server(u_shaped=True)
    stage = copy.deepcopy(server.stage)
    twin = torch.optim.SGD(stage.parameters(), lr=0.1, momentum=0.9)
    before = _state(server)
    gradients = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).tensor_split(pieces)

    def give_back(piece: int) -> None:
        assert not server.resting
        assert _same(_state(server), before)
        answer = server.reply(Message("returns", "ann", 0, {"gradient": gradients[piece]}, piece, pieces))
        assert set(answer.tensors) == {"gradient"}
        z = Z.tensor_split(pieces)[piece].clone().requires_grad_()
        stage(z).backward(gradients[piece])
        assert z.grad is not None
        assert torch.equal(answer.tensors["gradient"], z.grad)

    for piece in range(pieces):
        answer = server.reply(_batch(piece, pieces, labels=False))
        assert set(answer.tensors) == {"features"}
        assert torch.equal(answer.tensors["features"], stage(Z.tensor_split(pieces)[piece]))
        if early:
            give_back(piece)
    if not early:
        for piece in range(pieces):
            give_back(piece)
    twin.step()
    assert server.resting
    assert all(torch.equal(tensor, server.stage.state_dict()[name]) for name, tensor in stage.state_dict().items())


@pytest.mark.parametrize(
    ("u_shaped", "message", "words"),
    [
        (True, _batch(), "labels, where they stay with the client"),
        (False, _batch(labels=False), "expected an int64 label for each of 8 records"),
        (False, _batch(1, 2), "piece 1 of 2; expected piece 0"),
        (True, Message("returns", "ann", 0, {"gradient": Z}), "no features of step 0, piece 0 of 1, are out"),
        (False, Message("returns", "ann", 0, {"gradient": Z}), "no features of step 0, piece 0 of 1, are out"),
        (False, Message("activations", "ann", 0, {"activations": Z, "labels": Y + 1}), "labels from 1 to 3"),
        (False, Message("queries", "ann", 0, {"activations": Z[:, :3]}), "do not have the shape agreed on"),
    ],
)
def test_who_is_refused_moves_neither_weights_nor_dropout(u_shaped: bool, message: Message, words: str) -> None:
    server, undisturbed = (_server(u_shaped=u_shaped, dropout=0.5) for _ in range(2))
    before = _state(server)
    with pytest.raises(MessageError, match=words):
        server.reply(message)
    assert _same(_state(server), before)
    assert server.resting
    answers = [each.reply(_batch(labels=not u_shaped)) for each in (server, undisturbed)]
    assert _same(dict(answers[0].tensors), dict(answers[1].tensors))
    assert _same(_state(server), _state(undisturbed))


def test_a_loss_that_is_not_finite_ends_the_training_before_the_step() -> None:
    server = _server()
    before = _state(server)
    tensors = {"activations": torch.full((2, 4), 3e38), "labels": Y[:2]}
    with pytest.raises(MilkglassError, match=r"step 7: the loss is (nan|inf); training has diverged"):
        server.reply(Message("activations", "ann", 7, tensors))
    assert _same(_state(server), before)


def test_a_question_between_pieces_changes_nothing() -> None:
    for u_shaped in (False, True):
        asked, left_alone = (_server(u_shaped=u_shaped, dropout=0.5) for _ in range(2))
        answers: list[list[Any]] = [[], []]
        for server, said in zip((asked, left_alone), answers, strict=True):
            for piece in range(2):
                said.append(server.reply(_batch(piece, 2, labels=not u_shaped)))
                if server is asked:
                    server.reply(Message("queries", "ben", 0, {"activations": Z}))
            if u_shaped:
                for piece in range(2):
                    returned = {"gradient": torch.ones(4, 3)}
                    said.append(server.reply(Message("returns", "ann", 0, returned, piece, 2)))
        for one, other in zip(*answers, strict=True):
            assert _same(dict(one.tensors), dict(other.tensors))
        assert _same(_state(asked), _state(left_alone))


def test_a_snapshot_answers_as_now_and_never_learns() -> None:
    server = _server(dropout=0.5)
    server.reply(_batch())
    question = Message("queries", "ben", 1, {"activations": Z})
    copied, now = server.snapshot(), server.reply(question).tensors["logits"]
    for step in range(1, 4):
        server.reply(_batch(step=step))
    assert torch.equal(copied.reply(question).tensors["logits"], now)
    assert not torch.equal(server.reply(question).tensors["logits"], now)
    weights = {name: tensor.clone() for name, tensor in copied.weights().items()}
    copied.reply(_batch(step=4))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in copied.weights().items())
    with pytest.raises(MessageError, match="shape agreed on"):
        server.snapshot().reply(Message("queries", "ben", 1, {"activations": Z[:, :2]}))


def test_a_gradient_that_is_not_finite_takes_no_step() -> None:
    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
            return x.clone()

        @staticmethod
        def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
            return grads[0] * torch.inf

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(Spoiled.apply(x))  # type: ignore[no-untyped-call, no-any-return]

    stage = Stage()
    before = [p.detach().clone() for p in stage.parameters()]
    server = Server(stage, torch.optim.SGD(stage.parameters(), lr=0.1))
    tensors = {"activations": torch.ones(4, 3), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(MilkglassError, match="the gradient is not finite"):
        server.reply(Message("activations", "a", 0, tensors))
    assert all(torch.equal(p, old) for p, old in zip(stage.parameters(), before, strict=True))
