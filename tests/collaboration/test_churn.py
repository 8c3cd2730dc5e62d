"""The simulation of coming and going against what can be computed by hand, and its check on lines made by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.churn import compare, read_run, tables
from benchmarks.churn_model import (
    Costs,
    Outcome,
    Population,
    Sessions,
    draw_sessions,
    epoch_seconds,
    simulate,
)
from milkglass.errors import RunError

FREE = Costs(matchmaking_seconds=0.0)
NEVER = math.inf


def played(
    *volunteers: tuple[float, float, bool, float], costs: Costs, target: float, seconds: float, warm_up: float = 0.0
) -> Outcome:
    """volunteers: (counts from, leaves, killed, speed) of each."""
    counts, leaves, killed, speeds = (np.array(each) for each in zip(*volunteers, strict=True))
    sessions = Sessions(counts, counts, leaves, killed, speeds, np.full(len(speeds), 8e6))
    return simulate(sessions, costs, target, seconds, warm_up)


def crowd(online: float, session_seconds: float, killed_share: float = 1.0) -> Population:
    return Population(online, session_seconds, killed_share, speed=2.0, speed_spread=0.5, rates=(8e6,))


def drawn(people: Population, costs: Costs, target: float, sessions_long: float = 20, seed: int = 0) -> Outcome:
    """A run of so many mean sessions, after two."""
    seconds, warm_up = sessions_long * people.session_seconds, 2 * people.session_seconds
    sessions = draw_sessions(people, costs, seconds + warm_up, np.random.default_rng(seed))
    return simulate(sessions, costs, target, seconds, warm_up)


def conserved(outcome: Outcome) -> None:
    assert outcome.computed == pytest.approx(outcome.useful + outcome.wasted + outcome.in_flight, rel=1e-9)
    assert 0 <= outcome.computed <= outcome.capacity * (1 + 1e-9)


def test_nobody_leaves_and_nothing_costs() -> None:
    """Then an epoch takes target / sum of speeds, and all that can be computed is used."""
    three = [(0.0, NEVER, False, speed) for speed in (1.0, 2.5, 6.5)]
    outcome = played(*three, costs=FREE, target=400, seconds=4020)
    assert outcome.epochs == 100
    assert outcome.useful == pytest.approx(100 * 400)
    assert outcome.in_flight == pytest.approx(20 * 10)
    assert outcome.computed == pytest.approx(outcome.capacity)
    assert outcome.efficiency == pytest.approx(4000 / 4020)
    assert (outcome.wasted, outcome.failed, outcome.group) == (0, 0, 3)
    assert outcome.beyond_target == pytest.approx(0, abs=1e-6)


def test_costs_without_churn_add_up() -> None:
    """An epoch is computing, meeting, averaging; what is computed while they meet is used, and over the target."""
    costs = Costs(matchmaking_seconds=5, gradient_bytes=3e6, latency_seconds=0.5, rounds=2, seconds_per_connection=0.25)
    averaging = 1.0 + 2 * 0.25 + 3 * (1 + 1 / 3)
    assert costs.averaging_seconds(3, 8e6) == pytest.approx(averaging)
    epoch = 40 + 5 + averaging
    three = [(0.0, NEVER, False, speed) for speed in (1.0, 2.5, 6.5)]
    outcome = played(*three, costs=costs, target=400, seconds=50.001 * epoch)
    assert (outcome.epochs, outcome.averagings, outcome.failed) == (50, 50, 0)
    assert outcome.batch == pytest.approx(450)
    assert outcome.beyond_target == pytest.approx(50 * 50)
    assert outcome.efficiency == pytest.approx(450 / (10 * epoch), rel=1e-4)


def test_one_alone_neither_meets_nor_averages() -> None:
    costs = Costs(matchmaking_seconds=5, gradient_bytes=1e9, latency_seconds=9)
    outcome = played((0.0, NEVER, False, 4.0), costs=costs, target=100, seconds=255)
    assert (outcome.epochs, outcome.averagings, outcome.batch) == (10, 0, 100)


def test_two_average_a_vector_once_and_many_twice() -> None:
    """Equal shares in the linear program of DeDLOC: (N - 2) / N + 1 vectors over the slowest link."""
    costs = Costs(gradient_bytes=1e6)
    assert costs.averaging_seconds(1, 8e6) == 0
    assert costs.averaging_seconds(2, 8e6) == pytest.approx(1)
    assert costs.averaging_seconds(4, 4e6) == pytest.approx(3)
    assert costs.averaging_seconds(100_000, 8e6) == pytest.approx(2, rel=1e-4)


@pytest.mark.parametrize("killed", [True, False])
def test_one_that_ends_while_its_group_averages(killed: bool) -> None:
    """Killed: a time-out, and again without it. Else it stays to the end. By hand: 10 s computing, 5 meeting, 4 to go.

    Who comes while they average, at 20 or at 16, counts from the end of the averaging; who has left by then, never.
    """
    costs = Costs(matchmaking_seconds=5, timeout_seconds=30, latency_seconds=4, rounds=1)
    others = [(0.0, NEVER, False, 1.0), (0.0, NEVER, False, 3.0)]
    comes = (20.0, NEVER, False, 1.0) if killed else (16.0, NEVER, False, 1.0)
    gone = (16.0, 18.0, killed, 8.0)
    outcome = played(*others, (0.0, 17.0, killed, 2.0), comes, gone, costs=costs, target=60, seconds=60)
    if killed:  # 15 to 45 lost; 45 to 50 they meet, 50 to 54 they average; 54 to 60 they compute
        assert outcome.wasted == pytest.approx(15 * 2)
        assert outcome.useful == pytest.approx(20 * 1 + 20 * 3 + 5 * 1)
        assert outcome.in_flight == pytest.approx(6 * 5)
        assert (outcome.epochs, outcome.averagings, outcome.failed, outcome.group) == (1, 2, 1, 3)
    else:  # 15 to 19 they average; 19 to 31 they compute, to 36 they meet, to 40 they average; and 40 to 60 again
        assert outcome.wasted == 0
        assert outcome.useful == pytest.approx(15 * 6 + 17 * 5)
        assert (outcome.epochs, outcome.averagings, outcome.failed, outcome.members) == (2, 2, 0, 6)
    assert outcome.beyond_target == pytest.approx(outcome.useful - 60 * outcome.epochs)
    conserved(outcome)


def test_an_averaging_longer_than_the_time_out_never_ends() -> None:
    costs = Costs(matchmaking_seconds=5, timeout_seconds=30, latency_seconds=31, rounds=1)
    two = [(0.0, NEVER, False, 1.0), (0.0, NEVER, False, 1.0)]
    outcome = played(*two, costs=costs, target=60, seconds=1000)
    assert (outcome.epochs, outcome.useful, outcome.failed_share) == (0, 0, 1)
    assert outcome.seconds_per_epoch == math.inf
    conserved(outcome)


def test_what_is_there_before_the_window_is_not_counted() -> None:
    """One kill before it, one in it; the batch in flight at its begin is useful later, so in flight falls."""
    always, before = (0.0, NEVER, False, 1.0), (0.0, 50.0, True, 1.0)
    outcome = played(always, before, (60.0, 130.0, True, 1.0), costs=FREE, target=120, seconds=100, warm_up=100)
    # at 100: 100 of the first, 40 of the last: a step at 90 (90 + 30); so 10 + 10 in flight, then 60 s to the target
    assert outcome.wasted == pytest.approx(130 - 90)
    assert outcome.computed == pytest.approx(100 + 30)
    assert outcome.capacity == pytest.approx(130)
    conserved(outcome)


@pytest.mark.parametrize("online", [2, 30, 300])
@pytest.mark.parametrize("target", [300, 3000])
def test_nothing_is_lost_in_the_books(online: int, target: int) -> None:
    costs = Costs(5, 30, gradient_bytes=4e6, state_bytes=20e6, latency_seconds=0.1, seconds_per_connection=0.01)
    outcome = drawn(crowd(online, 900, killed_share=0.5), costs, target)
    assert outcome.epochs > 0
    assert outcome.wasted > 0
    conserved(outcome)


@pytest.mark.parametrize("reach", [0.05, 0.3, 0.7])
def test_waste_of_kills_alone_is_the_closed_form(reach: float) -> None:
    """reach: target / (all speeds x mean session). Of what was computed t ago exp(-t / session) is left.

    So an epoch takes L = -session log(1 - reach). A kill, at a random time, costs min(U L, age) seconds of work, U
    uniform, the age exponential: its mean times the rate of kills is the share lost, 1 - (1 - exp(-l)) / l with
    l = L / session.
    """
    people = crowd(3000, 600)
    outcome = drawn(people, FREE, reach * people.total_speed * 600)
    epoch = -600 * math.log(1 - reach)
    generator = np.random.default_rng(1)
    at_a_kill = np.minimum(epoch * generator.random(400_000), generator.exponential(600, 400_000)).mean()
    relative = epoch / 600
    assert 1 - (1 - math.exp(-relative)) / relative == pytest.approx(at_a_kill / 600, rel=0.01)
    assert outcome.wasted_share == pytest.approx(at_a_kill / 600, rel=0.03)
    assert outcome.seconds_per_epoch == pytest.approx(epoch, rel=0.03)
    assert epoch_seconds(people, FREE, reach * people.total_speed * 600) == pytest.approx(epoch)
    conserved(outcome)


def test_a_target_beyond_what_sessions_hold_is_never_reached() -> None:
    people = crowd(300, 600)
    assert epoch_seconds(people, FREE, 1.3 * people.total_speed * 600) == math.inf
    outcome = drawn(people, FREE, 1.3 * people.total_speed * 600)
    assert (outcome.epochs, outcome.efficiency, outcome.wasted_share) == (0, 0, 1)


def test_averagings_fail_as_often_as_somebody_is_killed_in_them() -> None:
    """A group of g averages for a seconds: it fails with 1 - exp(-g killed a / session)."""
    people = crowd(100, 600, killed_share=0.4)
    outcome = drawn(people, Costs(2, 12, latency_seconds=10, rounds=1), target=500, sessions_long=100)
    expected = 1 - math.exp(-100 * 0.4 * 10 / 600)
    assert outcome.averagings > 2000
    assert outcome.failed_share == pytest.approx(expected, rel=0.06)


def test_who_downloads_does_not_compute() -> None:
    """A session is past its download for exp(-download / session) of its time."""
    people = crowd(1000, 600)
    outcome = drawn(people, replace(FREE, state_bytes=120e6), target=20_000)  # 120 s
    assert outcome.computed / outcome.capacity == pytest.approx(math.exp(-120 / 600), rel=0.02)


def test_sessions_are_as_they_should_be() -> None:
    """Their mean, how many are online at any time, what they can do, how many end with a kill."""
    people = Population(200, 900, 0.25, speed=5, speed_spread=0.6, rates=(1e6, 3e6))
    sessions = draw_sessions(people, FREE, 200 * 900, np.random.default_rng(2))
    later = sessions.arrives > 0
    lengths = (sessions.leaves - sessions.arrives)[later]
    assert lengths.mean() == pytest.approx(900, rel=0.03)
    assert lengths.std() == pytest.approx(900, rel=0.04)
    at = np.linspace(0, 200 * 900, 400)[:, None]
    online = ((sessions.arrives <= at) & (at < sessions.leaves)).sum(axis=1)
    assert online.mean() == pytest.approx(200, rel=0.03)
    assert online[:200].mean() == pytest.approx(online[200:].mean(), rel=0.06)
    assert sessions.capacity(0, 200 * 900) == pytest.approx(200 * 5 * 200 * 900, rel=0.04)
    assert sessions.killed.mean() == pytest.approx(0.25, abs=0.01)
    assert sessions.rates.mean() == pytest.approx(2e6, rel=0.02)


def test_a_seed_is_a_run() -> None:
    costs = Costs(5, 30, gradient_bytes=4e6, state_bytes=20e6)
    first, again, other = (drawn(crowd(20, 900, 0.5), costs, 2000, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_pooled_outcomes_are_one_longer_run() -> None:
    outcomes = [drawn(crowd(20, 900, 0.5), FREE, 2000, seed=seed) for seed in (0, 1)]
    pooled = Outcome.pooled(outcomes)
    assert pooled.epochs == sum(each.epochs for each in outcomes)
    assert pooled.seconds_per_epoch == pytest.approx(2 * outcomes[0].seconds / pooled.epochs)
    assert min(each.efficiency for each in outcomes) < pooled.efficiency < max(each.efficiency for each in outcomes)


def test_tables_name_the_targets_to_use() -> None:
    good = played((0.0, NEVER, False, 1.0), costs=FREE, target=10, seconds=1001)
    wasteful, never = replace(good, wasted=100.0), replace(good, useful=0.0, epochs=0)
    lines = tables({(2, 16): [good], (2, 32): [wasteful], (2, 64): [never]})
    assert "| 2 | 16 to 32 | 16, 64 | 16 |" in lines
    assert any(line.startswith("| 2 | 64 | 0.0 (0.0 to 0.0)") and "never" in line for line in lines)


def lines_of(speed: float, all_speeds: float, epochs: Sequence[int], computing: float = 1.0) -> list[dict[str, Any]]:
    """A peer's metrics as the model has it: to 100 records, 2 s of meeting on top, 3 s of averaging.

    computing: times as long as it should take.
    """
    working = 100 / all_speeds + 2
    return [
        {
            "epoch": epoch,
            "loss": 1.0,
            "samples": speed * working,
            "group_samples": all_speeds * working,
            "seconds": computing * working + 3,
            "averaging_seconds": 3.0,
            "matchmaking_seconds": 2.0,
        }
        for epoch in epochs
    ]


def test_real_runs_that_are_as_the_model_has_them() -> None:
    """Two peers, then three: a row for each set, measured and simulated alike."""
    first = [lines_of(speed, 10, range(1, 9)) + lines_of(speed, 20, range(9, 20)) for speed in (4, 6)]
    rows = compare({"a": first[0], "b": first[1], "c": lines_of(10, 20, range(8, 20))}, 100)
    assert [(row.peers, row.epochs) for row in rows] == [(("a", "b"), 7), (("a", "b", "c"), 11)]
    for row, seconds in zip(rows, (10 + 2 + 3, 5 + 2 + 3), strict=True):
        assert row.measured_seconds == pytest.approx(seconds)
        assert row.seconds_ratio == pytest.approx(1, abs=0.002)
        assert row.efficiency_ratio == pytest.approx(1, abs=0.002)
        assert row.measured_efficiency == pytest.approx((seconds - 3) / seconds)


def test_real_runs_that_meet_before_the_target_is_there_differ() -> None:
    """Peers that meet while they compute to the target save that time; the model does not, and the ratio says so."""
    lines = [line | {"samples": 50, "group_samples": 100, "seconds": 13} for line in lines_of(5, 10, range(10))]
    (row,) = compare({"a": lines, "b": lines}, 100)
    assert row.measured_seconds == 13
    assert row.simulated_seconds == pytest.approx(15, rel=0.002)
    assert row.seconds_ratio == pytest.approx(15 / 13, rel=0.002)


def test_lines_that_lack_numbers_are_left_out() -> None:
    whole = lines_of(5, 10, range(10))
    patchy = [line | ({"averaging_seconds": None} if line["epoch"] % 2 else {}) for line in whole]
    del patchy[4]["seconds"]
    rows = compare({"a": whole, "b": patchy}, 100)
    assert [(row.peers, row.epochs) for row in rows] == [(("a", "b"), 3)]  # epochs 2, 6, 8; alone `a` adds up half


def test_a_peer_whose_lines_all_lack_something_is_named() -> None:
    lines = [{"epoch": epoch, "samples": 1, "seconds": 2.0} for epoch in range(5)]
    with pytest.raises(RunError, match=r"^peer b: .* group_samples, averaging_seconds, matchmaking_seconds; expected "):
        compare({"a": lines_of(5, 10, range(5)), "b": lines}, 100)


def test_peers_without_the_rest_of_their_group_are_refused() -> None:
    with pytest.raises(RunError, match="expected the run folders of all peers"):
        compare({"a": lines_of(3, 10, range(9)), "b": lines_of(4, 10, range(9))}, 100)


def kept(folder: Path, name: str, lines: Sequence[dict[str, Any]], target: int = 100) -> None:
    (folder / name).mkdir()
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / name / "recipe.toml").write_text(f"[collaboration]\ntarget_batch = {target}\n")


def test_run_folders_are_read(tmp_path: Path) -> None:
    for name, speed in (("a", 4), ("b", 6)):
        kept(tmp_path, name, lines_of(speed, 10, range(5)))
    peers, target = read_run(tmp_path)
    assert (sorted(peers), target) == (["a", "b"], 100)
    assert compare(peers, target)[0].seconds_ratio == pytest.approx(1, abs=0.002)


def test_run_folders_of_less_or_more_than_one_run(tmp_path: Path) -> None:
    kept(tmp_path, "a", lines_of(4, 10, range(5)))
    with pytest.raises(RunError, match=r": 1 folders with a metrics\.jsonl; expected"):
        read_run(tmp_path)
    kept(tmp_path, "b", lines_of(6, 10, range(5)), target=200)
    with pytest.raises(RunError, match=r"target batches \[100, 200\]; expected"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "broken"), [("metrics.jsonl", "[1]\n"), ("metrics.jsonl", "{\n"), ("recipe.toml", "[collaboration]\n")]
)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, broken: str) -> None:
    for peer in ("a", "b"):
        kept(tmp_path, peer, lines_of(5, 10, range(5)))
    (tmp_path / "b" / name).write_text(broken)
    with pytest.raises(RunError, match=r"b: not a run folder of a collaboration .*; expected") as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)
