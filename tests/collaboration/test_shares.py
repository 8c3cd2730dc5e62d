"""Shares by bandwidth: the oracle is the linear program itself, as a library solves it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from milkglass.collaboration.shares import seconds, shares, sizes

BANDWIDTHS = st.lists(st.floats(0.05, 20.0), min_size=2, max_size=8)


def _least_seconds(bandwidths: list[float]) -> float:
    """Minimize xi, where (N - 2) w / b + 1 / b <= xi for all who reduce, and the shares w >= 0 add up to 1."""
    count = len(bandwidths)
    able = [index for index, each in enumerate(bandwidths) if each > 0]
    limits = np.zeros((len(able), count + 1))
    for row, index in enumerate(able):
        limits[row, index], limits[row, -1] = (count - 2) / bandwidths[index], -1.0
    found = linprog(
        [0.0] * count + [1.0],
        A_ub=limits,
        b_ub=[-1 / bandwidths[index] for index in able],
        A_eq=[[1.0] * count + [0.0]],
        b_eq=[1.0],
        bounds=[(0, None if each > 0 else 0) for each in bandwidths] + [(0, None)],
        method="highs",
    )
    return float(found.fun)


@given(bandwidths=BANDWIDTHS, unreachable=st.integers(0, 2))
def test_the_slowest_takes_as_long_as_in_the_linear_program(bandwidths: list[float], unreachable: int) -> None:
    bandwidths = [*bandwidths, *[0.0] * unreachable]
    assert seconds(bandwidths, shares(bandwidths)) == pytest.approx(_least_seconds(bandwidths), rel=1e-6)


@given(bandwidths=BANDWIDTHS, unreachable=st.integers(0, 2))
def test_shares_add_up_and_who_is_not_reachable_reduces_nothing(bandwidths: list[float], unreachable: int) -> None:
    found = shares([*bandwidths, *[0.0] * unreachable])
    assert sum(found) == pytest.approx(1)
    assert min(found) >= 0
    assert found[len(bandwidths) :] == [0.0] * unreachable


@given(bandwidths=BANDWIDTHS, numbers=st.integers(0, 10_000))
def test_sizes_are_whole_and_complete(bandwidths: list[float], numbers: int) -> None:
    found = sizes(numbers, bandwidths)
    assert sum(found) == numbers
    assert min(found) >= 0
    for size, part in zip(found, shares(bandwidths), strict=True):
        assert abs(size - part * numbers) <= 2


def test_four_of_200_100_50_and_50() -> None:
    bandwidths = [200.0, 100.0, 50.0, 50.0]
    assert seconds(bandwidths, [0.25] * 4) / seconds(bandwidths, shares(bandwidths)) == pytest.approx(1.5)
    assert shares(bandwidths)[2:] == [0.0, 0.0]
