"""Volunteers in one process, on loopback: real daemons and messages, weights of any length, no training.

Legend: D numbers of the vector.
"""

from __future__ import annotations

import gc
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from milkglass.collaboration.admission import Admission, OpenDoor
from milkglass.collaboration.engine import get_dht_time
from milkglass.collaboration.group import Group, Member
from milkglass.collaboration.identity import Identity, new_identity
from milkglass.collaboration.parts import RoundFailedError
from milkglass.collaboration.progress import Report
from milkglass.collaboration.reduction import Outcome
from milkglass.collaboration.replica import Replica
from milkglass.collaboration.session import Agreed, Place, Session, connected
from milkglass.parties import Party
from milkglass.randomness import Source
from milkglass.recipe import Recipe, parse_recipe

DIGEST = hashlib.sha256(b"what all agreed on").digest()


@final
class Vector(nn.Module):
    """A network that is so many numbers."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers_D = nn.Parameter(torch.zeros(numbers))


@final
class Listed(Admission):
    """Admits those on a list, which may change."""

    def __init__(self, peers: set[bytes]) -> None:
        self.peers = peers

    @property
    def token(self) -> bytes:
        return b"a token"

    def objection(self, peer_id: bytes, token: bytes) -> str | None:
        return None if peer_id in self.peers and token == self.token else "not on the list"


@final
@dataclass(frozen=True)
class Volunteer:
    """A session, and what it stands on."""

    session: Session
    replica: Replica
    identity: Identity

    @property
    def peer_id(self) -> bytes:
        return self.identity.peer_id


def recipe_of(**options: object) -> Recipe:
    collaboration = {"run": "test", "target_batch": 64, "epochs": 9, "matchmaking_seconds": 1.0, "timeout_seconds": 6.0}
    return parse_recipe(
        {
            "seed": 0,
            "data": {"name": "digits"},
            "network": {"name": "mlp"},
            "parties": {"mode": "collaboration"},
            "attacker": {"auxiliary_share": 0, "validation_share": 0},
            "collaboration": collaboration | options,
        }
    )


def replica_of(numbers: int, *, robust: bool = False) -> Replica:
    stage = Vector(numbers)
    party = Party(stage, torch.optim.SGD(stage.parameters(), lr=0.1, momentum=0.9), Source(os.urandom(32)))
    return Replica(party, DIGEST, robust=robust)


def reporting(replica: Replica, *, reachable: bool = True, trains: bool = True) -> Callable[[], Report]:
    """The report of a volunteer that has 8 records."""

    def report() -> Report:
        version = replica.version
        return Report(
            epoch=version.epoch,
            samples=8,
            rate=1.0,
            time=float(get_dht_time()),
            reachable=reachable,
            trains=trains,
            recipe=DIGEST,
            history=version.history,
            states=((version.epoch, version.digest),),
        )

    return report


@contextmanager
def forgiving_hivemind(found: list[Volunteer]) -> Iterator[None]:
    """It leaves sockets to the garbage collector where a stream is broken off; so that works now. found: is emptied."""
    try:
        yield
    finally:
        found.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


@contextmanager
def volunteers(
    count: int,
    numbers: int,
    *,
    unreachable: Sequence[int] = (),
    admissions: Mapping[int, Admission] | None = None,
    identities: Sequence[Identity] = (),
    newcomers: bool = False,
    **options: object,
) -> Iterator[list[Volunteer]]:
    """So many, who know each other; the first is who the others are told of. options: of the recipe's section."""
    agreed = Agreed(recipe_of(**options), "", DIGEST)
    found: list[Volunteer] = []
    with forgiving_hivemind(found), ExitStack() as stack:
        for index in range(count):
            identity = identities[index] if identities else new_identity()
            replica = replica_of(numbers, robust=agreed.recipe.collaboration.robust)
            reachable = index not in unreachable
            place = Place(tuple(found[0].session.node.addresses) if found else (), reachable=reachable)
            admission = (admissions or {}).get(index, OpenDoor())
            report = reporting(replica, reachable=reachable)
            session = stack.enter_context(connected(agreed, identity, admission, replica, place, report))
            session.board.is_newcomer = newcomers
            found.append(Volunteer(session, replica, identity))
        yield found


def prepare(members: Sequence[Volunteer], numbers: int, timeout_seconds: float = 6.0, **options: object) -> None:
    """Use volunteers again for a vector of another length, and with other options of the section."""
    for each in members:
        each.replica.numbers, each.replica.center_D, each.replica.epoch = numbers, None, 0
        session = each.session
        session._section = recipe_of(timeout_seconds=timeout_seconds, **options).collaboration
        session._reductions.timeout_seconds = timeout_seconds
        session.caught.clear()
        session._told.clear()
        session._matcher.banned.clear()
        session._matcher._shuns = True


def acquaint(members: Sequence[Volunteer], *, unreachable: Sequence[int] = (), **options: object) -> None:
    """Let them average once, with time: the first call between two takes long where the machine is busy."""
    numbers = 4 * len(members)
    prepare(members, numbers, timeout_seconds=30.0, **options)
    ones = [torch.ones(numbers)] * len(members)
    outcomes(averaged(members, group_of(members, unreachable=unreachable), ones, [1] * len(members)))


def group_of(
    members: Sequence[Volunteer],
    *,
    unreachable: Sequence[int] = (),
    listening: Sequence[int] = (),
    bandwidths: Sequence[float | None] | None = None,
) -> Group:
    """A group as matchmaking would have found it. listening: of those who are auxiliaries."""
    described = [
        Member(
            each.peer_id,
            each.replica.epoch,
            None if bandwidths is None else bandwidths[index],
            index not in unreachable,
            index not in listening,
        )
        for index, each in enumerate(members)
    ]
    return Group(os.urandom(32), tuple(sorted(described, key=lambda member: member.peer_id)))


def averaged(
    members: Sequence[Volunteer],
    group: Group,
    vectors: Sequence[Tensor | None],
    samples: Sequence[int],
    losses: Sequence[float] | None = None,
) -> list[Outcome | RoundFailedError]:
    """What the same round comes to at each of them, all at once."""

    def one(index: int) -> Outcome | RoundFailedError:
        loss = 0.0 if losses is None else losses[index]
        try:
            return members[index].session.average(group, vectors[index], samples[index], loss)
        except RoundFailedError as error:
            return error

    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(one, range(len(members))))


def outcomes(found: Sequence[Outcome | RoundFailedError]) -> list[Outcome]:
    """All of them, none of which failed; the same bits at all."""
    read: list[Outcome] = []
    for each in found:
        assert isinstance(each, Outcome), each
        read.append(each)
    for each in read[1:]:
        assert torch.equal(each.vector_D, read[0].vector_D)
    return read
