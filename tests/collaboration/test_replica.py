"""Copies of what all train: the same averages make the same bits, and a state that does not fit changes nothing.

At the end, how states are given and taken, without a network: nobody can hold up, or fill, the other side.

Legend: D numbers of all parameters that learn.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, final

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from milkglass.collaboration import state
from milkglass.collaboration.admission import OpenDoor
from milkglass.collaboration.centered_clipping import MEMORY
from milkglass.collaboration.engine import runtime_pb2
from milkglass.collaboration.replica import Replica, Version, epoch_of
from milkglass.errors import MessageError
from milkglass.parties import Party
from milkglass.randomness import Source

RECIPE = bytes(range(32))
Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "adam": lambda learning: torch.optim.Adam(learning, lr=0.1, weight_decay=0.01),
    "momentum": lambda learning: torch.optim.SGD(learning, lr=0.1, momentum=0.9),
    "sgd": lambda learning: torch.optim.SGD(learning, lr=0.1),
}


class Network(nn.Module):
    """Two layers, one number alone, a frozen one, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.alone = nn.Parameter(torch.randn((), generator=generator))
        self.last = nn.Parameter(torch.randn(5, generator=generator))
        self.register_buffer("count", torch.tensor(7))


NUMBERS = 3 * 4 + 1 + 5


def replica_of(optimizer: str = "adam", *, robust: bool = False, recipe: bytes = RECIPE) -> Replica:
    network = Network()
    learning = [each for each in network.parameters() if each.requires_grad]
    party = Party(network, OPTIMIZERS[optimizer](learning), Source(bytes(32)), rate=lambda step: 0.1 / (step + 1))
    return Replica(party, recipe, robust=robust)


def averages(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(NUMBERS, generator=generator) for _ in range(count)]


def stepped(replica: Replica, steps: list[Tensor]) -> Replica:
    for average_D in steps:
        replica.step(average_D)
    return replica


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("robust", [False, True])
def test_same_averages_same_bits(optimizer: str, robust: bool) -> None:
    one, other = (stepped(replica_of(optimizer, robust=robust), averages(4)) for _ in range(2))
    assert one.version == other.version
    assert one.save() == other.save()
    assert one.epoch == 4


def test_numbers_and_gradient() -> None:
    replica = replica_of()
    assert replica.numbers == NUMBERS
    assert not replica.gradient().any()
    network = Network()
    replica = Replica(Party(network, OPTIMIZERS["sgd"]([network.last]), Source(bytes(32))), RECIPE, robust=False)
    (2 * network.first.sum() + 3 * network.alone).backward()  # type: ignore[no-untyped-call]
    assert replica.gradient().tolist() == [2.0] * 12 + [3.0] + [0.0] * 5
    replica.forget_gradient()
    assert not replica.gradient().any()


def test_a_step_is_the_optimizers() -> None:
    """By hand for plain SGD at learning rates 0.1 and 0.05, in the order of the parameters."""
    network, (first_D, second_D) = Network(), averages(2)
    expected_D = torch.cat([network.first.flatten(), network.alone.view(1), network.last]).detach()
    expected_D = expected_D - 0.1 * first_D - 0.05 * second_D
    tensors = load(stepped(replica_of("sgd"), [first_D, second_D]).save()[1])
    found_D = torch.cat([tensors["stage.first"].flatten(), tensors["stage.alone"].view(1), tensors["stage.last"]])
    assert torch.allclose(found_D, expected_D, atol=1e-6)
    assert tensors["stage.frozen"].tolist() == [1, 1]


def test_history_and_digest_tell_apart() -> None:
    steps = averages(2)
    same = stepped(replica_of(), steps).version
    turned = stepped(replica_of(), steps[::-1]).version
    nudged = stepped(replica_of(), [steps[0], torch.nextafter(steps[1], torch.tensor(9.0))]).version
    fewer = stepped(replica_of(), steps[:1]).version
    other_recipe = stepped(replica_of(recipe=bytes(32)), steps).version
    assert len({each.history for each in (same, turned, nudged, fewer, other_recipe)}) == 5
    assert len({each.digest for each in (same, turned, nudged, fewer, other_recipe)}) == 5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("before", [0, 2])
