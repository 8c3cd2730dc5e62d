"""`milkglass collab` as its user sees it: what it prints, how it leaves, what it goes on from, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from milkglass.cli import main
from milkglass.collaboration.progress import STALE_SECONDS
from tests.collaboration.processes import NOBODY, STOPPED, WAITING, Collaboration, Volunteer, refused
from tests.wire_server import until


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Collaboration]:
    with Collaboration(tmp_path / "run") as run:
        yield run


def told(volunteer: Volunteer) -> list[dict[str, Any]]:
    """The lines of its metrics.jsonl."""
    return [json.loads(line) for line in (volunteer.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--client-mode", "--auxiliary"], "--auxiliary averages for others"),
        (["--client-mode"], "--client-mode: nobody can come to this one; expected --peer"),
        (["--listen", "7000"], "--listen '7000': expected an IP address of this machine and a port"),
        (["--listen", "localhost:7000"], "--listen 'localhost:7000': expected an IP address"),
        (["--listen", "127.0.0.1:70000"], "--listen '127.0.0.1:70000': expected an IP address"),
        (["--listen", "192.0.2.7:7000"], "cannot listen on 192.0.2.7:7000: Cannot assign requested address; expected"),
        (["--peer", "192.0.2.7:7000"], "address '192.0.2.7:7000': expected one that `milkglass collab` prints"),
        (["--peer", f"/ip4/192.0.2.7/tcp/7000/p2p/{NOBODY}"], "--listen 127.0.0.1:0: others cannot reach a loopback"),
        (["--peer", "/ip4/192.0.2.7/tcp/7000"], "address '/ip4/192.0.2.7/tcp/7000': expected one that"),
        (
            ["--set", "parties.mode=data_parallel"],
            "recipe recipe.toml: parties.mode is data_parallel; expected collaboration",
        ),
        (["--set", "collaboration.target_batch=0"], "collaboration.target_batch"),
        (["--key", "missing.key"], "missing.key"),
        (["--admission", "missing"], "missing"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    run: Collaboration,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(run.folder)
    monkeypatch.syspath_prepend(run.folder)
    assert words in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--watch: whom to ask? expected --peer"),
        (["--peer", "/ip4/192.0.2.7/tcp/7000/p2p/me"], "address '/ip4/192.0.2.7/tcp/7000/p2p/me': expected"),
        (["--listen", "127.0.0.1:7000"], "--watch only looks on; expected it without --listen"),
        (["--client-mode"], "--watch only looks on; expected it without --client-mode"),
        (["--auxiliary"], "--watch only looks on; expected it without --auxiliary"),
        (["--checkpoints"], "--watch only looks on; expected it without --checkpoints"),
        (["--out", "run"], "--watch only looks on; expected it without --out"),
        (["--key", "some.key"], "--watch only looks on; expected it without --key"),
        (["--resume"], "--watch only looks on; expected it without --resume"),
    ],
)
def test_who_looks_on_is_told_what_does_not_go_with_it(
    run: Collaboration,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(run.folder)
    monkeypatch.syspath_prepend(run.folder)
    with pytest.raises(SystemExit) as exit_:
        main(["collab", "recipe.toml", "--watch", *arguments])
    assert exit_.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert words in line


def test_a_run_alone_ends_and_says_so(run: Collaboration) -> None:
    """A run of one's own needs no other; its folder holds a line for each epoch, the network and the summary."""
    run.pace(0)
    alone = run.start("alone", options=("--set", "collaboration.epochs=12"))
    summary = alone.finishes()
    assert re.fullmatch(
        r"alone: 12 epochs of run digits; accuracy 0\.\d{3}; 1,536 records [^\n]*", alone.command.said[-1]
    )
    assert [line["epoch"] for line in told(alone)] == list(range(1, 13))
    assert summary["samples"] == 12 * 128
    assert (summary["bytes_sent"], summary["state_downloads"], summary["failed_averagings"]) == (0, 0, 0)
    assert len(bytes.fromhex(summary["state"])) == 32
    assert (alone.folder / "network.safetensors").is_file()
    assert alone.command.processes() == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_who_is_stopped_leaves_in_order(run: Collaboration, number: signal.Signals, group: bool) -> None:
    """Its daemon ends before it, it says one line, and the other does not wait for it."""
    first = run.start("first")
    other = run.start("other", first.address())
    other.averages_with(1)
    daemon = other.command.daemon()
    assert os.getpgid(daemon) != other.command.pid  # a terminal's Ctrl-C does not reach it
    other.command.signal(number, group=group)
    signalled = time.monotonic()
    assert other.command.code() == 128 + number
    assert other.command.processes() == []
    assert all(line.startswith("milkglass: ") for line in other.command.complained)
    assert [line for line in other.command.complained if not line.startswith("milkglass: epoch ")] == [
        line for line in other.command.complained[-1:] if line.startswith(STOPPED)
    ]
    first.averages_with(0)
    assert time.monotonic() - signalled < STALE_SECONDS / 2  # it has said goodbye


