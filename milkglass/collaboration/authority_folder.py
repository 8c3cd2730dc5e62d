"""The folder of an authority: its key, its allow-list, and a folder for each volunteer, which goes to it by hand.

    DIR/authority/     authority.key, allowed.json, authority.json: whoever has this key decides who takes part
    DIR/alice/         identity.key, authority.json; without the key where the volunteer keeps its own

allowed.json     {"allowed": {name: peer id}, "revoked": {peer id: name}}
authority.json   {"authority": peer id, "name": name, "addresses": [where the authority listens]}

No key is ever replaced. A running authority reads allowed.json anew as soon as it changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from milkglass.certificates import PARTY_NAME
from milkglass.collaboration.engine import PeerID
from milkglass.collaboration.identity import Identity, new_identity, peer_name, read_identity
from milkglass.collaboration.tokens import PEER_ID_BYTES
from milkglass.errors import CertificateError, RunError, nearest
from milkglass.runs import write_beside

IDENTITY: Final = "identity.key"
ABOUT: Final = "authority.json"
_AUTHORITY: Final = "authority"
_KEY: Final = "authority.key"
_LISTS: Final = "allowed.json"
_ED25519: Final = "12D3KooW"  # how the peer id of every Ed25519 key begins


@final
@dataclass(frozen=True)
class Lists:
    """allowed: peer ids by name. revoked: names by peer id; a name may have had several keys."""

    allowed: Mapping[str, bytes]
    revoked: Mapping[bytes, str]

    def name_of(self, peer_id: bytes) -> str | None:
        """The name of one who is allowed, and not revoked."""
        if peer_id in self.revoked:
            return None
        return next((name for name, allowed in self.allowed.items() if allowed == peer_id), None)


@final
@dataclass(frozen=True)
class About:
    """What a volunteer must know of its authority. authority: its peer id. name: what it calls the volunteer."""

    authority: bytes
    name: str
    addresses: tuple[str, ...]

    def write(self, path: Path) -> None:
        """As JSON."""
        content = {"authority": peer_name(self.authority), "name": self.name, "addresses": self.addresses}
        write_beside(path, (json.dumps(content, indent=2) + "\n").encode())


def allow(folder: Path, names: Mapping[str, str | None]) -> list[str]:
    """Allow volunteers; the folder, the authority and its key are made where there are none. A line for each, to print.

    names: with a peer id for one who has a key of its own; without, the key is made. One who was revoked is allowed
    again. Raises CertificateError or RunError, one line, before anything is written for a name that is wrong.
    """
    named = _named_keys(names)
    for above in (folder, folder / _AUTHORITY):
        try:
            above.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the folder {above}: {error.strerror or error}") from None
    with _locked(folder / _AUTHORITY):
        authority = _open_or_make(folder)
        lists, address_book = _read_lists(folder), read_about(folder / _AUTHORITY / ABOUT)
        allowed, revoked = dict(lists.allowed), dict(lists.revoked)
        _check_case(folder, named, allowed)
        keys = {name: _key_of(folder, name, peer_id, lists, authority) for name, peer_id in named.items()}
        known = dict(allowed)
        for name, key in keys.items():
            _check_key(name, key.peer_id, known, authority)
            known[name] = key.peer_id
        lines = []
        for name, key in keys.items():
            place = folder / name
            if allowed.get(name) == key.peer_id:
                lines.append(f"{name}: was allowed already, as {peer_name(key.peer_id)}")
                continue
            if key.made is not None:
                key.made.write(place / IDENTITY)
            About(authority.peer_id, name, address_book.addresses).write(place / ABOUT)
            again = "allowed again" if revoked.pop(key.peer_id, None) is not None else "allowed"
            allowed[name] = key.peer_id
            own = "" if (place / IDENTITY).exists() else f", beside its own {IDENTITY}"
            lines.append(f"{name}: {again}, as {peer_name(key.peer_id)}; {place} goes to {name}{own}")
        _write_lists(folder, Lists(allowed, revoked))
    return lines


def revoke(folder: Path, names: Sequence[str]) -> list[str]:
    """Take back what was allowed; a line for each name, to print. Raises CertificateError for one that is not known."""
    _check_made(folder)
    with _locked(folder / _AUTHORITY):
        lists = _read_lists(folder)
        known = {name.casefold(): name for name in [*lists.revoked.values(), *lists.allowed]}
        for name in names:
            if name.casefold() not in known:
                raise CertificateError(f"--revoke {name}: not on the list of {folder}; {nearest(name, known.values())}")
        allowed, revoked, lines = dict(lists.allowed), dict(lists.revoked), []
        for name in (known[name.casefold()] for name in names):
            peer_id = allowed.pop(name, None)
            if peer_id is None:
                lines.append(f"{name}: was revoked already")
                continue
            revoked[peer_id] = name
            lines.append(f"{name}: revoked, {peer_name(peer_id)}")
        _write_lists(folder, Lists(allowed, revoked))
    return lines


def open_authority(folder: Path) -> Identity:
    """The authority's key. Raises CertificateError if there is none, or it cannot be used."""
    _check_made(folder)
    return read_identity(folder / _AUTHORITY / _KEY)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[None]:
    """Inside, no other process serves this folder. Raises RunError if one does already."""
    with (folder / _AUTHORITY / _KEY).open("rb") as file:  # a file that nobody ever replaces
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{folder}: another process serves this authority; stop it first") from None
        yield


