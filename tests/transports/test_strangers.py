"""Whoever may not come in is told so, logged and counted; who is in goes on and does not notice."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from milkglass.certificates import Credentials, Issued, Role, issue, issue_authority
from milkglass.cli import main
from milkglass.codec import encode
from milkglass.errors import LinkError, MilkglassError
from milkglass.messages import Message
from milkglass.transports.agreement import Agreement
from milkglass.transports.grpc import METHOD, GrpcTransport
from tests import wire_server
from tests.wire_faults import FaultyNetwork
from tests.wire_server import AGREEMENT, Doubling, ServerThread, asks, bare_channel, dial, hello, talk, until

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
Own = Callable[[str], Credentials]
pytestmark = pytest.mark.usefixtures("unmoved")


def credentials(authority: Issued, role: Role, name: str, *, end: datetime = NOW + DAY) -> Credentials:
    """Those of a party, as TLS sees them: nothing is checked here."""
    issued = issue(authority, role, name, NOW - 3 * DAY, end)
    return Credentials(authority.certificate_pem, issued.certificate_pem, issued.key_pem, name)


@pytest.fixture(scope="module")
def another_ca() -> Issued:
    return issue_authority(NOW - 3 * DAY, NOW + DAY)


@pytest.fixture
def refused(server: ServerThread) -> Callable[..., dict[str, Any]]:
    """(why, words): that one refusal more was counted, and logged with these words; returns the line."""
    before = server.watch.refusals.copy()
    lines = len(server.lines)

    def check(why: str, *words: str, times: int = 1) -> dict[str, Any]:
        until(lambda: (server.watch.refusals - before)[why] >= times)
        others = {"handshake"}  # of an earlier test: these are counted when their time is over
        assert (server.watch.refusals - before).keys() - others == {why} - others
        new = [line for line in server.lines[lines:] if line["event"] == "refused" and line["why"] == why]
        assert all(word in new[-1]["reason"] for word in words), new[-1]
        assert all(len(str(value)) < 1200 for value in new[-1].values())
        return new[-1]

    return check


def turned_away(transport: GrpcTransport, *words: str, kind: type[MilkglassError] = LinkError) -> None:
    """Connecting raises one line that holds these words."""
    try:
        with pytest.raises(kind, match="^[^\n]*" + "[^\n]*".join(map(re.escape, words)) + "[^\n]*$"):
            transport.connect()
    finally:
        transport.close()


# By TLS.


@pytest.mark.parametrize("who", ["no certificate", "another CA", "expired", "another CA of the same name"])
def test_tls_lets_in_nobody_without_a_good_certificate(
    who: str, server: ServerThread, theirs: Credentials, kit: Path, another_ca: Issued, tmp_path: Path, refused: Any
) -> None:
    if who == "no certificate":
        _, code, _ = talk(server.port, Credentials(theirs.root, b"", b"", ""), [hello("hospital-b")])
        assert code == grpc.StatusCode.UNAVAILABLE
    else:
        shown = credentials(another_ca, "client", "hospital-b")
        if who == "expired":
            shown = credentials(authority_of(kit), "client", "hospital-b", end=NOW - DAY)
        elif who == "another CA of the same name":
            imitated = issue_authority(NOW - 3 * DAY, NOW + DAY)
            shown = credentials(imitated, "client", "hospital-b")
        transport = dial(server.port, replace(shown, root=theirs.root), tmp_path, patience_seconds=0.3)
        turned_away(transport, "could not be reached for 0.3 seconds", "does it trust this client?")
    line = refused("handshake", "no certificate")
    assert line["connections"] >= 1


def authority_of(kit: Path) -> Issued:
    """The CA of a kit, to sign what it would not."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = serialization.load_pem_private_key((kit / "ca" / "rootCA.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Issued(x509.load_pem_x509_certificate((kit / "ca" / "rootCA.pem").read_bytes()), key)


@pytest.mark.parametrize(
    ("who", "words"),
    [
        ("expired", "certificate has expired"),
        ("another CA", "CERTIFICATE_VERIFY_FAILED"),
        ("another host", "Hostname Verification Check failed"),
        ("a client that plays the server", "CERTIFICATE_VERIFY_FAILED"),
        ("plain text", "WRONG_VERSION_NUMBER"),
    ],
)
def test_a_client_does_not_talk_to_a_false_server(
    who: str, words: str, kit: Path, own: Own, another_ca: Issued, tmp_path: Path
) -> None:
    right = authority_of(kit)
    shown = {
        "expired": credentials(right, "server", "localhost", end=NOW - DAY),
        "another CA": credentials(another_ca, "server", "localhost"),
        "another host": credentials(right, "server", "elsewhere.example"),
        "a client that plays the server": credentials(right, "client", "localhost"),
        "plain text": None,
    }[who]
    with ServerThread(shown, tmp_path / "server", Doubling()) as false:
        began = time.monotonic()
        turned_away(dial(false.port, own("hospital-b"), tmp_path / "own"), "is not one that this client trusts", words)
        assert time.monotonic() - began < 15  # at once, and not after its patience of 20 seconds
        assert not false.watch.taken
        assert not false.said("connected")