def test_load_what_was_saved(optimizer: str, robust: bool, steps: int, before: int) -> None:
    """All is equal, then and after further steps; whatever the one who loads has done before."""
    donor = stepped(replica_of(optimizer, robust=robust), averages(steps))
    version, content = donor.save()
    taker = stepped(replica_of(optimizer, robust=robust), averages(before, seed=9))
    assert taker.load(content) == version
    assert taker.version == version
    assert taker.save() == (version, content)
    assert epoch_of(content) == steps == taker.epoch
    more = averages(2, seed=5)
    assert stepped(taker, more).save() == stepped(donor, more).save()


def test_a_gradient_from_before_is_forgotten() -> None:
    network = Network()
    party = Party(network, OPTIMIZERS["sgd"]([p for p in network.parameters() if p.requires_grad]), Source(bytes(32)))
    replica = Replica(party, RECIPE, robust=False)
    network.first.sum().backward()  # type: ignore[no-untyped-call]
    replica.load(replica_of("sgd").save()[1])
    assert not replica.gradient().any()


def test_center_is_kept_in_robust_mode_alone() -> None:
    steps = averages(2)
    robust, plain = stepped(replica_of(robust=True), steps), stepped(replica_of(), steps)
    assert robust.center_D is not None
    expected_D = steps[0] * MEMORY + steps[1] * (1 - MEMORY)
    assert torch.equal(robust.center_D, expected_D)
    assert plain.center_D is None
    taker = replica_of(robust=True)
    taker.load(robust.save()[1])
    assert taker.center_D is not None
    assert torch.equal(taker.center_D, expected_D)
    taker.load(replica_of(robust=True).save()[1])
    assert taker.center_D is None  # at epoch 0 nobody has one


def changed(content: bytes, **tensors: Tensor | None) -> bytes:
    """A state with some tensors replaced or added, or taken out."""
    found = load(content)
    for name, tensor in tensors.items():
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
    return save(found)


def headed(content: bytes, **head: object) -> bytes:
    """A state with another head."""
    known = json.loads(bytes(load(content)["head"].tolist()))
    return changed(content, head=torch.tensor(list(json.dumps(known | head).encode()), dtype=torch.uint8))


GOOD = stepped(replica_of(), averages(2)).save()[1]
LIES: dict[str, bytes] = {
    "nothing": b"",
    "noise": bytes(range(256)) * 4,
    "cut off": GOOD[:-1],
    "longer": GOOD + b"x",
    "another recipe": stepped(replica_of(recipe=bytes(32)), averages(2)).save()[1],
    "no head": changed(GOOD, head=None),
    "head that is no JSON": changed(GOOD, head=torch.tensor([1, 2], dtype=torch.uint8)),
    "head of floats": changed(GOOD, head=torch.ones(3)),
    "head of large numbers": changed(GOOD, head=torch.tensor([300])),
    "head in two dimensions": changed(GOOD, head=torch.ones(2, 2, dtype=torch.uint8)),
    "head that is a list": changed(GOOD, head=torch.tensor(list(b"[1]"), dtype=torch.uint8)),
    "head that is deep": changed(GOOD, head=torch.tensor(list(b"[" * 20_000), dtype=torch.uint8)),
    "negative epoch": headed(GOOD, epoch=-1),
    "endless epoch": headed(GOOD, epoch=10**30),
    "infinite epoch": headed(GOOD, epoch=float("inf")),
    "epoch that is no number": headed(GOOD, epoch="three"),
    "short history": headed(GOOD, history="00"),
    "long history": headed(GOOD, history="00" * 100_000),
    "history that is no hexadecimal": headed(GOOD, history="x" * 64),
    "missing weights": changed(GOOD, **{"stage.last": None}),
    "missing buffer": changed(GOOD, **{"stage.count": None}),
    "missing part of the optimizer": changed(GOOD, **{"optimizer.1.exp_avg": None}),
    "optimizer of before": headed(replica_of().save()[1], epoch=2),
    "optimizer at epoch 0": headed(GOOD, epoch=0),
    "another optimizer": stepped(replica_of("momentum"), averages(2)).save()[1],
    "more weights": changed(GOOD, **{"stage.more": torch.ones(1)}),
    "more of the optimizer": changed(GOOD, **{"optimizer.0.more": torch.ones(3, 4)}),
    "optimizer of a parameter that is not there": changed(GOOD, **{"optimizer.9.exp_avg": torch.ones(5)}),
    "optimizer of no parameter": changed(GOOD, **{"optimizer.x": torch.ones(5)}),
    "another name": changed(GOOD, evil=torch.ones(5)),
    "weights of another shape": changed(GOOD, **{"stage.last": torch.ones(6)}),
    "weights of another kind": changed(GOOD, **{"stage.last": torch.ones(5, dtype=torch.float64)}),
    "optimizer of another parameter's shape": changed(GOOD, **{"optimizer.0.exp_avg": torch.ones(5)}),
    "optimizer of whole numbers": changed(GOOD, **{"optimizer.2.exp_avg": torch.ones(5, dtype=torch.int64)}),
    "weights not finite": changed(GOOD, **{"stage.last": torch.tensor([0, 0, 0, 0, float("nan")])}),
    "optimizer not finite": changed(GOOD, **{"optimizer.2.exp_avg_sq": torch.full((5,), float("inf"))}),
    "a center in plain mode": changed(GOOD, center=torch.zeros(NUMBERS)),
}


