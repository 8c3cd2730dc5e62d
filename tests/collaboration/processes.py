"""Volunteers as processes of their own, `python -m milkglass collab`, that surely end with the test.

Each is marked in its environment, which what it starts inherits: so its daemons are found, and ended, by their ids,
even where the volunteer itself is gone. The network of a run is as slow as the file `pace` says.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self, final

import pytest

from milkglass.cli import main
from tests.background import in_background

SECONDS: Final = 90.0
"""A machine that has other work too is given so long for what takes seconds."""
WAITING: Final = 1.0
"""The pace of a run that should not get far while others start."""
NOBODY: Final = "12D3KooWMCMFxRKsSWiWsgrrfqkyDZh7DHbtasi67TN45ehfFm1y"
"""An id that no peer has."""
READY: Final = "others join with: --peer "
STOPPED: Final = "milkglass: stopped; "
_MARK: Final = "MILKGLASS_TEST_VOLUNTEER"
_RECIPE: Final = """
[data]
name = "digits"
[network]
name = "paced:network"
[parties]
mode = "collaboration"
[attacker]
auxiliary_share = 0
validation_share = 0
[training]
batch_size = 16
learning_rate = 0.003
[client]
checkpoint_seconds = 0.1
[collaboration]
run = "digits"
target_batch = 128
epochs = {epochs}
matchmaking_seconds = 1
timeout_seconds = 5
"""
_NETWORK: Final = '''
"""An MLP whose every batch of training takes as long as the file `pace` says, in seconds."""

import time
from pathlib import Path

from milkglass.networks import mlp


def wait(module, _):
    if module.training:
        time.sleep(float(Path("pace").read_text()))


def network(shape, classes):
    made = mlp(shape, classes)
    made.register_forward_pre_hook(wait)
    return made
'''


@final
class Command:
    """A `milkglass` that runs in a folder. Its lines are kept as they come: `said`, `complained`.

    Its process leads a group and a session of its own, as that of a terminal does: the test is not in it.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._mark = f"{_MARK}={secrets.token_hex(8)}"
        environment = os.environ | dict([self._mark.split("=")]) | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "milkglass", *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.said: list[str] = []
        self.complained: list[str] = []
        self._read = [_lines(self._process.stdout, self.said), _lines(self._process.stderr, self.complained)]

    @property
    def pid(self) -> int:
        """Of the command itself."""
        return self._process.pid

    def processes(self) -> list[int]:
        """All that live of it: itself and what it has started, wherever that has gone. Dead ones are none."""
        return [pid for pid in _all_pids() if self._mark.encode() in _environment(pid)]

    def daemon(self) -> int:
        """Its peer-to-peer daemon."""
        (pid,) = [pid for pid in self.processes() if pid != self.pid]
        return pid

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        """Send a signal; group: to all of its group, as a terminal does at Ctrl-C."""
        (os.killpg if group else os.kill)(self.pid, number)

    def kill(self) -> None:
        """`kill -9`; returns when it is dead."""
        self._process.kill()
        self._process.wait(SECONDS)

    def code(self) -> int:
        """What it exits with, once it does and all that it said is read."""
        code = self._process.wait(SECONDS)
        for read in self._read:
            read.result(SECONDS)
        return code

    def until(self, holds: Callable[[], object]) -> None:
        """Wait until it holds; a test fails where it never does, or the command ends before."""
        self._await(holds, time.monotonic() + SECONDS)

    def end(self) -> None:
        """Nothing of it outlives the test."""
        for pid in (self.pid, *self.processes()):
            _kill(pid)
        self._process.wait(SECONDS)
        deadline = time.monotonic() + SECONDS
        while left := self.processes():
            assert time.monotonic() < deadline, f"{left} do not die"
            for pid in left:  # what was started while the others were ended
                _kill(pid)
            time.sleep(0.05)
        self.code()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()

    def _await(self, holds: Callable[[], object], deadline: float) -> None:
        while not holds():
            ended = self._process.poll() is not None
            if ended:
                self.code()
                if holds():
                    return
            assert not ended, f"it has ended: {self.said[-3:]} {self.complained[-8:]}"
            assert time.monotonic() < deadline, f"it never came: {self.said[-3:]} {self.complained[-8:]}"
            time.sleep(0.02)


