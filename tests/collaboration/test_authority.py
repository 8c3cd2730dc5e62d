"""The authority: its folder, the running one, and what volunteers believe; on real nodes on loopback."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, final

import pytest

from milkglass.cli import main
from milkglass.collaboration.admission import Admission, OpenDoor
from milkglass.collaboration.authority import AuthorityService, Granted, Refused, read_answer, serve
from milkglass.collaboration.authority_folder import AllowList, allow, open_authority, read_about, revoke
from milkglass.collaboration.engine import get_dht_time
from milkglass.collaboration.identity import Identity, new_identity, peer_name, read_identity
from milkglass.collaboration.node import Node
from milkglass.collaboration.signed_records import SignedRecords
from milkglass.collaboration.token_admission import Pass, TokenAdmission, read_pass
from milkglass.collaboration.tokens import Judge, read_revoked, read_token, sign_token
from milkglass.errors import CertificateError, LinkError, MilkglassError, RunError

NOW = 1_800_000_000.0
LONG_ENOUGH_SECONDS = 10.0


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """An authority with alice and bob."""
    allow(tmp_path / "house", {"alice": None, "bob": None})
    return tmp_path / "house"


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _peer(house: Path, name: str) -> bytes:
    return read_identity(house / name / "identity.key").peer_id


# The folder.


def test_a_volunteer_s_folder_holds_its_key_and_the_authority_and_is_closed_to_others(house: Path) -> None:
    authority = open_authority(house)
    for name in ("alice", "bob"):
        about = read_about(house / name / "authority.json")
        assert (about.authority, about.name, about.addresses) == (authority.peer_id, name, ())
        assert AllowList(house).current().name_of(_peer(house, name)) == name
    assert _peer(house, "alice") != _peer(house, "bob")
    assert {path.stat().st_mode & 0o077 for path in (house, *house.rglob("*"))} == {0}


def test_a_name_that_is_there_is_left_as_it_is_and_others_can_be_added(house: Path) -> None:
    before = _contents(house)
    lines = allow(house, {"alice": None, "bob": peer_name(_peer(house, "bob"))})
    assert [line.split(",")[0] for line in lines] == ["alice: was allowed already", "bob: was allowed already"]
    assert _contents(house) == before
    allow(house, {"carol": None})
    assert {key: value for key, value in _contents(house).items() if key in before} | {
        "authority/allowed.json": before["authority/allowed.json"]
    } == before
    assert set(AllowList(house).current().allowed) == {"alice", "bob", "carol"}


def test_a_volunteer_that_keeps_its_own_key_gets_none(house: Path) -> None:
    own = new_identity()
    (line,) = allow(house, {"carol": own.name})
    assert line.endswith("goes to carol, beside its own identity.key")
    assert [file.name for file in (house / "carol").iterdir()] == ["authority.json"]
    assert AllowList(house).current().name_of(own.peer_id) == "carol"
    with pytest.raises(CertificateError, match=r"no identity\.key; expected identity\.key and authority\.json"):
        read_pass(house / "carol")


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ({"Alice": None}, "alice is there; names that differ in case are one"),
        ({"carol": None, "CAROL": None}, "named twice"),
        ({"Authority": None}, "that folder is the authority's own"),
        ({"../carol": None}, "expected up to 63 letters"),
        ({"carol": None, "": None}, "expected up to 63 letters"),
        ({"carol": None, "dave": "12D3KooWxyz"}, "expected that of an Ed25519 key"),
        ({"dave": "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"}, "expected that of an Ed25519 key"),
        ({"carol": None, "bob": new_identity().name}, "is another key than"),
    ],
)
def test_a_name_or_a_key_that_is_none_is_refused_and_nothing_is_written(
    names: dict[str, str | None], why: str, house: Path
) -> None:
    before = _contents(house)
    with pytest.raises(MilkglassError, match=why) as error:
        allow(house, names)
    assert "\n" not in str(error.value)
    assert _contents(house) == before


def test_nothing_is_made_for_a_name_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CertificateError):
        allow(tmp_path / "new", {"a/b": None})
    assert not (tmp_path / "new").exists()


def test_one_key_has_one_name_and_one_name_one_key(house: Path) -> None:
    own = new_identity()
    allow(house, {"carol": own.name})
    for names, why in (
        ({"dave": own.name}, "is carol's key"),
        ({"carol": new_identity().name}, "is allowed with another key"),
        ({"dave": open_authority(house).name}, "is the authority itself"),
        ({"dave": (twice := new_identity().name), "erin": twice}, "is dave's key"),
    ):
        with pytest.raises(CertificateError, match=why):
            allow(house, names)
    assert set(AllowList(house).current().allowed) == {"alice", "bob", "carol"}


def test_another_authority_s_folder_is_not_replaced(house: Path, tmp_path: Path) -> None:
    allow(tmp_path / "other", {"carol": None})
    (tmp_path / "other" / "carol").rename(house / "carol")
    with pytest.raises(RunError, match="of another authority, and no file is replaced"):
        allow(house, {"carol": None})


def test_to_revoke_twice_is_to_revoke_once(house: Path) -> None:
    bob = _peer(house, "bob")
    assert revoke(house, ["bob"]) == [f"bob: revoked, {peer_name(bob)}"]
    after = _contents(house)
    assert revoke(house, ["BOB"]) == ["bob: was revoked already"]
    assert _contents(house) == after
    lists = AllowList(house).current()
    assert (set(lists.allowed), lists.revoked) == ({"alice"}, {bob: "bob"})
    assert lists.name_of(bob) is None


def test_who_is_not_known_is_not_revoked_and_neither_are_those_beside(house: Path) -> None:
    before = _contents(house)
    with pytest.raises(CertificateError, match=r"--revoke bbo: not on the list of .*; did you mean 'bob'\? known: "):
        revoke(house, ["alice", "bbo"])
    assert _contents(house) == before
    with pytest.raises(CertificateError, match="no authority"):
        revoke(house / "alice", ["alice"])


def test_who_was_revoked_can_come_back_with_its_key_or_with_another(house: Path) -> None:
    bob = _peer(house, "bob")
    revoke(house, ["bob"])
    assert allow(house, {"bob": None})[0].startswith(f"bob: allowed again, as {peer_name(bob)}")
    assert AllowList(house).current().revoked == {}
    revoke(house, ["bob"])
    (house / "bob" / "identity.key").unlink()
    allow(house, {"bob": None})
    lists = AllowList(house).current()
    assert lists.allowed["bob"] == _peer(house, "bob") != bob
    assert lists.revoked == {bob: "bob"}


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", '{"allowed": {}}', '{"allowed": {}, "revoked": []}', '{"allowed": {"a": 1}, "revoked": {}}'),
        *('{"allowed": {"a/b": "12D3"}, "revoked": {}}', '{"allowed": {}, "revoked": {"12D3": "bob"}}'),
    ],
)
def test_a_damaged_list_is_told_in_one_line_and_admits_nobody(content: str, house: Path) -> None:
    service = AuthorityService(open_authority(house), AllowList(house))
    alice = _peer(house, "alice")
    whole = (house / "authority" / "allowed.json").read_bytes()
    (house / "authority" / "allowed.json").write_text(content)
    with pytest.raises(CertificateError, match="damaged") as error:
        AllowList(house).current()
    assert "\n" not in str(error.value)
    answer = service.answer(alice, "", NOW)
    assert isinstance(answer, Refused)
    assert not answer.for_good  # the volunteer asks again; nobody is sent away by a slip of the pen
    (house / "authority" / "allowed.json").write_bytes(whole)
    assert isinstance(service.answer(alice, "", NOW + 1.0), Granted)


# The answers.


def _service(house: Path, **settings: Any) -> tuple[AuthorityService, list[tuple[str, dict[str, object]]]]:
    lines: list[tuple[str, dict[str, object]]] = []

    def log(event: str, **values: object) -> None:
        lines.append((event, values))

    return AuthorityService(open_authority(house), AllowList(house), log=log, **settings), lines


def test_who_is_on_the_list_gets_a_token_for_its_own_key_and_the_list_of_the_revoked(house: Path) -> None:
    service, _ = _service(house, lifetime_seconds=120.0)
    revoke(house, ["bob"])
    answer = service.answer(_peer(house, "alice"), "", NOW)
    assert isinstance(answer, Granted)
    token = read_token(answer.token)
    assert (token.name, token.peer_id, token.run, token.issued, token.expires) == (
        *("alice", _peer(house, "alice"), "", NOW, NOW + 120.0),
    )
    judge = Judge(open_authority(house).peer_id)
    judge.learn(read_revoked(answer.revoked), NOW)
    assert judge.objection(_peer(house, "alice"), answer.token, NOW) is None
    assert judge.objection(_peer(house, "bob"), answer.token, NOW) == "the authority has revoked this key"


def test_strangers_and_the_revoked_get_none_and_the_list_is_read_as_soon_as_it_changes(house: Path) -> None:
    service, lines = _service(house)
    alice, stranger = _peer(house, "alice"), new_identity()
    assert isinstance(service.answer(alice, "", NOW), Granted)
    assert isinstance(service.answer(alice, "", NOW + 15.0), Granted)
    said = service.answer(stranger.peer_id, "", NOW)
    assert said == Refused(f"{stranger.name} is not on the list of those who may take part")
    revoke(house, ["alice"])
    assert service.answer(alice, "", NOW + 30.0) == Refused("this key has been revoked")
    allow(house, {"alice": None, "carol": stranger.name})
    assert isinstance(service.answer(alice, "", NOW + 45.0), Granted)
    assert isinstance(service.answer(stranger.peer_id, "", NOW + 45.0), Granted)
    told = [(event, values["name"]) for event, values in lines]
    assert told == [  # what is answered as before is not told again
        *(("admitted", "alice"), ("refused", "a stranger"), ("refused", "alice")),
        *(("admitted", "alice"), ("admitted", "carol")),
    ]


def test_who_asks_too_often_is_told_to_wait(house: Path) -> None:
    service, _ = _service(house)
    alice, bob = _peer(house, "alice"), _peer(house, "bob")
    assert isinstance(service.answer(alice, "", NOW), Granted)
    assert service.answer(alice, "", NOW + 0.9) == Refused("asked more than once in 1 s", for_good=False)
    assert isinstance(service.answer(bob, "", NOW + 0.9), Granted)
    assert isinstance(service.answer(alice, "", NOW + 1.0), Granted)


def test_callers_are_forgotten_in_the_end(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milkglass.collaboration.authority._MOST_CALLERS", 3)
    service, _ = _service(house)
    for number in range(9):
        service.answer(bytes([number]) * 38, "", NOW)
    assert len(service._callers) == 3


def test_an_authority_of_one_run_gives_no_token_for_another(house: Path) -> None:
    service, _ = _service(house, run="spring")
    alice = _peer(house, "alice")
    assert service.answer(alice, "autumn", NOW) == Refused("this authority is for the run spring, not for autumn")
    for at, run in enumerate(("spring", ""), start=1):
        answer = service.answer(alice, run, NOW + at)
        assert isinstance(answer, Granted)
        assert read_token(answer.token).run == "spring"


@pytest.mark.parametrize("answer", [Granted(b"token", b"list"), Refused("no"), Refused("wait", for_good=False)])
def test_an_answer_comes_back_from_its_bytes(answer: Granted | Refused) -> None:
    assert read_answer(answer.to_bytes()) == answer


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"\x07x", b"\x01", b"\x01\x00", b"\x01\x00\x05token", b"\x01\xff\xff"]
)
def test_an_answer_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(CertificateError, match="unreadable answer"):
        read_answer(content)


def test_a_refusal_is_one_short_line_whatever_came() -> None:
    answer = read_answer(b"\x02" + b"a\nb\x1b[2J\xff" + b"x" * 10_000)
    assert isinstance(answer, Refused)
    assert answer.why.isprintable()
    assert len(answer.why) <= 300


# On the network.


@contextlib.contextmanager
def _member(admission: Admission, identity: Identity, addresses: tuple[str, ...]) -> Iterator[Node]:
    with Node(identity, SignedRecords(identity, admission), peers=addresses) as node:
        yield node


@contextlib.contextmanager
def _volunteer(folder: Path) -> Iterator[tuple[Node, TokenAdmission]]:
    own = read_pass(folder)
    admission = TokenAdmission(own)
    with _member(admission, own.identity, own.addresses) as node:
        node.run(admission.renew(node.p2p))
        yield node, admission


@contextlib.contextmanager
def _running(house: Path, **settings: Any) -> Iterator[Node]:
    with serve(house, ("127.0.0.1", _free_port()), pause_seconds=0.0, **settings) as node:
        yield node


def _store(node: Node, content: object = "here", *, key: str = "progress") -> bool:
    """Whether anybody took it."""
    expires = get_dht_time() + 60.0
    return bool(node.run(node.dht.store(key, content, expires, subkey=node.identity.peer_id)))


def _read(node: Node, *, key: str = "progress") -> dict[bytes, object]:
    found = node.run(node.dht.get(key, latest=True))
    return {} if found is None else {owner: entry.value for owner, entry in found.value.items()}


def _until(holds: Callable[[], bool]) -> float:
    """Seconds until it holds."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < LONG_ENOUGH_SECONDS
        time.sleep(0.02)
    return time.monotonic() - begun