@pytest.mark.parametrize("name", LIES)
def test_a_state_that_does_not_fit_changes_nothing(name: str) -> None:
    replica = stepped(replica_of(), averages(3, seed=4))
    before = replica.save()
    with pytest.raises(MessageError) as error:
        replica.load(LIES[name])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    assert replica.save() == before
    more = averages(1, seed=5)
    assert stepped(replica, more).save() == stepped(replica_of(), [*averages(3, seed=4), *more]).save()


def test_the_state_they_are_made_of_fits() -> None:
    assert replica_of().load(GOOD).epoch == 2
    assert replica_of().load(changed(GOOD)).epoch == 2


@pytest.mark.parametrize(
    "center_D", [None, torch.zeros(NUMBERS + 1), torch.zeros(NUMBERS).double(), torch.full((NUMBERS,), float("nan"))]
)
def test_a_robust_state_has_a_center_that_fits(center_D: Tensor | None) -> None:
    """Who had another center than the rest would take honest reducers for liars."""
    good = stepped(replica_of(robust=True), averages(2)).save()[1]
    replica = replica_of(robust=True)
    with pytest.raises(MessageError):
        replica.load(changed(good, center=center_D))
    assert replica.epoch == 0
    assert replica.load(good).epoch == 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("robust", [False, True])
def test_no_state_is_longer_than_most_bytes(optimizer: str, robust: bool) -> None:
    """Known before the first step; and what it leaves to a liar is little, at any size of the network."""
    most_bytes = replica_of(optimizer, robust=robust).most_bytes
    for steps in (0, 1, 3):
        replica = stepped(replica_of(optimizer, robust=robust), averages(steps))
        assert len(replica.save()[1]) <= most_bytes == replica.most_bytes
    large = nn.Linear(2000, 500)
    party = Party(large, OPTIMIZERS[optimizer](list(large.parameters())), Source(bytes(32)))
    replica = Replica(party, RECIPE, robust=robust)
    replica.step(torch.ones(replica.numbers))
    length = len(replica.save()[1])
    assert length <= replica.most_bytes <= length + (1 << 20) + 16 * 512


# Giving and taking states


@final
class Taker:
    """Who asks, as hivemind tells it."""

    class remote_id:  # noqa: N801
        """hivemind's."""

        @staticmethod
        def to_bytes() -> bytes:
            """Any id."""
            return b"peer"


def asked(states: state.States) -> AsyncIterator[Any]:
    return states.give(runtime_pb2.ExpertRequest(), Taker())


def counted(replica: Replica) -> list[bytes]:
    """What `save` returns from now on."""
    saved: list[bytes] = []
    save_ = replica.save

    def save_and_count() -> tuple[Version, bytes]:
        version, content = save_()
        saved.append(content)
        return version, content

    replica.save = save_and_count  # type: ignore[method-assign]
    return saved


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_PIECE", 100)
    monkeypatch.setattr(state, "_BUSY_SECONDS", 0.05)


