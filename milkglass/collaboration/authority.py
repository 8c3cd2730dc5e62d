"""The running authority: a node of the network that trains nothing, and gives tokens to those on its list.

Volunteers ask it over the connection that proves their peer id, some times a minute, and so learn soon who is revoked.
It is also the well-known address at which the network is entered, and refuses records of strangers as all others do.
"""

from __future__ import annotations

import contextlib
import ipaddress
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

from milkglass.collaboration.admission import Admission
from milkglass.collaboration.authority_folder import AllowList, open_authority, serving, write_addresses
from milkglass.collaboration.engine import P2PContext, ServicerBase, runtime_pb2
from milkglass.collaboration.identity import Identity, peer_name
from milkglass.collaboration.node import Node, on_loopback
from milkglass.collaboration.signed_records import SignedRecords
from milkglass.collaboration.tokens import Judge, sign_revoked, sign_token
from milkglass.errors import CertificateError, LinkError, foreign_line

Log = Callable[..., None]
LIFETIME_SECONDS: Final = 300.0
_GRANTED: Final = 1
_REFUSED: Final = 2
_LATER: Final = 3
_LENGTH: Final = struct.Struct(">BH")  # which answer, length of the token
_MOST_CALLERS: Final = 4096


@final
@dataclass(frozen=True)
class Granted:
    """A token, and the list of revoked keys, as bytes."""

    token: bytes = field(repr=False)
    revoked: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        """As they are answered."""
        return _LENGTH.pack(_GRANTED, len(self.token)) + self.token + self.revoked


@final
@dataclass(frozen=True)
class Refused:
    """No token. for_good: as long as the list stays as it is; otherwise one may ask again."""

    why: str
    for_good: bool = True

    def to_bytes(self) -> bytes:
        """As it is answered."""
        return bytes([_REFUSED if self.for_good else _LATER]) + self.why.encode()


def read_answer(content: bytes) -> Granted | Refused:
    """What an authority has answered. Raises CertificateError where it is no answer."""
    kind = content[0] if content else 0
    if kind in (_REFUSED, _LATER):
        why = foreign_line(content[1:].decode("utf-8", errors="replace"))
        return Refused(why, for_good=kind == _REFUSED)
    if kind == _GRANTED and len(content) >= _LENGTH.size:
        ends = _LENGTH.size + _LENGTH.unpack_from(content)[1]
        if len(content) > ends:
            return Granted(content[_LENGTH.size : ends], content[ends:])
    raise CertificateError("unreadable answer; expected one of a milkglass authority")


@final
class AuthorityService(ServicerBase):  # type: ignore[misc]  # hivemind has no types
    """Answers who asks for a token. lifetime_seconds: of a token. run: the only run that they are for; "" for any.

    pause_seconds: who asks again sooner is told to wait. log: (event, named values).
    """

    def __init__(
        self,
        identity: Identity,
        allowed: AllowList,
        *,
        lifetime_seconds: float = LIFETIME_SECONDS,
        run: str = "",
        pause_seconds: float = 1.0,
        log: Log = lambda *_, **__: None,
    ) -> None:
        self._identity, self._allowed, self._run, self._log = identity, allowed, run, log
        self._lifetime_seconds, self._pause_seconds = lifetime_seconds, pause_seconds
        self._callers: OrderedDict[bytes, _Caller] = OrderedDict()  # who asked last is last

    async def rpc_token(self, request: runtime_pb2.ExpertRequest, context: P2PContext) -> runtime_pb2.ExpertResponse:
        """A token for the caller. uid: the run that it takes part in, "" for any. metadata: the answer."""
        answer = self.answer(bytes(context.remote_id.to_bytes()), request.uid, time.time())
        return runtime_pb2.ExpertResponse(metadata=answer.to_bytes())

    def answer(self, peer_id: bytes, run: str, now: float) -> Granted | Refused:
        """What the owner of that peer id is told, who asks at that time (Unix time, seconds)."""
        caller = self._callers.pop(peer_id, None) or _Caller()
        self._callers[peer_id] = caller
        if len(self._callers) > _MOST_CALLERS:
            self._callers.popitem(last=False)
        if abs(now - caller.asked) < self._pause_seconds:
            return Refused(f"asked more than once in {self._pause_seconds:g} s", for_good=False)
        caller.asked = now
        name, answer = self._decide(peer_id, run, now)
        told = answer.why if isinstance(answer, Refused) else ""
        if caller.told != told:  # not every token of those who ask four times a minute
            caller.told = told
            event, more = ("refused", {"why": told}) if isinstance(answer, Refused) else ("admitted", {})
            self._log(event, name=name or "a stranger", peer=peer_name(peer_id), **more)
        return answer

    def _decide(self, peer_id: bytes, run: str, now: float) -> tuple[str | None, Granted | Refused]:
        """The caller's name, where it has one, and the answer."""
        try:
            lists = self._allowed.current()
        except CertificateError as error:  # a slip of the pen must not send everybody away
            self._log("cannot read the list", why=str(error))
            return None, Refused("the authority cannot read its list at the moment", for_good=False)
        if peer_id in lists.revoked:
            return lists.revoked[peer_id], Refused("this key has been revoked")
        name = lists.name_of(peer_id)
        if name is None:
            return None, Refused(f"{peer_name(peer_id)} is not on the list of those who may take part")
        if run and self._run and run != self._run:
            return name, Refused(f"this authority is for the run {self._run}, not for {run}")
        token = sign_token(
            self._identity, name, peer_id, run=self._run, issued=now, lifetime_seconds=self._lifetime_seconds
        )
        return name, Granted(token.to_bytes(), sign_revoked(self._identity, lists.revoked, issued=now).to_bytes())


