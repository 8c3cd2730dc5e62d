"""Real averagings on loopback: their numbers against the mean by hand, and who may not take part.

Legend: D numbers of the vector.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from milkglass.collaboration.admission import OpenDoor
from milkglass.collaboration.duty import Averaging
from milkglass.collaboration.engine import get_dht_time, runtime_pb2
from milkglass.collaboration.group import MOST_BANS, Group, Matcher, Member, read_member, without_banned
from milkglass.collaboration.identity import Identity, new_identity
from milkglass.collaboration.parts import RoundFailedError, plan
from milkglass.collaboration.reduction import PURPOSE, Outcome, read_included
from milkglass.collaboration.sealed import seal
from milkglass.collaboration.state import Download, download
from milkglass.collaboration.wire_vector import PIECE, Compress, VectorCodec
from milkglass.errors import MessageError
from tests.collaboration.in_process import (
    Listed,
    Volunteer,
    acquaint,
    averaged,
    group_of,
    outcomes,
    prepare,
    replica_of,
    volunteers,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # hivemind's, of streams that were broken off
]


@pytest.fixture(scope="module")
def four() -> Iterator[list[Volunteer]]:
    """Used by many tests, none of which harms them; the last cannot be called by others."""
    with volunteers(4, 10, unreachable=[3]) as found:
        acquaint(found, unreachable=[3])
        prepare(found, 10)
        yield found


def vectors(count: int, numbers: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numbers, generator=generator) for _ in range(count)]


def mean(x: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """By hand, float64."""
    return sum(w * each.double() for w, each in zip(weights, x, strict=True)) / sum(weights)  # type: ignore[return-value]


TOLERANCE = {"none": 1e-6, "gaussian_k": 1e-6, "fp16": 2e-3, "int8": 2 / 127}
"""Of the largest number: of float32 in sums; half a step there and half a step back, at most."""


@pytest.mark.parametrize("compress", TOLERANCE)
@pytest.mark.parametrize("bandwidths", [None, [1e6, 3e6, 2e6, 9e9]])
def test_the_average_is_the_weighted_mean(
    four: list[Volunteer], compress: Compress, bandwidths: list[float | None] | None
) -> None:
    """At all members the same bits, though one is not reachable; with equal parts, and with unequal."""
    prepare(four, 5000, compress=compress)
    x, samples, losses = vectors(4, 5000), [10, 20, 5, 40], [1.0, 2.0, 3.0, 4.0]
    if compress == "gaussian_k":
        x = [each * (each.abs() > 1.5) for each in x]
    group = group_of(four, unreachable=[3], bandwidths=bandwidths)
    found = outcomes(averaged(four, group, x, samples, losses))
    expected_D = mean(x, [10, 20, 5, 40])
    largest = max(float(each.abs().max()) for each in x)
    assert torch.allclose(found[0].vector_D.double(), expected_D, rtol=0, atol=largest * TOLERANCE[compress])
    assert not torch.allclose(found[0].vector_D.double(), mean(x, [1, 1, 1, 1]), rtol=0, atol=0.1)
    for each in found:
        assert (each.samples, each.members) == (75, 4)
        assert each.loss == pytest.approx((10 + 40 + 15 + 160) / 75)
        assert not each.caught


def test_no_claim_counts_above_the_cap(four: list[Volunteer]) -> None:
    prepare(four, 50, weight_cap=2.0)
    x = vectors(4, 50)
    found = outcomes(averaged(four, group_of(four, unreachable=[3]), x, [10, 20, 10, 10**9]))
    assert torch.allclose(found[0].vector_D.double(), mean(x, [10, 20, 10, 20]), atol=1e-6)


def test_one_that_listens_alone(four: list[Volunteer]) -> None:
    """An auxiliary, and one who has no gradient just now: they reduce, and hear the same; their numbers count not."""
    for listening, missing in (([1], [1]), ([], [0, 2])):
        prepare(four, 301)
        x: list[Tensor | None] = [None if index in missing else each for index, each in enumerate(vectors(4, 301))]
        samples = [0 if index in missing else 8 for index in range(4)]
        found = outcomes(averaged(four, group_of(four, unreachable=[3], listening=listening), x, samples))
        there = [each for each in x if each is not None]
        assert torch.allclose(found[0].vector_D.double(), mean(there, [1] * len(there)), atol=1e-6)
        assert found[0].samples == 8 * len(there)


@pytest.mark.parametrize("numbers", [1, 2, 3, 4])
def test_fewer_numbers_than_members(four: list[Volunteer], numbers: int) -> None:
    prepare(four, numbers)
    x = vectors(4, numbers)
    found = outcomes(averaged(four, group_of(four, unreachable=[3]), x, [1, 2, 3, 4]))
    assert torch.allclose(found[0].vector_D.double(), mean(x, [1, 2, 3, 4]), atol=1e-6)


@pytest.mark.parametrize("numbers", [PIECE, PIECE + 1, 3 * PIECE - 1])
def test_a_part_of_several_pieces(four: list[Volunteer], numbers: int) -> None:
    """Of two, one reduces all."""
    two = [four[2], four[3]]
    prepare(two, numbers)
    x = vectors(2, numbers)
    found = outcomes(averaged(two, group_of(two, unreachable=[1]), x, [1, 3]))
    assert torch.allclose(found[0].vector_D.double(), mean(x, [1, 3]), atol=1e-6)
    assert found[1].sent >= 4 * numbers


def test_nobody_contributes(four: list[Volunteer]) -> None:
    prepare(four, 10)
    found = averaged(four, group_of(four, unreachable=[3]), [None] * 4, [0] * 4)
    assert all(isinstance(each, RoundFailedError) for each in found)


def test_nobody_can_be_reached(four: list[Volunteer]) -> None:
    prepare(four, 10)
    found = averaged(four, group_of(four, unreachable=range(4)), list(vectors(4, 10)), [1] * 4)
    assert [str(each) for each in found] == ["too few in the group can be reached"] * 4


def test_what_is_not_finite_spoils_nothing(four: list[Volunteer]) -> None:
    prepare(four, 60)
    x = vectors(4, 60)
    x[3][:] = float("nan")
    found = outcomes(averaged(four, group_of(four, unreachable=[3]), x, [1, 2, 3, 4]))
    assert torch.allclose(found[0].vector_D.double(), mean(x[:3], [1, 2, 3]), atol=1e-6)
    assert found[0].samples == 6


def test_one_that_never_comes_is_left_out(four: list[Volunteer]) -> None:
    """It reduces nothing; the rest waits a third of the time-out for it."""
    prepare(four, 60, timeout_seconds=3.0)
    x = vectors(4, 60)
    begun = time.monotonic()
    found = outcomes(averaged(four[:3], group_of(four, unreachable=[3]), x[:3], [1, 2, 3]))
    assert time.monotonic() - begun < 2.5
    assert torch.allclose(found[0].vector_D.double(), mean(x[:3], [1, 2, 3]), atol=1e-6)


def test_a_reducer_that_never_comes_ends_the_round_in_time(four: list[Volunteer]) -> None:
    prepare(four, 60, timeout_seconds=3.0)
    begun = time.monotonic()
    found = averaged(four[1:], group_of(four, unreachable=[3]), list(vectors(3, 60)), [1, 2, 3])
    assert time.monotonic() - begun < 5
    for each in found:
        assert isinstance(each, RoundFailedError)
        assert "did not come back" in str(each)
        assert not each.caught


def stalling(volunteer: Volunteer, monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> None:
    """Make a contributor dawdle before each piece of 1 number that it sends to others."""
    reductions = volunteer.session._reductions
    count = reductions._count

    def slow(begun: Any, message: Any) -> Any:
        if message.tensors:
            time.sleep(seconds)
        return count(begun, message)

    monkeypatch.setattr(reductions, "_count", slow)


def test_one_that_dawdles_is_left_out_of_what_it_did_not_deliver(
    four: list[Volunteer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece now and then, each in time, would hold a round for ever: there is an end for all of them together."""
    two = [four[2], four[3]]
    numbers = 8 * PIECE
    prepare(two, numbers, timeout_seconds=6.0)
    four[3].session._reductions.timeout_seconds = 30.0  # it does not give up itself
    stalling(four[3], monkeypatch, seconds=0.9)
    x = vectors(2, numbers)
    found = averaged(two, group_of(two, unreachable=[1]), x, [1, 3])
    assert isinstance(found[0], Outcome)  # within its time-out, of 6 seconds
    last = slice(7 * PIECE, None)
    assert torch.equal(found[0].vector_D[last], x[0][last])
    assert torch.allclose(found[0].vector_D[:PIECE], mean(x, [1, 3])[:PIECE].float(), atol=1e-6)


