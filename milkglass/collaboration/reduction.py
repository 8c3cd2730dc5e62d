"""The butterfly all-reduce of one round: every volunteer reduces a part of the vector for all (DeDLOC, hivemind).

Who reduces what stands in `parts.py`. Differences from hivemind's all-reduce, which
cannot be told so from outside:
- what comes back is the average itself and not the difference to one's own, so that all hold the same bits;
- a part that fails is asked for again in a new round, and never replaced by one's own gradients;
- the weights are those that contributors claim, capped, and averages say of whom they are made;
- robust mode: contributions are clipped (`centered_clipping.py`), and each part is reduced by two, one after the other
  in a ring that each round draws anew (`disputes.py` says what happens where they differ).

Legend: D numbers of the vector, N members.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from torch import Tensor

from milkglass.collaboration.admission import Admission
from milkglass.collaboration.duty import (
    MOST_SAMPLES,
    Average,
    Averaging,
    Contribution,
    Duty,
    Included,
    Share,
    digest_of,
    share_from,
)
from milkglass.collaboration.engine import P2PContext, runtime_pb2
from milkglass.collaboration.group import Group
from milkglass.collaboration.identity import short_name
from milkglass.collaboration.node import Node
from milkglass.collaboration.parts import Part, RoundFailedError, plan
from milkglass.collaboration.sealed import read_json, seal, unseal
from milkglass.collaboration.wire_vector import pieces
from milkglass.errors import MessageError, first_line

PURPOSE: Final = "contribution"


NOT_BEGUN: Final = 1 / 3
_DELIVERED: Final = 2 / 3
_ANSWERED: Final = 5 / 6
"""Shares of the time-out, after which is left out who has sent nothing, who has not sent all, who has not answered."""


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """What a round came to. vector_D: the average, the same bits at all. samples, loss: as claimed, of all.

    sent, received: bytes of this volunteer's messages. caught: peer ids that were seen to lie. heard: by peer id
    the share of a contributor's weight that counted, over all parts.
    """

    vector_D: Tensor
    samples: int
    loss: float
    members: int
    sent: int
    received: int
    caught: frozenset[bytes] = frozenset()
    heard: Mapping[bytes, float] = field(default_factory=dict)


@final
@dataclass(eq=False)
class Round:
    """One averaging in one group, as this volunteer sees it. own: its index. own_D: what it contributes, or None.

    gradient_D: its own gradient alone, to compare with in robust mode.
    """

    group: Group
    own: int
    parts: Sequence[Part]
    averaging: Averaging
    own_D: Tensor | None
    share: Share
    gradient_D: Tensor | None = None
    duties: dict[int, Duty] = field(default_factory=dict)
    arrived: set[tuple[int, int]] = field(default_factory=set)
    """(part, member) of those who have begun to send."""
    reasons: dict[int, str] = field(default_factory=dict)
    sent: int = 0
    received: int = 0

    def blocks(self, part: Part) -> list[tuple[int, int]]:
        """A block is averaged at once: a piece, or in robust mode, where its length counts, all of the part."""
        return [(part.start, part.stop)] if self.averaging.robust else pieces(part.start, part.stop)


@final
class Reductions:
    """The rounds in which this volunteer takes part, and its side of their messages."""

    def __init__(self, node: Node, admission: Admission, service: Any, run: str, timeout_seconds: float) -> None:
        self._node, self._admission, self._service, self._run = node, admission, service, run
        self.timeout_seconds = timeout_seconds
        self.rounds: dict[bytes, Round] = {}
        self._changed = asyncio.Event()

    async def begin(
        self,
        group: Group,
        averaging: Averaging,
        own_D: Tensor | None,
        numbers: int,
        samples: int,
        loss: float,
        gradient_D: Tensor | None = None,
    ) -> Round:
        """Take part in a round; others may now send to us. samples: 0 with own_D None, to listen alone."""
        own = group.index(self._node.identity.peer_id)
        assert own is not None  # a group that was found holds us
        parts = plan(group, numbers, robust=averaging.robust)
        begun = Round(group, own, parts, averaging, own_D, Share(samples, loss, "", b""), gradient_D)
        trainers = [index for index, member in enumerate(group.members) if member.trains]
        for number, part in enumerate(parts):
            if own in part.reducers:
                begun.duties[number] = Duty(averaging, begun.blocks(part), trainers)
        self.rounds[group.round_id] = begun
        self._changed.set()
        self._changed = asyncio.Event()
        return begun

    async def collect(self, begun: Round) -> list[list[Average | None]]:
        """By part and by reducer the average that came back, None where none did."""
        waiting = asyncio.create_task(self._stop_waiting(begun))
        try:
            work = [self._of_part(begun, number) for number in range(len(begun.parts))]
            return await asyncio.wait_for(asyncio.gather(*work), self.timeout_seconds)
        except TimeoutError:
            raise RoundFailedError(f"it took more than {self.timeout_seconds:g} seconds") from None
        finally:
            waiting.cancel()

    def forget(self, keep: bytes | None = None) -> None:
        """Rounds that are over, but for the one of that id: somebody may still ask for its evidence."""
        for round_id in [each for each in self.rounds if each != keep]:
            for duty in self.rounds.pop(round_id).duties.values():
                duty.close()

    async def _stop_waiting(self, begun: Round) -> None:
        await asyncio.sleep(NOT_BEGUN * self.timeout_seconds)
        for number, duty in begun.duties.items():
            arrived = {index for part, index in begun.arrived if part == number}
            duty.give_up_waiting(arrived | {begun.own})

    async def _of_part(self, begun: Round, number: int) -> list[Average | None]:
        part = begun.parts[number]
        share, packed = await asyncio.get_running_loop().run_in_executor(None, self._pack, begun, number)
        asked = [
            self._ours(begun, number, share)
            if reducer == begun.own
            else self._ask(begun, number, reducer, share, packed)
            for reducer in part.reducers
        ]
        return list(await asyncio.gather(*asked))

    def _pack(self, begun: Round, number: int) -> tuple[Share, list[runtime_pb2.Tensor]]:
        """Our contribution to a part, signed. Where it is only averaged the connection says enough of who sent it."""
        part, packed = begun.parts[number], []
        if begun.own_D is not None:
            packed = begun.averaging.pack(begun.own_D[part.start : part.stop])
        digest = digest_of(packed) if begun.averaging.robust else ""
        content = {
            **{"round": begun.group.round_id.hex(), "part": number, "digest": digest},
            **{"samples": begun.share.samples, "loss": begun.share.loss},
        }
        sealed = seal(self._node.identity, self._admission.token, PURPOSE, content)
        return Share(begun.share.samples, begun.share.loss, digest, sealed), packed

    async def _ours(self, begun: Round, number: int, share: Share) -> Average | None:
        duty = begun.duties[number]
        for block, (start, stop) in enumerate(duty.blocks):
            if begun.own_D is None:
                duty.lose(begun.own)
                break
            packed = tuple(begun.averaging.pack(begun.own_D[start:stop]))
            try:
                row_D = begun.averaging.read(packed, start, stop)
            except MessageError:  # others do not count it either
                duty.lose(begun.own)
                break
            duty.put(block, begun.own, Contribution(share, row_D, packed if begun.averaging.robust else ()))
        with contextlib.suppress(MessageError):
            return _joined([await asyncio.shield(answer) for answer in duty.answers])
        return None

    async def _ask(
        self, begun: Round, number: int, reducer: int, share: Share, packed: Sequence[runtime_pb2.Tensor]
    ) -> Average | None:
        """Send our contribution to a part to one of its reducers; what comes back, None if nothing does."""
        peer = begun.group.members[reducer].peer_id
        part = begun.parts[number]

        async def messages() -> AsyncIterator[runtime_pb2.ExpertRequest]:
            head = {"round": begun.group.round_id.hex(), "part": number}
            yield self._count(begun, runtime_pb2.ExpertRequest(uid=json.dumps(head), metadata=share.sealed))
            for each in packed:
                yield self._count(begun, runtime_pb2.ExpertRequest(tensors=[each]))

        try:
            async with asyncio.timeout(_ANSWERED * self.timeout_seconds):
                answers = await self._service.stub(peer).rpc_reduce(messages())
                averages = []
                for start, stop in begun.blocks(part):
                    averages.append(await self._read_answer(begun, answers, start, stop))
                return _joined(averages)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # a stranger's fault or the network's: the part is missing
            begun.reasons[number] = "it does not answer" if isinstance(error, TimeoutError) else first_line(error)
            return None

    def _count(self, begun: Round, message: Any) -> Any:
        begun.sent += message.ByteSize()
        return message

    async def _read_answer(self, begun: Round, answers: AsyncIterator[Any], start: int, stop: int) -> Average:
        packed: list[runtime_pb2.Tensor] = []
        included: tuple[Included, ...] = ()
        for _ in pieces(start, stop):
            answer = await anext(answers)
            begun.received += answer.ByteSize()
            if answer.metadata:
                included = read_included(answer.metadata, len(begun.group.members))
            packed.extend(answer.tensors)
        return Average(begun.averaging.read(packed, start, stop), tuple(packed), included)

    async def serve(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """Somebody contributes to a part that we reduce: read what comes, and send averages as they are made."""
        sender = context.remote_id.to_bytes()
        head = await asyncio.wait_for(anext(requests), self.timeout_seconds)
        begun, index, number, share = await self._recognize(sender, head)
        begun.received += head.ByteSize()
        begun.arrived.add((number, index))
        duty = begun.duties[number]
        reading = asyncio.create_task(self._read(begun, duty, index, share, requests))
        try:
            for answer in duty.answers:
                average = await asyncio.wait_for(asyncio.shield(answer), self.timeout_seconds)
                for place, each in enumerate(average.packed):
                    metadata = json.dumps(average.included).encode() if place == 0 else b""
                    yield self._count(begun, runtime_pb2.ExpertResponse(tensors=[each], metadata=metadata))
            await asyncio.wait_for(reading, self.timeout_seconds)  # whoever still writes would find a closed door
        finally:
            if not reading.done():
                reading.cancel()

    async def _recognize(self, sender: bytes, head: runtime_pb2.ExpertRequest) -> tuple[Round, int, int, Share]:
        """Which round, member and part a contribution is for. Raises MessageError for a stranger's."""
        try:
            told = read_json(head.uid)
            round_id, number = bytes.fromhex(told["round"]), int(told["part"])
        except (MessageError, KeyError, TypeError, ValueError, OverflowError):
            raise MessageError("a contribution to no round") from None
        begun = await self._round(round_id)
        index = begun.group.index(sender)
        if index is None or number not in begun.duties:
            raise MessageError(f"{short_name(sender)} is not of this round, or part {number} is not ours")
        content = unseal(head.metadata, sender, PURPOSE, self._admission)
        if content.get("round") != round_id.hex() or content.get("part") != number:
            raise MessageError(f"{short_name(sender)}: a contribution to another part than its signature says")
        return begun, index, number, share_from(content, head.metadata)

    async def _round(self, round_id: bytes) -> Round:
        """A round; one that others know of before us is waited for a moment."""
        deadline = asyncio.get_running_loop().time() + self.timeout_seconds / 3
        while round_id not in self.rounds:
            changed = self._changed  # that of now: `begin` sets it and makes another
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                raise MessageError("a round that is not known here")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), left)
        return self.rounds[round_id]

    async def _read(
        self, begun: Round, duty: Duty, index: int, share: Share, requests: AsyncIterator[runtime_pb2.ExpertRequest]
    ) -> None:
        """Take in a contributor's blocks; whatever goes wrong, the rest of them is not waited for."""
        keep = begun.averaging.robust
        try:
            async with asyncio.timeout(_DELIVERED * self.timeout_seconds):
                for block, (start, stop) in enumerate(duty.blocks if share.samples else ()):
                    packed: list[runtime_pb2.Tensor] = []
                    for _ in pieces(start, stop):
                        request = await asyncio.wait_for(anext(requests), self.timeout_seconds / 3)
                        begun.received += request.ByteSize()
                        packed.extend(request.tensors)
                    if keep and digest_of(packed) != share.digest:
                        raise MessageError("pieces that are not those that were signed")
                    row_D = begun.averaging.read(packed, start, stop)
                    duty.put(block, index, Contribution(share, row_D, tuple(packed) if keep else ()))
        except (MessageError, TimeoutError, StopAsyncIteration):
            pass
        finally:
            duty.lose(index)
        async for _ in requests:
            pass


