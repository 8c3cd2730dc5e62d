"""The formulas hold their laws: break-even where the papers put it, sums of parts, what doubling K does."""

from __future__ import annotations

import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milkglass.charts import svg
from milkglass.costs import (
    WAYS,
    Scale,
    averaging,
    break_even_clients,
    client_flops,
    federated,
    ring,
    split,
    synchronous,
)
from milkglass.costs_figure import FEWEST, MOST, bytes_in_words, formula_charts
from milkglass.errors import RecipeError
from milkglass.figures import BOTTOM, LEFT, RIGHT, TOP

SCALE = Scale(clients=8, parameters=4096, records=2048, cut_values=64, client_share=0.25, batch_size=16)
scales = st.builds(
    Scale,
    clients=st.integers(1, 10_000),
    parameters=st.integers(1, 10**11),
    records=st.integers(1, 10**8),
    cut_values=st.integers(1, 10**6),
    client_share=st.floats(0, 1),
    batch_size=st.integers(1, 1024),
)


def test_formulas_by_hand() -> None:
    """K = 8, N = 4,096, p = 2,048, q = 64, eta = 1/4, B = 16: p/K = 256, so 16 steps an epoch."""
    assert split(SCALE).total == 2 * 256 * 64 + 1024
    assert (split(SCALE).up, split(SCALE).down) == (256 * 64 + 1024, 256 * 64)
    assert split(SCALE, weight_sharing=False).total == 2 * 256 * 64
    assert (federated(SCALE).up, federated(SCALE).down) == (4096, 4096)
    assert synchronous(SCALE).up == synchronous(SCALE).down == 16 * 2 * 4096 * 7 / 8
    assert averaging(SCALE, 4).total == 4 * 4 * 4096 * 7 / 8
    assert client_flops(SCALE, 10.0) == 2560.0
    assert federated(SCALE).total_bytes == 4 * 2 * 4096


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 4096))
def test_split_and_federated_are_even_exactly_where_nk_is_pq(clients: int, a: int, b: int) -> None:
    """N K = p q by construction: p = K a, N = a q."""
    scale = Scale(clients=clients, parameters=a * b, records=clients * a, cut_values=b)
    assert split(scale, weight_sharing=False).total == federated(scale).total
    assert break_even_clients(scale) == pytest.approx(clients, rel=1e-12)


@given(scales)
def test_at_the_break_even_neither_sends_more_and_beyond_it_split_sends_less(scale: Scale) -> None:
    even = break_even_clients(scale)
    if even >= 1:
        at = replace(scale, clients=even)
        assert split(at, weight_sharing=False).total == pytest.approx(federated(at).total)
    beyond = replace(scale, clients=max(1.0, 1.01 * even))
    assert split(beyond, weight_sharing=False).total < federated(beyond).total
    shared = break_even_clients(scale, weight_sharing=True)
    assert shared >= even * (1 - 1e-12)
    if shared >= 1:
        there = replace(scale, clients=shared)
        assert split(there).total == pytest.approx(federated(there).total)


@given(scales)
def test_twice_the_clients_halve_what_follows_from_records_and_nothing_else(scale: Scale) -> None:
    twice = replace(scale, clients=2 * scale.clients)
    assert split(twice, weight_sharing=False).total == split(scale, weight_sharing=False).total / 2
    handed_on = scale.client_share * scale.parameters
    assert split(twice).total - handed_on == pytest.approx(
        (split(scale).total - handed_on) / 2, abs=1e-6 * split(scale).total
    )
    assert federated(twice) == federated(scale)
    assert client_flops(twice, 7.0) == client_flops(scale, 7.0) / 2


@given(scales)
def test_all_clients_together_as_the_papers_sum_them(scale: Scale) -> None:
    together = scale.clients * split(scale).total
    exact = (
        2 * Fraction(scale.records) * Fraction(scale.cut_values)
        + Fraction(scale.client_share) * Fraction(scale.parameters) * Fraction(scale.clients)
    )  # fmt: skip
    assert together == pytest.approx(float(exact))


@pytest.mark.parametrize("ranks", [2, 3, 7, 64])
def test_a_ring_sends_what_one_that_is_played_sends(ranks: int) -> None:
    """Reduce-scatter and all-gather by hand: in each of K - 1 rounds twice, a rank passes one of K parts on."""
    parameters = 12 * ranks
    parts = [list(range(k * 12, (k + 1) * 12)) for k in range(ranks)]
    sent = [0] * ranks
    for _ in range(2):
        for round_ in range(ranks - 1):
            for rank in range(ranks):
                sent[rank] += len(parts[(rank - round_) % ranks])
    scale = Scale(ranks, parameters, 1, 1)
    assert {ring(scale, 1).up, ring(scale, 1).down} == {*map(float, sent)}