def test_one_that_sends_to_some_alone_is_left_out_by_the_others(
    four: list[Volunteer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of its numbers counts."""
    prepare(four, 60, timeout_seconds=3.0)
    group = group_of(four, unreachable=[3])
    left = group.index(four[0].peer_id)
    ask = four[3].session._reductions._ask

    async def some(begun: Any, number: int, reducer: int, *others: Any) -> Any:
        return None if reducer == left else await ask(begun, number, reducer, *others)

    monkeypatch.setattr(four[3].session._reductions, "_ask", some)
    x = vectors(4, 60)
    found = outcomes(averaged(four, group, x, [1, 2, 3, 4])[:3])
    for part in plan(group, 60, robust=False):
        span = slice(part.start, part.stop)
        expected_D = mean(x[:3], [1, 2, 3]) if part.reducers == (left,) else mean(x, [1, 2, 3, 4])
        assert torch.allclose(found[0].vector_D[span].double(), expected_D[span], atol=1e-6)


@pytest.mark.parametrize("moment", ["before", "as it sends", "as it answers"])
def test_one_that_dies_in_the_middle(moment: str) -> None:
    """Its daemon is killed. The others end: with an average, the same at all who have one, or with a failure."""
    with volunteers(4, 40_000, timeout_seconds=3.0) as found:
        dying = found[1].session

        def die(*_: object) -> None:
            dying.board.is_newcomer = True  # so that it does not try to say goodbye, which takes it seconds
            if dying.node.alive:
                dying.node.p2p._child.kill()

        if moment == "before":
            die()
        reductions = dying._reductions
        if moment == "as it sends":
            begin_count = reductions._count
            reductions._count = lambda *each: (die(), begin_count(*each))[1]  # type: ignore[method-assign, func-returns-value]
        if moment == "as it answers":
            recognize = reductions._recognize

            async def dying_then(*each: Any) -> Any:
                die()
                return await recognize(*each)

            reductions._recognize = dying_then  # type: ignore[method-assign, assignment]
        living = found if moment != "before" else [found[0], *found[2:]]
        x = vectors(4, 40_000)
        begun = time.monotonic()
        came = averaged(living, group_of(found), x[: len(living)], [1] * len(living))
        assert time.monotonic() - begun < 6
        survivors = [each for volunteer, each in zip(living, came, strict=True) if volunteer is not found[1]]
        assert any(isinstance(each, RoundFailedError) for each in survivors)  # its own part at least is missing
        outcomes([each for each in survivors if isinstance(each, Outcome)])
        rest = [found[0], *found[2:]]
        prepare(rest, 40_000, timeout_seconds=3.0)
        again = outcomes(averaged(rest, group_of(rest), x[:3], [1, 2, 3]))  # tried again without it
        assert torch.allclose(again[0].vector_D.double(), mean(x[:3], [1, 2, 3]), atol=1e-6)


# Who is not of a round


async def _ask(volunteer: Volunteer, of: Volunteer, head: object, sealed: bytes, numbers: int = 10) -> list[Any]:
    """Contribute to whatever round the head says; what comes back."""

    async def messages() -> Any:
        yield runtime_pb2.ExpertRequest(uid=head if isinstance(head, str) else json.dumps(head), metadata=sealed)
        codec_piece = runtime_pb2.Tensor(buffer=torch.full((numbers,), 1e6).numpy().tobytes(), size=[numbers])
        yield runtime_pb2.ExpertRequest(tensors=[codec_piece])

    answers = await volunteer.session._service.stub(of.peer_id).rpc_reduce(messages())
    found = [answer async for answer in answers]
    if not found:  # now and then hivemind closes the stream before its error is read
        raise MessageError("nothing came back")
    return found


def words(group: Group, part: int, **changes: Any) -> dict[str, Any]:
    return {"round": group.round_id.hex(), "part": part, "digest": "", "samples": 9, "loss": 0.0} | changes


def test_a_stranger_sends_to_a_round(four: list[Volunteer]) -> None:
    """Whatever he says and signs, nothing comes back, and the round is as without him."""
    three, stranger = four[:2], four[2]
    prepare(four, 10, timeout_seconds=3.0)
    group = group_of(three)
    session, ours = three[0].session, group.index(three[0].peer_id)
    part = next(number for number, each in enumerate(plan(group, 10, robust=False)) if ours in each.reducers)
    head = {"round": group.round_id.hex(), "part": part}
    own = seal(stranger.identity, b"", PURPOSE, words(group, part))
    member = seal(three[1].identity, b"", PURPOSE, words(group, part))
    attempts: list[tuple[object, bytes]] = [
        (head, own),
        (head, member),  # what a member signed, seen on its way
        (head, b""),
        (head | {"part": part + 1}, own),
        (head | {"part": float("inf")}, own),
        (head | {"round": "00"}, own),
        (head | {"round": 3}, own),
        ("[" * 30_000, own),
        ("", own),
    ]
    averaging = Averaging(VectorCodec("none"), 4.0, robust=False)
    x = vectors(2, 10)
    begun = session.node.run(session._reductions.begin(group, averaging, x[0], 10, 5, 0.0))
    for attempt, sealed in attempts:
        with pytest.raises(Exception) as refused:  # noqa: PT011 - hivemind's own, of whatever the other side raised
            stranger.session.node.run(_ask(stranger, three[0], attempt, sealed), 5.0)
        assert not isinstance(refused.value, TimeoutError)
    assert not begun.arrived
    found = outcomes(averaged(three, group, x, [1, 3]))
    assert torch.allclose(found[0].vector_D.double(), mean(x, [1, 3]), atol=1e-6)


def test_a_member_says_one_part_and_signs_another(four: list[Volunteer]) -> None:
    two = four[:2]
    prepare(two, 10, timeout_seconds=3.0)
    group = group_of(two)
    ours = group.index(two[0].peer_id)
    part = next(number for number, each in enumerate(plan(group, 10, robust=False)) if ours in each.reducers)
    averaging = Averaging(VectorCodec("none"), 4.0, robust=False)
    session = two[0].session
    begun = session.node.run(session._reductions.begin(group, averaging, torch.ones(10), 10, 5, 0.0))
    head = {"round": group.round_id.hex(), "part": part}
    for content in (
        words(group, part + 1),
        words(group, part, round="00"),
        words(group, part, samples=-1),
        words(group, part, samples=1 << 60),
        words(group, part, samples=1.5),
        words(group, part, loss=float("nan")),
        words(group, part, loss=10**400),
        words(group, part, loss=None),
        {},
    ):
        sealed = seal(two[1].identity, b"", PURPOSE, content)
        with pytest.raises(Exception) as refused:  # noqa: PT011
            two[1].session.node.run(_ask(two[1], two[0], head, sealed), 5.0)
        assert not isinstance(refused.value, TimeoutError)
    assert not begun.arrived


def test_included_is_checked() -> None:
    assert read_included(b'[[0, 5, 0.5, "", 1.0], [2, 3, 1, "d", 0]]', 3) == (
        (0, 5, 0.5, "", 1.0),
        (2, 3, 1.0, "d", 0.0),
    )
    for lie in (
        *(b"", b"{}", b"[[0]]", b"5", b'[[3, 5, 0.5, "", 1]]', b'[[-1, 5, 0.5, "", 1]]', b'[[0, -5, 0.5, "", 1]]'),
        *(b'[[0, 5, 0.5, ""]]', b'[[0, 5, 0.5, "", 1.5]]', b'[[0, 5, 0.5, "", NaN]]'),
    ):
        if lie != b"{}":
            with pytest.raises(MessageError):
                read_included(lie, 3)
    for samples, loss in (
        ("1e400", "0"),
        ("1" + "0" * 400, "0"),
        ("1", "NaN"),
        ("1", "Infinity"),
        ("1", "1" + "0" * 400),
    ):
        with pytest.raises(MessageError):
            read_included(f'[[0, {samples}, {loss}, "", 1]]'.encode(), 3)
    with pytest.raises(MessageError, match="twice"):
        read_included(b'[[0, 5, 0.5, "", 1], [0, 5, 0.5, "", 1]]', 3)
    with pytest.raises(MessageError):
        read_included(b"[" * 30_000, 3)


# Who reduces what


def member(index: int, bandwidth: float | None = None, *, reachable: bool = True) -> Member:
    return Member(bytes([index]), 0, bandwidth, reachable, True)


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize(
    "bandwidths",
    [
        [None, None, None],
        [1e6, 1e6, 1e6],
        [1e-300, 1e11, 1e11],
        [5e-324, 1e-300, 1e11],
        [9e11, 1.0, 1.0],
        [1e-9, 1e11, 1e6],
        [None, 1e11, 1e-11],
        [1e6, 2e6, 1e6, 1e6, 5e-324],
    ],
)
@pytest.mark.parametrize("numbers", [1, 10, 10_000_019])
def test_parts_cover_the_vector_whatever_bandwidths_are_claimed(
    bandwidths: list[float | None], robust: bool, numbers: int
) -> None:
    """The linear program fails on numbers that are too far apart: a liar could stop every round so."""
    members = [member(index, each) for index, each in enumerate(bandwidths)] + [member(99, 1e6, reachable=False)]
    for last in (0, 1, 255):
        parts = plan(Group(bytes([last] * 32), tuple(members)), numbers, robust=robust)
        assert parts[0].start == 0
        assert parts[-1].stop == numbers
        assert all(one.stop == two.start for one, two in pairwise(parts))
        assert all(part.stop > part.start for part in parts)
        for part in parts:
            assert len(set(part.reducers)) == len(part.reducers) == 1 + robust
            assert len(members) - 1 not in part.reducers
        firsts = [part.reducers[0] for part in parts]
        assert len(set(firsts)) == len(firsts)


# Groups, as leaders tell of them


def says(identity: Identity, **changes: Any) -> bytes:
    return seal(identity, b"", "member", _says() | changes)


def own_member(volunteer: Volunteer) -> Member:
    return Member(volunteer.peer_id, 0, None, True, True)


def test_a_leader_who_tells_different_things_makes_different_rounds(four: list[Volunteer]) -> None:
    """Leaving out, putting in, or changing a word: whoever was told of it is in another round."""
    matcher: Matcher = four[0].session._matcher
    others = [new_identity() for _ in range(3)]
    told = {each.peer_id: says(each) for each in [four[0].identity, *others]}
    own = own_member(four[0])
    group = matcher._group(b"id", told, own)
    assert group is not None
    assert len(group.members) == 4
    again = matcher._group(b"id", dict(reversed(told.items())), own)
    assert again == group
    left_out = {peer: sealed for peer, sealed in told.items() if peer != others[0].peer_id}
    older = told | {others[0].peer_id: says(others[0], bandwidth=5.0)}
    put_in = told | {(more := new_identity()).peer_id: says(more)}
    found = [matcher._group(b"id", each, own) for each in (left_out, older, put_in)]
    found.append(matcher._group(b"other id", told, own))
    assert all(each is not None for each in found)
    assert len({group.round_id, *[each.round_id for each in found if each is not None]}) == 5


def test_a_leader_can_put_words_in_nobodys_mouth(four: list[Volunteer]) -> None:
    matcher: Matcher = four[0].session._matcher
    other = new_identity()
    own = own_member(four[0])
    fair = {four[0].peer_id: says(four[0].identity), other.peer_id: says(other)}
    assert matcher._group(b"id", fair, own) is not None
    for lie in (
        says(four[0].identity),
        b"",
        bytes(100),
        says(other, epoch=1),
        says(other, time=get_dht_time() - 1000),
        says(other, time="now"),
        says(other, bandwidth=-1.0),
        says(other, bandwidth=0),
        says(other, bandwidth=float("nan")),
        says(other, bandwidth=1e13),
        says(other, bans=["xy"]),
        says(other, bans=5),
        says(other, epoch=float("inf")),
        says(other, epoch=None),
        seal(other, b"", "contribution", {"epoch": 0}),
        seal(other, b"", "member", {}),
    ):
        assert matcher._group(b"id", fair | {other.peer_id: lie}, own) is None
    assert matcher._group(b"id", {other.peer_id: fair[other.peer_id]}, own) is None


def test_a_leader_cannot_deal_out_an_old_group(four: list[Volunteer], monkeypatch: pytest.MonkeyPatch) -> None:
    """With our words of an earlier attempt the round id would be the same, and we would sign it twice."""
    session = four[0].session
    other = new_identity()
    dealt: list[bytes] = []

    async def look_for_group(search: Any) -> Any:
        dealt.append(search.data_for_gather)
        gathered = [dealt[0], says(other, history=four[0].replica.history.hex())]
        ids = [SimpleNamespace(to_bytes=lambda peer=peer: peer) for peer in (four[0].peer_id, other.peer_id)]
        return SimpleNamespace(group_id=b"id", peer_ids=ids, gathered=gathered)

    monkeypatch.setattr(session._matcher._matchmaking, "look_for_group", look_for_group)
    first = session.find_group(2).result(5)
    assert first is not None
    assert len(first.members) == 2
    assert session.find_group(2).result(5) is None


def test_one_alone_puts_nobody_out() -> None:
    """Nor himself: whom he has caught and the others have not stays in the group that he sees."""
    for count in range(2, 8):
        liar = Member(b"liar", 0, None, True, True)
        for votes in range(count):
            others = [
                Member(bytes([index]), 0, None, True, True, frozenset([b"liar"] if index < votes else []))
                for index in range(count - 1)
            ]
            kept = without_banned([liar, *others])
            assert (liar in kept) == (2 * votes <= count - 1)
            assert [each for each in kept if each is not liar] == others
    own = Member(b"me", 0, None, True, True, frozenset([b"me"]))
    assert own in without_banned([own, liar])


def test_whom_we_alone_have_caught_is_in_our_group_as_in_the_others(four: list[Volunteer]) -> None:
    matcher: Matcher = four[0].session._matcher
    caught, other, third = (new_identity() for _ in range(3))
    own = own_member(four[0])
    told = {each.peer_id: says(each) for each in (caught, other, third)}
    ours = says(four[0].identity, bans=[caught.peer_id.hex()])
    before = matcher._group(b"id", told | {four[0].peer_id: ours}, own)
    matcher.banned.add(caught.peer_id)
    after = matcher._group(b"id", told | {four[0].peer_id: ours}, own)
    assert after == before
    assert after is not None
    assert len(after.members) == 4
    two_votes = told | {four[0].peer_id: ours, other.peer_id: says(other, bans=[caught.peer_id.hex()])}
    voted = matcher._group(b"id", two_votes, own)
    assert voted is not None
    assert caught.peer_id not in {each.peer_id for each in voted.members}
    matcher.banned.clear()


def test_a_member_reads_as_it_was_said() -> None:
    now = 1000.0
    content = {"epoch": 3, "bandwidth": 5e6, "reachable": True, "trains": False, "bans": ["00ff"], "time": 999.0}
    content["history"] = "0b"
    expected = Member(b"id" * 19, 3, 5e6, True, False, frozenset([b"\x00\xff"]), b"\x0b")
    assert read_member(b"id" * 19, content, now) == expected
    content["bans"] = [f"{count:04x}" for count in range(MOST_BANS)]
    assert len(read_member(b"id" * 19, content, now).bans) == MOST_BANS
    content["bans"] = [f"{count:04x}" for count in range(MOST_BANS + 1)]
    with pytest.raises(MessageError, match=f"says that it has caught {MOST_BANS + 1}; at most {MOST_BANS} are told"):
        read_member(b"id" * 19, content, now)


def test_whom_one_has_caught_is_told_within_bounds(four: list[Volunteer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a liar who comes back again and again under new names: the latest, each once."""
    session, told = four[0].session, list[Member]()

    async def nobody(own: Member, *_: object) -> None:
        told.append(own)

    monkeypatch.setattr(session._matcher, "find", nobody)
    names = [count.to_bytes(4, "big") for count in range(MOST_BANS + 9)]
    for name in names:
        session._catch(frozenset([name, names[0]]))
    assert session.find_group(2).result(5) is None
    assert told[0].bans == frozenset(names[-MOST_BANS:])
    assert session.caught == set(names)


# Whom admission keeps out


def test_a_stranger_is_kept_out_of_everything() -> None:
    """He runs the same program, and his own list admits all. He is not matched, gets no state, is not on the board."""
    names = [new_identity() for _ in range(3)]
    honest = Listed({each.peer_id for each in names[:2]})
    lenient = Listed({each.peer_id for each in names})
    doors = {0: honest, 1: honest, 2: lenient}
    with volunteers(3, 10, admissions=doors, identities=names, timeout_seconds=3.0) as found:
        one, other, stranger = found
        for each in found:
            each.session.node.run(each.session.board.tell())
        deadline = time.monotonic() + 5
        while not one.session.others or not other.session.others:
            assert time.monotonic() < deadline
            one.session.look()
            other.session.look()
        groups = [each.session.find_group(3) for each in found]
        ends = [each.result(20) for each in groups]
        assert set(one.session.others) == {other.peer_id}
        assert set(other.session.others) == {one.peer_id}
        for group in ends[:2]:
            assert group is not None
            assert {each.peer_id for each in group.members} == {one.peer_id, other.peer_id}
        assert ends[2] is None
        assert ends[0] is not None
        assert ends[1] is not None
        assert ends[0].round_id == ends[1].round_id
        with pytest.raises(MessageError, match="does not answer"):
            stranger.session.catch_up()
        assert not one.session.states.bytes_sent
        sealed = seal(stranger.identity, b"a token", PURPOSE, words(ends[0], 0))
        head = {"round": ends[0].round_id.hex(), "part": 0}
        with pytest.raises(Exception) as refused:  # noqa: PT011
            stranger.session.node.run(_ask(stranger, one, head, sealed), 10.0)
        assert not isinstance(refused.value, TimeoutError)


def test_a_stranger_who_leads_is_not_followed() -> None:
    """By whoever does not admit him: what he deals out holds nobody whom the member itself does not admit."""
    names = [new_identity() for _ in range(2)]
    doors = {0: Listed({names[0].peer_id}), 1: OpenDoor()}
    with volunteers(2, 10, admissions=doors, identities=names) as found:
        member_of = found[0].session._matcher
        told = {each.peer_id: seal(each.identity, b"a token", "member", _says()) for each in found}
        assert member_of._group(b"id", told, own_member(found[0])) is None
        open_door = found[1].session._matcher
        assert open_door._group(b"id", told, own_member(found[1])) is not None


def _says() -> dict[str, Any]:
    known: dict[str, Any] = {"epoch": 0, "bandwidth": None, "reachable": True, "trains": True, "bans": []}
    known["history"] = ""
    return known | {"time": get_dht_time()}


# States


def tampered(volunteer: Volunteer, content: bytes) -> None:
    """Give this state in place of one's own."""
    version = volunteer.replica.version
    volunteer.replica.save = lambda: (version, content)  # type: ignore[method-assign]


def step_all(members: Sequence[Volunteer], numbers: int, steps: int) -> None:
    for average_D in vectors(steps, numbers, seed=3):
        for each in members:
            each.replica.step(average_D)


def all_told(members: Sequence[Volunteer]) -> None:
    """Everybody's report is new, and everybody has read those of all who have one."""
    for each in members:
        each.session.node.run(each.session.board.tell())
    deadline = time.monotonic() + 8
    telling = [each for each in members if not each.session.board.is_newcomer]
    for each in members:
        epochs = {one.peer_id: one.replica.epoch for one in telling if one is not each}
        while {peer: report.epoch for peer, report in each.session.others.items()} != epochs:
            assert time.monotonic() < deadline
            each.session.look()
            time.sleep(0.05)


def test_a_donor_of_another_state_is_passed_over() -> None:
    """Of four, one is new. One of the three gives weights that nobody else has; the state of the others is taken."""
    with volunteers(4, 10) as found:
        *donors, taker = found
        taker.session.board.is_newcomer = True
        step_all(donors, 10, 2)
        liar = donors[0]
        forged = _replica_like(found[0], steps=2, seed=77)
        tampered(liar, forged)
        all_told(found)
        for order in ([liar, *donors[1:]], [*donors[1:], liar]):
            taker.replica.load(_replica_like(taker, steps=0, seed=0))
            download = _download(taker, [each.peer_id for each in order])
            assert download.donor == next(each.peer_id for each in order if each is not liar)
            assert download.checked
            assert taker.replica.version == donors[1].replica.version
        with pytest.raises(MessageError, match="not the one that most have"):
            _download(taker, [liar.peer_id])


def test_a_donor_of_a_far_epoch_is_passed_over() -> None:
    """A state of an epoch that nobody has reached has no other's word against it, and is not taken for that."""
    with volunteers(3, 10) as found:
        liar, honest, taker = found
        taker.session.board.is_newcomer = True
        step_all([liar, honest], 10, 1)
        tampered(liar, _replica_like(liar, steps=5, seed=77))
        all_told(found)
        download = _download(taker, [liar.peer_id, honest.peer_id])
        assert download.donor == honest.peer_id
        assert taker.replica.version == honest.replica.version


def test_a_donor_who_says_nothing_or_nonsense_is_passed_over() -> None:
    with volunteers(4, 10) as found:
        silent, nonsense, honest, taker = found
        prepare(found, 10, timeout_seconds=2.0)
        taker.session.board.is_newcomer = True
        step_all(found[:3], 10, 1)
        tampered(nonsense, b"nonsense")
        silent.session.states.give = _never  # type: ignore[method-assign, assignment]
        all_told(found)
        download = _download(taker, [silent.peer_id, nonsense.peer_id, honest.peer_id])
        assert download.donor == honest.peer_id
        assert taker.replica.version == honest.replica.version


async def _never(*_: object) -> Any:
    await asyncio.sleep(100)
    yield


def _replica_like(volunteer: Volunteer, steps: int, seed: int) -> bytes:
    replica = replica_of(volunteer.replica.numbers)
    for average_D in vectors(steps, replica.numbers, seed=seed):
        replica.step(average_D)
    return replica.save()[1]


def _download(taker: Volunteer, order: Sequence[bytes]) -> Download:
    session = taker.session
    work = download(session._service, taker.replica, b"", order, session._agreed, session._section.timeout_seconds)
    return session.node.run(work, 30.0)
