"""Tokens: an authority's signed word, for some minutes, that the owner of a key may take part; and whom it has revoked.

hivemind's own tokens (`hivemind.utils.auth`) name a user and a second key, of RSA, and the DHT's calls alone ask for
them. A token here names the peer id that the connection itself proves: shown by another key, it is worth nothing.
Both contents are a fixed layout of bytes, and each is signed under a heading of its own.
"""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, final

from milkglass.certificates import PARTY_NAME
from milkglass.collaboration.identity import Identity, signed_by
from milkglass.errors import CertificateError

RUN_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}"
PEER_ID_BYTES: Final = 38
CLOCK_SECONDS: Final = 60.0
"""A token from further in the future is refused."""
_VERSION: Final = 1
_TOKEN_HEAD: Final = struct.Struct(">BddBB")  # version, issued, expires, length of the name, length of the run's name
_REVOKED_HEAD: Final = struct.Struct(">BdI")  # version, issued, how many
_SIGNATURE: Final = 64
_LATEST: Final = 1e11  # seconds; also refuses what is no number
_MOST_KEPT: Final = 4096


@final
@dataclass(frozen=True)
class Token:
    """The owner of `peer_id`, whom the authority calls `name`, may take part in `run` ("": any) until it expires.

    issued, expires: seconds of the DHT's time, which is Unix time.
    """

    name: str
    peer_id: bytes
    run: str
    issued: float
    expires: float
    signature: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        """At most 250 bytes; `read_token` reads them."""
        return self.content() + self.signature

    def content(self) -> bytes:
        """What is signed, but for the heading."""
        name, run = self.name.encode(), self.run.encode()
        head = _TOKEN_HEAD.pack(_VERSION, self.issued, self.expires, len(name), len(run))
        return head + self.peer_id + name + run


@final
@dataclass(frozen=True)
class Revoked:
    """The peer ids that may take part no more, whatever token they show. issued: Unix time; a later list wins."""

    issued: float
    peer_ids: frozenset[bytes]
    signature: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        """38 bytes for each, and 77; `read_revoked` reads them."""
        return self.content() + self.signature

    def content(self) -> bytes:
        """What is signed, but for the heading."""
        head = _REVOKED_HEAD.pack(_VERSION, self.issued, len(self.peer_ids))
        return head + b"".join(sorted(self.peer_ids))


def sign_token(
    authority: Identity, name: str, peer_id: bytes, *, run: str = "", issued: float, lifetime_seconds: float
) -> Token:
    """A token that anybody who knows the authority's peer id can check."""
    unsigned = Token(name, peer_id, run, issued, issued + lifetime_seconds, b"")
    signature = authority.sign(_under("token", unsigned.content()))
    return Token(name, peer_id, run, issued, unsigned.expires, signature)


def sign_revoked(authority: Identity, peer_ids: Iterable[bytes], *, issued: float) -> Revoked:
    """The authority's list, as of now."""
    unsigned = Revoked(issued, frozenset(peer_ids), b"")
    return Revoked(issued, unsigned.peer_ids, authority.sign(_under("revoked", unsigned.content())))


def read_token(content: bytes) -> Token:
    """The token in these bytes, not yet verified. Raises CertificateError where they are not one, to the last byte."""
    try:
        version, issued, expires, name_length, run_length = _TOKEN_HEAD.unpack_from(content)
        name_at = _TOKEN_HEAD.size + PEER_ID_BYTES
        run_at = name_at + name_length
        ends = run_at + run_length
        if version != _VERSION or len(content) != ends + _SIGNATURE or not 0 <= issued < expires <= _LATEST:
            raise ValueError
        name, run = content[name_at:run_at].decode("ascii"), content[run_at:ends].decode("ascii")
        if not re.fullmatch(PARTY_NAME, name) or (run and not re.fullmatch(RUN_NAME, run)):
            raise ValueError
    except (ValueError, struct.error):
        raise CertificateError("unreadable; expected a token of a milkglass authority, whole") from None
    return Token(name, bytes(content[_TOKEN_HEAD.size : name_at]), run, issued, expires, bytes(content[ends:]))


