"""The recommendation: each rule can turn it, and what it says follows from the rows and needs alone."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from milkglass.compare import MEASURED, MODELLED, Cell, Row
from milkglass.compare_advice import Advice, advise, seconds_of
from milkglass.compare_section import CompareSection
from milkglass.figures import amount, duration
from milkglass.leakage.estimate import Estimate


def row(name: str, **changes: Any) -> Row:
    """A measured row of a cell as its folder is called; figures are numbers, `status` and others as they are."""
    training, protection, clients = name.rsplit("-", 2)
    told: dict[str, Any] = {"accuracy": 0.95, "peek": 0.3, "seconds": 10.0, "client_flops": 1e9, "status": MEASURED}
    told |= {"bytes_up": 1e6, "bytes_down": 1e6} | changes
    for figure, half in (("accuracy", 0.01), ("peek", 0.05)):
        value = told[figure]
        if isinstance(value, float):
            told[figure] = Estimate(value, value - half, value + half)
    return Row(Cell(training, protection, int(clients)), **told)


def needs(**changes: Any) -> CompareSection:
    return CompareSection(clients=changes.pop("clients", (2,)), **changes)


def one(rows: list[Row], **changes: Any) -> Advice:
    (advice,) = advise(rows, needs(**changes))
    return advice


def chosen(rows: list[Row], **changes: Any) -> str | None:
    found = one(rows, **changes).chosen
    return None if found is None else found.cell.name


FAST, OTHER = "split-none-2", "u_shaped-none-2"


@pytest.mark.parametrize(
    ("turned", "stated"),
    [
        pytest.param({"status": MODELLED}, {}, id="modelled"),
        pytest.param({"status": "no library"}, {}, id="not run"),
        pytest.param({"sound": False}, {}, id="unsound"),
        pytest.param({"inference": True}, {}, id="of answers"),
        pytest.param({"peek": 0.8}, {"peek_at_most": 0.5}, id="peek"),
        pytest.param({"peek": 0.46}, {"peek_at_most": 0.5}, id="upper end of peek"),
        pytest.param({"peek": None}, {"peek_at_most": 1.0}, id="peek unmeasured"),
        pytest.param({"peek": Estimate(0.1, math.nan, math.nan)}, {"peek_at_most": 1.0}, id="no interval"),
        pytest.param({"guarantee": None, "guarantee_covers": False}, {"guarantee": True}, id="guarantee"),
        pytest.param({"guarantee_covers": False}, {"guarantee": True}, id="guarantee of something else"),
        pytest.param({"accuracy": 0.9}, {}, id="accuracy"),
        pytest.param({"accuracy": None}, {}, id="accuracy unmeasured"),
        pytest.param({"seconds": 20.0}, {}, id="seconds"),
        pytest.param({"seconds": None}, {}, id="seconds unmeasured"),
        pytest.param({"bytes_up": 1e8}, {"uplink_mbit_per_second": 20.0}, id="bytes up"),
        pytest.param({"bytes_down": 1e8}, {"downlink_mbit_per_second": 20.0}, id="bytes down"),
        pytest.param({"bytes_up": None}, {"uplink_mbit_per_second": 20.0}, id="bytes unmeasured"),
        pytest.param({"seconds": 8.0, "peek": 0.31}, {}, id="ten percent and peek"),
        pytest.param({"seconds": 7.5, "client_flops": 2e9}, {}, id="flops"),
    ],
)
def test_each_rule_turns_the_choice(turned: dict[str, Any], stated: dict[str, Any]) -> None:
    words = {"guarantee": "yes", "guarantee_covers": True}
    rows = [row(FAST, seconds=7.5, **words), row(OTHER, seconds=8.0, **words)]
    assert chosen(rows, **stated) == FAST
    rows[0] = row(FAST, **{"seconds": 7.5} | words | turned)
    advice = one(rows, **stated)
    assert advice.chosen is rows[1]
    dropped = [(each.cell.name, why) for rule in advice.rules for each, why in rule.dropped]
    assert [name for name, _ in dropped] == [FAST]
    assert dropped[0][1]


def test_labels_that_must_stay_turn_the_choice() -> None:
    rows = [row(FAST, seconds=1.0), row("splitfed-none-2", seconds=1.0), row(OTHER, seconds=50.0)]
    assert chosen(rows) == FAST
    assert chosen(rows, labels_stay=True) == OTHER


def test_records_never_leave_and_the_yardstick_still_measures_accuracy() -> None:
    rows = [row("whole-none-1", accuracy=0.99, seconds=0.1, peek=0.0), row(FAST, accuracy=0.965), row(OTHER)]
    assert chosen(rows) is None
    assert one(rows).nearest is rows[1]
    assert chosen(rows, accuracy_lost_at_most=0.03) == FAST
    assert chosen([row("whole-none-1")]) is None


def test_the_best_accuracy_is_of_all_measured_trainings_and_of_no_encrypted_answers() -> None:
    rows = [row(FAST, accuracy=0.9), row("split-homomorphic-2", accuracy=1.0, inference=True)]
    assert chosen(rows) == FAST
    assert chosen([*rows, row("u_shaped-none-2", accuracy=0.93, sound=False)]) is None
    two, ten = advise([*rows, row("split-none-10", accuracy=0.93)], needs(clients=(2, 10)))
    assert two.chosen is None
    assert ten.chosen is not None


@pytest.mark.parametrize(
    ("stated", "at", "beyond"),
    [
        ({"peek_at_most": 0.35}, {"peek": Estimate(0.3, 0.2, 0.35)}, {"peek": Estimate(0.3, 0.2, 0.3501)}),
        ({}, {"accuracy": 0.95}, {"accuracy": 0.9499}),  # 0.97 - 0.95 > 0.02 in floating point
        ({"accuracy_lost_at_most": 0.0}, {"accuracy": 0.97}, {"accuracy": 0.9699}),
    ],
    ids=["peek", "accuracy", "no loss"],
)
def test_a_row_at_a_limit_is_within_it(stated: dict[str, Any], at: dict[str, Any], beyond: dict[str, Any]) -> None:
    slow = row(OTHER, seconds=99.0, peek=0.1, accuracy=0.97)
    assert chosen([row(FAST, **at), slow], **stated) == FAST
    assert chosen([row(FAST, **beyond), slow], **stated) == OTHER


@pytest.mark.parametrize(("seconds", "expected"), [(10.99, OTHER), (11.0, FAST), (11.01, FAST)])
def test_less_than_ten_percent_apart_is_equal(seconds: float, expected: str) -> None:
    assert chosen([row(FAST, seconds=10.0, peek=0.3), row(OTHER, seconds=seconds, peek=0.2)]) == expected


def test_time_is_computing_and_both_transfers_added() -> None:
    given = row("splitfed-none-2", seconds=3.0, bytes_up=5e6, bytes_down=1e6)
    assert seconds_of(given, needs()) == 3.0
    assert seconds_of(given, needs(uplink_mbit_per_second=20.0)) == pytest.approx(3 + 2)
    both = needs(uplink_mbit_per_second=20.0, downlink_mbit_per_second=8.0)
    assert seconds_of(given, both) == pytest.approx(3 + 2 + 1)
    assert seconds_of(row(FAST, seconds=3.0, bytes_down=None), both) is None


@pytest.mark.parametrize(
    ("name", "transfers"), [("split-none-10", 10), ("u_shaped-none-2", 2), ("federated-none-10", 1)]
)
def test_clients_who_take_turns_send_one_after_the_other(name: str, transfers: int) -> None:
    """Twenty megabits take a second at this rate."""
    given = row(name, seconds=0.0, bytes_up=2.5e6)
    assert seconds_of(given, needs(uplink_mbit_per_second=20.0)) == pytest.approx(transfers)


def test_equal_rows_keep_their_order() -> None:
    names = [FAST, OTHER, "federated-none-2"]
    for turn in range(3):
        order = names[turn:] + names[:turn]
        advice = one([row(name) for name in order])
        assert advice.chosen is not None
        assert advice.chosen.cell.name == order[0]
        assert "3 of them are equal" in advice.why
        assert advice.headline.startswith("no needs stated: ")


def test_what_no_row_has_decides_nothing() -> None:
    rows = [row(FAST, seconds=None, peek=None, client_flops=None), row(OTHER, seconds=None, peek=None)]
    assert chosen(rows) == OTHER  # by FLOPs, which one of them has
    assert chosen(rows[::-1]) == OTHER


@pytest.mark.parametrize(
    ("changes", "stated", "words"),
    [
        ({"peek": 0.5}, {"peek_at_most": 0.4}, "The limit on peek dropped the last 2"),
        ({"accuracy": 0.5}, {}, "The limit on lost accuracy dropped the last 2"),
        ({}, {"guarantee": True}, "The need of a guarantee dropped the last 2"),
    ],
    ids=["peek", "accuracy", "guarantee"],
)
def test_where_nothing_is_left_it_says_which_rule_and_by_how_much(
    changes: dict[str, Any], stated: dict[str, Any], words: str
) -> None:
    worse = {name: value + (0.2 if name == "peek" else -0.1) for name, value in changes.items()}
    rows = [row("whole-none-1"), row(OTHER, **worse), row(FAST, **changes)]
    advice = one(rows, **stated)
    assert advice.chosen is None
    assert advice.why.startswith(words)
    assert advice.rules[-1].kept == 0
    assert "nothing fits, with 2 clients" in advice.headline
    if changes:
        assert advice.nearest is rows[2]
        assert {"peek": "over by 0.150 in peek", "accuracy": "over by 43 points"}[next(iter(changes))] in advice.why


def test_nothing_is_near_where_nothing_was_measured() -> None:
    advice = one([row(FAST, status=MODELLED), row(OTHER, status="not installed")])
    assert advice.chosen is advice.nearest is None
    assert [why for _, why in advice.rules[0].dropped] == ["modelled, not measured", "not run: not installed"]
    assert one([]).chosen is None


def test_the_rules_account_for_every_row() -> None:
    rows = [row(FAST), row(OTHER, peek=0.9), row("splitfed-none-2", sound=False), row("whole-none-1")]
    rows += [row("federated-none-2", accuracy=0.5), row("large_batch-none-2", seconds=99.0)]
    advice = one(rows, peek_at_most=0.5)
    assert sum(len(rule.dropped) for rule in advice.rules) + advice.rules[-1].kept == len(rows)
    left = len(rows)
    for rule in advice.rules:
        left -= len(rule.dropped)
        assert rule.kept == left


def test_clients_are_given_and_not_chosen() -> None:
    rows = [row("whole-none-1"), row(FAST, seconds=50.0), row("split-none-10", seconds=1.0)]
    rows += [row("federated-secure_aggregation-3", seconds=2.0), row("adaptive-none-4")]
    two, ten, four = advise(rows, needs(clients=(2, 10)))
    assert [two.clients, ten.clients, four.clients] == [2, 10, 4]
    assert two.chosen is rows[1]
    dropped = {each.cell.name: why for rule in two.rules for each, why in rule.dropped}
    assert dropped["federated-secure_aggregation-3"] == "needs 3 clients"
    assert ten.chosen is rows[2]
    assert four.chosen is rows[4]
    for advice in (two, ten, four):
        assert any(each.cell.training == "whole" for rule in advice.rules for each, _ in rule.dropped)


def test_encrypted_answers_are_an_addition_to_a_split_network_alone() -> None:
    shield = {"inference": True, "records": 100, "seconds": 50.0, "bytes_up": 3e6, "bytes_down": 1e6}
    answers = [row(f"{way}-homomorphic-2", **shield) for way in ("split", "u_shaped")]
    answers += [row("split-two_party-2", **shield), row("split-garbled-2", status="no library", inference=True)]
    advice = one([*answers, row(OTHER)])
    assert advice.chosen is not None
    assert [each.cell.name for each in advice.afterwards] == ["u_shaped-homomorphic-2", "split-two_party-2"]
    assert advice.to_dict()["afterwards"][0]["costs"] == "40.0 kB and 0.500 s an answer"
    assert one([*answers, row("federated-none-2")]).afterwards == ()


def test_a_choice_that_shows_much_says_so_where_no_limit_was_stated() -> None:
    much, little = row(FAST, peek=0.3), row(FAST, peek=0.1)
    assert "it shows much (peek 0.30)" in one([much]).headline
    assert "shows much" not in one([little]).headline
    assert "shows much" not in one([much], peek_at_most=0.9).headline


def test_the_headline_says_the_needs_and_then_the_choice() -> None:
    stated: dict[str, Any] = {"labels_stay": True, "uplink_mbit_per_second": 20.0}
    advice = one([row("u_shaped-channel-2", peek=0.1)], **stated)
    assert advice.headline == "labels must stay, 20 Mbit/s up: split, U-shaped, channel, 2 clients"
    stated |= {"peek_at_most": 0.5, "guarantee": True, "downlink_mbit_per_second": 100.0, "accuracy_lost_at_most": 0.01}
    told = one([row("u_shaped-channel-2", guarantee="yes")], **stated).headline.split(": ")[0]
    assert told == (
        "labels must stay, peek at most 0.5, a formal guarantee, 20 Mbit/s up, 100 Mbit/s down, "
        "at most 1 point of accuracy lost"
    )


def test_it_goes_into_json_and_names_every_row_that_it_dropped() -> None:
    rows = [row(FAST, peek=None), row(OTHER), row("splitfed-none-2", seconds=None)]
    advice = one(rows, peek_at_most=0.5)
    told = json.loads(json.dumps(advice.to_dict(), allow_nan=False))
    assert told["chosen"] == {"training": "u_shaped", "protection": "none", "clients": 2, "words": rows[1].cell.words}
    words = [each["words"] for rule in told["rules"] for each in rule["dropped"]]
    assert words == [rows[0].cell.words, rows[2].cell.words]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_999, "1.00 MB"),
        (1.234e9, "1.23 GB"),
        (-220_000, "−220 kB"),
        (None, "–"),
    ],
    ids=str,
)
def test_amounts_have_three_digits_and_a_unit(value: float | None, told: str) -> None:
    assert amount(value, "B") == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.0123, "0.012 s"), (59.94, "59.9 s"), (599.0, "599.0 s"), (1800.0, "30.0 min"), (72_000.0, "20.0 h")],
)
def test_durations_have_a_unit(seconds: float, told: str) -> None:
    assert duration(seconds) == told