def write_addresses(folder: Path, addresses: Sequence[str]) -> list[Path]:
    """Say in every folder that is there where the authority listens; returns the volunteers' folders."""
    with _locked(folder / _AUTHORITY):
        about = read_about(folder / _AUTHORITY / ABOUT)
        About(about.authority, _AUTHORITY, tuple(addresses)).write(folder / _AUTHORITY / ABOUT)
        places = [folder / name for name in _read_lists(folder).allowed if (folder / name / ABOUT).is_file()]
        for place in places:  # one that has been moved to its owner is not made anew
            About(about.authority, place.name, tuple(addresses)).write(place / ABOUT)
    return places


def read_about(path: Path) -> About:
    """An authority.json. Raises CertificateError, one line."""
    content = _read_json(path, {"authority": str, "name": str, "addresses": list})
    if not all(isinstance(address, str) for address in content["addresses"]):
        raise CertificateError(f"{path}: damaged: addresses; expected a list of text")
    return About(_read_peer_id(content["authority"], str(path)), content["name"], tuple(content["addresses"]))


@final
class AllowList:
    """The lists of a running authority, read anew when the file has changed. Any thread may ask."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._lists = Lists({}, {})

    def current(self) -> Lists:
        """Raises CertificateError, one line, while the file is missing or damaged."""
        path = self._folder / _AUTHORITY / _LISTS
        with self._lock:
            try:
                found = path.stat()
            except OSError as error:
                raise CertificateError(f"{path}: {error.strerror or error}") from None
            seen = (found.st_ino, found.st_mtime_ns, found.st_size)
            if seen != self._seen:
                self._lists = _read_lists(self._folder)
                self._seen = seen
            return self._lists


@final
@dataclass(frozen=True)
class _Key:
    """made: the key itself, where it is new."""

    peer_id: bytes
    made: Identity | None = None


def _key_of(folder: Path, name: str, named: bytes | None, lists: Lists, authority: Identity) -> _Key:
    """The key to allow: the one named, else the one in the folder, else the one on the list, else a new one."""
    there, about = folder / name / IDENTITY, folder / name / ABOUT
    if about.exists() and read_about(about).authority != authority.peer_id:
        raise RunError(f"{about}: of another authority, and no file is replaced; remove {about.parent} first")
    in_folder = read_identity(there).peer_id if there.exists() else None
    if named is not None and in_folder not in (None, named):
        raise RunError(f"{there}: is another key than {peer_name(named)}, and no file is replaced; remove it first")
    found = named or in_folder or lists.allowed.get(name)
    if found is not None:
        return _Key(found)
    made = new_identity()
    return _Key(made.peer_id, made)


def _check_key(name: str, peer_id: bytes, allowed: Mapping[str, bytes], authority: Identity) -> None:
    """Raise CertificateError unless one name has one key, and one key one name."""
    if peer_id == authority.peer_id:
        raise CertificateError(f"--allow {name}: {peer_name(peer_id)} is the authority itself; expected a volunteer's")
    other = next((other for other, known in allowed.items() if known == peer_id and other != name), None)
    if other is not None:
        raise CertificateError(f"--allow {name}: {peer_name(peer_id)} is {other}'s key; expected one of its own")
    if allowed.get(name, peer_id) != peer_id:
        raise CertificateError(
            f"--allow {name}: is allowed with another key, {peer_name(allowed[name])}; revoke that one first"
        )


def _named_keys(names: Mapping[str, str | None]) -> dict[str, bytes | None]:
    """Each name with the key that was named for it. Raises CertificateError for a name or a peer id that is none."""
    seen: set[str] = set()
    for name in names:
        if not re.fullmatch(PARTY_NAME, name):
            raise CertificateError(f"--allow {name!r}: expected up to 63 letters, digits and . _ -, the first no . _ -")
        if name.casefold() == _AUTHORITY:
            raise CertificateError(f"--allow {name}: that folder is the authority's own; expected another name")
        if name.casefold() in seen:
            raise CertificateError(f"--allow {name}: named twice; expected a name of its own, whatever the case")
        seen.add(name.casefold())
    return {
        name: None if text is None else _read_peer_id(text, f"--allow {name}={text}") for name, text in names.items()
    }


def _check_case(folder: Path, names: Iterable[str], allowed: Mapping[str, bytes]) -> None:
    """Raise CertificateError where a name differs in nothing but case from one that is there."""
    there = {path.name.casefold(): path.name for path in folder.iterdir()}
    there |= {name.casefold(): name for name in allowed}
    for name in names:
        if there.get(name.casefold(), name) != name:
            raise CertificateError(
                f"--allow {name}: {there[name.casefold()]} is there; names that differ in case are one"
            )


def _open_or_make(folder: Path) -> Identity:
    """The authority's key. A new one comes with an empty list; whatever a stopped start left is used again."""
    place = folder / _AUTHORITY
    if not (place / _KEY).exists():
        if (place / _LISTS).exists():
            raise RunError(f"{place / _LISTS}: is there without {_KEY}; expected both or neither")
        new_identity().write(place / _KEY)
    authority = read_identity(place / _KEY)
    if not (place / ABOUT).exists():
        About(authority.peer_id, _AUTHORITY, ()).write(place / ABOUT)
    if not (place / _LISTS).exists():
        _write_lists(folder, Lists({}, {}))
    return authority


