"""Liars in a real round of robust mode: the honest end with equal bits, made of what was honestly contributed.

Each liar is an honest volunteer in whose session one step is replaced. Legend: D numbers of the vector.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from milkglass.collaboration.centered_clipping import centered_clip
from milkglass.collaboration.disputes import Shown, united
from milkglass.collaboration.duty import Contribution, Share, digest_of
from milkglass.collaboration.engine import runtime_pb2
from milkglass.collaboration.group import Group, Member
from milkglass.collaboration.parts import RoundFailedError, plan
from milkglass.collaboration.reduction import PURPOSE, Outcome
from milkglass.collaboration.sealed import seal
from milkglass.collaboration.wire_vector import VectorCodec
from milkglass.errors import MessageError
from tests.collaboration.in_process import Volunteer, acquaint, averaged, group_of, outcomes, prepare, volunteers

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # hivemind's, of streams that were broken off
]

NUMBERS = 600
SAMPLES = [8, 16, 8, 12]
CODEC = VectorCodec("none")
Change = Callable[[Tensor, bytes], Tensor]
"""What a liar makes of the true numbers of a part, given who asks."""


TIMEOUT_SECONDS = 5.0


@pytest.fixture(scope="module")
def four() -> Iterator[list[Volunteer]]:
    with volunteers(4, NUMBERS, robust=True) as found:
        acquaint(found, robust=True)
        yield found


@pytest.fixture
def ready(four: list[Volunteer], monkeypatch: pytest.MonkeyPatch) -> list[Volunteer]:
    """All honest, with nothing behind them. monkeypatch is asked for so that it ends after this."""
    del monkeypatch
    prepare(four, NUMBERS, robust=True, timeout_seconds=TIMEOUT_SECONDS)
    return four


def gradients(count: int = 4, seed: int = 0) -> list[Tensor]:
    """A common direction, and noise."""
    generator = torch.Generator().manual_seed(seed)
    common_D = torch.randn(NUMBERS, generator=generator)
    return [common_D + 0.5 * torch.randn(NUMBERS, generator=generator) for _ in range(count)]


def clipped(group: Group, who: Sequence[Volunteer], x: Sequence[Tensor], center_D: Tensor | None = None) -> Tensor:
    """The average that these contributions come to, part by part."""
    order = sorted(range(len(who)), key=lambda index: who[index].peer_id)
    rows = torch.stack([x[index] for index in order])
    weights = torch.tensor([float(SAMPLES[index]) for index in order])
    parts = plan(group, NUMBERS, robust=True)
    spans = [slice(part.start, part.stop) for part in parts]
    return torch.cat(
        [centered_clip(rows[:, span], weights, None if center_D is None else center_D[span]).value_D for span in spans]
    )


def clipped_without(who: Sequence[Volunteer], left_out: int, x: Sequence[Tensor], span: slice) -> Tensor:
    """The average of a part that the contributions of all but one come to."""
    order = sorted(set(range(len(who))) - {left_out}, key=lambda index: who[index].peer_id)
    rows = torch.stack([x[index][span] for index in order])
    return centered_clip(rows, torch.tensor([float(SAMPLES[index]) for index in order])).value_D


def rounds(members: Sequence[Volunteer], x: Sequence[Tensor], group: Group) -> list[Outcome | RoundFailedError]:
    begun = time.monotonic()
    found = averaged(members, group, list(x), SAMPLES[: len(members)])
    assert time.monotonic() - begun < TIMEOUT_SECONDS + 2  # and what it takes to look
    return found


def honest_outcomes(
    found: Sequence[Outcome | RoundFailedError], members: Sequence[Volunteer], liars: Sequence[Volunteer]
) -> list[Outcome]:
    """Of those who do not lie: equal bits. Nobody honest was caught."""
    read = outcomes([each for each, member in zip(found, members, strict=True) if member not in liars])
    names = {liar.peer_id for liar in liars}
    for each in read:
        assert each.caught <= names
    for member in members:
        if member not in liars:
            assert member.session.caught <= names
    return read


def lies(liar: Volunteer, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a reducer that answers others with something else than the average."""
    reductions = liar.session._reductions
    serve = reductions.serve

    async def lying(requests: Any, context: Any) -> Any:
        async for answer in serve(requests, context):
            (piece,) = answer.tensors
            value_D = change(CODEC.unpack(piece, *piece.size), context.remote_id.to_bytes())
            yield runtime_pb2.ExpertResponse(tensors=[CODEC.pack(value_D)], metadata=answer.metadata)

    monkeypatch.setattr(reductions, "serve", lying)