def test_volunteers_with_tokens_believe_each_other_and_nobody_else(house: Path) -> None:
    with _running(house) as authority, _volunteer(house / "alice") as (alice, _), _volunteer(house / "bob") as (bob, _):
        assert _store(alice, "of alice")
        assert _store(bob, "of bob")
        everybody = {alice.identity.peer_id: "of alice", bob.identity.peer_id: "of bob"}
        assert _read(alice) == _read(bob) == _read(authority) == everybody
        addresses = read_about(house / "alice" / "authority.json").addresses
        with _member(OpenDoor(), new_identity(), addresses) as stranger:
            _store(stranger, "of a stranger")  # it believes itself
            assert stranger.identity.peer_id in _read(stranger)
            assert _read(alice) == _read(bob) == _read(authority) == everybody
            _store(stranger, "alone", key="another")
            assert _read(alice, key="another") == _read(authority, key="another") == {}


@final
class _Shows(Admission):
    """Shows one token for ever, and believes everybody."""

    def __init__(self, token: bytes) -> None:
        self._token = token

    @property
    def token(self) -> bytes:
        return self._token

    def objection(self, peer_id: bytes, token: bytes) -> str | None:
        return None


def test_a_stolen_token_and_an_expired_one_open_no_door(house: Path) -> None:
    with _running(house), _volunteer(house / "alice") as (alice, admission):
        own = read_pass(house / "bob")
        thief = new_identity()
        with _member(_Shows(admission.token), thief, own.addresses) as node:
            _store(node, "stolen")
            assert _read(node) == {thief.peer_id: "stolen"}
            assert _read(alice) == {}
        now = get_dht_time()
        for issued, expected in ((now - 10.1, {}), (now - 1.0, {own.identity.peer_id: "here"})):
            token = sign_token(open_authority(house), "bob", own.identity.peer_id, issued=issued, lifetime_seconds=10.0)
            with _member(_Shows(token.to_bytes()), own.identity, own.addresses) as node:
                _store(node)
                assert _read(alice) == expected


