"""Formula and stated overheads are the bytes that were counted, in every way of split training."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch

from benchmarks.communication_formulas import played
from milkglass.codec import encode
from milkglass.costs import Scale, federated, split
from milkglass.costs_wire import Terms, Work, federated_bytes, frame_bytes, ring_bytes, split_bytes
from milkglass.errors import RecipeError
from milkglass.messages import Message
from tests.helpers import small_recipe

TWO_PERCENT = 0.02
NAMES = ("a", "ben", "the-third-client")
SGD = {"epochs": 2, "batch_size": 32, "optimizer": "sgd", "learning_rate": 0.1}
CNN = {"network": {"name": "cnn", "settings": {"width": 8, "hidden": 16}}, "cut": {"at": "block1"}}
U_SHAPED = {"cut": {"at": "hidden1", "back_at": "hidden2"}}
CASES: dict[str, dict[str, Any]] = {
    "relay of 1": {},
    "relay of 1, last batch kept": {"training": SGD | {"batch_size": 36, "drop_last_batch": False}},
    "relay of 1, last batch left out": {"training": SGD | {"batch_size": 36}},
    "relay of 2": {"parties": {"clients": NAMES[:2]}},
    "relay of 2, sgd": {"parties": {"clients": NAMES[:2]}, "training": SGD},
    "relay of 2, no momentum": {"parties": {"clients": NAMES[:2]}, "training": SGD | {"momentum": 0.0}},
    "relay of 3, pictures": {"parties": {"clients": NAMES}, **CNN},
    "U-shaped": U_SHAPED,
    "U-shaped of 2": {"parties": {"clients": NAMES[:2]}, **U_SHAPED},
    "splitfed1 of 2": {"parties": {"clients": NAMES[:2], "mode": "splitfed1"}},
    "splitfed2 of 2": {"parties": {"clients": NAMES[:2], "mode": "splitfed2"}},
    "splitfed1 of 3, U-shaped, unevenly": {
        "parties": {"clients": NAMES, "mode": "splitfed1"},
        "data": {"name": "digits", "train_records": 97, "test_records": 40, "test_share": 0.1},
        "training": {"epochs": 2, "batch_size": 10, "drop_last_batch": False, "learning_rate": 1e-2},
        **U_SHAPED,
    },
}
STAGE = (("stage.a", (10, 10)), ("stage.b", (60,)), ("stage.c", (40,)))  # 200 numbers
WORK = Work(("ann", "ben", "cat"), (8, 4, 4), 10, 300, 30, 200, 3, epochs=2, batch_size=32, stage=STAGE)


def in_a_list(tensors: dict[str, torch.Tensor]) -> list[tuple[str, int, int]]:
    return [(name, t.dim(), t.numel() * t.element_size()) for name, t in tensors.items()]


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 64])
@pytest.mark.parametrize("party", ["a", "server", "ümlaut"])
def test_a_frame_has_the_length_that_the_codec_gives_it(party: str, rows: int) -> None:
    for tensors in (
        {},
        {"activations": torch.zeros(rows, 3, 4, 4)},
        {"activations": torch.zeros(rows, 5), "labels": torch.zeros(rows, dtype=torch.int64)},
        {"gradient": torch.zeros(rows, 5), "loss": torch.zeros(()), "right": torch.zeros((), dtype=torch.int64)},
        {str(place): torch.zeros(rows + place, dtype=torch.uint8) for place in range(3)},
    ):
        message = Message("activations", party, 3, tensors)
        assert frame_bytes(party, *in_a_list(tensors)) == len(encode(message))


@pytest.mark.parametrize("case", CASES)
def test_split_training_sends_what_is_stated(case: str) -> None:
    """Each client, each way by itself: to the byte, and within 2 % where the tensors' names are not given."""
    work, counted = played(small_recipe(**CASES[case]))
    stated = [(flows.up.total, flows.down.total) for flows in split_bytes(work)]
    for told, found in zip(stated, counted, strict=True):
        assert found == told
    estimated = [(flows.up.total, flows.down.total) for flows in split_bytes(replace(work, stage=None))]
    for told, found in zip(estimated, counted, strict=True):
        assert found == pytest.approx(told, rel=TWO_PERCENT)