def shows(liar: Volunteer, show: Callable[[Any, Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a reducer that shows other evidence. show: is given the true answers."""
    disputes = liar.session._disputes
    true = disputes.show

    async def forging(request: Any, context: Any) -> Any:
        answers = [answer async for answer in true(request, context)]
        async for answer in show(answers, context):
            yield answer

    monkeypatch.setattr(disputes, "show", forging)


def test_all_are_honest(ready: list[Volunteer]) -> None:
    """Also in a second round, around the first average; and what is shown for that is nothing."""
    x, group = gradients(), group_of(ready)
    found = honest_outcomes(rounds(ready, x, group), ready, [])
    assert torch.equal(found[0].vector_D, clipped(group, ready, x))
    assert not any(each.caught for each in found)
    assert found[0].samples == sum(SAMPLES)
    for each in ready:
        each.replica.center_D = found[0].vector_D
    again, y = group_of(ready), gradients(seed=1)
    y[0] = 10 * y[0]  # where one is far from the others it counts around what
    second = honest_outcomes(rounds(ready, y, again), ready, [])
    assert torch.equal(second[0].vector_D, clipped(again, ready, y, found[0].vector_D))
    assert not torch.equal(second[0].vector_D, clipped(again, ready, y))


LIES: dict[str, Change] = {
    "zeros": lambda value_D, _: torch.zeros_like(value_D),
    "turned around": lambda value_D, _: -value_D,
    "scaled": lambda value_D, _: 1000 * value_D,
    "nudged": lambda value_D, _: torch.nextafter(value_D, torch.tensor(1e9)),
    "random": lambda value_D, _: torch.randn(value_D.shape, generator=torch.Generator().manual_seed(5)),
    "not finite": lambda value_D, _: torch.full_like(value_D, float("nan")),
    "another for each": lambda value_D, asking: value_D + asking[-1] / 100,
    "shorter": lambda value_D, _: value_D[:-1],
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("count", [3, 4])
def test_a_reducer_that_lies(ready: list[Volunteer], name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The true average is used at once, and all but he know it. What cannot be read is as good as no answer."""
    members, x = ready[:count], gradients()[:count]
    liar = members[1]
    lies(liar, LIES[name], monkeypatch)
    group = group_of(members)
    found = honest_outcomes(rounds(members, x, group), members, [liar])
    assert torch.equal(found[0].vector_D, clipped(group, members, x))
    caught = {frozenset([liar.peer_id])} if name not in ("not finite", "shorter") else {frozenset()}
    assert {each.caught for each in found} == caught


def test_a_reducer_that_lies_to_one_alone(ready: list[Volunteer], monkeypatch: pytest.MonkeyPatch) -> None:
    """That one knows it, and is not put out for knowing it: the others hold the same bits, and see the same group."""
    liar, victim = ready[0], ready[2]
    lies(liar, lambda value_D, asking: -value_D if asking == victim.peer_id else value_D, monkeypatch)
    group, x = group_of(ready), gradients()
    found = honest_outcomes(rounds(ready, x, group), ready, [liar])
    assert torch.equal(found[0].vector_D, clipped(group, ready, x))
    assert [each.session.caught for each in ready[1:]] == [set(), {liar.peer_id}, set()]
    monkeypatch.undo()
    everybody = {each.peer_id for each in ready}
    for _ in range(6):  # at times two begin to lead, or the victim shuns the one whom the rest follow
        groups = matched(ready, 4)
        if len(groups) == 4 and {member.peer_id for member in groups[0].members} == everybody:
            break
    assert len({each.round_id for each in groups}) == 1
    assert {member.peer_id for member in groups[0].members} == everybody


def test_a_reducer_that_says_nothing(ready: list[Volunteer], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be gone, so it is not caught; the other reducer's evidence is enough, in time."""
    liar = ready[3]

    async def silent(*_: object) -> Any:
        await asyncio.sleep(100)
        yield

    monkeypatch.setattr(liar.session._reductions, "serve", silent)
    monkeypatch.setattr(liar.session._disputes, "show", silent)
    group, x = group_of(ready), gradients()
    found = rounds(ready, x, group)
    read = honest_outcomes(found, ready, [liar])
    assert not any(each.caught for each in read)
    # what it contributes to the parts of others arrives; and its own parts have the other reducer's word
    parts = plan(group, NUMBERS, robust=True)
    own = group.index(liar.peer_id)
    expected_D = clipped(group, ready, x)
    for part in parts:
        if own not in part.reducers:
            assert torch.equal(read[0].vector_D[part.start : part.stop], expected_D[part.start : part.stop])


def test_a_reducer_that_does_not_come(ready: list[Volunteer]) -> None:
    """It takes no part at all. The other reducer of its parts is there."""
    three, x = ready[:3], gradients()[:3]
    group = group_of(ready)
    found = honest_outcomes(rounds(three, x, group), three, [])
    assert torch.equal(found[0].vector_D, clipped(group, three, x))
    assert not found[0].caught


def contributes_two(liar: Volunteer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a contributor that signs something else for the second reducer of each part than for the first."""
    reductions = liar.session._reductions
    ask = reductions._ask

    async def lying(begun: Any, number: int, reducer: int, share: Share, packed: Any) -> Any:
        part = begun.parts[number]
        if reducer == part.reducers[1]:
            packed = begun.averaging.pack(-begun.own_D[part.start : part.stop])
            content = {"round": begun.group.round_id.hex(), "part": number, "digest": digest_of(packed)}
            content |= {"samples": share.samples, "loss": share.loss}
            share = replace(share, digest=content["digest"], sealed=seal(liar.identity, b"", PURPOSE, content))
        return await ask(begun, number, reducer, share, packed)

    monkeypatch.setattr(reductions, "_ask", lying)


@pytest.mark.parametrize("count", [3, 4])
def test_a_contributor_that_sends_two_different_vectors(
    ready: list[Volunteer], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He is caught by two of his signatures, and left out where neither reducer is himself; there, what the other has
    of him counts, as it does for who had no reason to look.
    """
    members, x = ready[:count], gradients()[:count]
    liar = members[0]
    contributes_two(liar, monkeypatch)
    group = group_of(members)
    found = honest_outcomes(rounds(members, x, group), members, [liar])
    own = group.index(liar.peer_id)
    for part in plan(group, NUMBERS, robust=True):
        span = slice(part.start, part.stop)
        if own not in part.reducers:
            expected_D = clipped_without(members, 0, x, span)
        else:
            sent_D = -x[0] if own == part.reducers[0] else x[0]
            expected_D = clipped(group, members, [sent_D, *x[1:]])[span]
        assert torch.equal(found[0].vector_D[span], expected_D)
    assert {each.caught for each in found} == {frozenset([liar.peer_id])}


def test_a_contributor_to_some_parts_alone(ready: list[Volunteer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has begun to send one part is waited for there, not in the others, which end without it in time."""
    liar, x, group = ready[0], gradients(), group_of(ready)
    parts, own = plan(group, NUMBERS, robust=True), group.index(ready[0].peer_id)
    missing = next(number for number, part in enumerate(parts) if own not in part.reducers)
    ask = liar.session._reductions._ask

    async def some(begun: Any, number: int, *others: Any) -> Any:
        return None if number == missing else await ask(begun, number, *others)

    monkeypatch.setattr(liar.session._reductions, "_ask", some)
    found = honest_outcomes(rounds(ready, x, group), ready, [liar])
    for number, part in enumerate(parts):
        span = slice(part.start, part.stop)
        expected_D = clipped_without(ready, 0, x, span) if number == missing else clipped(group, ready, x)[span]
        assert torch.equal(found[0].vector_D[span], expected_D)
    assert not any(each.caught for each in found)


def test_a_contributor_of_what_is_not_finite(ready: list[Volunteer]) -> None:
    """It is not counted, by nobody; what it reduces is right."""
    x = gradients()
    x[3] = torch.full_like(x[3], float("nan"))
    group = group_of(ready)
    found = honest_outcomes(rounds(ready, x, group), ready, [ready[3]])
    assert torch.equal(found[0].vector_D, clipped(group, ready[:3], x[:3]))
    assert not found[0].caught


def test_a_contributor_of_far_too_much(ready: list[Volunteer]) -> None:
    """Clipping holds it within the others' noise: it may send what it likes."""
    x = gradients()
    honest = clipped(group_of(ready), ready, x)
    for factor in (-1.0, 100.0, 1e30):
        y = [*x[:3], factor * x[3]]
        group = group_of(ready)
        found = honest_outcomes(rounds(ready, y, group), ready, [])
        assert torch.equal(found[0].vector_D, clipped(group, ready, y))
        noise = float(torch.stack([each - honest for each in x[:3]]).norm(dim=1).max())
        assert float((found[0].vector_D - honest).norm()) < 2 * noise


async def _nothing(answers: Any, context: Any) -> Any:
    del context
    for answer in answers[:0]:
        yield answer


async def _hides(answers: Any, context: Any) -> Any:
    """All but the first that is not of who asks."""
    del context
    for answer in answers[1:]:
        yield answer


async def _changes(answers: Any, context: Any) -> Any:
    """One contribution's numbers, under its contributor's signature."""
    del context
    for place, answer in enumerate(answers):
        if place == 0:
            (piece,) = answer.tensors
            changed = CODEC.pack(-CODEC.unpack(piece, *piece.size))
            yield runtime_pb2.ExpertResponse(metadata=answer.metadata, tensors=[changed])
        else:
            yield answer


async def _swaps(answers: Any, context: Any) -> Any:
    """Who contributed what."""
    del context
    for one, other in pairwise([*answers, answers[0]]):
        yield runtime_pb2.ExpertResponse(metadata=one.metadata[:2] + other.metadata[2:], tensors=other.tensors)


async def _nonsense(answers: Any, context: Any) -> Any:
    del answers, context
    yield runtime_pb2.ExpertResponse(metadata=b"\xff\xff nonsense")


EVIDENCE = {"nothing": _nothing, "hides": _hides, "changes": _changes, "swaps": _swaps, "nonsense": _nonsense}


@pytest.mark.parametrize("name", EVIDENCE)
def test_a_lying_reducer_that_forges_evidence(
    ready: list[Volunteer], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The honest reducer's evidence has all; the lie does not follow from what the liar shows."""
    liar = ready[2]
    lies(liar, LIES["turned around"], monkeypatch)
    shows(liar, EVIDENCE[name], monkeypatch)
    group, x = group_of(ready), gradients()
    found = honest_outcomes(rounds(ready, x, group), ready, [liar])
    assert torch.equal(found[0].vector_D, clipped(group, ready, x))
    assert {each.caught for each in found} == {frozenset([liar.peer_id])}


def test_a_lying_reducer_that_shows_what_it_sent_to_nobody(
    ready: list[Volunteer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own contribution, kept from all other reducers: what one shows who lied about his average is not used."""
    liar = ready[2]
    lies(liar, LIES["turned around"], monkeypatch)
    reductions = liar.session._reductions
    ask = reductions._ask

    async def without(begun: Any, number: int, reducer: int, *_: object) -> Any:
        content = {"round": begun.group.round_id.hex(), "part": number, "digest": "", "samples": 0, "loss": 0.0}
        nothing = Share(0, 0.0, "", seal(liar.identity, b"", PURPOSE, content))
        return await ask(begun, number, reducer, nothing, [])

    monkeypatch.setattr(reductions, "_ask", without)
    group, x = group_of(ready), gradients()
    found = honest_outcomes(rounds(ready, x, group), ready, [liar])
    honest = [index for index in sorted(range(4), key=lambda each: ready[each].peer_id) if index != 2]
    rows, weights = (
        torch.stack([x[index] for index in honest]),
        torch.tensor([float(SAMPLES[index]) for index in honest]),
    )
    for part in plan(group, NUMBERS, robust=True):
        span = slice(part.start, part.stop)
        assert torch.equal(found[0].vector_D[span], centered_clip(rows[:, span], weights).value_D)
    assert {each.caught for each in found} == {frozenset([liar.peer_id])}


def test_a_lying_reducer_that_shows_nobody_anything(ready: list[Volunteer], monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be told from one that has just gone: it is not caught, and its lie is not used."""

    async def refuses(answers: Any, context: Any) -> Any:
        del context
        for answer in answers:
            raise MessageError("not for you")
            yield answer  # type: ignore[unreachable]

    liar = ready[2]
    lies(liar, LIES["turned around"], monkeypatch)
    shows(liar, refuses, monkeypatch)
    group, x = group_of(ready), gradients()
    found = honest_outcomes(rounds(ready, x, group), ready, [liar])
    assert torch.equal(found[0].vector_D, clipped(group, ready, x))
    assert not any(each.caught for each in found)


def test_a_reducer_that_leaves_somebody_out(ready: list[Volunteer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its average follows from what it shows, so nobody can say that it lied. The other has who was left out.

    Of a part which both reduce the victim alone would show its own: there it stays out.
    """
    liar, victim = ready[0], ready[1]
    begin = liar.session._reductions.begin

    async def begins(group: Group, *others: Any) -> Any:
        begun = await begin(group, *others)
        index = group.index(victim.peer_id)
        assert index is not None
        for duty in begun.duties.values():
            duty.lose(index)
        return begun

    monkeypatch.setattr(liar.session._reductions, "begin", begins)
    group, x = neighbours(ready, liar, victim, together=False), gradients()
    found = honest_outcomes(rounds(ready, x, group), ready, [liar])
    assert torch.equal(found[0].vector_D, clipped(group, ready, x))
    assert not any(each.caught for each in found)


def neighbours(members: Sequence[Volunteer], one: Volunteer, other: Volunteer, *, together: bool = True) -> Group:
    """A group whose round has the two reduce a part together, or none."""
    while True:
        group = group_of(members)
        both = {group.index(one.peer_id), group.index(other.peer_id)}
        if together == any(set(part.reducers) == both for part in plan(group, NUMBERS, robust=True)):
            return group


def test_two_reducers_that_agree_on_a_large_lie(ready: list[Volunteer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has another word to compare it with; but no average around the last one can be there."""
    liars = ready[:2]
    for each in liars:
        lies(each, LIES["scaled"], monkeypatch)
    group, x = neighbours(ready, *liars), gradients()
    found = honest_outcomes(rounds(ready, x, group), ready, liars)
    assert torch.equal(found[0].vector_D, clipped(group, ready, x))
    assert {each.caught for each in found} == {frozenset(each.peer_id for each in liars)}


def test_two_reducers_that_agree_on_a_small_lie_are_believed(
    ready: list[Volunteer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit, as documented: their common part is theirs; the others' bits are equal, and the rest is right."""
    liars = ready[:2]
    for each in liars:
        lies(each, LIES["zeros"], monkeypatch)
    group, x = neighbours(ready, *liars), gradients()
    found = honest_outcomes(rounds(ready, x, group), ready, liars)
    both = {group.index(each.peer_id) for each in liars}
    for part in plan(group, NUMBERS, robust=True):
        span = slice(part.start, part.stop)
        if set(part.reducers) == both:
            assert not found[0].vector_D[span].any()
        else:
            assert torch.equal(found[0].vector_D[span], clipped(group, ready, x)[span])


def test_two_reducers_that_hear_themselves_alone(ready: list[Volunteer], monkeypatch: pytest.MonkeyPatch) -> None:
    """What they show is signed, by them, and their average follows from it; but it is far, and made without us.

    So the round fails at all who are left out, and is tried again, by other pairs.
    """
    liars = ready[:2]
    for each in liars:
        begin = each.session._reductions.begin

        async def begins(group: Group, *others: Any, begin: Any = begin) -> Any:
            begun = await begin(group, *others)
            for duty in begun.duties.values():
                for member in ready[2:]:
                    index = group.index(member.peer_id)
                    assert index is not None
                    duty.lose(index)
            return begun

        monkeypatch.setattr(each.session._reductions, "begin", begins)
    group, x = neighbours(ready, *liars), gradients()
    x[0] = x[1] = 1000 * x[0]
    found = rounds(ready, x, group)
    for came in found[2:]:
        assert isinstance(came, RoundFailedError)
        assert not came.caught - {liar.peer_id for liar in liars}


def matched(members: Sequence[Volunteer], expected: int) -> list[Group]:
    """The groups that real matchmaking finds for them."""
    searches = [each.session.find_group(expected) for each in members]
    found = [each.result(15) for each in searches]
    return [each for each in found if each is not None]


def test_whom_most_have_caught_is_in_no_later_group(ready: list[Volunteer], monkeypatch: pytest.MonkeyPatch) -> None:
    """He looks for one like the others."""
    liar = ready[1]
    lies(liar, LIES["zeros"], monkeypatch)
    group, x = group_of(ready), gradients()
    honest_outcomes(rounds(ready, x, group), ready, [liar])
    honest = [each for each in ready if each is not liar]
    assert [each.session.caught for each in honest] == [{liar.peer_id}] * 3
    for _ in range(6):
        search = liar.session.find_group(4)
        groups = matched(honest, 3)
        search.cancel()
        for each in groups:
            assert liar.peer_id not in {member.peer_id for member in each.members}
        if [len(each.members) for each in groups] == [3, 3, 3]:
            break
    assert len({each.round_id for each in groups}) == 1
    assert len(groups) == 3


def test_evidence_is_for_members_alone(ready: list[Volunteer]) -> None:
    """A stranger, who knows the round's id, is shown nothing; nor is a member of a round that is not robust."""
    three, stranger = ready[:3], ready[3]
    group, x = group_of(three), gradients()[:3]
    outcomes(rounds(three, x, group))

    async def asked(who: Volunteer, question: str) -> int:
        service = who.session._service
        answers = await service.stub(three[0].peer_id).rpc_evidence(runtime_pb2.ExpertRequest(uid=question))
        found = [each async for each in answers]
        if not found:  # now and then hivemind closes the stream before its error is read
            raise MessageError("nothing was shown")
        return len(found)

    own = group.index(three[0].peer_id)
    part = next(number for number, each in enumerate(plan(group, NUMBERS, robust=True)) if own in each.reducers)
    question = json.dumps({"round": group.round_id.hex(), "part": part})
    assert three[1].session.node.run(asked(three[1], question), 5) == 3
    for who, other in (
        (stranger, question),
        (three[1], json.dumps({"round": "00", "part": part})),
        (three[1], json.dumps({"round": group.round_id.hex(), "part": 99})),
        (three[1], "[" * 20_000),
        (three[1], "5"),
    ):
        with pytest.raises(Exception) as refused:  # noqa: PT011 - hivemind's, of what the other side raised
            who.session.node.run(asked(who, other), 5)
        assert not isinstance(refused.value, TimeoutError)


# By hand


def contribution(word: str, samples: int = 1) -> Contribution:
    return Contribution(Share(samples, 0.0, word, b""), torch.zeros(1))


def test_united() -> None:
    a, b, c, other = contribution("a"), contribution("b"), contribution("c"), contribution("other")
    assert united({}) == ({}, set())
    assert united({0: Shown({0: a, 1: b})}) == ({0: a, 1: b}, set())
    assert united({8: Shown({0: a, 1: b}), 9: Shown({1: b, 2: c})}) == ({0: a, 1: b, 2: c}, set())
    assert united({8: Shown({0: a, 1: b}), 9: Shown({0: other, 1: b})}) == ({1: b}, {0})
    assert united({8: Shown({0: a}), 9: Shown({0: contribution("a", samples=2)})}) == ({}, {0})
    # of what a reducer shows of its own the other's word counts, in either order
    assert united({0: Shown({0: other, 1: b}), 1: Shown({0: a, 1: b})}) == ({0: a, 1: b}, {0})
    assert united({1: Shown({0: a, 1: b}), 0: Shown({0: other, 1: b})}) == ({0: a, 1: b}, {0})
    # and where the other shows none of it, there is none: he could show it to one member and not to the next
    assert united({0: Shown({0: other, 1: b}), 1: Shown({1: b})}) == ({1: b}, set())


def test_who_reduces_together_is_drawn_anew() -> None:
    """Neighbours by id are not neighbours in the ring: with six, two meet in 2 of 5 rounds."""
    members = tuple(Member(bytes([index]), 0, None, True, True) for index in range(6))
    rounds_of = [plan(Group(bytes([index] * 32), members), NUMBERS, robust=True) for index in range(200)]
    for pair in ({0, 1}, {2, 5}):
        met = sum(any(set(part.reducers) == pair for part in parts) for parts in rounds_of)
        assert 50 < met < 110