@pytest.mark.slow
def test_who_is_stopped_while_it_connects_leaves_in_order(run: Collaboration) -> None:
    """It waits for somebody who takes the call and says nothing; and the same command can be given again."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        nobody = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{NOBODY}"
        waiting = run.start("waiting", nobody)
        waiting.command.until(lambda: len(waiting.command.processes()) == 2)
        waiting.command.signal(signal.SIGINT, group=True)
        assert waiting.command.code() == 130
        assert waiting.command.processes() == []
        (line,) = waiting.command.complained
        assert line.startswith(STOPPED)
    run.start("waiting").address()


@pytest.mark.slow
def test_who_is_killed_leaves_no_daemon(run: Collaboration) -> None:
    killed = run.start("killed")
    killed.address()
    assert len(killed.command.processes()) == 2
    killed.command.kill()
    until(lambda: not killed.command.processes(), 30)


@pytest.mark.slow
def test_a_volunteer_that_nobody_reaches_and_one_that_does_not_train(tmp_path: Path) -> None:
    """All end with one state; the look at the run shows what they are."""
    with Collaboration(tmp_path / "run", epochs=60, pace=WAITING) as run:
        first = run.start("first")
        address = first.address()
        behind = run.start("behind", address, options=("--client-mode",))
        helper = run.start("helper", address, options=("--auxiliary",))
        reached = helper.address()
        run.pace(0.05)
        for volunteer in (first, behind, helper):
            volunteer.averages_with(2)
        run.pace(WAITING)
        look = run.run("collab", "recipe.toml", "--watch", "--peer", reached)
        look.until(lambda: look.said and len(json.loads(look.said[-1])["peers"]) == 3)
        kinds = [(peer["reachable"], peer["trains"]) for peer in json.loads(look.said[-1])["peers"]]
        assert sorted(kinds) == [(False, True), (True, False), (True, True)]
        look.signal(signal.SIGINT)
        assert look.code() == 130
        run.pace(0)
        summaries = [volunteer.finishes() for volunteer in (first, behind, helper)]
    assert len({summary["state"] for summary in summaries}) == 1
    assert [summary["samples"] > 0 for summary in summaries] == [True, True, False]
    assert behind.command.said[:-1] == []  # no address
    assert behind.command.complained[0] == "milkglass: connected; nobody can join by this volunteer"
    assert all(line["samples"] == 0 for line in told(helper))


@pytest.mark.slow
def test_the_look_at_a_run_is_a_json_object_a_second(run: Collaboration) -> None:
    first = run.start("first")
    look = run.run("collab", "recipe.toml", "--watch", "--peer", first.address())
    look.until(lambda: len(look.said) > 4)
    look.signal(signal.SIGTERM)
    assert look.code() == 143
    assert look.processes() == []
    assert [line.startswith(STOPPED) for line in look.complained] == [True]
    looks = [json.loads(line) for line in look.said]
    there = [each for each in looks if each["peers"]]
    assert there
    for each in there:
        assert each.keys() == {"time", "run", "epoch", "epochs", "samples", "target", "rate", "loss", "peers"}
        assert (each["run"], each["epochs"], each["target"]) == ("digits", 1000, 128)
        assert 0 <= each["samples"] <= 128 + 16 * 20  # at most a second's work at 20 batches a second
        assert 0 < each["rate"] <= 16 * 20 * 1.5
        assert each["loss"] is None or 0 < each["loss"] < 5
        (peer,) = each["peers"]
        assert peer["share"] in (0, 1)
        assert (peer["epoch"], peer["reachable"], peer["trains"]) == (each["epoch"], True, True)
        assert first.address().endswith(peer["peer"])
    epochs = [each["epoch"] for each in there]
    assert epochs == sorted(epochs)
    assert epochs[-1] > epochs[0]
    assert abs(epochs[-1] - first.epoch()) <= 20
    assert not (run.folder / "runs").exists()  # who looks on writes nothing


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint(run: Collaboration) -> None:
    """The only volunteer is killed; resumed it makes each epoch that was not kept once more, and ends."""
    options = ("--checkpoints", "--set", "collaboration.epochs=60")
    killed = run.start("only", options=options)
    killed.reaches(10)
    killed.command.kill()
    kept = max(int(file.parent.name) for file in killed.folder.glob("checkpoint/*/progress.json"))
    assert kept >= 5
    before = told(killed)[:kept]
    again = run.start("only")
    assert again.command.code() == 2
    (line,) = again.command.complained
    assert "go on with --resume" in line
    run.pace(0)
    resumed = run.start("only", options=(*options, "--resume"))
    summary = resumed.finishes()
    assert resumed.command.complained[0].startswith(f"milkglass: epoch {kept + 1} of 60: ")
    assert [line["epoch"] for line in told(resumed)] == list(range(1, 61))
    assert told(resumed)[:kept] == before
    assert summary["samples"] == (60 - kept) * 128
    assert summary["accuracy"] > 0.8
    assert any("test_accuracy" in line for line in before)


@pytest.mark.slow
def test_a_run_outlives_its_first_volunteer(tmp_path: Path) -> None:
    """Who comes later joins by the address of any; a dead one among several does not matter."""
    with Collaboration(tmp_path / "run", epochs=60, pace=WAITING) as run:
        first = run.start("first")
        gone = first.address()
        second, third = run.start("second", gone), run.start("third", gone)
        known = second.address()
        third.address()
        run.pace(0.05)
        for volunteer in (second, third):
            volunteer.averages_with(2)
        first.command.kill()
        second.averages_with(1)
        run.pace(WAITING)
        late = run.start("late", gone, known)
        late.address()
        run.pace(0.05)
        late.averages_with(2)
        run.pace(0)
        summaries = [volunteer.finishes() for volunteer in (second, third, late)]
    assert len({summary["state"] for summary in summaries}) == 1
    assert summaries[2]["state_downloads"] >= 1
    assert summaries[0]["daemon_restarts"] == 0
