"""The handshake names the first thing that differs, and the one that explains the others before them."""

from __future__ import annotations

import pytest

from milkglass.messages import Message
from milkglass.transports.agreement import Agreement, read_greeting, refused

OURS = Agreement({"seed": 0, "training": {"epochs": 2}}, (16,), classes=10, features=(10,))


def _told(theirs: Agreement) -> dict[str, object]:
    return read_greeting(Message("hello", "a", 0, {"told": theirs.told(run=0)}))


def test_parties_that_hold_the_same_agree() -> None:
    assert OURS.difference(_told(OURS)) is None


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        # a file that lacks a class makes another last layer as well: the classes are what explains it
        (Agreement(OURS.recipe, (16,), classes=9, features=(9,)), "classes is 10 here and 9 there"),
        (Agreement(OURS.recipe, (16,), classes=10, features=(8,)), "features is [10] here and [8] there"),
        (Agreement(OURS.recipe, (8,), classes=9, features=(9,)), "cut shape is [16] here and [8] there"),
        (
            Agreement({"seed": 0, "training": {"epochs": 3}}, (16,), classes=10, features=(10,)),
            "recipe: training.epochs is 2 here and 3 there",
        ),
    ],
)
def test_the_difference_is_named_with_both_values(theirs: Agreement, words: str) -> None:
    assert OURS.difference(_told(theirs)) == words


def test_what_a_server_says_of_a_refusal_cannot_write_on_the_terminal_or_fill_it() -> None:
    words = str(refused("\x1b[2Jno\n" + "x" * 10_000))
    assert words.isprintable()
    assert len(words) < 1100