def read_revoked(content: bytes) -> Revoked:
    """The list in these bytes, not yet verified. Raises CertificateError where they are not one, to the last byte."""
    try:
        version, issued, count = _REVOKED_HEAD.unpack_from(content)
        ends = _REVOKED_HEAD.size + count * PEER_ID_BYTES
        if version != _VERSION or len(content) != ends + _SIGNATURE or not 0 <= issued <= _LATEST:
            raise ValueError
        each = [bytes(content[at : at + PEER_ID_BYTES]) for at in range(_REVOKED_HEAD.size, ends, PEER_ID_BYTES)]
        if each != sorted(set(each)):  # one form only for one list
            raise ValueError
    except (ValueError, struct.error):
        raise CertificateError("unreadable; expected the list of revoked keys of a milkglass authority") from None
    return Revoked(issued, frozenset(each), bytes(content[ends:]))


def verify(token: Token, authority: bytes, now: float) -> str | None:
    """What is wrong with a token, for one who trusts the authority of that peer id; None where nothing is."""
    if not signed_by(authority, _under("token", token.content()), token.signature):
        return f"the token of {token.name} is not signed by the authority"
    return _out_of_date(token, now)


def verify_revoked(revoked: Revoked, authority: bytes, now: float) -> str | None:
    """What is wrong with a list of revoked keys; None where nothing is."""
    if not signed_by(authority, _under("revoked", revoked.content()), revoked.signature):
        return "the list of revoked keys is not signed by the authority"
    if revoked.issued > now + CLOCK_SECONDS:
        return f"the list of revoked keys {_from_the_future(revoked.issued - now)}"
    return None


@final
class Judge:
    """What a token is worth to one who trusts one authority. Any thread may ask it; nothing here reads a clock.

    authority: its peer id. run: the run that one takes part in, "" for any.
    """

    def __init__(self, authority: bytes, run: str = "") -> None:
        self._authority, self._run = authority, run
        self._lock = threading.Lock()
        self._good: dict[bytes, Token] = {}  # signature verified, nothing else; the oldest first
        self._revoked = Revoked(0.0, frozenset(), b"")

    def learn(self, revoked: Revoked, now: float) -> None:
        """Take the authority's list. Raises CertificateError if it is not its own, or older than the known one."""
        wrong = verify_revoked(revoked, self._authority, now)
        if wrong is not None:
            raise CertificateError(wrong)
        with self._lock:
            if revoked.issued < self._revoked.issued:
                raise CertificateError("the list of revoked keys is older than the known one; expected a newer one")
            self._revoked = revoked

    def objection(self, peer_id: bytes, token: bytes, now: float) -> str | None:
        """Why the owner of that peer id, who shows that token, may not take part; None where it may.

        A signature is verified once; dates, key and revocation are looked at each time.
        """
        if peer_id == self._authority:
            return None
        with self._lock:
            if peer_id in self._revoked.peer_ids:
                return "the authority has revoked this key"
            read = self._good.get(token)
        if read is None:
            if not token:
                return "no token; expected one of the authority"
            try:
                read = read_token(token)
            except CertificateError as error:
                return f"token {error}"
            if (wrong := verify(read, self._authority, now)) is not None:
                return wrong
            with self._lock:
                if len(self._good) >= _MOST_KEPT:
                    self._good.pop(next(iter(self._good)))
                self._good[bytes(token)] = read
        if read.peer_id != peer_id:
            return f"the token of {read.name}, shown by another key"
        if self._run and read.run not in ("", self._run):
            return f"the token of {read.name} is for the run {read.run}; this is {self._run}"
        return _out_of_date(read, now)


def check_run_name(run: str) -> None:
    """Raise CertificateError unless tokens can be for a run of that name; "" is any."""
    if run and not re.fullmatch(RUN_NAME, run):
        raise CertificateError(f"--run {run!r}: expected a recipe's collaboration.run: letters, digits, _ and -")


def _out_of_date(token: Token, now: float) -> str | None:
    if token.issued > now + CLOCK_SECONDS:
        return f"the token of {token.name} {_from_the_future(token.issued - now)}"
    if now >= token.expires:
        return f"the token of {token.name} expired {now - token.expires:.0f} s ago"
    return None


def _from_the_future(seconds: float) -> str:
    return f"was issued {seconds:.0f} s in the future: one of the two clocks is wrong"


def _under(heading: str, content: bytes) -> bytes:
    """Content under a heading, so that no signature of one kind passes for another."""
    return f"milkglass {heading}\n".encode() + content
