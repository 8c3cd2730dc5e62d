"""Robust mode: a part comes back from two reducers. Where they agree, it is so; where not, everybody looks for himself.

Clipping at honest reducers is no defense against a reducer that lies: it may return anything for its part. So every
part is reduced by two, and the average is a function of the contributions alone, to the last bit. Where the two differ,
or one says nothing, or both say something that no average around the last one can be (`is_plausible`), the signed
contributions are fetched from both, and the average is computed here:
- whose average does not follow from the contributions that he shows is caught, and what he shows is not used;
- who signed two contributions to one part, one for each reducer, is left out and caught;
- a contribution that only one of them shows counts: nobody can tell who withheld it.

So the true average is used at once, and nobody need be believed. Two reducers of one part that both lie alike are found
where their lie is large; a small one moves the part by no more than clipping would have let them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch

from milkglass.collaboration.admission import OpenDoor
from milkglass.collaboration.centered_clipping import is_plausible
from milkglass.collaboration.duty import Average, Contribution, digest_of, share_from
from milkglass.collaboration.engine import P2PContext, runtime_pb2
from milkglass.collaboration.identity import short_name
from milkglass.collaboration.parts import RoundFailedError
from milkglass.collaboration.reduction import PURPOSE, Outcome, Reductions, Round, outcome
from milkglass.collaboration.sealed import read_json, unseal
from milkglass.errors import MessageError

_EVIDENCE: Final = 1 / 3  # of an averaging's time-out


@final
@dataclass(frozen=True, eq=False)
class Shown:
    """What a reducer showed of the contributions to a part: by contributor."""

    contributions: Mapping[int, Contribution]


@final
class Disputes:
    """Settles what reducers differ about. service: for calls to others."""

    def __init__(self, reductions: Reductions, service: Any) -> None:
        self._reductions, self._service = reductions, service

    async def settle(self, begun: Round, averages: Sequence[Sequence[Average | None]]) -> Outcome:
        """The outcome of a round in which each part came back twice. Raises RoundFailedError."""
        agreed: dict[int, Average] = {}
        differing = []
        for number, answers in enumerate(averages):
            first = answers[0]
            alike = first is not None and all(_same(first, other) for other in answers)
            if first is not None and alike and self._plausible(begun, number, first):
                agreed[number] = first
            else:
                differing.append(number)
        caught: set[int] = set()
        looks = await asyncio.gather(*[self._look(begun, number, averages[number]) for number in differing])
        for number, (average, liars) in zip(differing, looks, strict=True):
            caught |= liars
            if average is not None:
                agreed[number] = average
        peers = frozenset(begun.group.members[index].peer_id for index in caught - {begun.own})
        try:
            return outcome(begun, agreed, peers)
        except RoundFailedError as error:
            raise RoundFailedError(str(error), peers) from None

    def _plausible(self, begun: Round, number: int, average: Average) -> bool:
        """Whether clipping can have come to that; where we have nothing to compare it with, yes."""
        part, center_D = begun.parts[number], begun.averaging.center_D
        gradient_D = begun.own_D if begun.gradient_D is None else begun.gradient_D
        if gradient_D is None:
            return True
        span = slice(part.start, part.stop)
        return is_plausible(average.value_D, None if center_D is None else center_D[span], gradient_D[span])

    async def _look(
        self, begun: Round, number: int, answers: Sequence[Average | None]
    ) -> tuple[Average | None, set[int]]:
        """The average that the contributions come to, and who lied.

        None where nobody shows any, or where both leave ours out and come to what no average can be: such a part is
        averaged again, by others.
        """
        part = begun.parts[number]
        shown = await asyncio.gather(*[self._shown(begun, number, reducer) for reducer in part.reducers])
        evidence = {reducer: each for reducer, each in zip(part.reducers, shown, strict=True) if each is not None}
        averaging, liars = begun.averaging, set()
        for reducer, answer in zip(part.reducers, answers, strict=True):
            if answer is None or reducer not in evidence:
                continue  # whoever is gone has not lied
            try:
                follows = _same(averaging.of(evidence[reducer].contributions, part.start, part.stop), answer)
            except MessageError:
                follows = False
            if not follows:
                liars.add(reducer)
        believed = {reducer: each for reducer, each in evidence.items() if reducer not in liars} or evidence
        everything, twofold = united(believed)
        liars |= twofold
        try:
            average = averaging.of(everything, part.start, part.stop)
        except MessageError:
            return None, liars
        left_out = begun.own_D is not None and begun.own not in everything
        return None if left_out and not self._plausible(begun, number, average) else average, liars

    async def _shown(self, begun: Round, number: int, reducer: int) -> Shown | None:
        """The contributions that a reducer shows, each checked against its contributor's signature."""
        if reducer == begun.own:
            return Shown(begun.duties[number].contributions[0])
        question = json.dumps({"round": begun.group.round_id.hex(), "part": number})
        contributions: dict[int, Contribution] = {}
        try:
            async with asyncio.timeout(_EVIDENCE * self._reductions.timeout_seconds):
                answers = await self._service.stub(begun.group.members[reducer].peer_id).rpc_evidence(
                    runtime_pb2.ExpertRequest(uid=question)
                )
                async for answer in answers:
                    begun.received += answer.ByteSize()
                    index, contribution = self._checked(begun, number, answer)
                    contributions[index] = contribution
        except asyncio.CancelledError:
            raise
        except MessageError:
            return Shown({})  # it shows what nobody signed: nothing follows from that
        except Exception:  # it is gone
            return None
        return Shown(contributions)

    def _checked(self, begun: Round, number: int, answer: runtime_pb2.ExpertResponse) -> tuple[int, Contribution]:
        part, members = begun.parts[number], begun.group.members
        index = int.from_bytes(answer.metadata[:2], "big")
        sealed = answer.metadata[2:]
        if index >= len(members) or not members[index].trains:
            raise MessageError("a contribution of somebody who is not of the group")
        content = unseal(sealed, members[index].peer_id, PURPOSE, OpenDoor())
        share = share_from(content, sealed)
        packed = tuple(answer.tensors)
        if (content.get("round"), content.get("part")) != (begun.group.round_id.hex(), number):
            raise MessageError("a contribution to something else")
        if digest_of(packed) != share.digest:
            raise MessageError("a contribution that was not signed so")
        return index, Contribution(share, begun.averaging.read(packed, part.start, part.stop), packed)

    async def show(
        self, request: runtime_pb2.ExpertRequest, context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """A member of the round asks what contributions we have averaged. Raises MessageError for others."""
        try:
            asked = read_json(request.uid)
            begun = self._reductions.rounds[bytes.fromhex(asked["round"])]
            duty = begun.duties[int(asked["part"])]
        except (MessageError, KeyError, TypeError, ValueError, OverflowError):
            raise MessageError("a part of no round, or of one that is over") from None
        if begun.group.index(context.remote_id.to_bytes()) is None or not begun.averaging.robust:
            raise MessageError(f"{short_name(context.remote_id.to_bytes())} is not of this round")
        for index, each in sorted(duty.contributions[0].items()):
            metadata = index.to_bytes(2, "big") + each.share.sealed
            yield runtime_pb2.ExpertResponse(metadata=metadata, tensors=each.packed)


def united(shown: Mapping[int, Shown]) -> tuple[dict[int, Contribution], set[int]]:
    """All contributions that reducers show, and those who signed two different ones to the same part.

    shown: by reducer. Of a reducer's own contribution what the other shows counts, be it another or none: else it could
    show it to some and not to the rest, and they would come to different averages.
    """
    everything: dict[int, Contribution] = {}
    liars: set[int] = set()
    for reducer, each in shown.items():
        for index, contribution in each.contributions.items():
            known = everything.setdefault(index, contribution)
            if _word(known) == _word(contribution):
                continue
            liars.add(index)
            if index != reducer:
                everything[index] = contribution
    for reducer in shown if len(shown) > 1 else ():
        if not any(reducer in each.contributions for other, each in shown.items() if other != reducer):
            everything.pop(reducer, None)
    return {index: each for index, each in everything.items() if index not in liars or index in shown}, liars


def _word(contribution: Contribution) -> tuple[int, float, str]:
    return contribution.share.samples, contribution.share.loss, contribution.share.digest


def _same(one: Average, other: Average | None) -> bool:
    return other is not None and one.included == other.included and torch.equal(one.value_D, other.value_D)
