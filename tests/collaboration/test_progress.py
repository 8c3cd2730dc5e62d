"""Where a run stands, by what all say: no single liar moves it, and what is no report is none."""

from __future__ import annotations

import asyncio
import math
import statistics
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milkglass.collaboration.board import Board
from milkglass.collaboration.progress import (
    KEPT_STATES,
    STALE_SECONDS,
    Pace,
    Progress,
    Report,
    agreed_state,
    judge,
    read_report,
)
from milkglass.errors import MessageError

NOW = 1_000_000.0
TARGET = 1000
CAP = 4.0


def said(epoch: int = 5, samples: int = 50, rate: float = 10.0, **changes: Any) -> Report:
    """A volunteer's report."""
    report = Report(
        epoch=epoch,
        samples=samples,
        rate=rate,
        time=NOW,
        reachable=True,
        trains=True,
        recipe=b"recipe",
        history=b"history",
        states=((epoch, b"state"),),
    )
    return replace(report, **changes)


def judged(own: Report, others: list[Report], pace: Pace | None = None, cap: float = CAP) -> Progress:
    named = {bytes([index]): report for index, report in enumerate(others)}
    return judge(own, named, target=TARGET, cap=cap, pace=pace)


honest_runs = st.tuples(
    st.integers(0, 50),  # epoch
    st.lists(
        st.tuples(st.integers(0, 900), st.floats(0, 100)), min_size=3, max_size=9
    ),  # (samples, rate) of the others
    st.tuples(st.integers(0, 900), st.floats(0, 100)),
)
lies = st.builds(
    said,
    epoch=st.integers(0, 1 << 39),
    samples=st.integers(0, 1 << 39),
    rate=st.floats(0, 1e11),
    time=st.floats(NOW - STALE_SECONDS, NOW + STALE_SECONDS),
    trains=st.booleans(),
    history=st.binary(max_size=32),
)


@given(honest_runs, lies)
def test_one_liar_moves_no_epoch_and_fills_no_batch(
    run: tuple[int, list[tuple[int, float]], tuple[int, float]], lie: Report
) -> None:
    """Among three others or more: the epoch is the honest one's, the counted claims are bounded by honest ones."""
    epoch, claims, (own_samples, own_rate) = run
    honest = [said(epoch, samples, rate) for samples, rate in claims]
    own = said(epoch, own_samples, own_rate)
    found = judged(own, [*honest, lie])
    assert found.epoch == epoch
    assert found.history == b"history"
    most = max(claim.samples for claim in [own, *honest])
    honest_sum = sum(claim.samples for claim in [own, *honest])
    assert found.samples <= honest_sum + CAP * most
    assert found.samples <= own_samples + CAP * most * (len(honest) + 1)
    assert found.rate <= sum(each.rate for each in [own, *honest]) + CAP * max(each.rate for each in [own, *honest])


@given(honest_runs, lies)
def test_one_liar_holds_nobody_back(run: tuple[int, list[tuple[int, float]], tuple[int, float]], lie: Report) -> None:
    """Whoever is behind sees that the others are further; and with equal claims a batch is full with the liar's or not.

    The claims of equally fast volunteers all count, whatever one more says.
    """
    epoch, claims, own_claim = run
    behind = said(epoch, *own_claim)
    assert judged(behind, [*[said(epoch + 3, *claim) for claim in claims], lie]).epoch == epoch + 3
    samples = TARGET // (len(claims) + 1) + 1
    honest = [said(epoch, samples) for _ in claims]
    assert judged(said(epoch, samples), [*honest, lie]).ready


@pytest.mark.parametrize("others", range(1, 7))
@pytest.mark.parametrize("cap", [1.0, 2.0, 4.0])
def test_counted_records_are_bounded(others: int, cap: float) -> None:
    """n others who claim all there is count for n * cap times the typical one at most, and only if half of all lie."""
    liars = [said(samples=1 << 39, rate=0.0) for _ in range(others)]
    own = said(samples=30, rate=0.0)
    one = judged(own, [said(samples=30, rate=0.0)] * (others - 1) + liars[:1], cap=cap)
    assert one.samples == 30 + 30 * (others - 1) + 30 * cap
    if others == 1:
        assert judged(own, liars, cap=cap).samples == 30 + cap * 30


