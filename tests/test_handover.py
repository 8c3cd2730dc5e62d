"""Weights handed from client to client: sealed from the server, bound to their place, and averaged exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from milkglass.errors import MessageError
from milkglass.handover import average, seal, unseal
from milkglass.randomness import Source, drawing_from, public_source
from milkglass.training.rounds import sealing_key
from milkglass.training.split import play_epoch, set_up
from milkglass.transcript import Transcript
from milkglass.transports.wrappers import RecordingTransport
from tests.helpers import KEY, small_recipe
from tests.training.whole import U_SHAPED, parties, recipe_of

SHARED = Source(KEY)


def _weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    stage = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    return {
        **{f"stage.{name}": tensor for name, tensor in stage.state_dict().items()},
        "double": torch.rand(5, 2, generator=draw).double(),
        "half": torch.rand(3, generator=draw).half(),
        "not in one piece": torch.rand(4, 6, generator=draw).t(),
        "of a graph": torch.rand(3, generator=draw).requires_grad_(),
        "records": torch.tensor(32.0),
        "extreme": torch.tensor([0.0, -0.0, 1e-45, torch.finfo(torch.float32).max, torch.inf, torch.nan]),
    }


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and found[name].contiguous().numpy().tobytes() == tensor.detach().contiguous().numpy().tobytes()
        for name, tensor in expected.items()
    )


def test_what_was_sealed_comes_out_to_the_bit() -> None:
    weights = _weights()
    sealed = seal(weights, SHARED, "ann", 3)
    assert sealed.dtype == torch.uint8
    assert sealed.dim() == 1
    opened = unseal(sealed, SHARED, "ann", 3)
    assert _same(opened, weights)
    assert not any(tensor.requires_grad for tensor in opened.values())


def test_sealing_again_gives_the_same_bytes_and_anything_else_other_ones() -> None:
    weights = _weights()
    sealed = seal(weights, SHARED, "ann", 3)
    assert torch.equal(seal(_weights() | {k: v.clone() for k, v in weights.items()}, SHARED, "ann", 3), sealed)
    nearly = {**weights, "records": torch.tensor(33.0)}
    others = [
        seal(nearly, SHARED, "ann", 3),
        seal(weights, SHARED, "ben", 3),
        seal(weights, SHARED, "ann", 4),
        seal(weights, Source(b"x" * 32), "ann", 3),
    ]
    for other in others:
        assert other.shape == sealed.shape
        share = (other == sealed).double().mean()
        assert share < 0.05, "no byte tells which part is the same: 1 in 256 agrees by chance"


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_found(place: int, bit: int) -> None:
    sealed = seal({"weight": torch.rand(64, generator=torch.Generator().manual_seed(0))}, SHARED, "ann", 1)
    sealed[place % len(sealed)] ^= 1 << bit
    with pytest.raises(MessageError, match="weights of ann in round 1: cannot be opened; they were changed"):
        unseal(sealed, SHARED, "ann", 1)


def test_of_another_party_round_or_key_or_cut_short() -> None:
    sealed = seal(_weights(), SHARED, "ann", 1)
    longer = torch.cat([sealed, torch.zeros(1, dtype=torch.uint8)])
    for shared, party, round_, what in (
        (SHARED, "ben", 1, sealed),
        (SHARED, "ann", 2, sealed),
        (SHARED, "ann1", 1, sealed),
        (SHARED, "ann", 11, sealed),
        (Source(b"x" * 32), "ann", 1, sealed),
        (SHARED.derive("shared"), "ann", 1, sealed),
        *[(SHARED, "ann", 1, part) for part in (sealed[:-1], sealed[1:], sealed[:0], sealed[:16], longer)],
    ):
        with pytest.raises(MessageError, match=f"weights of {party} in round {round_}: cannot be opened") as caught:
            unseal(what, shared, party, round_)
        assert "\n" not in str(caught.value)


def _chunks(content: bytes, length: int = 8) -> set[bytes]:
    return {content[i : i + length] for i in range(len(content) - length + 1)}


def test_the_server_finds_no_weight_in_what_it_is_handed() -> None:
    recipe = recipe_of(**U_SHAPED, parties=parties("splitfed1"))
    setup = set_up(recipe, Source(KEY), wrap=RecordingTransport)
    play_epoch(setup, 1, test=False)
    transcripts: list[Transcript] = [seat.client.transport.transcript for seat in setup.seats]  # type: ignore[attr-defined]
    sealed = [c.message for t in transcripts for c in t if c.message.kind in ("weights", "handed")]
    assert len(sealed) == 6
    for seat in setup.seats:
        mine = next(m.tensors["sealed"] for m in sealed if m.kind == "weights" and m.party == seat.client.name)
        opened = unseal(mine, sealing_key(seat), seat.client.name, 1)
        assert float(opened.pop("records")) == 32
        assert {name.split(".")[0] for name in opened} == {"stage", "head"}, "what the optimizer knows stays"
        plain = set().union(*(_chunks(tensor.numpy().tobytes()) for tensor in opened.values()))
        assert len(plain) > 4000
        for message in sealed:
            for tensor in message.tensors.values():
                assert tensor.dtype == torch.uint8
                assert not plain & _chunks(tensor.numpy().tobytes())
        # the server has the recipe, and with it everything public
        for guess in (public_source(recipe.seed), setup.server.source, public_source(recipe.seed).derive("shared")):
            with pytest.raises(MessageError, match="cannot be opened"):
                unseal(mine, guess.derive("sealing", recipe.digest()), seat.client.name, 1)


# -- the mean


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 10_000), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
    seed=st.integers(0, 2**32),
)
def test_the_mean_is_that_of_numpy_in_float64(counts: list[int], dtype: torch.dtype, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    parts = [{"w": torch.randn(3, 4, generator=draw).to(dtype), "n": torch.tensor(i)} for i in range(len(counts))]
    mean = average(parts, counts)
    stacked = np.stack([part["w"].double().numpy() for part in parts])
    expected = np.average(stacked, axis=0, weights=counts)
    assert mean["w"].dtype == dtype
    assert np.abs(mean["w"].double().numpy() - expected).max() <= 2 * torch.finfo(dtype).eps * np.abs(stacked).max()
    assert mean["n"] == 0, "a counter is the first one's"


def test_the_mean_of_equal_weights_is_themselves_and_weighs_by_records() -> None:
    with drawing_from(public_source(0).generator("w")):
        weights = nn.Linear(5, 3).state_dict()
    same = average([weights, weights, weights], [1, 2, 5])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in same.items())
    one, three = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}
    assert average([one, three], [3, 1])["w"].item() == 1.5
    assert average([one, three], [0, 1])["w"].item() == 3.0
    assert one["w"].item() == 1.0, "what is averaged stays as it is"


def test_a_mean_of_parts_that_do_not_fit_is_an_error() -> None:
    one = {"w": torch.zeros(2)}
    for wrong in ({"w": torch.zeros(3)}, {"v": torch.zeros(2)}):
        with pytest.raises((RuntimeError, KeyError)):
            average([one, wrong], [1, 1])
    with pytest.raises(ValueError, match="zip"):
        average([one, one], [1])


def test_every_recipe_has_a_sealing_key_of_its_own() -> None:
    seats = [set_up(small_recipe(seed=seed), Source(KEY)).seats[0] for seed in (0, 1)]
    weights = {"w": torch.ones(3)}
    sealed = seal(weights, sealing_key(seats[0]), "client", 1)
    assert torch.equal(unseal(sealed, sealing_key(seats[0]), "client", 1)["w"], weights["w"])
    with pytest.raises(MessageError, match="cannot be opened"):  # handed out again in another run
        unseal(sealed, sealing_key(seats[1]), "client", 1)
