"""What breaks around a volunteer: networks that are not there or not the right one, disks, pauses, daemons."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from milkglass.collaboration.progress import STALE_SECONDS
from tests.collaboration.processes import NOBODY, WAITING, Collaboration, refused
from tests.wire_server import until


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collaboration]:
    with Collaboration(tmp_path / "run") as run:
        monkeypatch.chdir(run.folder)
        monkeypatch.syspath_prepend(run.folder)
        yield run


@pytest.mark.usefixtures("run")
def test_nobody_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    """It can be tried again at once."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{NOBODY}"
    for _ in range(2):
        line = refused(capsys, "--peer", address)
        assert line.startswith(f"milkglass: nobody answers at {address}; expected an address that a running")


@pytest.mark.slow
@pytest.mark.usefixtures("run")
def test_another_program_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{NOBODY}"
        assert refused(capsys, "--peer", address).startswith(f"milkglass: nobody answers at {address}; ")


@pytest.mark.usefixtures("run")
def test_the_port_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where its owner would share it, as libp2p does."""
    for shared in (False, True):
        with socket.create_server(("127.0.0.1", 0), reuse_port=shared) as taken:
            port = taken.getsockname()[1]
            line = refused(capsys, "--listen", f"127.0.0.1:{port}")
            assert line == (
                f"milkglass: cannot listen on 127.0.0.1:{port}: Address already in use; expected an address of this "
                "machine and a free port"
            )


@pytest.mark.slow
def test_the_others_train_something_else(run: Collaboration, capsys: pytest.CaptureFixture[str]) -> None:
    """Another recipe, another run, another network than the address names, another volunteer's port."""
    first = run.start("first")
    address = first.address()
    name, port = address.rpartition("/")[2], address.split("/")[4]
    line = refused(capsys, "--peer", address, "--set", "training.learning_rate=0.01")
    assert line == (
        f"milkglass: the volunteer {name[-8:]} trains by another recipe: training.learning_rate is 0.01 here "
        "and 0.003 there"
    )
    line = refused(capsys, "--peer", address, "--set", "collaboration.run=letters")
    assert line == (f"milkglass: the volunteer {name[-8:]} trains run 'digits'; collaboration.run is 'letters' here")
    assert "Address already in use" in refused(capsys, "--listen", f"127.0.0.1:{port}")
    assert "nobody answers" in refused(capsys, "--peer", address.replace(name, NOBODY))
    assert first.command.complained[-1].startswith("milkglass: epoch ")


@pytest.mark.slow
def test_two_networks_that_do_not_know_each_other(run: Collaboration, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = run.start("one"), run.start("other")
    addresses = [one.address(), other.address()]
    line = refused(capsys, *(word for address in addresses for word in ("--peer", address)))
    names = sorted(address.rpartition("/")[2] for address in addresses)
    assert line.startswith(
        f"milkglass: {names[0][-8:]} and {names[1][-8:]} do not know each other: these are two collaborations"
    )
    third = run.start("third", addresses[0])
    refused(capsys, "--peer", third.address(), "--peer", addresses[1])
    third.averages_with(1)
    fourth = run.start("fourth", addresses[0], third.address())  # those two do
    fourth.averages_with(2)


@pytest.mark.slow
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """It is said once; the others lose nothing; and what cannot be written at the end is an error."""
    with Collaboration(tmp_path / "run", epochs=60, pace=WAITING) as run:
        first = run.start("first")
        full = run.start("full", first.address(), options=("--checkpoints",))
        full.address()
        run.pace(0.05)
        full.averages_with(1)
        until(lambda: list(full.folder.glob("checkpoint/*/progress.json")))
        full.fill_disk()
        full.command.until(lambda: any("cannot write" in line for line in full.command.complained))
        full.averages_with(1)
        full.averages_with(1)
        run.pace(0)
        first.finishes()
        assert full.command.code() == 2
    said = [line for line in full.command.complained if not line.startswith("milkglass: epoch ")]
    assert len(said) == 2
    assert said[0].startswith("milkglass: cannot write full/metrics.jsonl: File too large; ")
    assert said[0].endswith("; going on without checkpoints")
    assert said[1].startswith("milkglass: cannot write full/metrics.jsonl: File too large; ")
    assert said[1] == full.command.complained[-1]
    assert not list(full.folder.rglob("*.partial"))
    assert not (full.folder / "summary.json").exists()
    since = full.command.complained[full.command.complained.index(said[0]) + 1 : -1]
    assert any(line.startswith("milkglass: epoch 60 of 60: ") for line in since)
    shared = {line.rpartition(" records, ")[0] for line in since if " 2 volunteers, " in line}  # what is both's
    assert shared <= {line.rpartition(" records, ")[0] for line in first.command.complained}
    assert len([line for line in since if " 0 of them from here" not in line]) > len(since) / 2


@pytest.mark.slow
def test_a_volunteer_that_stands_still(tmp_path: Path) -> None:
    """It is forgotten, and the others go on; let go, it takes over their state and ends with the same."""
    with Collaboration(tmp_path / "run", epochs=80, pace=WAITING) as run:
        first = run.start("first")
        other, still = run.start("other", first.address()), run.start("still", first.address())
        for volunteer in (other, still):
            volunteer.address()
        run.pace(0.3)
        for volunteer in (first, other, still):
            volunteer.averages_with(2)
        still.command.signal(signal.SIGSTOP)
        paused = time.monotonic()
        stood, at = still.epoch(), first.epoch()
        first.averages_with(1)
        while time.monotonic() < paused + STALE_SECONDS + 5:
            first.averages_with(1)
            assert still.epoch() == stood
        went_on = first.epoch()
        assert went_on > at + 5
        still.command.signal(signal.SIGCONT)
        still.averages_with(2)
        assert still.epoch() > went_on
        run.pace(0)
        summaries = [volunteer.finishes() for volunteer in (first, other, still)]
    assert len({summary["state"] for summary in summaries}) == 1
    assert summaries[2]["state_downloads"] >= 1
    assert summaries[2]["daemon_restarts"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["the first's", "another's"])
def test_a_daemon_that_is_killed(tmp_path: Path, whose: str) -> None:
    """The volunteer starts another, comes back by the addresses that it remembers, and ends with the others' state."""
    with Collaboration(tmp_path / "run", epochs=60, pace=WAITING) as run:
        first = run.start("first")
        other = run.start("other", first.address())
        other.address()
        run.pace(0.05)
        for volunteer in (first, other):
            volunteer.averages_with(1)
        bereft = first if whose == "the first's" else other
        run.pace(WAITING)
        daemon = bereft.command.daemon()
        os.kill(daemon, signal.SIGKILL)
        bereft.command.until(lambda: len(bereft.addresses()) == 2)
        assert bereft.command.daemon() != daemon
        assert not Path(f"/proc/{daemon}").exists()  # no zombie either
        run.pace(0.05)
        for volunteer in (first, other):
            volunteer.averages_with(1)
        run.pace(0)
        summaries = {volunteer: volunteer.finishes() for volunteer in (first, other)}
    assert len({summary["state"] for summary in summaries.values()}) == 1
    assert [summaries[volunteer]["daemon_restarts"] for volunteer in (first, other)] == [
        int(volunteer is bereft) for volunteer in (first, other)
    ]
    assert len([line for line in bereft.command.complained if "starting another" in line]) == 1