@pytest.mark.usefixtures("small_pieces")
def test_takers_of_one_state_share_one_copy() -> None:
    """A step later there is another; each taker has one of them whole; with the last upload the copy is forgotten."""
    replica = stepped(replica_of(), averages(2))
    saved, states = counted(replica), state.States(replica, OpenDoor())

    async def give() -> list[bytes]:
        one, other = asked(states), asked(states)
        found = [(await anext(one)).metadata, (await anext(other)).metadata]
        assert len(saved) == 1
        replica.step(averages(1)[0])
        found[0] += b"".join([piece.metadata async for piece in one])
        found.append(b"".join([piece.metadata async for piece in asked(states)]))
        found[1] += b"".join([piece.metadata async for piece in other])
        assert states._copy is None
        return found

    found = asyncio.run(give())
    assert len(saved) == 2
    assert found == [saved[0], saved[0], saved[1]]
    assert states.bytes_sent == sum(map(len, found))


@pytest.mark.usefixtures("small_pieces")
def test_a_third_taker_is_told_to_come_again() -> None:
    states = state.States(replica_of(), OpenDoor())

    async def give() -> None:
        takers = [asked(states), asked(states)]
        for each in takers:
            await anext(each)
        with pytest.raises(MessageError, match="busy"):
            await anext(asked(states))
        await takers[0].aclose()  # type: ignore[attr-defined]  # it breaks off
        assert [piece async for piece in asked(states)]
        await takers[1].aclose()  # type: ignore[attr-defined]
        assert states._copy is None

    asyncio.run(give())


@pytest.mark.usefixtures("small_pieces")
def test_a_taker_that_does_not_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_UPLOAD_SECONDS", 0.05)
    states = state.States(replica_of(), OpenDoor())

    async def send_to_one_who_reads_once() -> None:
        async for _ in asked(states):
            await asyncio.sleep(30)

    async def give() -> None:
        for _ in range(3):
            with pytest.raises(asyncio.CancelledError):
                await asyncio.create_task(send_to_one_who_reads_once())
        assert [piece async for piece in asked(states)]

    asyncio.run(asyncio.wait_for(give(), 10))


@final
class Donor:
    """A service of one donor that gives pieces, each after so many seconds."""

    def __init__(self, pieces: list[bytes], seconds: float = 0.0, *, endless: bool = False) -> None:
        self._pieces, self._seconds, self._endless = pieces, seconds, endless

    def stub(self, _: bytes) -> Donor:
        """Of itself."""
        return self

    async def rpc_state(self, _: object) -> AsyncIterator[Any]:
        """The pieces, again and again if endless."""

        async def give() -> AsyncIterator[Any]:
            while True:
                for piece in self._pieces:
                    await asyncio.sleep(self._seconds)
                    yield runtime_pb2.ExpertResponse(metadata=piece)
                if not self._endless:
                    return

        return give()


def fetched(donor: Donor, most_bytes: int = 1000) -> bytes:
    return asyncio.run(asyncio.wait_for(state._fetch(donor, b"peer", b"", 0.3, most_bytes), 10))


def test_a_download_has_an_end() -> None:
    """Whole up to the most that a state has; not beyond, not at any speed, and not without content."""
    assert fetched(Donor([b"x" * 500] * 2)) == b"x" * 1000
    assert fetched(Donor([b"x" * 500] * 2, seconds=0.2)) == b"x" * 1000
    with pytest.raises(MessageError, match="more than 999 bytes"):
        fetched(Donor([b"x" * 500] * 2), most_bytes=999)
    with pytest.raises(MessageError, match="more than 1000 bytes"):
        fetched(Donor([b"x"], endless=True))
    with pytest.raises(MessageError, match="less than 65536 bytes/s"):
        fetched(Donor([b"x"], seconds=0.05, endless=True))
    with pytest.raises(MessageError, match="less than 65536 bytes/s"):
        fetched(Donor([b""], seconds=0.01, endless=True))
    with pytest.raises(MessageError, match="gives no state"):
        fetched(Donor([]))
    with pytest.raises(TimeoutError):
        fetched(Donor([b"x"], seconds=5))
