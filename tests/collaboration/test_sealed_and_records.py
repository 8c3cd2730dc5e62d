"""What is signed holds for its author, its purpose and its time alone: messages that go through others, and the DHT."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milkglass.collaboration.admission import Admission, OpenDoor
from milkglass.collaboration.engine import DHTRecord, MSGPackSerializer, get_dht_time
from milkglass.collaboration.identity import Identity, new_identity, read_identity, signed_by
from milkglass.collaboration.sealed import read_json, seal, unseal
from milkglass.collaboration.signed_records import LONGEST_SECONDS, SignedRecords
from milkglass.errors import CertificateError, MessageError
from tests.collaboration.in_process import Listed

ANNA, BERTA = new_identity(), new_identity()
CONTENT = {"epoch": 3, "word": "größer", "list": [1, 2.5, None]}
OPEN = OpenDoor()
TOKEN = Listed(set()).token


def sealed(author: Identity = ANNA, purpose: str = "member", content: dict[str, Any] = CONTENT) -> bytes:
    return seal(author, TOKEN, purpose, content)


def listed(*who: Identity) -> Listed:
    return Listed({each.peer_id for each in who})


def test_what_was_sealed_is_read() -> None:
    assert unseal(sealed(), ANNA.peer_id, "member", OPEN) == CONTENT
    assert unseal(sealed(), ANNA.peer_id, "member", listed(ANNA)) == CONTENT


def test_of_another_author_or_purpose() -> None:
    with pytest.raises(MessageError, match="wrong signature"):
        unseal(sealed(), BERTA.peer_id, "member", OPEN)
    for purpose in ("contribution", "membe", "member ", "member\0{", ""):
        with pytest.raises(MessageError, match="wrong signature"):
            unseal(sealed(), ANNA.peer_id, purpose, OPEN)


def test_of_somebody_who_is_not_admitted() -> None:
    with pytest.raises(MessageError, match="not on the list"):
        unseal(sealed(), ANNA.peer_id, "member", listed(BERTA))
    with pytest.raises(MessageError, match="not on the list"):
        unseal(seal(ANNA, b"", "member", CONTENT), ANNA.peer_id, "member", listed(ANNA))


def test_a_token_is_not_signed_but_shown() -> None:
    """Another's token with one's own words is the admission's to refuse: it names a peer id."""
    other = sealed()[: -len(TOKEN)] + bytes(len(TOKEN))
    assert unseal(other, ANNA.peer_id, "member", OPEN) == CONTENT
    with pytest.raises(MessageError, match="not on the list"):
        unseal(other, ANNA.peer_id, "member", listed(ANNA))


def test_every_change_of_a_byte_is_seen() -> None:
    whole = sealed()
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1
        with pytest.raises(MessageError):
            unseal(bytes(changed), ANNA.peer_id, "member", listed(ANNA))


def test_every_cut_is_seen() -> None:
    whole = sealed()
    for length in range(len(whole)):
        with pytest.raises(MessageError):
            unseal(whole[:length], ANNA.peer_id, "member", OPEN)
    with pytest.raises(MessageError):
        unseal(whole + b"x", ANNA.peer_id, "member", OPEN)


@given(st.binary(max_size=200))
def test_noise(content: bytes) -> None:
    with pytest.raises(MessageError):
        unseal(content, ANNA.peer_id, "member", OPEN)


def signed_body(body: bytes) -> bytes:
    """What an admitted liar can sign, whatever `seal` would have written."""
    return struct.pack(">IH", len(body), 0) + body + ANNA.sign(b"milkglass member\0" + body)


