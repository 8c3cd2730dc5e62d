"""The group of one averaging: hivemind's matchmaking finds it, and each member checks all the others.

Matchmaking has a leader who collects what the others sent along and deals it out. Here every member signs what it sends
along and shows its token in it, so that a leader can leave somebody out, but neither let somebody in nor put words in
his mouth. Whoever was told of another group has another round id, and takes no part in this one.

Two peers of different epochs never meet: each epoch has a key of its own in the DHT.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, final

from milkglass.collaboration.admission import Admission
from milkglass.collaboration.engine import Matchmaking, P2PContext, ServicerBase, averaging_pb2, get_dht_time
from milkglass.collaboration.identity import short_name
from milkglass.collaboration.node import Node, Notices
from milkglass.collaboration.sealed import seal, unseal
from milkglass.errors import MessageError

MOST_MEMBERS: Final = 256
MOST_BANS: Final = 256
"""Nobody tells of more whom it has caught: the latest. New identities cost nothing, and each message has to end."""
_PURPOSE: Final = "member"
_FRESH_SECONDS: Final = 120.0


@final
@dataclass(frozen=True)
class Member:
    """One of a group, in its own words. bandwidth: bytes per second, None where not measured. bans: whom it caught.

    history: of its weights. Gradients of other weights are of no use, and around another average nothing is alike.
    """

    peer_id: bytes
    epoch: int
    bandwidth: float | None
    reachable: bool
    trains: bool
    bans: frozenset[bytes] = frozenset()
    history: bytes = b""


@final
@dataclass(frozen=True)
class Group:
    """Those who average together, in the order of their ids. round_id: the same for all who were told the same."""

    round_id: bytes
    members: tuple[Member, ...]

    def index(self, peer_id: bytes) -> int | None:
        """The place of a member, None for a stranger."""
        ids = [member.peer_id for member in self.members]
        return ids.index(peer_id) if peer_id in ids else None


@final
@dataclass
class _Search:
    """What hivemind's matchmaking asks of a step."""

    scheduled_time: float
    deadline: float
    data_for_gather: bytes

    def get_timeout(self) -> float:
        """Seconds left."""
        return max(0.0, self.deadline - float(get_dht_time()))


@final
class _Unshunned:
    """Notices for hivemind's matchmaking, without those whom we shun: we follow no such leader."""

    def __init__(self, notices: Notices, is_shunned: Callable[[bytes], bool]) -> None:
        self.peer_id, self.store = notices.peer_id, notices.store
        self._notices, self._is_shunned = notices, is_shunned

    async def get(self, key: str, latest: bool = False, return_future: bool = True) -> Any:
        """As hivemind's."""
        found = await self._notices.get(key, latest, return_future)
        if found is None or not isinstance(found.value, dict):
            return found
        return replace(found, value={peer: each for peer, each in found.value.items() if not self._is_shunned(peer)})