def test_a_stranger_and_a_revoked_one_get_no_token_and_are_told_why(house: Path) -> None:
    with _running(house):
        own = read_pass(house / "alice")
        revoke(house, ["bob"])
        stranger = Pass(new_identity(), own.authority, own.addresses, "mallory")
        for who, why in (
            (stranger, f"{stranger.identity.name} is not on the list of those who may take part"),
            (read_pass(house / "bob"), "this key has been revoked"),
        ):
            admission = TokenAdmission(who)
            with _member(admission, who.identity, who.addresses) as node:
                with pytest.raises(LinkError) as error:
                    node.run(admission.renew(node.p2p))
                said = f"the authority at {own.addresses[0]} gives {who.name} no token: {why}"
                assert (str(error.value), admission.withdrawn, admission.token) == (said, said, b"")


def test_a_revocation_is_known_to_all_within_the_time_between_two_questions(house: Path) -> None:
    every_seconds = 0.5
    with _running(house), _volunteer(house / "alice") as (alice, of_alice), _volunteer(house / "bob") as (bob, of_bob):
        for node, admission in ((alice, of_alice), (bob, of_bob)):
            node.begin(admission.keep_renewing(node.p2p, every_seconds))
        first = of_bob.token
        assert _store(bob)
        assert bob.identity.peer_id in _read(alice)
        _until(lambda: of_bob.token != first)
        shown = of_bob.token
        assert of_alice.objection(bob.identity.peer_id, shown) is None
        revoke(house, ["bob"])
        took = _until(lambda: of_alice.objection(bob.identity.peer_id, shown) is not None)
        assert took < every_seconds + 0.5
        assert of_alice.objection(bob.identity.peer_id, shown) == "the authority has revoked this key"
        assert not _store(bob, key="after")
        assert _read(alice, key="after") == {}
        _until(lambda: of_bob.withdrawn is not None)
        assert str(of_bob.withdrawn).endswith("gives bob no token: this key has been revoked")
        assert of_alice.withdrawn is None
        allow(house, {"bob": None})
        _until(lambda: of_alice.objection(bob.identity.peer_id, shown) is None)


