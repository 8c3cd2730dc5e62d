"""Addresses are checked before anything dials: a wrong one is a line at once, not minutes of trying."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from milkglass.cli import main
from milkglass.errors import LinkError
from milkglass.transports.address import checked_address, every_address

DIGITS = str(Path(__file__).parents[2] / "examples" / "digits.toml")
FORM = "expected HOST:PORT"
PORT = "expected a number from 1 to 65535"
WRONG = [
    *[(text, FORM) for text in ("localhost", "", ":7499", "http://localhost:7499", "dns:localhost:7499", "a b:7499")],
    *[(text, FORM) for text in ("::1:7499", "[::1]", "[localhost]:7499", "[]:7499", "localhost\n:7499", "unix:/a/b:7")],
    *[
        (f"localhost:{port}", PORT)
        for port in ("0", "65536", "99999", "abc", "-1", "+1", "1_0", "", "7499/", "٣", "1\n")
    ],
]


@pytest.mark.parametrize("text", ["localhost:7499", "10.0.0.1:1", "my_host.example.org:65535", "[::1]:7499", "[::]:80"])
def test_an_address_comes_back_as_it_is(text: str) -> None:
    assert checked_address(text, "--server") == checked_address(text, "--listen", free_port=True) == text


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_what_is_no_address_is_refused(text: str, words: str) -> None:
    with pytest.raises(LinkError) as caught:
        checked_address(text, "--server")
    assert str(caught.value).startswith("--server ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_port_0_is_for_those_who_listen() -> None:
    assert checked_address("localhost:0", "--listen", free_port=True) == "localhost:0"
    with pytest.raises(LinkError, match="expected a number from 0 to 65535"):
        checked_address("localhost:65536", "--listen", free_port=True)


@pytest.fixture
def two_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is [::1] and 127.0.0.1, as localhost is on most machines."""
    found = [(socket.AF_INET6, "::1", (0, 0)), (socket.AF_INET, "127.0.0.1", ())]

    def resolved(_: str, port: int, **__: object) -> list[tuple[object, ...]]:
        return [(family, socket.SOCK_STREAM, 6, "", (host, port, *rest)) for family, host, rest in found]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)


@pytest.mark.usefixtures("two_addresses")
def test_whoever_listens_does_so_at_every_address_or_at_none() -> None:
    places = every_address("localhost:0")
    port = places[-1].rpartition(":")[2]
    assert places in ([f"[::1]:{port}", f"127.0.0.1:{port}"], [f"127.0.0.1:{port}"])  # without IPv6
    assert every_address(f"localhost:{port}") == places
    with socket.create_server(("127.0.0.1", int(port))):
        with pytest.raises(LinkError, match=f"cannot listen at localhost:{port}: it is in use"):
            every_address(f"localhost:{port}")
        assert every_address("localhost:0")


def test_a_free_port_is_free_at_every_address(two_addresses: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    """The second address is taken twice at the port that was free at the first: another one is taken."""
    taken: list[object] = []

    class Probe(socket.socket):
        def bind(self, address: tuple[object, ...]) -> None:  # type: ignore[override]
            if len(address) == 2 and len(taken) < 2:
                taken.append(address[1])
                raise OSError(errno.EADDRINUSE, "in use")
            super().bind(address)

    monkeypatch.setattr(socket, "socket", Probe)
    places = every_address("localhost:0")
    assert len(taken) == 2
    assert len({place.rpartition(":")[2] for place in places}) == 1


def test_no_address_of_this_machine() -> None:
    with pytest.raises(
        LinkError, match=r"cannot listen at 192\.0\.2\.1:0: it is in use, or no address of this machine"
    ):
        every_address("192.0.2.1:0")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["serve", DIGITS, "--plaintext", "--listen", "localhost"], "--listen 'localhost': "),
        (
            ["serve", DIGITS, "--plaintext", "--listen", "localhost:0", "--onward", "localhost:0"],
            "--onward 'localhost:0': ",
        ),
        (["join", DIGITS, "--name", "x", "--server", "localhost:99999"], "--server 'localhost:99999': "),
        (["predict", "none", "none.npy", "--plaintext", "--server", "localhost:abc"], "--server 'localhost:abc': "),
    ],
)
def test_every_command_checks_its_addresses(
    words: list[str], option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith(f"milkglass: {option}")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
