"""A volunteer's side of the network while it is connected: notice board, groups, averagings, states, in one place.

The training asks it from its own thread; all that these methods do happens in the node's event loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, final

from torch import Tensor

from milkglass.collaboration.admission import Admission
from milkglass.collaboration.bandwidth import PARTNERS
from milkglass.collaboration.board import Board
from milkglass.collaboration.disputes import Disputes
from milkglass.collaboration.duty import Averaging
from milkglass.collaboration.engine import P2P
from milkglass.collaboration.group import MOST_BANS, Group, Matcher, Member
from milkglass.collaboration.identity import Identity, peer_name
from milkglass.collaboration.node import BROKEN, Node, peer_of
from milkglass.collaboration.parts import RoundFailedError
from milkglass.collaboration.progress import Pace, Progress, Report, agreed_state, judge
from milkglass.collaboration.reduction import Outcome, Reductions, outcome
from milkglass.collaboration.replica import Replica
from milkglass.collaboration.service import Greeter, Greeting, Service, greet
from milkglass.collaboration.signed_records import SignedRecords
from milkglass.collaboration.state import Download, States, donors, download
from milkglass.collaboration.weights import ROBUST_CAP
from milkglass.collaboration.wire_vector import VectorCodec
from milkglass.errors import LinkError, RecipeError, foreign_line
from milkglass.recipe import Recipe, first_difference, parse_recipe

_HEARD: Final = 0.9  # of a running mean
_LEAST_HEARD: Final = 0.5
_MEASUREMENTS: Final = 3
_MEASURE_SECONDS: Final = 2.0
_REMEMBER_SECONDS: Final = 0.5


@final
@dataclass(frozen=True)
class Place:
    """Where a volunteer stands in the network.

    peers: addresses of others, none for the first. listen: (host, port). reachable: others can call it. trains: it is
    no auxiliary, which only averages.
    """

    peers: tuple[str, ...] = ()
    listen: tuple[str, int] = ("127.0.0.1", 0)
    reachable: bool = True
    trains: bool = True


@final
@dataclass(frozen=True)
class Agreed:
    """What all volunteers of a run have in common. data: of their data, such as a text's hash. digest: of both."""

    recipe: Recipe
    data: str
    digest: bytes


