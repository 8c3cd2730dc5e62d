"""Trainings of `milkglass compare` that take several processes: ranks under torchrun, volunteers of a collaboration.

All are on this machine and talk over its loopback; they are ended by their own ids, whatever happens.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from milkglass.errors import MilkglassError, foreign_line
from milkglass.recipe import Recipe
from milkglass.runs import RunFolder, write_beside
from milkglass.training.shares import deal_records
from milkglass.training.split import digest_of

READY: Final = "others join with: --peer "
_READY_SECONDS: Final = 120.0
_GRACE_SECONDS: Final = 10.0


def finished(recipe: Recipe, run: Path) -> dict[str, Any] | None:
    """The summary of a run of that recipe that is there already; None where it must be made, or finished.

    Raises RunError where the folder belongs to another recipe, or to other records.
    """
    if not (run / "summary.json").is_file():
        return None
    return RunFolder.resume(run, recipe, digest_of(deal_records(recipe))).read_json("summary.json")


def volunteers(count: int) -> list[str]:
    """The names of their folders."""
    return [f"volunteer-{number}" for number in range(1, count + 1)]


def run_ranks(recipe: Recipe, out: Path, ranks: int) -> dict[str, Any]:
    """Train a data-parallel recipe with so many ranks, under torchrun, into `out`; what summary.json holds.

    An earlier run there goes on. Raises MilkglassError with a rank's own last line where the training fails.
    """
    with tempfile.TemporaryDirectory(prefix="milkglass-ranks-") as folder:
        file = Path(folder) / "recipe.toml"
        write_beside(file, recipe.to_toml().encode())
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "milkglass"]
        with _running([*torchrun, "train", str(file), "--out", str(out), "--resume"], Path(folder) / "log") as process:
            process.wait()
            if process.returncode or not (out / "summary.json").is_file():
                raise MilkglassError(f"{ranks} ranks: {_last_words(Path(folder) / 'log')}")
    summary: dict[str, Any] = json.loads((out / "summary.json").read_bytes())
    return summary


def run_volunteers(recipe: Recipe, out: Path, count: int) -> list[dict[str, Any]]:
    """Train a collaboration's recipe with so many volunteers, each into a folder of its own in `out`; their summaries.

    The first is there before the others, so its first steps may be made alone. Raises MilkglassError, as `run_ranks`.
    """
    folders = [out / name for name in volunteers(count)]
    with tempfile.TemporaryDirectory(prefix="milkglass-volunteers-") as folder, ExitStack() as all_of_them:
        file = Path(folder) / "recipe.toml"
        write_beside(file, recipe.to_toml().encode())
        processes: list[subprocess.Popen[bytes]] = []
        peer: list[str] = []
        for number, run in enumerate(folders):
            arguments = ["milkglass", "collab", str(file), "--listen", "127.0.0.1:0", "--out", str(run), *peer]
            log = Path(folder) / f"log-{number}"
            processes.append(all_of_them.enter_context(_running([*arguments, "--resume"], log)))
            if not number:
                peer = ["--peer", _address(processes[0], log)]
        for number, process in enumerate(processes):
            process.wait()
            if process.returncode:
                raise MilkglassError(f"volunteer {number + 1}: {_last_words(Path(folder) / f'log-{number}')}")
    return [json.loads((run / "summary.json").read_bytes()) for run in folders]


@contextmanager
def _running(arguments: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m` with these arguments, its words in the log; surely over afterwards, with all that it has started."""
    with log.open("wb") as words:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=words, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(_GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where the first volunteer is reached, as it says."""
    until = time.monotonic() + _READY_SECONDS
    while time.monotonic() < until:
        for line in log.read_text("utf-8", errors="replace").splitlines():
            if line.startswith(READY):
                return line.removeprefix(READY).strip()
        if process.poll() is not None:
            raise MilkglassError(f"volunteer 1: {_last_words(log)}")
        select.select([], [], [], 0.1)
    raise MilkglassError(f"volunteer 1: not ready after {_READY_SECONDS:.0f} s: {_last_words(log)}")


def _last_words(log: Path) -> str:
    """The last line that milkglass itself said, else the last one."""
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("milkglass: ")]
    return foreign_line((own or lines or ["it ended without a word"])[-1].removeprefix("milkglass: "), 1000)
