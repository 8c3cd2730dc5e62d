"""Split equals unsplit, bit for bit, for every way of training: who holds the labels, and how several clients train."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.errors import DataError
from milkglass.randomness import Source, public_source
from milkglass.recipe import Recipe
from milkglass.training.split import Setup, play_epoch, set_up
from milkglass.transports.wrappers import RecordingTransport
from tests.helpers import KEY
from tests.training.whole import (
    CLIENTS,
    DEFENDED,
    DROPOUTS,
    MLP,
    U_SHAPED,
    Whole,
    assert_same_bits,
    average_into,
    parties,
    recipe_of,
    training,
    unequal,
)

EPOCHS = (1, 2)


def _play(setup: Setup) -> None:
    """Without tests in between: they draw noise, too."""
    before = copy.deepcopy([part.state_dict() for part in (*_stages(setup), setup.server.stage)])
    for epoch in EPOCHS:
        play_epoch(setup, epoch, test=False)
    for part, old in zip((*_stages(setup), setup.server.stage), before, strict=True):
        new = part.state_dict()
        assert not new or any(not torch.equal(tensor, old[name]) for name, tensor in new.items()), "it learns"


def _stages(setup: Setup) -> list[nn.Module]:
    return [seat.client.stage for seat in setup.seats]


# -- U-shaped


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("defense", [{}, DEFENDED], ids=["undefended", "noise and NoPeek"])
@pytest.mark.parametrize("network", [MLP | U_SHAPED, DROPOUTS | {"cut": {"at": "drop1", "back_at": "drop2"}}])
def test_u_shaped_equals_one_network(network: dict[str, Any], defense: dict[str, Any], optimizer: str) -> None:
    setup = set_up(recipe_of(**network, defense=defense, training=training(optimizer=optimizer)), Source(KEY))
    twin = Whole(setup.seats, setup.server)
    _play(setup)
    for epoch in EPOCHS:
        twin.train_on(setup.seats[0], epoch)
    assert_same_bits(setup.client.stage, twin.bottoms[0])
    assert_same_bits(setup.server.stage, twin.top)
    assert_same_bits(setup.client.head, twin.head)


def test_a_u_shaped_cut_behind_each_layer_of_a_picture_network() -> None:
    for at, back_at in (("stem", "block1"), ("stem", "pool"), ("block2", "block3"), ("block3", "pool")):
        network = {"network": {"name": "resnet", "settings": {"width": 4}}, "cut": {"at": at, "back_at": back_at}}
        setup = set_up(recipe_of(**network))
        twin = Whole(setup.seats, setup.server)
        _play(setup)
        for epoch in EPOCHS:
            twin.train_on(setup.seats[0], epoch)
        for part, other in (
            (setup.client.stage, twin.bottoms[0]),
            (setup.server.stage, twin.top),
            (setup.client.head, twin.head),
        ):
            assert_same_bits(part, other)


def _tells_labels(tensor: Tensor, y: Tensor) -> bool:
    """Whether a tensor holds labels as they are, in another order, or one-hot."""
    flat = tensor.flatten().double()
    one_hot = F.one_hot(y, 10).double()
    if flat.numel() == y.numel():
        return torch.equal(flat.sort().values, y.double().sort().values)
    if flat.numel() == one_hot.numel():
        rows = flat.reshape(one_hot.shape)
        return bool(((rows == 0) | (rows == 1)).all()) and torch.equal(rows.sum(1), one_hot.sum(1))
    return False


@pytest.mark.parametrize("pieces", [1, 2])
def test_labels_never_travel_in_u_shaped_training(pieces: int) -> None:
    recipe = recipe_of(**U_SHAPED, training=training(micro_batches=pieces))
    setup = set_up(recipe, wrap=RecordingTransport)
    transcript = cast(RecordingTransport, setup.transport).transcript
    for epoch in EPOCHS:
        play_epoch(setup, epoch)
    batch = [
        *[("to server", "activations")] * pieces,
        *[("to client", "features"), ("to server", "returns")] * pieces,
        *[("to client", "gradients")] * pieces,
    ]
    assert sorted(transcript.kinds()) == sorted(
        [*batch * 3, ("to server", "queries"), ("to client", "predictions")] * 2
    )
    if pieces == 1:
        assert transcript.kinds() == [*batch * 3, ("to server", "queries"), ("to client", "predictions")] * 2
    held = {
        "activations": {"activations"},
        "features": {"features"},
        "returns": {"gradient"},
        "gradients": {"gradient"},
        "queries": {"activations"},
        "predictions": {"logits"},
    }
    share = setup.seats[0].share
    labels = [share.test.y]
    for epoch in EPOCHS:
        for rows in setup.seats[0].batches(epoch):
            labels += [share.train.y[rows], *share.train.y[rows].tensor_split(pieces)]
    for crossing in transcript:
        assert set(crossing.message.tensors) == held[crossing.message.kind]
        for tensor in crossing.message.tensors.values():
            assert tensor.is_floating_point()
            assert not any(_tells_labels(tensor, y) for y in labels)
    # what is looked for would be found
    assert _tells_labels(F.one_hot(labels[1], 10).float(), labels[1])
    assert _tells_labels(labels[1].flip(0).float(), labels[1])


# -- in turn


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("cut", [{}, U_SHAPED], ids=["labels sent", "U-shaped"])
def test_a_relay_equals_one_client_with_the_batches_of_all_in_turn(cut: dict[str, Any], optimizer: str) -> None:
    setup = unequal(recipe_of(**cut, parties=parties("relay"), training=training(optimizer=optimizer)))
    twin = Whole(setup.seats[:1], setup.server)
    for epoch in EPOCHS:
        results = play_epoch(setup, epoch)
        for seat in setup.seats:
            twin.train_on(seat, epoch)
        for seat, result in zip(setup.seats, results, strict=True):
            assert result.evaluation is not None
            assert result.evaluation.accuracy == twin.accuracy(seat.share.test.x, seat.share.test.y)
            assert_same_bits(seat.client.stage, twin.bottoms[0])
            assert_same_bits(seat.client.head or nn.Identity(), twin.head)
            _assert_same_memory(seat.client.optimizer, twin.optimizers[0])
        assert_same_bits(setup.server.stage, twin.top)
        _assert_same_memory(setup.server.optimizer, twin.optimizers[1])


def _assert_same_memory(optimizer: torch.optim.Optimizer | None, twin: torch.optim.Optimizer) -> None:
    assert optimizer is not None
    found, expected = optimizer.state_dict()["state"], twin.state_dict()["state"]
    assert found.keys() == expected.keys()
    assert found
    for index, slots in found.items():
        assert slots.keys() == expected[index].keys()
        assert all(torch.equal(value, expected[index][name]) for name, value in slots.items())


# -- in parallel


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "network", [MLP, MLP | U_SHAPED, DROPOUTS, DROPOUTS | {"cut": {"at": "drop1", "back_at": "drop2"}}]
)
def test_splitfed1_equals_networks_trained_apart_and_averaged(network: dict[str, Any], optimizer: str) -> None:
    setup = unequal(recipe_of(**network, parties=parties("splitfed1"), training=training(optimizer=optimizer)))
    twins = [Whole([seat], setup.desk.servers[seat.client.name]) for seat in setup.seats]
    for epoch in EPOCHS:
        results = play_epoch(setup, epoch)
        for seat, twin in zip(setup.seats, twins, strict=True):
            twin.train_on(seat, epoch)
        counts = [sum(map(len, seat.batches(epoch))) for seat in setup.seats]
        assert counts == [64, 32, 32], "the last, shorter batch is dropped"
        for parts in ([t.bottoms[0] for t in twins], [t.top for t in twins], [t.head for t in twins]):
            average_into(parts, counts)
        for seat, twin, result in zip(setup.seats, twins, results, strict=True):
            assert result.evaluation is not None
            assert result.evaluation.accuracy == twin.accuracy(seat.share.test.x, seat.share.test.y)
            assert_same_bits(seat.client.stage, twin.bottoms[0])
            assert_same_bits(seat.client.head or nn.Identity(), twin.head)
            assert_same_bits(setup.desk.servers[seat.client.name].stage, twin.top)
            _assert_same_memory(seat.client.optimizer, twin.optimizers[0])


def _drawn(recipe: Recipe, epoch: int, index: int) -> list[int]:
    generator = public_source(recipe.seed).derive("desk").generator("turns", epoch, index)
    return cast(list[int], torch.randperm(3, generator=generator).tolist())


def _splitfed2_twins(setup: Setup, *, in_drawn_order: bool = True) -> list[Whole]:
    twins: list[Whole] = []
    for seat in setup.seats:
        twins.append(Whole([seat], setup.server, beside=twins[0] if twins else None))
    for epoch in EPOCHS:
        batches = [seat.batches(epoch) for seat in setup.seats]
        for index in range(max(map(len, batches))):
            for i in _drawn(setup.recipe, epoch, index) if in_drawn_order else range(3):
                if index < len(batches[i]):
                    train, rows = setup.seats[i].share.train, batches[i][index]
                    twins[i].train([train.x[rows]], train.y[rows])
        counts = [sum(map(len, each)) for each in batches]
        average_into([twin.bottoms[0] for twin in twins], counts)
        average_into([twin.head for twin in twins], counts)
    return twins


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("network", [MLP, MLP | U_SHAPED, DROPOUTS])
def test_splitfed2_equals_one_top_stage_stepped_in_the_drawn_order(network: dict[str, Any], optimizer: str) -> None:
    recipe = recipe_of(**network, parties=parties("splitfed2"), training=training(optimizer=optimizer))
    setup = unequal(recipe, (64, 32, 96))
    twins = _splitfed2_twins(setup)
    in_order = _splitfed2_twins(setup, in_drawn_order=False)
    _play(setup)
    for seat, twin in zip(setup.seats, twins, strict=True):
        assert_same_bits(seat.client.stage, twin.bottoms[0])
        assert_same_bits(seat.client.head or nn.Identity(), twin.head)
        assert_same_bits(setup.desk.servers[seat.client.name].stage, twin.top)
    with pytest.raises(AssertionError):
        assert_same_bits(setup.server.stage, in_order[0].top)


# -- owners of columns


def table(folder: Path) -> dict[str, Any]:
    """The data table of a recipe: 300 rows of 7 columns."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(300, 7))
    np.savez(folder / "table.npz", features=x, labels=(x[:, 0] * x[:, 5] > 0).astype(np.int64))
    return {"path": str(folder / "table.npz"), "train_records": 96, "test_records": 30, "test_share": 0.1}