@final
class Session:
    """See `connected`, which makes it."""

    def __init__(
        self,
        agreed: Agreed,
        node: Node,
        admission: Admission,
        replica: Replica,
        place: Place,
        report: Callable[[], Report],
    ) -> None:
        section = agreed.recipe.collaboration
        self.node, self._agreed_on, self._replica, self._place, self._report = node, agreed, replica, place, report
        self._admission, self._section = admission, section
        self._service = Service(node, section.run, admission)
        self.board = Board(node, section.run, report)
        self.states = States(replica, admission)
        self._matcher = Matcher(
            node,
            admission,
            Service,
            section.run,
            agreed.digest,
            section.matchmaking_seconds,
        )
        self._reductions = Reductions(node, admission, self._service, section.run, section.timeout_seconds)
        self._disputes = Disputes(self._reductions, self._service)
        self._service.matcher, self._service.reductions = self._matcher, self._reductions
        self._service.disputes, self._service.states = self._disputes, self.states
        self._pace = Pace(section.target_batch)
        self._measured_with = self._measurements = 0
        self._averages = False
        self._last_round: bytes | None = None
        self.bandwidth: float | None = None
        self.caught: set[bytes] = set()
        self._told: deque[bytes] = deque(maxlen=MOST_BANS)
        self.known: list[str] = []
        self._heard: dict[bytes, float] = {}

    @property
    def others(self) -> dict[bytes, Report]:
        """Reports of those of the same recipe."""
        digest = self._agreed_on.digest
        return {peer: report for peer, report in self.board.reports.items() if report.recipe == digest}

    def progress(self) -> Progress:
        """Where the run stands, as far as is known here."""
        section = self._section
        return judge(self._report(), self.others, target=section.target_batch, cap=section.weight_cap, pace=self._pace)

    def look(self) -> None:
        """Read the notice board now."""
        with contextlib.suppress(TimeoutError):  # what was seen last is still there
            self.node.run(self.board.look(), self._section.timeout_seconds)

    def measure_first(self) -> None:
        """Measure the bandwidth with those who are there, before taking part."""
        if self._partners():
            self.node.run(self._measure())

    def find_group(self, expected: int) -> concurrent.futures.Future[Group | None]:
        """Look for others to average with at this epoch, in the background."""
        member = Member(
            self.node.identity.peer_id,
            self._replica.epoch,
            self.bandwidth,
            self._place.reachable,
            self._place.trains,
            frozenset(self._told),
            self._replica.history,
        )
        return self.node.begin(self._matcher.find(member, expected, self._section.timeout_seconds))

    def average(
        self, group: Group, own_D: Tensor | None, samples: int, loss: float, gradient_D: Tensor | None = None
    ) -> Outcome:
        """Average with a group; own_D: what we contribute, None to listen alone. Raises RoundFailedError.

        gradient_D: our gradient alone, where own_D is more than that.
        """
        self._averages = True
        try:
            found = self.node.run(self._average(group, own_D, samples, loss, gradient_D))
        except RoundFailedError as error:
            self._catch(error.caught)
            raise
        finally:
            self._averages = False
        if self._section.robust:
            found = replace(found, caught=found.caught | self._unheard(found.heard))
        self._catch(found.caught)
        return found

    def _unheard(self, heard: Mapping[bytes, float]) -> frozenset[bytes]:
        """Who was so far from all others, for long, that next to nothing of it counted: what still does is too much."""
        for peer, part in heard.items():
            self._heard[peer] = _HEARD * self._heard.get(peer, 1.0) + (1 - _HEARD) * part
        out = {peer for peer in heard if self._heard[peer] < _LEAST_HEARD} - {self.node.identity.peer_id}
        return frozenset(out - self.caught)

    def catch_up(self) -> Download:
        """Take over the state that most have. Raises MessageError where nobody gives it."""
        epoch = self.progress().epoch
        peers = donors(self.others, epoch)
        token, timeout = self._admission.token, self._section.timeout_seconds
        return self.node.run(download(self._service, self._replica, token, peers, self._agreed, timeout))

    async def open(self) -> None:
        """Answer others, and keep the notice board."""
        greeting = Greeter(self._greeting)
        if self._place.reachable:
            await greeting.add_p2p_handlers(self.node.p2p)
        await self._service.open()
        await self.board.look()
        self._keeping = [
            asyncio.create_task(work) for work in (self.board.keep(), self._remember(), self._keep_measuring())
        ]

    async def close(self) -> None:
        """Say goodbye."""
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        self._reductions.forget()
        with contextlib.suppress(Exception):
            await self.board.leave()
            await self._service.close()

    def _partners(self) -> list[bytes]:
        """With whom to measure: nobody, for one who reduces nothing."""
        able = [peer for peer, report in self.others.items() if report.reachable]
        return able[:PARTNERS] if self._place.reachable else []

    async def _measure(self) -> None:
        partners = self._partners()
        found = await self._service.probes.measure(self._service, partners, self._admission.token)
        if found is None:
            return  # somebody is being measured by another just now
        if len(partners) > self._measured_with:
            self._measured_with, self._measurements = len(partners), 0
        self._measurements += 1
        self.bandwidth = max(found, self.bandwidth or 0.0)

    async def _keep_measuring(self) -> None:
        """A few times, and again as the run has grown: traffic of others only lessens what is seen."""
        while True:
            await asyncio.sleep(_MEASURE_SECONDS * (0.5 + secrets.randbelow(1000) / 1000))
            grown = len(self._partners()) > self._measured_with
            if not self._averages and (grown or 0 < self._measurements < _MEASUREMENTS):
                await self._measure()

    async def _remember(self) -> None:
        """Note others' addresses, to come back by if the daemon dies."""
        while True:
            with contextlib.suppress(*BROKEN):
                self.known = await _addresses(self.node.p2p) or self.known
            await asyncio.sleep(_REMEMBER_SECONDS)

    async def _agreed(self, epoch: int) -> bytes | None:
        await self.board.look()
        return agreed_state(self.others.values(), epoch)

    async def _average(
        self, group: Group, own_D: Tensor | None, samples: int, loss: float, gradient_D: Tensor | None
    ) -> Outcome:
        section, reductions = self._section, self._reductions
        reductions.forget(keep=self._last_round)
        codec = VectorCodec(section.compress)
        cap = min(section.weight_cap, ROBUST_CAP) if section.robust else section.weight_cap
        averaging = Averaging(codec, cap, section.robust, self._replica.center_D)
        begun = await reductions.begin(group, averaging, own_D, self._replica.numbers, samples, loss, gradient_D)
        self._last_round = group.round_id
        averages = await reductions.collect(begun)
        if section.robust:
            return await self._disputes.settle(begun, averages)
        return outcome(begun, {number: each[0] for number, each in enumerate(averages) if each[0] is not None})

    def _catch(self, caught: frozenset[bytes]) -> None:
        self._told.extend(sorted(caught - self.caught))
        self.caught |= caught
        self._matcher.banned |= caught

    def _greeting(self) -> Greeting:
        recipe, authority = self._agreed_on.recipe, self._admission.authority
        return Greeting(
            run=self._section.run,
            agreed=recipe.agreed(),
            digest=recipe.digest(),
            data=self._agreed_on.data,
            epoch=self._replica.epoch,
            peers=[peer_name(peer) for peer in self.board.reports],
            authority=None if authority is None else authority.hex(),
        )


