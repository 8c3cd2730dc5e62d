"""The commands between machines: how they are stopped, and what they say before anything is dialed."""

from __future__ import annotations

import gc
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from milkglass.certificates import load_credentials, make_certificates
from milkglass.cli import main
from milkglass.errors import DataError
from tests.helpers import KEY, small_recipe
from tests.wire_server import Holding, ServerThread, dial, question

STOPPED = (
    "milkglass: stopped; nothing finished is lost: run it again (train, serve, join, collab, federated-*: with "
    "--resume), and it goes on"
)
PLAIN = {"serve": ["--listen", "localhost:0"], "join": ["--server", "localhost:1", "--name", "hospital-a"], "train": []}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "r.toml").write_text(small_recipe(parties={"clients": ["hospital-a"]}).to_toml())
    return str(tmp_path / "r.toml")


def _typed(command: str, recipe: str, out: Path, *more: str) -> list[str]:
    plaintext = ["--plaintext"] if command != "train" else []
    return [command, recipe, *PLAIN[command], *plaintext, "--out", str(out), *more]


def _end(words: list[str]) -> object:
    """The exit code."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    return stop.value.code


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that nobody else gets, and at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def _stopped(words: list[str], event: str, number: signal.Signals) -> tuple[list[str], int]:
    """A command in a process of its own that gets a signal once it has logged that event: its other lines, its code."""
    command = [sys.executable, "-m", "milkglass", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert json.loads(process.stderr.readline())["event"] == event
        finally:
            process.send_signal(number)
        _, err = process.communicate(timeout=60)
    return [line for line in err.splitlines() if not line.startswith("{")], process.returncode


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_client_that_waits_is_stopped_in_one_line(
    number: signal.Signals, code: int, recipe: str, deaf_port: int, tmp_path: Path
) -> None:
    words = ["join", recipe, "--server", f"127.0.0.1:{deaf_port}", "--plaintext", "--name", "hospital-a"]
    assert _stopped([*words, "--out", str(tmp_path / "out")], "dialing again", number) == ([STOPPED], code)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_server_is_stopped_in_one_line_too(number: signal.Signals, code: int, recipe: str, tmp_path: Path) -> None:
    line = "milkglass: stopped; nothing is lost: run it again with --resume, and its clients go on"
    assert _stopped(_typed("serve", recipe, tmp_path / "out"), "ready", number) == ([line], code)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("command", "inner"), [("train", "split"), ("serve", "serve"), ("join", "join")])
def test_whatever_is_stopped_says_that_nothing_is_lost(
    command: str,
    inner: str,
    number: signal.Signals,
    code: int,
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(f"milkglass.training.{inner}.{command}", lambda *_, **__: signal.raise_signal(number))
    assert _end(_typed(command, recipe, tmp_path / "out")) == code
    assert capsys.readouterr().err == f"{STOPPED}\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_in_another_thread_runs_as_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[object] = []

    def run() -> None:
        try:
            main(["report", str(tmp_path / "none")])
        except SystemExit as stop:
            codes.append(stop.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [2]
    assert "none" in capsys.readouterr().err


def test_a_client_that_is_interrupted_while_it_reads_hangs_up_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_certificates(tmp_path / "pki", "localhost", ["hospital-a"])
    own = load_credentials(tmp_path / "pki" / "hospital-a", "client")
    with ServerThread(
        load_credentials(tmp_path / "pki" / "localhost", "server"), tmp_path / "srv", Holding()
    ) as server:
        transport = dial(server.port, own, tmp_path / "cli")
        transport.send(question("hospital-a", 0))
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        timer = threading.Timer(0.5, signal.pthread_kill, (main_thread, signal.SIGINT))

        def read() -> None:
            timer.start()  # no sooner: after a pause it is over at once
            transport.receive()

        with caplog.at_level(logging.DEBUG, "asyncio"), pytest.raises(KeyboardInterrupt):
            read()
        transport.close()
        timer.join()
        gc.collect()  # asyncio complains of a forgotten task when it is collected
        # gRPC's own poller tells every loop there ever was in this process of its events, closed ones too
        told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert [words for words in told if "PollerCompletionQueue" not in words] == []
        assert len(server.said("connected")) == 1  # it did not dial again


@pytest.mark.parametrize(("command", "option"), [("serve", "--key"), ("join", "--key"), ("join", "--shared-key")])
@pytest.mark.parametrize(("mode", "warned"), [(0o644, True), (0o600, False)])
def test_a_key_that_others_can_read_is_told_by_every_command(
    command: str,
    option: str,
    mode: int,
    warned: bool,
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def far_enough(*_: Any, **__: Any) -> None:
        raise DataError("far enough")

    monkeypatch.setattr(f"milkglass.training.{command}.{command}", far_enough)
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(mode)
    assert _end(_typed(command, recipe, tmp_path / "out", option, str(tmp_path / "key"))) == 2
    lines = capsys.readouterr().err.splitlines()
    warning = f"milkglass: warning: key {tmp_path / 'key'} can be read by others; chmod 600 {tmp_path / 'key'}"
    assert lines == [*([warning] if warned else []), "milkglass: far enough"]


def test_onward_needs_a_recipe_with_hops(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _end(_typed("serve", recipe, tmp_path / "out", "--onward", "localhost:7499")) == 2
    said = capsys.readouterr().err
    assert said.startswith("milkglass: --onward: the recipe has no hops; expected parties.hops")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