@pytest.mark.parametrize("others", range(1, 5))
def test_a_full_batch_just_after_a_step_is_nobodys_word(others: int) -> None:
    """All are at 0 records then. One who claims all of them would else step alone, along his own gradients."""
    fresh = [said(samples=0, rate=rate) for rate in [0.0] * others]
    found = judged(said(samples=0, rate=0.0), [*fresh[1:], said(samples=1 << 39, rate=1e9)])
    assert found.samples == 0
    assert found.rate == 0
    assert not found.ready
    assert found.seconds_left == math.inf


def test_an_auxiliary_counts_for_no_records() -> None:
    found = judged(said(samples=10, rate=1.0), [said(samples=9999, rate=9999.0, trains=False)])
    assert (found.samples, found.rate) == (10, 1)
    found = judged(said(samples=0, trains=False, rate=0.0), [said(samples=10, rate=1.0), said(samples=30, rate=1.0)])
    assert (found.samples, found.rate) == (40, 2)


def test_two_alone_can_do_to_each_other_what_is_said() -> None:
    """The other's epoch counts, as fast as his speed allows; his records as `cap` times one's own."""
    liar = said(epoch=9, samples=1 << 39, rate=1e11)
    assert judged(said(epoch=5), [liar]).epoch == 9
    pace = Pace(TARGET)
    judged(said(epoch=5, rate=10.0), [said(epoch=5, rate=10.0)], pace)
    assert judged(said(epoch=5, time=NOW + 1), [replace(liar, epoch=1000)], pace).epoch == 7
    own = said(epoch=5, samples=50, rate=10.0)
    found = judged(own, [replace(liar, epoch=5)])
    assert (found.samples, found.rate) == (50 + 4 * 50, 10 + 4 * 10)


def test_the_majority_decides_however_far_a_minority_is() -> None:
    for others in range(1, 8):
        for ahead in range(others + 1):
            reports = [said(epoch=8)] * ahead + [said(epoch=5)] * (others - ahead)
            expected = 8 if 2 * ahead > others else 5
            assert judged(said(epoch=5), reports).epoch == expected
    assert judged(said(epoch=9), [said(epoch=5)] * 3).epoch == 9  # its own steps it need not believe


def test_history_is_that_of_most_at_the_epoch() -> None:
    mine, theirs = said(history=b"mine"), said(history=b"theirs")
    assert judged(mine, [theirs, theirs]).history == b"theirs"
    assert judged(mine, [theirs]).history == judged(theirs, [mine]).history == b"mine"  # a tie: the smaller one
    behind = said(epoch=4, history=b"theirs")
    assert judged(mine, [theirs, behind]).history == b"mine"  # who is behind has no say
    assert judged(mine, [mine, theirs, theirs]).history == b"mine"


def test_here_counts_who_may_come() -> None:
    others = [said(epoch=epoch) for epoch in (5, 4, 3, 2, 5)]
    assert judged(said(epoch=5), others).here == 5
    assert judged(said(epoch=5), others).peers == 6


def test_pace_bounds_what_most_claim() -> None:
    """At 100 records a second and a batch of 1000 an epoch takes 10 s; four times as fast is believed, and two more."""
    pace = Pace(1000)
    assert pace.believable(77, 0.0) == 77  # nothing was seen yet
    pace.seen(10, 100.0, 0.0)
    assert pace.believable(11, 0.0) == 11
    assert pace.believable(10**9, 0.0) == 12
    assert pace.believable(10**9, 100.0) == 10 + 40 + 2
    assert pace.believable(3, 100.0) == 3
    pace.seen(12, 50.0, 100.0)
    assert pace.believable(10**9, 110.0) == 12 + 2 + 2


@given(st.lists(lies, min_size=0, max_size=5), st.lists(st.floats(0, 1e7), max_size=5))
def test_judge_never_fails_and_never_goes_back(others: list[Report], steps: list[float]) -> None:
    pace, epoch, now = Pace(TARGET), 5, NOW
    for step in steps:
        now += step
        found = judged(said(epoch=epoch, time=now), others, pace)
        assert found.epoch >= epoch
        assert found.samples >= 0
        assert found.rate >= 0
        epoch = found.epoch


like_msgpack = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=4),
    max_leaves=12,
)
names = list(said().to_dict())


@given(like_msgpack)
def test_what_is_no_report_is_none(content: object) -> None:
    assert read_report(content, NOW) is None