NO_OBJECTS = {
    "list": b"[1]",
    "number": b"3",
    "nothing": b"",
    "no JSON": b"{'a': 1}",
    "no text": b"\xff\xfe\x00",
    "thousands deep": b"[" * 20_000 + b"]" * 20_000,
    "objects thousands deep": b'{"a":' * 8000 + b"1" + b"}" * 8000,
    "digits": b'{"a": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("name", NO_OBJECTS)
def test_signed_nonsense(name: str) -> None:
    body = NO_OBJECTS[name]
    with pytest.raises(MessageError, match="no JSON object"):
        unseal(signed_body(body), ANNA.peer_id, "member", OPEN)
    with pytest.raises(MessageError, match="no JSON object"):
        read_json(body)


def test_signed_sense_by_the_same_way() -> None:
    """So what is refused above is refused for its body."""
    assert unseal(signed_body(b'{"a": 1}'), ANNA.peer_id, "member", OPEN) == {"a": 1}


def test_longer_than_allowed() -> None:
    body = json.dumps({"a": "x" * (1 << 16)}).encode()
    with pytest.raises(MessageError, match="bytes; expected a signed one"):
        unseal(signed_body(body), ANNA.peer_id, "member", OPEN)


@pytest.mark.parametrize(
    "peer_id",
    [b"", b"x" * 38, ANNA.peer_id[:-1], ANNA.peer_id + b"x", b"\x12" + ANNA.peer_id[1:]],
    ids=["empty", "no id", "too short", "too long", "another kind"],
)
def test_an_id_that_is_no_key_signs_nothing(peer_id: bytes) -> None:
    assert not signed_by(peer_id, b"content", ANNA.sign(b"content"))
    assert signed_by(ANNA.peer_id, b"content", ANNA.sign(b"content"))


def test_a_key_file(tmp_path: Any) -> None:
    path = tmp_path / "key"
    ANNA.write(path)
    assert read_identity(path).peer_id == ANNA.peer_id
    for content in (b"", b"x" * 68, path.read_bytes()[:-1], path.read_bytes()[:-1] + b"\0"):
        path.write_bytes(content)
        with pytest.raises(CertificateError, match="damaged"):
            read_identity(path)


# Records of the DHT


def record(
    owner: Identity | bytes = ANNA, value: object = CONTENT, seconds: float = 30.0, key: bytes = b"key"
) -> DHTRecord:
    subkey = MSGPackSerializer.dumps(owner.peer_id if isinstance(owner, Identity) else owner)
    return DHTRecord(key, subkey, MSGPackSerializer.dumps(value), get_dht_time() + seconds)


def with_value(old: DHTRecord, value: bytes, **others: Any) -> DHTRecord:
    fields = {"key": old.key, "subkey": old.subkey, "expiration_time": old.expiration_time, "value": value} | others
    return DHTRecord(**fields)


def signed(by: Identity, of: DHTRecord, admission: Admission | None = None) -> DHTRecord:
    return with_value(of, SignedRecords(by, admission or listed()).sign_value(of))


def validator(admission: Admission | None = None) -> SignedRecords:
    return SignedRecords(new_identity(), admission or listed(ANNA))


def test_an_entry_of_its_owner() -> None:
    entry = signed(ANNA, record())
    assert validator().validate(entry)
    assert validator().strip_value(entry) == record().value


@pytest.mark.parametrize("content", [b"\xc1", b"", b"\x81", b"\xd9\xff"], ids=["never used", "empty", "cut", "short"])
def test_an_entry_that_cannot_be_read(content: bytes) -> None:
    """hivemind would wait for ever for an entry that is no msgpack, and with it all that its owner stops."""
    assert not validator().validate(signed(ANNA, with_value(record(), content)))


def test_an_entry_of_another() -> None:
    """Under a peer's id stands what that peer signed."""
    assert not validator(listed(ANNA, BERTA)).validate(signed(BERTA, record(ANNA)))
    taken = with_value(record(BERTA), signed(ANNA, record(ANNA)).value)
    assert not validator(listed(ANNA, BERTA)).validate(taken)


def test_a_stranger_or_one_who_is_revoked() -> None:
    entry = signed(ANNA, record())
    assert not validator(listed(BERTA)).validate(entry)
    door = listed(ANNA)
    judge = validator(door)
    assert judge.validate(entry)
    door.peers.clear()
    assert not judge.validate(entry)
    assert MSGPackSerializer.loads(judge.strip_value(entry)) is None  # what lay here already is not believed any more


def test_time_key_and_content_cannot_be_changed() -> None:
    entry = signed(ANNA, record())
    later = with_value(entry, entry.value, expiration_time=entry.expiration_time + 1e-6)
    elsewhere = with_value(entry, entry.value, key=b"kez")
    other = signed(ANNA, record(value={"epoch": 4}))
    swapped = with_value(entry, other.value)
    moved = with_value(entry, entry.value, key=b"keyx", subkey=entry.subkey[1:])
    for forged in (later, elsewhere, swapped, moved):
        assert not validator().validate(forged)
    assert validator().validate(other)


def test_nothing_is_kept_for_ever() -> None:
    assert validator().validate(signed(ANNA, record(seconds=LONGEST_SECONDS - 5)))
    for seconds in (LONGEST_SECONDS + 5, 1e9, float("inf")):
        assert not validator().validate(signed(ANNA, record(seconds=seconds)))


@pytest.mark.parametrize("subkey", [None, b"", "text", 5, b"x" * 300, ["list"]])
def test_what_stands_under_no_peers_id(subkey: Any) -> None:
    """Regular values, which belong to nobody, have the subkey nil."""
    plain = DHTRecord(b"key", MSGPackSerializer.dumps(subkey), b"value", get_dht_time() + 30)
    assert not validator().validate(signed(ANNA, plain))
    bare = DHTRecord(b"key", b"", b"value", get_dht_time() + 30)
    assert not validator().validate(signed(ANNA, bare))


def test_every_damage_of_a_record_is_seen() -> None:
    entry = signed(ANNA, record())
    for at in range(len(entry.value)):
        changed = bytearray(entry.value)
        changed[at] ^= 1
        assert not validator().validate(with_value(entry, bytes(changed)))
        assert not validator().validate(with_value(entry, entry.value[:at]))
    assert not validator().validate(with_value(entry, entry.value + b"\0"))
    assert not validator().validate(with_value(entry, bytes(1 << 17)))


@given(st.binary(max_size=200), st.binary(max_size=60))
@settings(max_examples=200)
def test_noise_in_the_dht(value: bytes, subkey: bytes) -> None:
    assert not validator().validate(DHTRecord(b"key", subkey, value, get_dht_time() + 30))
    assert not validator().validate(with_value(record(), value))