def test_without_its_authority_a_volunteer_goes_on_until_its_token_expires(house: Path) -> None:
    with contextlib.ExitStack() as stack:
        with _running(house, lifetime_seconds=3.0):
            alice, admission = stack.enter_context(_volunteer(house / "alice"))
        begun, expires = time.time(), read_token(admission.token).expires
        alice.begin(admission.keep_renewing(alice.p2p, 0.1))
        while time.time() < expires:
            assert admission.withdrawn is None
            time.sleep(0.05)
        assert expires - begun > 0.5  # it was seen to go on
        _until(lambda: admission.withdrawn is not None)
        assert str(admission.withdrawn).startswith(
            "the token of alice has expired: the authority at /ip4/127.0.0.1/tcp/"
        )
        assert "\n" not in str(admission.withdrawn)


def test_an_authority_that_comes_back_is_found_again(house: Path) -> None:
    place = ("127.0.0.1", _free_port())
    with contextlib.ExitStack() as stack:
        with serve(house, place, pause_seconds=0.0):
            alice, admission = stack.enter_context(_volunteer(house / "alice"))
            first = admission.token
        with pytest.raises(LinkError, match="does not answer"):
            alice.run(admission.renew(alice.p2p))
        assert admission.token == first
        with serve(house, place, pause_seconds=0.0):
            _until(lambda: _renewed(alice, admission, first))