@contextmanager
def connected(
    agreed: Agreed,
    identity: Identity,
    admission: Admission,
    replica: Replica,
    place: Place,
    report: Callable[[], Report],
    renew: Callable[[P2P], Any] | None = None,
) -> Iterator[Session]:
    """Inside, the volunteer is in the network; afterwards it has left in order. renew: keeps the token fresh.

    Raises LinkError where nobody answers or another authority admits, RecipeError where the others train by another
    recipe.
    """

    async def look_around(p2p: P2P) -> None:
        if renew is not None:
            await renew(p2p)
        await check_others(p2p, place.peers, agreed, admission.authority)

    validator = SignedRecords(identity, admission)
    with Node(
        identity,
        validator,
        peers=place.peers,
        listen=place.listen,
        reachable=place.reachable,
        look_around=look_around,
    ) as node:
        session = node.run(_made(agreed, node, admission, replica, place, report))
        try:
            yield session
        finally:
            with contextlib.suppress(Exception):
                node.run(session.close(), 5.0)


async def _made(
    agreed: Agreed, node: Node, admission: Admission, replica: Replica, place: Place, report: Callable[[], Report]
) -> Session:
    session = Session(agreed, node, admission, replica, place, report)
    await session.open()
    return session


async def check_others(p2p: P2P, addresses: Sequence[str], agreed: Agreed, authority: bytes | None) -> None:
    """Raise RecipeError or LinkError where those at the addresses are no one run, or not the one of that recipe.

    authority: who admits here, by its peer id; the others must say the same.
    """
    peers = [peer_of(address) for address in addresses]
    said = await asyncio.gather(*[greet(p2p, peer) for peer in peers])
    greetings = {peer_name(peer): each for peer, each in zip(peers, said, strict=True) if each is not None}
    for name, each in greetings.items():
        _check_recipe(name, each, agreed)
        _check_authority(name, each, authority)
    known = {name: {name, *each.peers} for name, each in greetings.items()}
    names = sorted(known)
    for name in names[1:]:
        if name not in known[names[0]] and names[0] not in known[name]:
            raise LinkError(
                f"{names[0][-8:]} and {name[-8:]} do not know each other: these are two collaborations, though of one "
                "recipe; name addresses of one of them"
            )


def _check_authority(name: str, said: Greeting, authority: bytes | None) -> None:
    if said.authority == (None if authority is None else authority.hex()):
        return
    if authority is None:
        raise LinkError("this run admits by an authority; expected --admission, the folder that it gave out")
    if said.authority is None:
        raise LinkError(
            f"the volunteer {name[-8:]} admits everybody, without an authority; expected a volunteer of the run that "
            "--admission is for"
        )
    raise LinkError(
        f"the volunteer {name[-8:]} admits by another authority than that of --admission; expected the folder that "
        "the run's own authority gave out"
    )


def _check_recipe(name: str, said: Greeting, agreed: Agreed) -> None:
    recipe = agreed.recipe
    if said.run != recipe.collaboration.run:
        raise RecipeError(
            f"the volunteer {name[-8:]} trains run {foreign_line(said.run)!r}; collaboration.run is "
            f"{recipe.collaboration.run!r} here"
        )
    if said.digest == recipe.digest():
        if said.data != agreed.data:
            raise RecipeError(
                f"the volunteer {name[-8:]} trains by the same recipe on other data: {foreign_line(said.data)} there, "
                f"{agreed.data} here"
            )
        return
    difference = "it does not say what"
    with contextlib.suppress(Exception):  # a stranger's words
        theirs = dict(said.agreed)
        theirs["data"] = {**recipe.data.model_dump(mode="json"), **theirs["data"]}
        difference = first_difference(recipe, parse_recipe(theirs)) or difference
    raise RecipeError(f"the volunteer {name[-8:]} trains by another recipe: {foreign_line(difference)}")


async def _addresses(p2p: P2P) -> list[str]:
    found = []
    for peer in await p2p.list_peers():
        found += [f"{address}/p2p/{peer.peer_id.to_base58()}" for address in peer.addrs]
    return found