def _check_made(folder: Path) -> None:
    if not (folder / _AUTHORITY / _KEY).is_file():
        raise CertificateError(f"{folder}: no authority; expected a folder that collab-authority --allow NAME has made")


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Inside, no other command changes the lists; it waits for one that does."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_lists(folder: Path, lists: Lists) -> None:
    content = {
        "allowed": {name: peer_name(peer_id) for name, peer_id in lists.allowed.items()},
        "revoked": {peer_name(peer_id): name for peer_id, name in lists.revoked.items()},
    }
    write_beside(folder / _AUTHORITY / _LISTS, (json.dumps(content, indent=2) + "\n").encode())


def _read_lists(folder: Path) -> Lists:
    path = folder / _AUTHORITY / _LISTS
    content = _read_json(path, {"allowed": dict, "revoked": dict})
    for name in (*content["allowed"], *content["revoked"].values()):
        if not isinstance(name, str) or not re.fullmatch(PARTY_NAME, name):
            raise CertificateError(f"{path}: damaged: {name!r}; expected a volunteer's name")
    allowed = {name: _read_peer_id(text, str(path)) for name, text in content["allowed"].items()}
    return Lists(allowed, {_read_peer_id(text, str(path)): name for text, name in content["revoked"].items()})


def _read_json(path: Path, fields: Mapping[str, type]) -> dict[str, Any]:
    """A JSON object of exactly these fields. Raises CertificateError, one line."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CertificateError(f"{path}: {error.strerror or error}; expected what collab-authority makes") from None
    except ValueError as error:
        raise CertificateError(f"{path}: damaged, not JSON: {error}") from None
    if not isinstance(content, dict) or content.keys() != fields.keys():
        raise CertificateError(f"{path}: damaged; expected a JSON object of {', '.join(fields)}")
    for key, kind in fields.items():
        if not isinstance(content[key], kind):
            raise CertificateError(f"{path}: damaged: {key}; expected a {kind.__name__}")
    return content


def _read_peer_id(text: object, where: str) -> bytes:
    """The bytes of a peer id as people see it. Raises CertificateError, which begins with where it was found."""
    try:
        peer_id = bytes(PeerID.from_base58(text).to_bytes())
        if len(peer_id) == PEER_ID_BYTES and peer_name(peer_id) == text and peer_name(peer_id).startswith(_ED25519):
            return peer_id
    except Exception:  # base58 raises whatever comes
        pass
    raise CertificateError(f"{where}: peer id {text!r}; expected that of an Ed25519 key, {_ED25519}...")