def _assert_vertical(setup: Setup, axis: int, pieces: int = 1) -> None:
    twin = Whole(setup.seats, setup.server, axis)
    _play(setup)
    for epoch in EPOCHS:
        for rows in setup.seats[0].batches(epoch):
            train = [seat.share.train for seat in setup.seats]
            twin.train([part.x[rows] for part in train], train[0].y[rows], pieces)
    for seat, bottom in zip(setup.seats, twin.bottoms, strict=True):
        assert_same_bits(seat.client.stage, bottom)
    assert_same_bits(setup.server.stage, twin.top)


@pytest.mark.parametrize("defense", [{}, DEFENDED], ids=["undefended", "noise and NoPeek"])
@pytest.mark.parametrize("owners", [2, 4])
def test_owners_of_columns_equal_one_network_over_both_stages(
    tmp_path: Path, owners: int, defense: dict[str, Any]
) -> None:
    who = parties("vertical", [f"owner{number}" for number in range(owners)], owner_settings={"hidden": [16 // owners]})
    setup = set_up(recipe_of(data=table(tmp_path), parties=who, defense=defense), Source(KEY))
    widths = [seat.share.train.x.shape[1] for seat in setup.seats]
    assert widths == ([4, 3] if owners == 2 else [2, 2, 2, 1])
    _assert_vertical(setup, 1)


@pytest.mark.parametrize("at", ["block1", "block2"])
@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("defense", [{}, DEFENDED], ids=["undefended", "noise and NoPeek"])
def test_owners_of_picture_halves_equal_one_network(axis: int, at: str, defense: dict[str, Any]) -> None:
    network: dict[str, Any] = {"network": {"name": "cnn", "settings": {"width": 8, "hidden": 16}}, "cut": {"at": at}}
    setup = set_up(recipe_of(**network, parties=parties("vertical", ["ann", "ben"], axis=axis), defense=defense))
    halves = torch.cat([seat.share.train.x for seat in setup.seats], dim=axis)
    assert torch.equal(halves, setup.records.train["ann"].x), "each has its half of the same records"
    _assert_vertical(setup, axis)


def test_owners_draw_one_order_that_the_public_seed_does_not_tell() -> None:
    who = parties("vertical", ["ann", "ben"], owner_settings={"hidden": [8]})
    secret, other = (set_up(recipe_of(parties=who), source) for source in (Source(KEY), None))
    orders = [torch.cat(seat.batches(1)) for seat in (*secret.seats, *other.seats)]
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[2], orders[3])
    assert not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("lost", [1, 5])
def test_records_that_one_owner_lacks_are_counted(lost: int) -> None:
    setup = set_up(recipe_of(parties=parties("vertical", ["ann", "ben"], owner_settings={"hidden": [8]})))
    ann, ben = setup.seats
    assert ben.share.hashes is not None
    hashes = ben.share.hashes.clone()
    assert hashes.shape == (1797, 32)
    hashes[:lost] ^= 1
    broken = replace(setup, seats=(ann, replace(ben, share=replace(ben.share, hashes=hashes))))
    before = copy.deepcopy(setup.server.stage)
    with pytest.raises(DataError, match=f"ann: {lost} of 1,797 records are not matched; ben: {lost} of 1,797"):
        play_epoch(broken, 1)
    assert_same_bits(setup.server.stage, before)
    assert ann.client.steps == ben.client.steps == 0


def test_every_client_of_several_has_weights_of_its_own_and_none_follow_from_the_seed() -> None:
    setup, public = (set_up(recipe_of(parties=parties("splitfed1")), source) for source in (Source(KEY), None))
    first = [next(seat.client.stage.parameters()).flatten() for seat in (*setup.seats, *public.seats)]
    assert len({tuple(weights.tolist()) for weights in first}) == 2 * len(CLIENTS)
