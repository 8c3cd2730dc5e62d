"""Volunteers of an open collaboration, each a process of its own, for benchmarks: start, watch, end by process id.

    with volunteers(folder) as crowd:
        first = crowd.start("a", ["-m", "milkglass", "collab", ...])
        crowd.start("b", [..., "--peer", first.address()])

What a volunteer says goes to <name>.log beside its run folder <name>. At the end of the block whoever still runs is
killed, and the daemon that it started is waited for, which ends by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, final

START_SECONDS: Final = 120.0
_LOOK_SECONDS: Final = 0.05
_DAEMON_SECONDS: Final = 10.0
_INVITATION: Final = "others join with: --peer "


@final
class Process:
    """A volunteer. folder: its run folder; log: what it says."""

    def __init__(self, name: str, folder: Path, command: Sequence[str], environment: dict[str, str]) -> None:
        self.name, self.folder, self.log = name, folder, folder.with_name(f"{name}.log")
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.daemons: set[int] = set()

    @property
    def pid(self) -> int:
        """Of its process, which leads a session and a group of its own."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Of its metrics.jsonl so far."""
        return read_lines(self.folder / "metrics.jsonl")

    @property
    def epoch(self) -> int:
        """The last one that it stepped to; 0 before."""
        lines = self.lines
        return int(lines[-1]["epoch"]) if lines else 0

    def summary(self) -> dict[str, Any] | None:
        """None where it did not come to the end."""
        path = self.folder / "summary.json"
        return dict(json.loads(path.read_text())) if path.exists() else None

    def said(self, words: str) -> list[str]:
        """Lines of its log with these words."""
        return [line for line in self.log.read_text().splitlines() if words in line]

    def address(self) -> str:
        """By which others join it. Raises RuntimeError where it ends before, or says nothing for two minutes."""
        wait_for(lambda: bool(self.said(_INVITATION)), [self], START_SECONDS, f"{self.name} says no address")
        self._find_daemons()
        return self.said(_INVITATION)[0].split()[-1]

    def signal(self, number: int) -> None:
        """SIGKILL, SIGINT, ..., to it alone."""
        self._find_daemons()
        os.kill(self._process.pid, number)

    def wait(self, seconds: float) -> int:
        """Its return code. Raises subprocess.TimeoutExpired."""
        return self._process.wait(seconds)

    def end(self) -> None:
        """Kill it, if it runs."""
        if self._process.poll() is None:
            self._find_daemons()
            self._process.kill()
        self._process.wait()

    def left_daemons(self) -> list[int]:
        """Process ids of those that it started and that live on, ten seconds after its end."""
        deadline = time.monotonic() + _DAEMON_SECONDS
        while (left := [pid for pid in self.daemons if _runs(pid)]) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        return left

    def _find_daemons(self) -> None:
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        with contextlib.suppress(OSError):
            for task in path.parent.parent.iterdir():
                self.daemons |= {int(word) for word in (task / "children").read_text().split()}


@final
class Crowd:
    """Those that were started in a folder. Made by `volunteers`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.all: list[Process] = []

    def start(self, name: str, words: Sequence[str], namespace: str | None = None) -> Process:
        """Python with these words, one thread, in a network namespace or none; its run folder is <folder>/<name>."""
        inside = [] if namespace is None else ["ip", "netns", "exec", namespace]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = Process(name, self._folder / name, [*inside, sys.executable, *words], environment)
        self.all.append(process)
        return process

    def collab(self, name: str, recipe: Path, words: Sequence[str] = ()) -> Process:
        """`milkglass collab`, as users run it."""
        return self.start(name, ["-m", "milkglass", "collab", str(recipe), "--out", str(self._folder / name), *words])


@contextlib.contextmanager
def volunteers(folder: Path) -> Iterator[Crowd]:
    """Inside, volunteers can be started; afterwards none of them runs, nor a daemon of theirs. Also on SIGTERM."""
    folder.mkdir(parents=True, exist_ok=True)
    crowd = Crowd(folder)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield crowd
    finally:
        signal.signal(signal.SIGTERM, before)
        for each in crowd.all:
            each.end()
        for each in crowd.all:
            for pid in each.left_daemons():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def wait_for(condition: Callable[[], bool], watched: Sequence[Process], seconds: float, words: str) -> None:
    """Until it holds. Raises RuntimeError where one of `watched` ends before, or where it takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        ended = [each for each in watched if each.returncode is not None]
        if ended and not condition():
            tail = " / ".join(ended[0].log.read_text().splitlines()[-3:])
            raise RuntimeError(f"{words}: {ended[0].name} has ended with {ended[0].returncode}: {tail}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{words}: not in {seconds:g} seconds")
        time.sleep(_LOOK_SECONDS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Of a file of JSON lines; none where it is not there, and without one that is just being written."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            lines.append(dict(json.loads(line)))
    return lines


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