def _renewed(node: Node, admission: TokenAdmission, before: bytes) -> bool:
    with contextlib.suppress(LinkError):
        node.run(admission.renew(node.p2p))
    return admission.token != before


def test_the_authority_is_reached_by_its_address_from_a_network_that_does_not_know_it(house: Path) -> None:
    with _running(house), _member(OpenDoor(), new_identity(), ()) as other:
        own = read_pass(house / "alice")
        admission = TokenAdmission(own)
        with _member(admission, own.identity, (*other.addresses,)) as node:
            node.run(admission.renew(node.p2p))
            assert read_token(admission.token).peer_id == own.identity.peer_id


def test_no_authority_at_the_start_is_one_line_that_names_its_address(house: Path) -> None:
    with _running(house):
        own = read_pass(house / "alice")
    admission = TokenAdmission(own)
    with (
        _member(OpenDoor(), new_identity(), ()) as other,
        _member(admission, own.identity, (*other.addresses,)) as node,
    ):
        with pytest.raises(LinkError, match=f"the authority at {own.addresses[0]} does not answer") as error:
            node.run(admission.renew(node.p2p))
        assert "\n" not in str(error.value)
        assert admission.withdrawn is None


def test_a_volunteer_whose_clock_is_wrong_is_told(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _running(house):
        own = read_pass(house / "alice")
        admission = TokenAdmission(own)
        with _member(admission, own.identity, own.addresses) as node:
            for wrong_seconds, why in ((400.0, "expired"), (-400.0, "in the future: one of the two clocks is wrong")):
                later = time.time() + wrong_seconds
                with monkeypatch.context() as patch:
                    patch.setattr(
                        "milkglass.collaboration.token_admission.time", SimpleNamespace(time=lambda now=later: now)
                    )
                    with pytest.raises(LinkError, match=why):
                        node.run(admission.renew(node.p2p))
                assert admission.token == b""


def test_a_pass_without_an_address_or_of_the_wrong_folder_says_what_was_expected(house: Path) -> None:
    with pytest.raises(
        CertificateError, match="no address; expected the folder as it is once collab-authority --listen"
    ):
        read_pass(house / "alice")
    with pytest.raises(CertificateError, match=f"expected one volunteer's folder, such as {house / 'alice'}"):
        read_pass(house)
    with pytest.raises(CertificateError, match=r"none: no authority\.json; expected identity\.key and authority\.json"):
        read_pass(house / "none")


def test_an_authority_is_served_once_and_its_address_goes_into_every_folder(house: Path) -> None:
    with _running(house) as authority:
        (address,) = authority.addresses
        with pytest.raises(RunError, match="another process serves this authority"), _running(house):
            pass
        allow(house, {"carol": None})  # while it runs
        for name in ("authority", "alice", "bob", "carol"):
            assert read_about(house / name / "authority.json").addresses == (address,)
        own = read_pass(house / "carol")
        assert (own.name, own.authority, own.addresses) == ("carol", authority.identity.peer_id, (address,))


# The command.


def _typed(*words: str) -> object:
    """The exit code; None for success."""
    with pytest.raises(SystemExit) as stop:
        main(["collab-authority", *words])
    return stop.value.code


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "nothing to do; expected --allow, --revoke or --listen"),
        (["--listen", "127.0.0.1:0"], "the port is '0'; expected a number from 1 to 65535"),
        (["--listen", "localhost:7000"], "expected an IP address and a port"),
        (["--listen", "127.0.0.1:7000", "--minutes", "0"], "--minutes 0: expected 1 to 60"),
        (["--listen", "127.0.0.1:7000", "--run", "a b"], "--run 'a b': expected"),
        (["--listen", "127.0.0.1:7000"], "no authority; expected a folder that collab-authority --allow NAME has made"),
        (["--allow", "alice,,bob"], "expected names with a comma between"),
        (["--allow", "alice,alice"], "--allow alice: named twice"),
        (["--revoke", "alice"], "no authority"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    words: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _typed(str(tmp_path / "house"), *words) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1
    assert not (tmp_path / "house").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_serves_until_it_is_stopped_and_a_second_one_changes_its_list(
    number: signal.Signals, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    house, port = tmp_path / "house", _free_port()
    command = [sys.executable, "-m", "milkglass", "collab-authority", str(house), "--allow", "alice,bob"]
    command += ["--listen", f"127.0.0.1:{port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert json.loads(process.stderr.readline())["event"] == "ready"
            with _volunteer(house / "alice") as (alice, admission):
                assert _typed(str(house), "--revoke", "alice") == 0
                time.sleep(1.1)  # no sooner is it asked again
                with pytest.raises(LinkError, match="revoked"):
                    alice.run(admission.renew(alice.p2p))
        finally:
            process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == code
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{open_authority(house).name}"
    assert [line.split(" ")[0] for line in out.splitlines()] == ["alice:", "bob:", address]
    *logged, last = err.splitlines()
    events = [(line["event"], line["name"]) for line in map(json.loads, logged)]
    assert events == [("admitted", "alice"), ("refused", "alice")]
    assert last.startswith("milkglass: stopped; nothing finished is lost")
    with pytest.raises(LinkError), _volunteer(house / "alice"):
        pass  # the daemon has gone with it
    assert capsys.readouterr().out.startswith("alice: revoked, ")


def test_what_a_revoked_one_has_said_before_is_believed_no_more(house: Path) -> None:
    with _running(house), _volunteer(house / "alice") as (alice, of_alice), _volunteer(house / "bob") as (bob, _):
        assert _store(alice, "of alice")
        assert _store(bob, "of bob")
        assert _read(alice)[bob.identity.peer_id] == "of bob"
        revoke(house, ["bob"])
        alice.run(of_alice.renew(alice.p2p))
        assert _read(alice) == {alice.identity.peer_id: "of alice", bob.identity.peer_id: None}