def _joined(averages: Sequence[Average]) -> Average:
    """The averages of a part's blocks as one; it is made of those who are in its first block."""
    return Average(
        torch.cat([average.value_D for average in averages]),
        tuple(each for average in averages for each in average.packed),
        averages[0].included,
    )


def read_included(metadata: bytes, members: int) -> tuple[Included, ...]:
    """Of whom an average is made, as its reducer says. Raises MessageError."""
    try:
        read = tuple(
            Included(int(index), int(samples), float(loss), str(digest), float(heard))
            for index, samples, loss, digest, heard in json.loads(metadata)
        )
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise MessageError(f"an average that does not say of whom it is made: {first_line(error)}") from None
    if any(not 0 <= index < members for index, *_ in read) or len({index for index, *_ in read}) < len(read):
        raise MessageError("an average of somebody who is not of the group, or twice of one")
    if any(not 0 <= each.samples < MOST_SAMPLES or not math.isfinite(each.loss) for each in read):
        raise MessageError("an average of more records than there can be")
    if any(not 0 <= each.heard <= 1 for each in read):
        raise MessageError("an average in which somebody counts more than once")
    return read


def outcome(begun: Round, averages: Mapping[int, Average], caught: frozenset[bytes] = frozenset()) -> Outcome:
    """The whole vector of the parts' averages. Raises RoundFailedError where one is missing."""
    missing = [number for number in range(len(begun.parts)) if number not in averages]
    if missing:
        lost = [short_name(begun.group.members[index].peer_id) for index in begun.parts[missing[0]].reducers]
        why = begun.reasons.get(missing[0], "it has none")
        raise RoundFailedError(
            f"part {missing[0]} of {len(begun.parts)} did not come back from {' and '.join(lost)}: {why}"
        )
    first = averages[0]
    vector_D = torch.cat([averages[number].value_D for number in range(len(begun.parts))])
    members = len(begun.group.members)
    heard = _heard(begun, averages)
    return Outcome(vector_D, first.samples, first.loss, members, begun.sent, begun.received, caught, heard)


def _heard(begun: Round, averages: Mapping[int, Average]) -> dict[bytes, float]:
    """How much of each contributor's weight counted, over the parts that it is in."""
    counted: dict[bytes, float] = {}
    there: dict[bytes, int] = {}
    for number, part in enumerate(begun.parts):
        numbers = part.stop - part.start
        for each in averages[number].included:
            peer = begun.group.members[each.member].peer_id
            counted[peer] = counted.get(peer, 0.0) + each.heard * numbers
            there[peer] = there.get(peer, 0) + numbers
    return {peer: total / there[peer] for peer, total in counted.items()}
