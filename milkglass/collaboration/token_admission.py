"""Admission by tokens: a volunteer asks its authority for one, again and again, and asks others for theirs.

Each answer brings the list of revoked keys along, so a revocation is known to all within `every_seconds`; where the
authority cannot be reached, within the lifetime of a token. Entering the DHT needs no token; what is said there without
one is believed by nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from milkglass.collaboration.admission import Admission
from milkglass.collaboration.authority import AuthorityService, Refused, read_answer
from milkglass.collaboration.authority_folder import ABOUT, IDENTITY, read_about
from milkglass.collaboration.engine import Multiaddr, PeerID, runtime_pb2
from milkglass.collaboration.identity import Identity, read_identity
from milkglass.collaboration.node import check_address
from milkglass.collaboration.tokens import Judge, read_revoked, read_token
from milkglass.errors import CertificateError, LinkError, first_line

EVERY_SECONDS: Final = 15.0
_ANSWER_SECONDS: Final = 10.0


@final
@dataclass(frozen=True)
class Pass:
    """A volunteer's folder. authority: its peer id. addresses: where it listens. name: what it calls the volunteer."""

    identity: Identity = field(repr=False)
    authority: bytes
    addresses: tuple[str, ...]
    name: str


def read_pass(folder: Path) -> Pass:
    """The folder that came from the authority. Raises CertificateError or LinkError, one line."""
    for file in (folder / ABOUT, folder / IDENTITY):
        if not file.is_file():
            raise CertificateError(f"{folder}: no {file.name}; {_where_else(folder)}")
    about = read_about(folder / ABOUT)
    if not about.addresses:
        raise CertificateError(
            f"{folder / ABOUT}: no address; expected the folder as it is once collab-authority --listen has run"
        )
    addresses = tuple(check_address(address) for address in about.addresses)
    return Pass(read_identity(folder / IDENTITY), about.authority, addresses, about.name)


def _where_else(folder: Path) -> str:
    """The end of a line about a missing file: what was expected, and what was perhaps meant."""
    with contextlib.suppress(OSError):
        inner = sorted(
            place for place in folder.iterdir() if (place / ABOUT).is_file() and (place / IDENTITY).is_file()
        )
        if inner:
            return f"expected one volunteer's folder, such as {inner[0]}"
    return f"expected {IDENTITY} and {ABOUT}, as collab-authority makes them"


@final
class TokenAdmission(Admission):
    """own: who this volunteer is, and whom it asks. run: the run that it takes part in; "" for any."""

    def __init__(self, own: Pass, run: str = "") -> None:
        self._own, self._run, self._judge = own, run, Judge(own.authority, run)
        self._lock = threading.Lock()
        self._token, self._expires = b"", 0.0
        self._withdrawn: str | None = None

    @property
    def token(self) -> bytes:
        """The newest of this volunteer's own; empty before the first `renew`."""
        with self._lock:
            return self._token

    @property
    def authority(self) -> bytes:
        """As `Admission`'s."""
        return self._own.authority

    @property
    def withdrawn(self) -> str | None:
        """Why this volunteer may take part no more, in one line; None while it may."""
        with self._lock:
            return self._withdrawn

    def objection(self, peer_id: bytes, token: bytes) -> str | None:
        """As `Admission`'s. What was verified before is answered in microseconds."""
        return self._judge.objection(peer_id, token, time.time())

    async def renew(self, p2p: Any) -> None:
        """Get a fresh token and the list of revoked keys. p2p: hivemind's, of this volunteer.

        Raises LinkError, one line, if the authority cannot be reached or refuses; `withdrawn` holds a refusal for good.
        """
        where = f"the authority at {self._own.addresses[0]}"
        try:
            answer = read_answer(await self._ask(p2p))
        except Exception as error:  # whatever hivemind raises
            raise LinkError(f"{where} does not answer ({first_line(error)}); expected one that runs") from None
        if isinstance(answer, Refused):
            said = f"{where} gives {self._own.name} no token: {answer.why}"
            if answer.for_good:
                self._withdraw(said)
            raise LinkError(said)
        now = time.time()
        try:
            self._judge.learn(read_revoked(answer.revoked), now)
            wrong = self._judge.objection(self._own.identity.peer_id, answer.token, now)
            expires = read_token(answer.token).expires
        except CertificateError as error:
            wrong, expires = str(error), 0.0
        if wrong is not None:
            raise LinkError(f"{where} gives a token that is no good here: {wrong}; expected clocks that agree")
        with self._lock:
            self._token, self._expires = answer.token, expires

    async def keep_renewing(self, p2p: Any, every_seconds: float = EVERY_SECONDS) -> None:
        """Renew for ever; ends once `withdrawn` says why.

        Without an answer the volunteer goes on until its token has expired, and a last question was not answered.
        """
        while self.withdrawn is None:
            await asyncio.sleep(every_seconds)
            try:
                await self.renew(p2p)
            except LinkError as error:
                with self._lock:
                    expired = time.time() >= self._expires
                if expired and self.withdrawn is None:
                    self._withdraw(f"the token of {self._own.name} has expired: {error}")

    def _withdraw(self, why: str) -> None:
        with self._lock:
            self._withdrawn = why

    async def _ask(self, p2p: Any) -> bytes:
        """The authority's answer; where the connection has broken, over a new one."""
        peer = PeerID(self._own.authority)
        request = runtime_pb2.ExpertRequest(uid=self._run)
        stub = AuthorityService.get_stub(p2p, peer)
        try:
            return bytes((await stub.rpc_token(request, timeout=_ANSWER_SECONDS)).metadata)
        except Exception:
            addresses = [Multiaddr(address.partition("/p2p/")[0]) for address in self._own.addresses]
            await asyncio.wait_for(p2p._client.connect(peer, addresses), _ANSWER_SECONDS)
            return bytes((await stub.rpc_token(request, timeout=_ANSWER_SECONDS)).metadata)
