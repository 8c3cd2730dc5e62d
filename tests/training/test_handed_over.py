"""Weights that another client left are looked at before they are taken over, and the one who left them is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from milkglass.errors import MessageError
from milkglass.randomness import Source
from milkglass.training.rounds import Seat, _check_handed
from milkglass.training.split import play_epoch, set_up
from tests.helpers import KEY, small_recipe

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def seat() -> Seat:
    setup = set_up(small_recipe(parties={"clients": ["a", "b"]}), Source(KEY))
    play_epoch(setup, 1, test=False)
    return setup.seats[0]


def _left(seat: Seat) -> Weights:
    return seat.client.weights(with_optimizer=True) | {"records": torch.tensor(48.0)}


def _first(seat: Seat, start: str) -> str:
    return next(name for name, tensor in _left(seat).items() if name.startswith(start) and tensor.dim() > 1)


def test_what_an_honest_client_leaves_is_taken(seat: Seat) -> None:
    _check_handed(seat, "b", _left(seat))
    _check_handed(seat, "b", seat.client.weights() | {"records": torch.tensor(1)})


@pytest.mark.parametrize("count", [0.0, -1.0, torch.inf, torch.nan, 1e13])
def test_a_number_of_records_that_cannot_be_is_refused(seat: Seat, count: float) -> None:
    with pytest.raises(MessageError, match="what b has left does not fit"):
        _check_handed(seat, "b", _left(seat) | {"records": torch.tensor(count)})


@pytest.mark.parametrize("start", ["stage.", "optimizer."])
def test_other_shapes_and_values_that_are_not_finite_are_refused(seat: Seat, start: str) -> None:
    name = _first(seat, start)
    right = _left(seat)[name]
    with pytest.raises(MessageError, match="what b has left does not fit"):
        _check_handed(seat, "b", _left(seat) | {name: torch.zeros(3, 5)})
    with pytest.raises(MessageError, match="that b has left are not finite"):
        _check_handed(seat, "b", _left(seat) | {name: torch.full_like(right, torch.nan)})


@pytest.mark.parametrize("extra", ["more", "stage.more", "optimizer.999.exp_avg", "optimizer.x.exp_avg"])
def test_more_or_less_than_a_stage_is_refused(seat: Seat, extra: str) -> None:
    with pytest.raises(MessageError, match="does not fit"):
        _check_handed(seat, "b", _left(seat) | {extra: torch.zeros(2, 2)})
    less = _left(seat)
    del less[_first(seat, "stage.")]
    with pytest.raises(MessageError, match="does not fit"):
        _check_handed(seat, "b", less)