def test_one_rank_sends_nothing_and_averaging_at_each_step_is_synchronous() -> None:
    assert synchronous(replace(SCALE, clients=1)).total == 0
    assert averaging(SCALE, 1) == synchronous(SCALE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clients": 0}, "clients is 0; expected a number from 1"),
        ({"clients": math.nan}, "clients is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"parameters": 0}, "parameters is 0; expected a number above 0"),
        ({"records": -1}, "records is -1"),
        ({"cut_values": math.inf}, "cut_values is inf"),
        ({"client_share": 1.5}, "client_share is 1.5; expected a share of the network"),
    ],
    ids=["no client", "nan", "no batch", "no parameter", "records", "infinite cut", "share"],
)
def test_what_cannot_be_is_refused_in_a_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        replace(SCALE, **changes)


def test_a_period_of_no_steps_is_refused() -> None:
    with pytest.raises(RecipeError, match="period is 0; expected a number of steps above 0"):
        averaging(SCALE, 0)


def test_formulas_are_there_before_torch() -> None:
    told = "import sys, milkglass.costs, milkglass.costs_wire, milkglass.costs_figure; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def _points(path: str) -> list[tuple[float, float]]:
    numbers = [float(word) for word in path.replace("M", " ").replace("L", " ").split()]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_curves_cross_where_the_formulas_are_even() -> None:
    scale = Scale(2, parameters=1000, records=40_000, cut_values=1, batch_size=1)
    drawn = formula_charts(scale)[0]
    lines = {name: _points(path) for name, path, _ in drawn.lines}
    assert {*WAYS, "even at 40 clients"} == lines.keys()
    across = LEFT + math.log(40 / FEWEST) / math.log(MOST / FEWEST) * (RIGHT - LEFT)
    mark = lines["even at 40 clients"]
    assert [x for x, _ in mark] == pytest.approx([across] * 2, abs=0.1)
    kept, flat = lines["split, weights kept"], lines["federated, a round an epoch"]
    above = [x for (x, y), (_, level) in zip(kept, flat, strict=True) if y > level]  # y grows downward
    assert min(above) >= across - 0.2
    assert len(above) == sum(x >= across - 0.2 for x, _ in kept)
    assert mark[1][1] == pytest.approx(flat[0][1], abs=0.1)
    assert all(TOP <= y <= BOTTOM and LEFT <= x <= RIGHT for points in lines.values() for x, y in points)
    assert "even at K* = pq/N = 40 clients." in drawn.words


def test_a_break_even_off_the_axis_is_said_and_not_drawn() -> None:
    drawn = formula_charts(Scale(2, parameters=10**9, records=100, cut_values=10))[0]
    assert [name for name, _, _ in drawn.lines] == list(WAYS)
    assert "K* = pq/N = 1e-06 clients, which is not on the axis" in drawn.words


def test_what_was_counted_lies_on_its_formula_where_it_is_equal() -> None:
    measured = {
        way: [(k, WAYS[way](replace(SCALE, clients=k)).total_bytes) for k in (2, 4, 1000)] for way in list(WAYS)[:4]
    }
    first, second, third = formula_charts(SCALE, measured)
    assert [len(each.lines) for each in (first, second, third)] == [6, 6, 2]
    name, path, dots = second.lines[1]
    assert name == "counted: split, weights handed on"
    formula = _points(second.lines[0][1])
    assert (_points(path)[0], _points(path)[-1]) == (formula[0], formula[-1])
    assert dots[0][2] == f"{name}, 2 clients: {bytes_in_words(measured['split, weights handed on'][0][1])}"
    page = ET.fromstring(svg([first, second, third], "words"))
    assert page.tag.endswith("svg")


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ({"split": [(2, 1.0)]}, "measured 'split' is no way that has a formula; .*split, weights"),
        ({"large-batch": [(1, 5.0)]}, "5 bytes of 1 clients; expected more than 0, of 2 to 1000"),
        ({"large-batch": [(2, 0.0)]}, "0 bytes of 2 clients"),
    ],
    ids=["unknown way", "one client", "no bytes"],
)
def test_points_that_cannot_be_drawn_are_refused(measured: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        formula_charts(SCALE, measured)


def test_bytes_are_told_in_two_digits() -> None:
    told = [bytes_in_words(amount) for amount in (0, 5, 999, 1200, 9.96e5, 1e6, 3.25e9, 4e18)]
    assert told == ["0 B", "5 B", "1000 B", "1.2 kB", "1000 kB", "1 MB", "3.2 GB", "4000 PB"]
