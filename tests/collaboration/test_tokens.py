"""Tokens and the list of revoked keys: what is believed, and by whom; no network."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from milkglass.collaboration.identity import new_identity
from milkglass.collaboration.tokens import (
    CLOCK_SECONDS,
    Judge,
    Revoked,
    Token,
    read_revoked,
    read_token,
    sign_revoked,
    sign_token,
    verify,
    verify_revoked,
)
from milkglass.errors import CertificateError

AUTHORITY, ALICE, BOB, OTHER = (new_identity() for _ in range(4))
NOW = 1_800_000_000.0


def _token(run: str = "", issued: float = NOW, lifetime_seconds: float = 300.0) -> Token:
    return sign_token(AUTHORITY, "alice", ALICE.peer_id, run=run, issued=issued, lifetime_seconds=lifetime_seconds)


def test_a_token_comes_back_from_its_bytes_and_is_small() -> None:
    token = sign_token(AUTHORITY, "a" * 63, ALICE.peer_id, run="r" * 63, issued=NOW, lifetime_seconds=300.0)
    assert read_token(token.to_bytes()) == token
    assert len(token.to_bytes()) <= 250
    assert verify(token, AUTHORITY.peer_id, NOW) is None
    assert token.expires == NOW + 300.0


def test_a_token_that_is_cut_short_or_prolonged_is_unreadable() -> None:
    whole = _token(run="r1").to_bytes()
    for length in range(len(whole)):
        with pytest.raises(CertificateError, match="unreadable"):
            read_token(whole[:length])
    with pytest.raises(CertificateError, match="unreadable"):
        read_token(whole + b"\0")


def test_no_bit_of_a_token_can_be_turned() -> None:
    whole = _token(run="r1").to_bytes()
    for at in range(8 * len(whole)):
        forged = bytearray(whole)
        forged[at // 8] ^= 1 << at % 8
        judge = Judge(AUTHORITY.peer_id)
        assert judge.objection(ALICE.peer_id, bytes(forged), NOW) is not None
    assert Judge(AUTHORITY.peer_id).objection(ALICE.peer_id, whole, NOW) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"name": "mallory"}, "not signed"),
        ({"peer_id": BOB.peer_id}, "not signed"),
        ({"run": "other"}, "not signed"),
        ({"expires": NOW + 10_000.0}, "not signed"),
        ({"signature": OTHER.sign(b"milkglass token\n" + _token().content())}, "not signed"),
        ({"signature": AUTHORITY.sign(_token().content())}, "not signed"),  # without its heading
        ({"signature": AUTHORITY.sign(b"milkglass revoked\n" + _token().content())}, "not signed"),
    ],
)
def test_a_forged_token_is_refused(changes: dict[str, object], why: str) -> None:
    forged = replace(_token(), **changes)  # type: ignore[arg-type]
    said = verify(forged, AUTHORITY.peer_id, NOW)
    assert said is not None
    assert why in said
    assert Judge(AUTHORITY.peer_id).objection(forged.peer_id, forged.to_bytes(), NOW) == said


def test_another_authority_s_token_is_refused() -> None:
    assert "not signed" in str(verify(_token(), OTHER.peer_id, NOW))


@pytest.mark.parametrize(
    ("issued", "expires"), [(float("nan"), NOW), (NOW, float("nan")), (NOW, float("inf")), (NOW, NOW), (-1.0, NOW)]
)
def test_dates_that_are_none_are_unreadable_though_they_are_signed(issued: float, expires: float) -> None:
    odd = replace(_token(), issued=issued, expires=expires)
    signed = replace(odd, signature=AUTHORITY.sign(b"milkglass token\n" + odd.content()))
    with pytest.raises(CertificateError, match="unreadable"):
        read_token(signed.to_bytes())


def test_a_token_holds_until_it_expires_also_where_it_was_verified_before() -> None:
    judge, token = Judge(AUTHORITY.peer_id), _token().to_bytes()
    assert judge.objection(ALICE.peer_id, token, NOW + 299.9) is None
    assert "expired" in str(judge.objection(ALICE.peer_id, token, NOW + 300.0))
    assert "expired" in str(Judge(AUTHORITY.peer_id).objection(ALICE.peer_id, token, NOW + 300.0))


def test_a_token_from_the_future_is_refused_with_a_word_on_clocks() -> None:
    judge, token = Judge(AUTHORITY.peer_id), _token().to_bytes()
    assert judge.objection(ALICE.peer_id, token, NOW - CLOCK_SECONDS) is None
    assert "clock" in str(judge.objection(ALICE.peer_id, token, NOW - CLOCK_SECONDS - 1.0))


def test_a_stolen_token_is_worth_nothing_with_another_key() -> None:
    judge, token = Judge(AUTHORITY.peer_id), _token().to_bytes()
    for _ in range(2):  # not known yet, and then known as alice's
        assert judge.objection(BOB.peer_id, token, NOW) == "the token of alice, shown by another key"
        assert judge.objection(ALICE.peer_id, token, NOW) is None


def test_a_stranger_has_no_token_and_the_authority_needs_none() -> None:
    judge = Judge(AUTHORITY.peer_id)
    assert judge.objection(OTHER.peer_id, b"", NOW) == "no token; expected one of the authority"
    assert "unreadable" in str(judge.objection(OTHER.peer_id, b"let me in", NOW))
    assert judge.objection(AUTHORITY.peer_id, b"", NOW) is None


def test_a_token_for_a_run_is_for_that_run() -> None:
    for of_token, of_judge in (("", "a"), ("a", "a"), ("a", "")):
        assert Judge(AUTHORITY.peer_id, of_judge).objection(ALICE.peer_id, _token(of_token).to_bytes(), NOW) is None
    said = Judge(AUTHORITY.peer_id, "a").objection(ALICE.peer_id, _token("b").to_bytes(), NOW)
    assert said == "the token of alice is for the run b; this is a"


def test_who_is_revoked_is_refused_though_its_token_was_verified() -> None:
    judge, token = Judge(AUTHORITY.peer_id), _token().to_bytes()
    assert judge.objection(ALICE.peer_id, token, NOW) is None
    judge.learn(sign_revoked(AUTHORITY, [ALICE.peer_id], issued=NOW), NOW)
    assert judge.objection(ALICE.peer_id, token, NOW) == "the authority has revoked this key"
    judge.learn(sign_revoked(AUTHORITY, [BOB.peer_id], issued=NOW + 1.0), NOW + 1.0)
    assert judge.objection(ALICE.peer_id, token, NOW) is None


def test_an_older_list_does_not_undo_a_newer_one() -> None:
    judge = Judge(AUTHORITY.peer_id)
    judge.learn(sign_revoked(AUTHORITY, [ALICE.peer_id], issued=NOW), NOW)
    with pytest.raises(CertificateError, match="older"):
        judge.learn(sign_revoked(AUTHORITY, [], issued=NOW - 0.001), NOW)
    assert "revoked" in str(judge.objection(ALICE.peer_id, _token().to_bytes(), NOW))


@pytest.mark.parametrize(
    ("revoked", "why"),
    [
        (sign_revoked(OTHER, [ALICE.peer_id], issued=NOW), "not signed"),
        (replace(sign_revoked(AUTHORITY, [ALICE.peer_id], issued=NOW), peer_ids=frozenset()), "not signed"),
        (replace(sign_revoked(AUTHORITY, [], issued=NOW), issued=NOW + 1.0), "not signed"),
        (sign_revoked(AUTHORITY, [], issued=NOW + CLOCK_SECONDS + 1.0), "clock"),  # or no list would be newer for long
    ],
)
def test_a_list_that_is_not_the_authority_s_or_of_tomorrow_is_refused(revoked: Revoked, why: str) -> None:
    assert why in str(verify_revoked(revoked, AUTHORITY.peer_id, NOW))
    judge = Judge(AUTHORITY.peer_id)
    with pytest.raises(CertificateError, match=why):
        judge.learn(revoked, NOW)
    assert judge.objection(ALICE.peer_id, _token().to_bytes(), NOW) is None


def test_a_list_comes_back_from_its_bytes_and_from_no_others() -> None:
    revoked = sign_revoked(AUTHORITY, [ALICE.peer_id, BOB.peer_id], issued=NOW)
    whole = revoked.to_bytes()
    assert read_revoked(whole) == revoked
    assert read_revoked(sign_revoked(AUTHORITY, [], issued=NOW).to_bytes()).peer_ids == frozenset()
    for length in range(len(whole)):
        with pytest.raises(CertificateError, match="unreadable"):
            read_revoked(whole[:length])
    first, second = (ALICE.peer_id, BOB.peer_id) if ALICE.peer_id < BOB.peer_id else (BOB.peer_id, ALICE.peer_id)
    for twisted in (whole.replace(first + second, second + first), whole.replace(first + second, first + first)):
        with pytest.raises(CertificateError, match="unreadable"):
            read_revoked(twisted)


def test_many_tokens_are_judged_rightly_and_a_known_one_is_judged_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milkglass.collaboration.tokens._MOST_KEPT", 8)
    judge = Judge(AUTHORITY.peer_id)
    tokens = [_token(issued=NOW + second).to_bytes() for second in range(20)]
    for token in tokens + tokens:
        assert judge.objection(ALICE.peer_id, token, NOW) is None
    begun = time.perf_counter()
    for _ in range(1000):
        judge.objection(ALICE.peer_id, tokens[-1], NOW)
    assert (time.perf_counter() - begun) / 1000 < 50e-6  # a signature alone takes twice that
