"""Where a message changes nothing: asked again, the same answer comes, and only questions are taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from milkglass.codec import decode, encode
from milkglass.compression.base import Identity
from milkglass.errors import MessageError
from milkglass.messages import Addressed, Message
from milkglass.training.answer import only
from milkglass.transports.agreement import Crossing
from milkglass.transports.queries import QueryTaker

RUN = 5
QUESTION = Message("queries", "a", 0, {"activations": torch.arange(6.0).reshape(2, 3)}, number=7)


class _Doubling:
    """Answers with twice what came, to whoever asked."""

    def receive(self, message: Message) -> list[Addressed]:
        return [(message.party, Message("predictions", "server", 0, {"logits": 2 * message.tensors["activations"]}))]


@pytest.fixture
def taker() -> QueryTaker:
    crossing = Crossing((3,), None, 3, rows=4, compressor=Identity())
    return QueryTaker(_Doubling(), {name: only(crossing.to_server(), "queries") for name in ("a", "b")}, run=RUN)


def test_a_repeated_question_gets_the_same_answer_under_its_own_number(taker: QueryTaker) -> None:
    found = []
    for number in (7, 7, 0, 7):  # a client's next process begins at 0 again
        frame = encode(replace(QUESTION, number=number), RUN)
        message = taker.check("a", frame)
        assert taker.again("a", message, frame) is None
        ((to, answer),) = taker.take("a", message, frame)
        assert to == "a"
        assert decode(answer, run=RUN).number == number
        torch.testing.assert_close(decode(answer).tensors["logits"], 2 * QUESTION.tensors["activations"])
        found.append(answer)
    assert found[0] == found[1] == found[3] != found[2]
    assert not taker.owes("a")


@pytest.mark.parametrize(
    ("message", "run", "words"),
    [
        (replace(QUESTION, party="b"), RUN, "a frame of 'b' came from 'a'"),
        (QUESTION, RUN + 1, "run"),
        (replace(QUESTION, kind="activations"), RUN, "activations"),
        (Message("goodbye", "a", 0), RUN, "goodbye"),
        (replace(QUESTION, tensors={"activations": torch.zeros(5, 3)}), RUN, "5"),
        (replace(QUESTION, tensors={"activations": torch.zeros(2, 4)}), RUN, "4"),
    ],
)
def test_nothing_else_is_taken(taker: QueryTaker, message: Message, run: int, words: str) -> None:
    assert taker.check("a", encode(QUESTION, RUN)).number == 7
    with pytest.raises(MessageError, match=words):
        taker.check("a", encode(message, run))