@final
class Matcher:
    """Finds groups. service: the class whose `rpc_join_group` calls `join` of the other side's matcher."""

    def __init__(
        self, node: Node, admission: Admission, service: type[ServicerBase], run: str, digest: bytes, seconds: float
    ) -> None:
        self._node, self._admission, self._seconds = node, admission, seconds
        self.banned: set[bytes] = set()
        """Whom we have caught. They are shunned, but for every other search where that finds nobody: if we alone have
        caught one, the others may follow him, and have us in that group. The group votes on whom it leaves out.
        """
        self._shuns = True
        self._matchmaking = Matchmaking(
            node.p2p,
            digest,
            _Unshunned(Notices(node), self._is_shunned),
            servicer_type=service,
            prefix=run,
            target_group_size=None,
            min_group_size=2,
            min_matchmaking_time=seconds,
            request_timeout=seconds / 2,
            client_mode=not node.reachable,
        )

    async def join(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.MessageFromLeader]:
        """Somebody asks to be in our group: shown the door, or handed to hivemind."""
        asking = context.remote_id.to_bytes()
        try:
            if self._is_shunned(asking):
                raise MessageError(f"{short_name(asking)}: was caught lying")
            self._read(asking, request.gather)
        except MessageError:
            yield averaging_pb2.MessageFromLeader(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        async for answer in self._matchmaking.rpc_join_group(request, context):
            yield answer

    async def find(self, own: Member, expected: int, timeout_seconds: float) -> Group | None:
        """A group for that epoch, or None in that time. expected: begin as soon as so many are there."""
        found = None
        try:
            found = await self._search(own, expected, timeout_seconds)
        finally:
            if found is None:
                self._shuns = not self._shuns
            await self._wake()
        return found

    async def _wake(self) -> None:
        """hivemind makes tasks that wait for these, and forgets them: without this they would wait for ever."""
        waited_for = (self._matchmaking.was_accepted_to_group, self._matchmaking.potential_leaders.declared_expiration)
        for event in waited_for:
            event.set()
        await asyncio.sleep(0)
        for event in waited_for:
            event.clear()

    async def _search(self, own: Member, expected: int, timeout_seconds: float) -> Group | None:
        content = {
            "epoch": own.epoch,
            "bandwidth": own.bandwidth,
            "reachable": own.reachable,
            "trains": own.trains,
            "bans": sorted(peer.hex() for peer in own.bans),
            "history": own.history.hex(),
            "time": get_dht_time(),
        }
        sealed = seal(self._node.identity, self._admission.token, _PURPOSE, content)
        now = get_dht_time()
        search = _Search(now + self._seconds, now + max(timeout_seconds, 2 * self._seconds), sealed)
        matchmaking = self._matchmaking
        matchmaking.target_group_size = min(max(expected, 2), MOST_MEMBERS)
        matchmaking.potential_leaders.target_group_size = matchmaking.target_group_size
        matchmaking.group_key_manager.group_bits = f"{own.epoch:b}"
        found = await matchmaking.look_for_group(search)
        if found is None:
            return None
        told = {peer.to_bytes(): words for peer, words in zip(found.peer_ids, found.gathered, strict=True)}
        if told.get(own.peer_id) != sealed:  # a leader who deals out an old group would have us sign a round twice
            return None
        return self._group(bytes(found.group_id), told, own)

    def _group(self, group_id: bytes, told: Mapping[bytes, bytes], own: Member) -> Group | None:
        """Who of those told of may be in it; None if that leaves nobody else."""
        members = []
        for peer_id, words in told.items():
            try:
                member = self._read(peer_id, words)  # of whom we alone have caught the others know nothing: they vote
            except MessageError:
                continue
            if (member.epoch, member.history) == (own.epoch, own.history):
                members.append(member)
        members = without_banned(members)
        if len(members) < 2 or own.peer_id not in {member.peer_id for member in members}:
            return None
        members.sort(key=lambda member: member.peer_id)
        told_of = b"".join(member.peer_id + told[member.peer_id] for member in members)
        return Group(hashlib.sha256(group_id + told_of).digest(), tuple(members))

    def _is_shunned(self, peer_id: bytes) -> bool:
        return self._shuns and peer_id in self.banned

    def _read(self, peer_id: bytes, sealed: bytes) -> Member:
        """What a peer says of itself. Raises MessageError for one that may not take part."""
        return read_member(peer_id, unseal(sealed, peer_id, _PURPOSE, self._admission), get_dht_time())


def read_member(peer_id: bytes, content: Mapping[str, Any], now: float) -> Member:
    """A member from what it signed. Raises MessageError."""
    name = short_name(peer_id)
    try:
        member = Member(
            peer_id,
            int(content["epoch"]),
            None if content["bandwidth"] is None else float(content["bandwidth"]),
            bool(content["reachable"]),
            bool(content["trains"]),
            frozenset(bytes.fromhex(peer) for peer in content["bans"]),
            bytes.fromhex(content["history"]),
        )
        age = now - float(content["time"])
    except (KeyError, TypeError, ValueError, OverflowError):  # such as an infinite epoch
        raise MessageError(f"{name}: says something else than a member does") from None
    if not -_FRESH_SECONDS < age < _FRESH_SECONDS:
        raise MessageError(f"{name}: what it says is {age:.0f} seconds old; are the clocks right?")
    if len(member.bans) > MOST_BANS:
        raise MessageError(f"{name}: says that it has caught {len(member.bans)}; at most {MOST_BANS} are told")
    if member.bandwidth is not None and not 0 < member.bandwidth < 1e12:
        raise MessageError(f"{name}: says that its bandwidth is {member.bandwidth:g} bytes per second")
    return member


def without_banned(members: Iterable[Member]) -> list[Member]:
    """Those whom no more than half of the others have caught: one member alone cannot put another out."""
    members = list(members)
    kept = []
    for member in members:
        votes = sum(member.peer_id in other.bans for other in members if other is not member)
        if 2 * votes <= len(members) - 1:
            kept.append(member)
    return kept