def test_plain_text_gets_nothing_from_a_server_that_speaks_tls(
    server: ServerThread, tmp_path: Path, refused: Any
) -> None:
    transport = dial(server.port, None, tmp_path, party="hospital-b", patience_seconds=0.3)
    turned_away(transport, "could not be reached")
    refused("handshake", "no TLS")


@pytest.mark.parametrize("address", ["0.0.0.0:5000", "10.0.0.1:5000", "[::]:5000", "example.org:5000"])
def test_plain_text_is_refused_off_loopback(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(Path(__file__).parents[2] / "examples" / "digits.toml")
    out = ["--out", str(tmp_path / "out"), "--plaintext"]
    for command in (["serve", recipe, "--listen", address], ["join", recipe, "--server", address, "--name", "x"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, *out])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "only on loopback" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(LinkError, match="plain text is for loopback alone"):
        GrpcTransport(address, None, None, party="x", agreement=AGREEMENT, limits=None)  # type: ignore[arg-type]


# By name.


def test_an_unknown_name_is_refused_before_it_has_said_a_word(
    server: ServerThread, own: Own, tmp_path: Path, refused: Any
) -> None:
    answers, code, details = talk(server.port, own("stranger"), [])
    assert (answers, code) == ([], grpc.StatusCode.PERMISSION_DENIED)
    refused("unknown name", "'stranger' is not among the clients of this run")
    turned_away(dial(server.port, own("stranger"), tmp_path), details)
    refused("unknown name", "'stranger'", times=2)


def test_a_certificate_goes_with_its_own_name_alone(
    server: ServerThread, own: Own, tmp_path: Path, refused: Any
) -> None:
    words = "the certificate is of 'hospital-b', the greeting, 'hello', of 'hospital-a'"
    turned_away(dial(server.port, own("hospital-b"), tmp_path, party="hospital-a"), words)
    line = refused("false name", words)
    assert line["peer"].startswith("ipv")


def test_a_second_connection_under_a_name_waits_until_the_first_is_gone(
    server: ServerThread, own: Own, tmp_path: Path, refused: Any
) -> None:
    second = dial(server.port, own("hospital-a"), tmp_path / "a", patience_seconds=0.3)
    turned_away(second, "did not let this client in for 0.3 seconds: hospital-a is connected already")
    refused("there already", "hospital-a is connected already")


@pytest.mark.usefixtures("short_pauses")
def test_a_certificate_takes_over_after_missed_heartbeats(theirs: Credentials, own: Own, tmp_path: Path) -> None:
    with (
        ServerThread(theirs, tmp_path / "server", Doubling(), heartbeat_seconds=3.0) as server,
        FaultyNetwork(server.port) as network,
    ):
        lost = dial(network.port, own("hospital-b"), tmp_path / "own", heartbeat_seconds=100.0)
        asks(lost, "hospital-b", range(3))
        network.fall_silent()  # and neither end is told anything
        # its process died, and was started again
        again = dial(server.port, own("hospital-b"), tmp_path / "own", patience_seconds=60.0)
        asks(again, "hospital-b", range(6))
        assert len(server.said("refused", why="there already")) >= 1
        events = [line["event"] for line in server.lines if line["event"] != "refused"]
        assert events == ["connected", "disconnected", "connected"]
        assert server.watch.taken["hospital-b"] == 6
        again.close()
        lost.close()


# By what they say.


@pytest.mark.parametrize(
    ("agreement", "words"),
    [
        (
            replace(AGREEMENT, recipe={"seed": 0, "training": {"batch_size": 32}}),
            "recipe: training.batch_size is 64 here and 32 there",
        ),
        (replace(AGREEMENT, recipe={"seed": 0}), "recipe: training is {'batch_size': 64} here and None there"),
        (replace(AGREEMENT, recipe={**AGREEMENT.recipe, "more": 1}), "recipe: more is None here and 1 there"),
        (replace(AGREEMENT, version="9.9"), "version is '0.1.0' here and '9.9' there"),
        (replace(AGREEMENT, frame_version=99), "frame version is 2 here and 99 there"),
        (replace(AGREEMENT, cut_shape=(3, 1)), "cut shape is [3] here and [3, 1] there"),
    ],
)
def test_the_handshake_names_what_differs_with_both_values(
    agreement: Agreement, words: str, server: ServerThread, own: Own, tmp_path: Path, refused: Any
) -> None:
    words = words.replace("'0.1.0'", repr(AGREEMENT.version))
    turned_away(dial(server.port, own("hospital-b"), tmp_path, agreement=agreement), "refuses this client", words)
    refused("another recipe", words, "here: server; there: hospital-b")


def test_a_client_checks_the_server_as_well(
    theirs: Credentials, own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(wire_server, "AGREEMENT", replace(AGREEMENT, recipe={"seed": 1}))
        false = ServerThread(theirs, tmp_path / "server", Doubling())
        with false:
            ours, answer = AGREEMENT, Agreement.difference
            patched.setattr(Agreement, "difference", lambda self, told: (self is ours and answer(self, told)) or None)
            transport = dial(false.port, own("hospital-b"), tmp_path / "own", agreement=ours)
            turned_away(transport, "does not agree with this client: recipe: seed is 0 here and 1 there")


def test_another_runs_number_is_refused(server: ServerThread, own: Own, tmp_path: Path, refused: Any) -> None:
    turned_away(dial(server.port, own("hospital-b"), tmp_path, run=77), "it began another run")
    refused("another run", "it began another run than the one that is served here")


def _told(text: bytes, kind: str = "hello") -> bytes:
    words = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return encode(Message(kind, "hospital-b", 0, {"told": words}))  # type: ignore[arg-type]


_DEEP = 20_000


@pytest.mark.parametrize(
    ("frame", "why", "words"),
    [
        (b"", "message", "truncated"),
        (b"GET / HTTP/1.1\r\n\r\n" * 9, "message", "not a milkglass frame"),
        (hello("hospital-b")[:-1], "message", "truncated, or two frames in one"),
        (hello("hospital-b")[:-1] + b"!", "message", "its checksum does not fit"),
        (_told(b"{]"), "message", "expected a JSON object"),
        (_told(b"\xff\xfe"), "message", "expected a JSON object"),
        (_told(b"[1, 2]"), "message", "expected a JSON object"),
        (_told(b"[" * _DEEP), "message", "expected a JSON object"),
        (_told(b"{}"), "another recipe", "there"),
        (_told(b'{"version": ' + b"9" * 4000 + b"}"), "another recipe", "..."),
        (_told(b'{"version":' + b"[" * 400 + b"]" * 400 + b"}"), "another recipe", "..."),
        (_told(b"{}", "welcome"), "false name", ""),
        (encode(Message("hello", "hospital-b", 0)), "message", "lacks told"),
        (encode(Message("hello", "hospital-b", 0, {"told": torch.zeros(9)})), "message", "told is float32"),
        (encode(Message("activations", "hospital-b", 0, {"x": torch.zeros(9)})), "message", "kind 'activations'"),
        (_told(b" " * ((1 << 20) + 1)), "message", "told is uint8 1048577"),
    ],
)
def test_a_greeting_that_is_none_is_refused(
    frame: bytes, why: str, words: str, server: ServerThread, own: Own, refused: Any
) -> None:
    answers, code, details = talk(server.port, own("hospital-b"), [frame])
    assert answers == []
    assert code in (
        *(grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION),
        grpc.StatusCode.PERMISSION_DENIED,
    )
    assert refused(why, words)["reason"] == details


@pytest.mark.parametrize("width", [1, 50_000])
def test_a_greeting_with_a_recipe_of_a_strangers_making_costs_little(
    width: int, server: ServerThread, own: Own
) -> None:
    told = {str(key): 1 for key in range(width)}
    deep: Any = told
    for _ in range(300):
        deep = {"a" * 1000: deep}
    for recipe in ({**AGREEMENT.recipe, "a" * 400_000: told}, {**AGREEMENT.recipe, "training": deep}):
        before = server.watch.refusals["another recipe"]
        frame = hello("hospital-b", replace(AGREEMENT, recipe=recipe))
        _, code, details = talk(server.port, own("hospital-b"), [frame])
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert len(details) < 400
        assert server.watch.refusals["another recipe"] == before + 1


def test_a_greeting_that_never_comes_is_not_awaited_for_ever(server: ServerThread, own: Own, refused: Any) -> None:
    over = threading.Event()

    def nothing() -> Iterator[bytes]:  # and no end of the stream either
        over.wait(60)
        yield from ()

    _, code, details = talk(server.port, own("hospital-b"), nothing(), after=over.set)
    assert (code, details) == (grpc.StatusCode.DEADLINE_EXCEEDED, "no greeting came for 4 seconds")
    refused("silent", details)


def test_who_hangs_up_before_greeting_leaves_the_name_free(
    server: ServerThread, own: Own, tmp_path: Path, refused: Any
) -> None:
    talk(server.port, own("hospital-b"), [])
    refused("no greeting", "it hung up before a greeting")
    for _ in range(5):  # gone at any moment of the handshake
        with bare_channel(server.port, own("hospital-b")) as channel:
            call = channel.stream_stream(METHOD)(iter([hello("hospital-b")]))
            call.cancel()
    transport = dial(server.port, own("hospital-b"), tmp_path)
    transport.connect()
    transport.close()
    until(lambda: server.watch.there == 1)
