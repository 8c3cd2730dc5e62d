"""Content that its author has signed, with the token that lets the author take part; others may pass it on."""

from __future__ import annotations

import json
import struct
from typing import Any, Final

from milkglass.collaboration.admission import Admission
from milkglass.collaboration.identity import Identity, short_name, signed_by
from milkglass.errors import MessageError

_HEAD: Final = struct.Struct(">IH")
_SIGNATURE: Final = 64
_MOST_BYTES: Final = 1 << 16


def seal(identity: Identity, token: bytes, purpose: str, content: dict[str, Any]) -> bytes:
    """`content` (JSON) signed for that purpose alone."""
    body = json.dumps(content, sort_keys=True).encode()
    return _HEAD.pack(len(body), len(token)) + body + identity.sign(_signed(purpose, body)) + token


def unseal(sealed: bytes, author: bytes, purpose: str, admission: Admission) -> dict[str, Any]:
    """What the peer of that id signed for that purpose. Raises MessageError: forged, damaged, or not admitted."""
    name = short_name(author)
    if not _HEAD.size <= len(sealed) <= _MOST_BYTES:
        raise MessageError(f"{name}: a message of {len(sealed)} bytes; expected a signed one")
    body_bytes, token_bytes = _HEAD.unpack(sealed[: _HEAD.size])
    ends = _HEAD.size + body_bytes
    if len(sealed) != ends + _SIGNATURE + token_bytes:
        raise MessageError(f"{name}: a signed message of a wrong length")
    body, signature, token = sealed[_HEAD.size : ends], sealed[ends : ends + _SIGNATURE], sealed[ends + _SIGNATURE :]
    objection = admission.objection(author, token)
    if objection is not None:
        raise MessageError(f"{name}: {objection}")
    if not signed_by(author, _signed(purpose, body), signature):
        raise MessageError(f"{name}: a message with a wrong signature")
    try:
        return read_json(body)
    except MessageError:
        raise MessageError(f"{name}: a signed message that is no JSON object") from None


def read_json(content: bytes | str) -> dict[str, Any]:
    """A JSON object that a stranger wrote. Raises MessageError."""
    try:
        read = json.loads(content)
    except (ValueError, RecursionError):  # brackets in brackets, thousands deep
        read = None
    if not isinstance(read, dict):
        raise MessageError("no JSON object")
    return read


def _signed(purpose: str, body: bytes) -> bytes:
    return b"milkglass " + purpose.encode() + b"\0" + body
