"""What a volunteer believes of the DHT: entries that their owner has signed, under its own id, showing its token.

An entry of a dictionary is stored under the id of the peer whose it is. It is `content + signature + token + length of
the token`; the signature covers key, id, content and the time at which it expires, so nobody can change it, prolong it
or give it out as his own. hivemind asks this validator before it stores an entry for somebody, and when it reads one.
"""

from __future__ import annotations

import struct
from typing import Final, final

from milkglass.collaboration.admission import Admission
from milkglass.collaboration.engine import DHTRecord, MSGPackSerializer, RecordValidatorBase, get_dht_time
from milkglass.collaboration.identity import Identity, signed_by

LONGEST_SECONDS: Final = 600.0
_SIGNATURE: Final = 64
_LENGTH: Final = struct.Struct(">H")
_MOST_BYTES: Final = 1 << 16
_NOTHING: Final = b"\xc0"  # msgpack's nil


@final
class SignedRecords(RecordValidatorBase):  # type: ignore[misc]  # hivemind has no types
    """identity: who signs what this volunteer stores. admission: whose tokens are good."""

    def __init__(self, identity: Identity, admission: Admission) -> None:
        self._identity, self._admission = identity, admission

    def sign_value(self, record: DHTRecord) -> bytes:
        """The content with its signature and our token."""
        token = self._admission.token
        signature = self._identity.sign(_signed(record, record.value))
        return bytes(record.value) + signature + token + _LENGTH.pack(len(token))

    def strip_value(self, record: DHTRecord) -> bytes:
        """The content alone, of a record that was valid when it came; nil if its owner may no longer take part.

        hivemind validates what others send, and never again what lies in its own storage: this is asked at each look.
        """
        content, _, token = _parts(record.value)
        owner = _owner(record.subkey)
        return content if owner is not None and self._admission.objection(owner, token) is None else _NOTHING

    def validate(self, record: DHTRecord) -> bool:
        """Whether its owner signed it, may take part, and does not ask to keep it for ever."""
        owner = _owner(record.subkey)
        if owner is None or record.expiration_time > get_dht_time() + LONGEST_SECONDS:
            return False
        try:
            content, signature, token = _parts(record.value)
        except ValueError:
            return False
        signed = signed_by(owner, _signed(record, content), signature)
        return signed and _can_be_read(content) and self._admission.objection(owner, token) is None


def _can_be_read(content: bytes) -> bool:
    """Whether it is msgpack. hivemind would never answer whoever looks for an entry that is not."""
    try:
        MSGPackSerializer.loads(content)
    except Exception:  # msgpack raises many
        return False
    return True


def _owner(subkey: bytes) -> bytes | None:
    """The peer id in a dictionary's key, which the DHT packs as msgpack's short binary."""
    if len(subkey) < 2 or subkey[0] != 0xC4 or subkey[1] != len(subkey) - 2:
        return None
    return bytes(subkey[2:])


def _parts(value: bytes) -> tuple[bytes, bytes, bytes]:
    """Content, signature, token. Raises ValueError."""
    if not _LENGTH.size + _SIGNATURE <= len(value) <= _MOST_BYTES:
        raise ValueError("too short or too long")
    (length,) = _LENGTH.unpack(value[-_LENGTH.size :])
    ends = len(value) - _LENGTH.size - length
    if ends < _SIGNATURE:
        raise ValueError("the token is longer than the record")
    return value[: ends - _SIGNATURE], value[ends - _SIGNATURE : ends], value[ends : -_LENGTH.size]


def _signed(record: DHTRecord, content: bytes) -> bytes:
    """What a signature covers."""
    head = struct.pack(">dHH", record.expiration_time, len(record.key), len(record.subkey))
    return b"milkglass record" + head + bytes(record.key) + bytes(record.subkey) + bytes(content)