@final
class AuthorityAdmission(Admission):
    """What the authority itself believes: a valid token, of one who is on the list at this moment."""

    def __init__(self, identity: Identity, allowed: AllowList) -> None:
        self._peer_id, self._allowed, self._judge = identity.peer_id, allowed, Judge(identity.peer_id)

    @property
    def authority(self) -> bytes:
        """As `Admission`'s."""
        return self._peer_id

    @property
    def token(self) -> bytes:
        """None: its peer id is known to all, and it takes part in nothing."""
        return b""

    def objection(self, peer_id: bytes, token: bytes) -> str | None:
        """As `Admission`'s."""
        try:
            listed = peer_id == self._peer_id or self._allowed.current().name_of(peer_id) is not None
        except CertificateError as error:
            return str(error)
        return self._judge.objection(peer_id, token, time.time()) if listed else "not on the authority's list"


@contextlib.contextmanager
def serve(
    folder: Path,
    listen: tuple[str, int],
    *,
    lifetime_seconds: float = LIFETIME_SECONDS,
    run: str = "",
    pause_seconds: float = 1.0,
    log: Log = lambda *_, **__: None,
) -> Iterator[Node]:
    """Inside, the authority of that folder answers, and every volunteer's folder says where.

    listen: (IP address, port). Raises MilkglassError, one line, for what cannot be served.
    """
    identity = open_authority(folder)
    with serving(folder):
        allowed = AllowList(folder)
        allowed.current()  # a list that cannot be read is told before anybody asks
        with Node(identity, SignedRecords(identity, AuthorityAdmission(identity, allowed)), listen=listen) as node:
            service = AuthorityService(
                identity, allowed, lifetime_seconds=lifetime_seconds, run=run, pause_seconds=pause_seconds, log=log
            )
            node.run(service.add_p2p_handlers(node.p2p))
            write_addresses(folder, reachable_addresses(node.addresses))
            yield node


def reachable_addresses(addresses: list[str]) -> list[str]:
    """Those that others can use: no loopback, unless there is nothing else."""
    return [address for address in addresses if not on_loopback(address)] or addresses


def listening_at(text: str) -> tuple[str, int]:
    """(IP address, port) of HOST:PORT or [IPV6]:PORT, for the network's daemon. Raises LinkError, one line."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        return str(ipaddress.ip_address(host)), int(port)
    except ValueError:
        raise LinkError(
            f"--listen {text!r}: expected an IP address and a port, such as 0.0.0.0:7000 for any of this machine"
        ) from None


@final
@dataclass
class _Caller:
    """When somebody asked last, and what the log says that it was told: "" for a token."""

    asked: float = float("-inf")
    told: str | None = None
