"""A batch in pieces: the bits of an unsplit loop that adds the same pieces up; in float64 those of a whole batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.errors import CutError, RecipeError
from milkglass.randomness import Source
from milkglass.server import Server
from milkglass.training.shares import deal_records
from milkglass.training.split import Setup, play_epoch, set_up
from milkglass.transports.wrappers import RecordingTransport
from tests.helpers import KEY
from tests.training.whole import (
    DEFENDED,
    DROPOUTS,
    MLP,
    U_SHAPED,
    Whole,
    all_weights,
    assert_equal_tensors,
    assert_same_bits,
    average_into,
    parties,
    recipe_of,
    training,
    unequal,
)

EPOCHS = (1, 2)
OWNERS = parties("vertical", ["ann", "ben"], owner_settings={"hidden": [8]})
WAYS: dict[str, dict[str, Any]] = {
    "vanilla": MLP,
    "U-shaped": MLP | U_SHAPED,
    "with dropout": DROPOUTS | {"cut": {"at": "drop1", "back_at": "drop2"}},
    "pictures": {"network": {"name": "cnn", "settings": {"width": 8, "hidden": 16}}, "cut": {"at": "block1"}},
    "vertical": MLP | {"parties": OWNERS},
}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("defense", [{}, DEFENDED], ids=["undefended", "noise and NoPeek"])
@pytest.mark.parametrize("pieces", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_pieces_equal_an_unsplit_loop_over_the_same_pieces(
    way: str, pieces: int, defense: dict[str, Any], optimizer: str
) -> None:
    settings = training(micro_batches=pieces, optimizer=optimizer)
    setup = set_up(recipe_of(**WAYS[way], training=settings, defense=defense), Source(KEY))
    twin = Whole(setup.seats, setup.server)
    for epoch in EPOCHS:
        play_epoch(setup, epoch, test=False)
        for rows in setup.seats[0].batches(epoch):
            train = [seat.share.train for seat in setup.seats]
            twin.train([part.x[rows] for part in train], train[0].y[rows], pieces)
    for seat, bottom in zip(setup.seats, twin.bottoms, strict=True):
        assert_same_bits(seat.client.stage, bottom)
    assert_same_bits(setup.server.stage, twin.top)
    assert_same_bits(setup.client.head or nn.Identity(), twin.head)


@pytest.mark.parametrize("network", [MLP, MLP | U_SHAPED], ids=["labels sent", "U-shaped"])
@pytest.mark.parametrize("pieces", [2, 4])
def test_splitfed1_in_pieces_equals_networks_apart_over_the_same_pieces(network: dict[str, Any], pieces: int) -> None:
    setup = unequal(recipe_of(**network, parties=parties("splitfed1"), training=training(micro_batches=pieces)))
    twins = [Whole([seat], setup.desk.servers[seat.client.name]) for seat in setup.seats]
    for epoch in EPOCHS:
        play_epoch(setup, epoch)
        for seat, twin in zip(setup.seats, twins, strict=True):
            twin.train_on(seat, epoch, pieces)
        counts = [sum(map(len, seat.batches(epoch))) for seat in setup.seats]
        for parts in ([t.bottoms[0] for t in twins], [t.top for t in twins], [t.head for t in twins]):
            average_into(parts, counts)
    for seat, twin in zip(setup.seats, twins, strict=True):
        assert_same_bits(seat.client.stage, twin.bottoms[0])
        assert_same_bits(setup.desk.servers[seat.client.name].stage, twin.top)
        assert_same_bits(seat.client.head or nn.Identity(), twin.head)


def _in_double(setup: Setup) -> Setup:
    """The same parties in float64, where rounding is far below what pieces could change."""
    for name, server in {id(server): (name, server) for name, server in setup.desk.servers.items()}.values():
        loss = F.cross_entropy if setup.recipe.cut.back_at is None else None
        other = Server(server.stage.double(), server.optimizer, loss=loss, name=server.name, source=server.source)
        own = [client for client, each in setup.desk.servers.items() if each is setup.desk.servers[name]]
        setup.desk.servers.update(dict.fromkeys(own, other))
    seats = []
    for seat in setup.seats:
        seat.client.stage.double()
        if seat.client.head is not None:
            seat.client.head.double()
        train = replace(seat.share.train, x=seat.share.train.x.double())
        seats.append(replace(seat, share=replace(seat.share, train=train)))
    return replace(setup, seats=tuple(seats))


def _trained_in_double(pieces: int, epochs: int = 2, **tables: Any) -> dict[str, Tensor]:
    settings = training(micro_batches=pieces, optimizer="sgd", learning_rate=0.1)
    records = deal_records(recipe_of(**tables))  # owners' hashes, and so their records' order, follow from the recipe
    setup = _in_double(set_up(recipe_of(**tables, training=settings), Source(KEY), records=records))
    for epoch in range(1, epochs + 1):
        play_epoch(setup, epoch, test=False)
    return all_weights(setup)


def _assert_the_same_within_rounding(epochs: int, **tables: Any) -> None:
    start, whole = (_trained_in_double(1, count, **tables) for count in (0, epochs))
    for pieces in (2, 4):
        found = _trained_in_double(pieces, epochs, **tables)
        assert found.keys() == whole.keys()
        for name, tensor in found.items():
            if name in start:
                assert not torch.equal(tensor, start[name]), f"{name} does not learn"
            error = (tensor - whole[name]).abs().max() / whole[name].abs().max()
            assert error <= 1e-10, name


MANY = {mode: MLP | U_SHAPED | {"parties": parties(mode)} for mode in ("relay", "splitfed1", "splitfed2")}


@pytest.mark.parametrize("defense", [{}, {"nopeek": {}}, {"nopeek": {"estimator": "unbiased"}}], ids=str)
@pytest.mark.parametrize("way", [way for way in [*WAYS, *MANY] if way != "with dropout"])
def test_pieces_are_the_whole_batch_within_rounding(way: str, defense: dict[str, Any]) -> None:
    _assert_the_same_within_rounding(2, **(WAYS | MANY)[way], defense=defense)


@pytest.mark.parametrize("way", ["vanilla", "U-shaped", "pictures", "vertical", "splitfed1", "splitfed2"])
def test_pieces_carry_the_noise_of_the_whole_batch(way: str) -> None:
    # one batch each: noise follows from the very bits of what it hides, so a step that differs by rounding ends that
    tables = (WAYS | MANY)[way]
    clients = 3 if way in MANY else 1
    records = {"name": "digits", "train_records": 32 * clients, "test_records": 40, "test_share": 0.1}
    _assert_the_same_within_rounding(1, **tables, data=records, defense=DEFENDED)


def test_pieces_of_one_batch_are_under_way_together() -> None:
    setup = set_up(recipe_of(training=training(micro_batches=4)), wrap=RecordingTransport)
    play_epoch(setup, 1, test=False)
    transcript = cast(RecordingTransport, setup.transport).transcript
    assert transcript.kinds() == [*[("to server", "activations")] * 4, *[("to client", "gradients")] * 4] * 3
    places = [(c.message.step, c.message.piece, c.message.pieces) for c in transcript]
    assert places == [(step, piece, 4) for step in range(3) for _ in range(2) for piece in range(4)]
    assert {len(c.message.tensors["activations"]) for c in transcript if c.direction == "to server"} == {8}


def test_a_last_batch_that_does_not_fall_into_pieces_goes_out_whole() -> None:
    settings = training(micro_batches=4, batch_size=36, drop_last_batch=False)  # 96 = 2 x 36 + 24
    setup = set_up(recipe_of(training=settings), wrap=RecordingTransport)
    play_epoch(setup, 1, test=False)
    transcript = cast(RecordingTransport, setup.transport).transcript
    assert [c.message.pieces for c in transcript if c.direction == "to server"] == [4] * 12
    uneven = training(micro_batches=4, batch_size=44, drop_last_batch=False)  # 97 = 2 x 44 + 9
    records = {"name": "digits", "train_records": 97, "test_records": 40, "test_share": 0.1}
    setup = set_up(recipe_of(training=uneven, data=records))
    twin = Whole(setup.seats, setup.server)
    play_epoch(setup, 1, test=False)
    for rows in setup.seats[0].batches(1):
        part = setup.seats[0].share.train
        twin.train([part.x[rows]], part.y[rows], 4 if len(rows) == 44 else 1)
    assert_same_bits(setup.client.stage, twin.bottoms[0])
    assert_same_bits(setup.server.stage, twin.top)


def test_a_leakage_guard_changes_no_bit() -> None:
    for pieces in (1, 4):
        weights = []
        for section in ({}, {"leakage": {"limit": 1.0, "window": 32}}):
            setup = set_up(recipe_of(training=training(micro_batches=pieces), client=section))
            for epoch in EPOCHS:
                play_epoch(setup, epoch)
            weights.append(all_weights(setup))
        assert_equal_tensors(*weights)


def normed(record_shape: tuple[int, ...], classes: int, at: int) -> nn.Module:
    """A factory with BatchNorm behind one of three layers."""
    widths = [torch.Size(record_shape).numel(), 12, 12, 12]
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for number in (1, 2, 3):
        layers[f"layer{number}"] = nn.Linear(widths[number - 1], widths[number])
        layers[f"norm{number}"] = nn.BatchNorm1d(12) if number == at else nn.Identity()
    layers["last"] = nn.Linear(12, classes)
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


@pytest.mark.parametrize("at", [1, 2, 3])
def test_batchnorm_in_any_part_is_refused_with_pieces(at: int) -> None:
    network = {"name": "tests.training.test_pieces:normed", "settings": {"at": at}}
    tables: dict[str, Any] = {"network": network, "cut": {"at": "norm1", "back_at": "norm2"}}
    set_up(recipe_of(**tables))  # a whole batch is fine
    with pytest.raises(CutError, match=rf"BatchNorm \(norm{at}\) takes its statistics over a whole batch") as refused:
        set_up(recipe_of(**tables, training=training(micro_batches=2)))
    assert "micro_batches = 1" in str(refused.value)


def test_pieces_of_unequal_size_are_refused() -> None:
    with pytest.raises(RecipeError, match="micro_batches is 3; it must divide batch_size, 32"):
        recipe_of(training=training(micro_batches=3))
