"""What volunteers learn of each other before they take part, and who looks on; strangers may say anything."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from milkglass.collaboration.admission import OpenDoor
from milkglass.collaboration.authority import serve
from milkglass.collaboration.authority_folder import allow, open_authority
from milkglass.collaboration.identity import new_identity
from milkglass.collaboration.node import Node, check_reachable
from milkglass.collaboration.service import Greeter, Greeting, read_greeting
from milkglass.collaboration.session import Agreed, Place, check_others, connected
from milkglass.collaboration.signed_records import SignedRecords
from milkglass.collaboration.token_admission import TokenAdmission, read_pass
from milkglass.collaboration.watch import watch
from milkglass.errors import LinkError, MessageError, MilkglassError, RecipeError, first_line, foreign_line
from tests.background import in_background
from tests.collaboration.in_process import DIGEST, forgiving_hivemind, recipe_of, replica_of, reporting
from tests.wire_server import until

AGREED = Agreed(recipe_of(), "data", DIGEST)
HERE = new_identity().peer_id
COLOURED = "\x1b[31mred\x1b[0m\nmilkglass: all is well\r\u202e\u2028"
Refusal = Callable[[Greeting, bytes | None], MilkglassError | None]


def said(**others: Any) -> Greeting:
    """The greeting of a volunteer that agrees with AGREED, but for some fields."""
    recipe = AGREED.recipe
    fields: dict[str, Any] = {
        "run": recipe.collaboration.run,
        "agreed": recipe.agreed(),
        "digest": recipe.digest(),
        "data": AGREED.data,
        "epoch": 3,
        "peers": [],
        "authority": None,
    }
    return Greeting(**(fields | others))


def test_a_greeting_comes_back_from_its_bytes() -> None:
    for greeting in (said(), said(authority=HERE.hex(), peers=["a", "b"])):
        assert read_greeting(greeting.to_bytes()) == greeting


@pytest.mark.parametrize(
    "wrong",
    [
        {"peers": 5},
        {"peers": [5]},
        {"peers": {"a": "b"}},
        {"peers": None},
        {"run": None},
        {"digest": 1},
        {"data": ["data"]},
        {"agreed": []},
        {"agreed": "recipe"},
        {"epoch": True},
        {"epoch": 1.0},
        {"authority": 5},
        {"more": 1},
    ],
)
def test_a_greeting_of_other_types_is_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(MessageError):
        read_greeting(json.dumps(asdict(said()) | wrong).encode())


@pytest.mark.parametrize("content", [b"", b"\xff", b"5", b"[]", b"{}", b"null", b'{"run": "test"}', b"[" * 100_000])
def test_what_is_no_greeting_is_none(content: bytes) -> None:
    with pytest.raises(MessageError):
        read_greeting(content)


def test_a_stranger_s_words_are_one_line_of_printable_characters() -> None:
    assert foreign_line(COLOURED) == " [31mred [0m milkglass: all is well   "
    assert foreign_line("Grüße, 世界") == "Grüße, 世界"
    assert foreign_line("x" * 301) == "x" * 300
    assert foreign_line("abc", 2) == "ab"
    assert first_line(OSError("\x1b[2Jgone\nmore")) == " [2Jgone"


@pytest.fixture(scope="module")
def refusal() -> Iterator[Refusal]:
    """Why a volunteer that some authority, or none, admits does not go to one who greets so; None where it does."""
    now = said()
    one_s, other_s = new_identity(), new_identity()
    with (
        forgiving_hivemind([]),
        Node(other_s, SignedRecords(other_s, OpenDoor())) as other,
        Node(one_s, SignedRecords(one_s, OpenDoor()), peers=other.addresses, reachable=False) as one,
    ):
        other.run(Greeter(lambda: now).add_p2p_handlers(other.p2p))

        def ask(greeting: Greeting, authority: bytes | None) -> MilkglassError | None:
            nonlocal now
            now = greeting
            try:
                one.run(check_others(one.p2p, other.addresses, AGREED, authority))
            except MilkglassError as error:
                return error
            return None

        yield ask


def test_those_who_agree_are_joined(refusal: Refusal) -> None:
    assert refusal(said(), None) is None
    assert refusal(said(authority=HERE.hex()), HERE) is None


def test_another_authority_is_told(refusal: Refusal) -> None:
    admits = said(authority=HERE.hex())
    without, another, open_door = refusal(admits, None), refusal(admits, new_identity().peer_id), refusal(said(), HERE)
    for error, words in (
        (without, "this run admits by an authority; expected --admission, the folder that it gave out"),
        (another, "admits by another authority than that of --admission"),
        (open_door, "admits everybody, without an authority"),
    ):
        assert isinstance(error, LinkError)
        assert words in str(error)


@pytest.mark.parametrize(
    ("greeting", "kind"),
    [
        (said(run=COLOURED), RecipeError),
        (said(data=COLOURED), RecipeError),
        (said(digest="another"), RecipeError),
        (said(digest=COLOURED, agreed=AGREED.recipe.agreed() | {"network": {"name": COLOURED}}), RecipeError),
        (said(digest=COLOURED, agreed={COLOURED: COLOURED}), RecipeError),
        (said(authority=COLOURED), LinkError),
        (said(peers=5), LinkError),
        (said(peers=[5]), LinkError),
        (said(run=None), LinkError),
        (said(agreed=7), LinkError),
    ],
)
def test_whatever_a_stranger_says_the_refusal_is_one_printable_line(
    refusal: Refusal, greeting: Greeting, kind: type[MilkglassError]
) -> None:
    error = refusal(greeting, None)
    assert type(error) is kind
    assert str(error).isprintable()
    assert len(str(error)) < 500


def test_a_clock_that_is_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    one_s, other_s = new_identity(), new_identity()
    with forgiving_hivemind([]), Node(other_s, SignedRecords(other_s, OpenDoor())) as other:
        addresses = other.addresses
        monkeypatch.setattr("hivemind.dht.protocol.MAX_DHT_TIME_DISCREPANCY_SECONDS", -1000.0)  # as if it were far off
        with (
            pytest.raises(LinkError, match=r"^local time must be within .*; are the clocks right\?$"),
            Node(one_s, SignedRecords(one_s, OpenDoor()), peers=addresses, reachable=False),
        ):
            pass


@pytest.mark.parametrize(
    ("host", "peer", "is_good"),
    [
        ("127.0.0.1", "/ip4/192.0.2.7/tcp/7000/p2p/a", False),
        ("127.0.0.1", "/dns4/example.org/tcp/7000/p2p/a", False),
        ("::1", "/ip6/2001:db8::7/tcp/7000/p2p/a", False),
        ("127.0.0.1", "/ip4/127.0.0.1/tcp/7000/p2p/a", True),
        ("127.0.0.1", "/dns4/localhost/tcp/7000/p2p/a", True),
        ("::1", "/ip6/::1/tcp/7000/p2p/a", True),
        ("0.0.0.0", "/ip4/192.0.2.7/tcp/7000/p2p/a", True),
        ("192.0.2.8", "/ip4/192.0.2.7/tcp/7000/p2p/a", True),
    ],
)
def test_who_goes_to_other_machines_listens_to_them(host: str, peer: str, is_good: bool) -> None:
    check_reachable((host, 0), ())
    if is_good:
        check_reachable((host, 0), (peer,))
        return
    with pytest.raises(LinkError, match=r"expected --listen 0\.0\.0\.0:PORT, or --client-mode"):
        check_reachable((host, 0), ("/ip4/127.0.0.1/tcp/7000/p2p/b", peer))


def test_a_volunteer_is_watched_by_its_own_folder_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And who has no folder, or another authority's, is told at that volunteer's address."""
    monkeypatch.setattr("milkglass.collaboration.watch._GONE_SECONDS", 0.5)
    house = tmp_path / "house"
    allow(house, {"alice": None})
    lines: list[str] = []

    def looks() -> list[dict[str, Any]]:
        lines.extend(capsys.readouterr().out.splitlines())
        return [json.loads(line) for line in lines]

    with forgiving_hivemind([]), serve(house, ("127.0.0.1", 0), pause_seconds=0.0):
        own = read_pass(house / "alice")
        assert own.authority == open_authority(house).peer_id
        admission, replica = TokenAdmission(own, "test"), replica_of(4)
        watching = in_background(lambda: watch(AGREED.recipe, (), house / "alice"))
        until(looks)
        time.sleep(1.0)  # longer than it stays where somebody was there
        assert not watching.done()
        report, place = reporting(replica), Place(own.addresses)
        with connected(AGREED, own.identity, admission, replica, place, report, admission.renew) as session:
            session.board.is_newcomer = False
            until(lambda: looks()[-1]["peers"])
            assert [peer["peer"] for peer in looks()[-1]["peers"]] == [own.identity.name]
            stranger = Place(tuple(session.node.addresses), reachable=False)
            with (
                pytest.raises(LinkError, match=r"^this run admits by an authority; expected --admission"),
                connected(AGREED, new_identity(), OpenDoor(), replica_of(4), stranger, report),
            ):
                pass
            assert not watching.done()
        watching.result(20)
    assert looks()[-1]["peers"] == []