@given(st.dictionaries(st.sampled_from(names), like_msgpack, min_size=1, max_size=3))
def test_a_report_with_strange_values_never_raises(changes: dict[str, Any]) -> None:
    """None, or one whose numbers can be counted with."""
    report = read_report(said().to_dict() | changes, NOW)
    if report is not None:
        assert 0 <= report.samples < 1 << 40
        assert 0 <= report.rate < 1 << 40
        judged(said(), [report, report], Pace(TARGET))
        agreed_state([report, said()], 5)


def test_a_report_survives_the_journey() -> None:
    for report in (said(), said(loss=0.5), said(trains=False, reachable=False, states=())):
        assert read_report(report.to_dict(), NOW) == report


@pytest.mark.parametrize(
    "changes",
    [
        {"time": NOW - STALE_SECONDS - 1},
        {"time": NOW + STALE_SECONDS + 1},
        {"time": math.nan},
        {"epoch": -1},
        {"epoch": 1 << 63},
        {"samples": -1},
        {"samples": 1 << 63},
        {"rate": -0.5},
        {"rate": 1e300},
        {"rate": math.inf},
        {"rate": math.nan},
        {"rate": 3},
        {"epoch": True},
        {"samples": False},
        {"states": [[True, b"state"]]},
        {"loss": math.inf},
        {"loss": 1},
        {"recipe": "recipe"},
        {"history": bytes(65)},
        {"states": [[5, b"state", 1]]},
        {"states": [[5, bytes(65)]]},
        {"states": [[b"5", b"state"]]},
        {"states": [[5, b"state"]] * (KEPT_STATES + 1)},
        {"more": 1},
    ],
)
def test_stale_and_malformed(changes: dict[str, Any]) -> None:
    content = said().to_dict()
    assert read_report(content, NOW) is not None
    assert read_report(content | changes, NOW) is None


def test_a_report_that_lacks_something() -> None:
    for name in names:
        content = said().to_dict()
        del content[name]
        assert read_report(content, NOW) is None


def states(*entries: tuple[int, bytes]) -> Report:
    return said(states=entries)


def test_agreed_state_is_the_word_of_most_one_each() -> None:
    honest, liar = states((5, b"true")), states(*[(5, b"lie")] * KEPT_STATES)
    assert agreed_state([honest, honest, liar], 5) == b"true"
    assert agreed_state([honest, liar], 5) is None
    assert agreed_state([honest], 5) is None  # one word is nobody else's
    assert agreed_state([states((5, b"a")), states((5, b"b")), states((5, b"c"))], 5) is None
    both = states((4, b"before"), (5, b"true"))
    assert agreed_state([both, both, states((5, b"true"))], 4) == b"before"


def test_a_state_that_few_know_of_is_none_to_take() -> None:
    """An epoch that one donor made up, or that all have forgotten."""
    honest = [states((5, b"true"))] * 3
    for epoch in (4, 6, 10**9):
        with pytest.raises(MessageError, match=f"epoch {epoch}, of which 0 of 3"):
            agreed_state(honest, epoch)
    with pytest.raises(MessageError, match="1 of 4"):
        agreed_state([*honest, states((6, b"lie"))], 6)


def test_a_newcomer_does_not_vote() -> None:
    """It reads the board, and puts nothing up until it has the state of the others."""
    stored: list[object] = []

    async def store(*arguments: object, **_: object) -> None:
        stored.append(arguments[1])

    node = SimpleNamespace(dht=SimpleNamespace(store=store), identity=SimpleNamespace(peer_id=b"id"))
    board = Board(node, "run", said)  # type: ignore[arg-type]
    asyncio.run(board.tell())
    asyncio.run(board.leave())
    assert not stored
    board.is_newcomer = False
    asyncio.run(board.tell())
    assert stored == [said().to_dict()]
    asyncio.run(board.leave())
    assert stored[1:] == [None]
    assert read_report(None, NOW) is None


def test_cap_is_times_the_lower_median() -> None:
    """By hand, for claims that do not grow (rate 0)."""
    claims = [7, 100, 20, 5000]
    found = judged(said(samples=7, rate=0.0), [said(samples=claim, rate=0.0) for claim in claims[1:]])
    most = CAP * statistics.median_low(claims)
    assert found.samples == 7 + most + 20 + most


def test_claims_count_as_they_were_said() -> None:
    """None grows by what may have been added since: a batch is never taken for full before it is."""
    own = said(samples=100, rate=0.0)
    for age in (0.0, 0.5, 20.0, -5.0):
        assert judged(own, [said(samples=100, rate=10.0, time=NOW - age)]).samples == 200