@final
class Volunteer:
    """A volunteer's process, and its run folder."""

    def __init__(self, folder: Path, name: str, arguments: list[str]) -> None:
        self.folder = folder / name
        self.command = Command(folder, "collab", "recipe.toml", "--out", name, *arguments)

    def addresses(self) -> list[str]:
        """All that it has told of, those of earlier daemons first."""
        return [line.removeprefix(READY) for line in self.command.said if line.startswith(READY)]

    def address(self) -> str:
        """By which others join, once they can."""
        self.command.until(lambda: self.addresses())
        return self.addresses()[-1]

    def epoch(self) -> int:
        """The last one that it has told of, of its own or taken over."""
        told = [line.split()[2].rstrip(":") for line in self.command.complained if line.startswith("milkglass: epoch ")]
        return max(map(int, told), default=0)

    def reaches(self, epoch: int) -> None:
        """Wait for it."""
        self.command.until(lambda: self.epoch() >= epoch)

    def averages_with(self, others: int) -> None:
        """Wait for an epoch with so many volunteers, after those that it has told of by now."""
        begun = len(self.command.complained)
        self.command.until(
            lambda: any(f" {others + 1} volunteers, " in line for line in self.command.complained[begun:])
        )

    def finishes(self) -> dict[str, Any]:
        """Its summary, once it is done; all that it complained are its own sentences."""
        assert self.command.code() == 0, self.command.complained[-8:]
        assert all(line.startswith("milkglass: ") for line in self.command.complained), self.command.complained
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary

    def fill_disk(self) -> None:
        """From now on it can write no file, as where a disk is full."""
        resource.prlimit(self.command.pid, resource.RLIMIT_FSIZE, (0, 0))


@final
class Collaboration:
    """A run in one folder: its recipe, its paced network, and its volunteers, who all end with the context."""

    def __init__(self, folder: Path, *, epochs: int = 1000, pace: float = 0.05) -> None:
        self.folder = folder
        self._commands: list[Command] = []
        folder.mkdir(exist_ok=True)
        (folder / "recipe.toml").write_text(_RECIPE.format(epochs=epochs))
        (folder / "paced.py").write_text(_NETWORK)
        self.pace(pace)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for command in self._commands:
            command.end()

    def pace(self, seconds: float) -> None:
        """From now on a batch takes so long, at all volunteers."""
        beside = self.folder / "pace.new"
        beside.write_text(str(seconds))
        beside.replace(self.folder / "pace")

    def start(self, name: str, *peers: str, options: tuple[str, ...] = ()) -> Volunteer:
        """Start a volunteer. peers: addresses of others."""
        named = [word for peer in peers for word in ("--peer", peer)]
        volunteer = Volunteer(self.folder, name, [*named, *options])
        self._commands.append(volunteer.command)
        return volunteer

    def run(self, *arguments: str) -> Command:
        """Start a command of another kind."""
        command = Command(self.folder, *arguments)
        self._commands.append(command)
        return command


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a volunteer in this process, and the working folder, refuses; it leaves nothing behind.

    It can be started again at once, with a better word.
    """
    before = _children()
    with pytest.raises(SystemExit) as exit_:
        main(["collab", "recipe.toml", "--out", "refused", *arguments])
    assert _children() <= before
    said = capsys.readouterr()
    assert exit_.value.code == 2
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("milkglass: ")
    assert "go on with --resume" not in line
    return line


def _children() -> set[int]:
    """Of this process, dead ones that nobody has waited for among them."""
    return {pid for pid in _all_pids() if _parent(pid) == os.getpid()}


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended meanwhile
        return 0


def _lines(stream: IO[str], lines: list[str]) -> Future[None]:
    def read() -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))

    return in_background(read)


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended meanwhile, or is another's
        return []


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