def test_the_papers_formula_alone_misses_what_was_counted() -> None:
    """So that the overheads are stated for a reason; and payload is the formula, exactly."""
    work, counted = played(small_recipe(parties={"clients": NAMES[:2]}))
    flows = split_bytes(work)
    assert sum(each.formula for each in flows) < 0.8 * sum(map(sum, counted))
    scale = Scale(2, 10_000, work.records, 16, work.client_parameters / 10_000)
    for each in flows:
        assert each.formula == pytest.approx(work.epochs * split(scale).total_bytes)


def test_terms_are_those_of_the_kinds_that_were_counted() -> None:
    """Where the bytes of a kind are known apart, its term must not hide in another one."""
    up, down = split_bytes(replace(WORK, clients=("ann", "ben")))[1].up, split_bytes(WORK)[1].down
    assert up.payload == 2 * 4 * 150 * 128
    assert up.left_out == -2 * 4 * (150 - 128) * 128
    assert up.labels == 2 * 8 * 128
    assert up.evaluation == 2 * 4 * 15 * 128
    assert up.weights == 2 * 4 * 200
    assert up.optimizer == 2 * (2 * 4 * 200 + 4 * 3)
    assert down.handed == 2 * 2 * (3 * 4 * 200 + 4 * 3)  # the one's before it, and the last one's; each epoch
    assert down.labels == 2 * 12 * (100 // 32)
    assert down.evaluation == 2 * 4 * 10 * 10


def test_in_splitfed_what_comes_down_grows_with_the_clients() -> None:
    """K eta N: each takes all the others' weights, as the server must not read them; the paper has eta N."""
    for count in (2, 4, 8):
        names = tuple(f"client{number}" for number in range(count))
        flows = split_bytes(replace(WORK, clients=names, records=1000 * count, mode="splitfed1"))
        assert {each.down.handed for each in flows} == {2 * count * 4 * 200}
        assert {each.up.weights for each in flows} == {2 * 4 * 200}
        assert {each.up.optimizer for each in flows} == {0}


@pytest.mark.parametrize("mode", ["relay", "splitfed1"])
def test_a_total_is_the_sum_of_its_terms_and_twice_the_epochs_send_twice(mode: Any) -> None:
    for once, twice in zip(
        split_bytes(replace(WORK, mode=mode, epochs=1)), split_bytes(replace(WORK, mode=mode, epochs=2)), strict=True
    ):
        for one, two in ((once.up, twice.up), (once.down, twice.down)):
            assert one.total == pytest.approx(sum(asdict(one).values()))
            for name in (each.name for each in fields(Terms) if each.name != "framing"):
                assert getattr(two, name) == 2 * getattr(one, name)
            assert one.framing < two.framing < 2 * one.framing  # clients enter once
        assert once.total == once.up.total + once.down.total


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clients": ()}, "0 clients, 2 epochs"),
        ({"epochs": 0}, "3 clients, 0 epochs"),
        ({"records": 90}, "90 records of 3 clients make no batch of 32 each"),
        ({"client_parameters": 201}, "stage has 200 numbers in 3 tensors; .* say 201 in 3"),
    ],
    ids=["no client", "no epoch", "no batch", "another stage"],
)
def test_work_that_cannot_be_dealt_out_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        replace(WORK, **changes)


def test_one_rank_sends_nothing_and_weights_go_in_one_piece() -> None:
    assert ring_bytes(1000, 1, 5).total == 0
    many, one = (ring_bytes(10**7, 4, 1, bucketed=bucketed) for bucketed in (True, False))
    assert many.formula == one.formula == 2 * 2 * 4 * 10**7 * 3 / 4
    assert many.up.framing > one.up.framing > 0


def test_a_federated_round_is_2n_and_tests_at_the_end_are_named() -> None:
    flows = federated_bytes(4 * 1000, rounds=3, closing_tests=1, messages_per_round=2, message_overhead_bytes=100)
    assert flows.formula == 3 * federated(Scale(2, 1000, 1, 1)).total_bytes
    assert flows.up.total == 3 * 4000 + 2 * 100 * 4
    assert flows.down.total == 4 * 4000 + 2 * 100 * 4
    assert federated_bytes(4000, 3, closing_tests=0).total == flows.formula
