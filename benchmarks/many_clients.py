"""Many clients at once against one server (splitfed1), over loopback with mutual TLS: its memory, and lost steps.

    python -m benchmarks.many_clients [--clients 32] [--seconds 600] [--out FILE.json]

The parties are what users run: `serve` and `join`, each in a process of its own, with journals and checkpoints. After
the given time all clients stop between two batches, and then the server with its state kept. Wanted: no growth of the
server's memory after the first third; each client has seen as many steps as its stage at the server has taken, by the
server's optimizer, and as many messages were taken as that needs.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import secrets
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, final

from benchmarks.setting import command_line, machine_line, write_result
from benchmarks.two_parties import Case, records_file
from milkglass.certificates import load_credentials, make_certificates
from milkglass.client import StepResult
from milkglass.errors import MilkglassError
from milkglass.recipe import Recipe

_FORKSERVER: Final = multiprocessing.get_context("forkserver")
_CASE: Final = Case("random", (1, 16, 16), "cnn", {"width": 8}, "block1")
_BATCH: Final = 16
_SAMPLE_SECONDS: Final = 1.0
_START_SECONDS: Final = 300.0
_STOP_SECONDS: Final = 60.0


def main() -> None:
    """Run once, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print(f"{command_line()}\n{machine_line()}\n")
    row = measure(arguments.clients, arguments.seconds)
    print("| clients | seconds | steps | lost or doubled | refused | memory, MiB | growth, MiB in 10 minutes |")
    print(f"|{'---|' * 7}")
    print(
        f"| {row['clients']} | {row['seconds']:.0f} | {row['steps']} | {row['lost_or_doubled']} | {row['refused']} "
        f"| {row['memory_mib']:.0f} | {row['growth_mib_in_10_minutes']:+.1f} ± {row['growth_error']:.1f} |"
    )
    if arguments.out:
        write_result(arguments.out, [row])


def measure(count: int, seconds: float) -> dict[str, Any]:
    """What `count` clients did in that time, and what the server's memory did."""
    names = [f"client-{number}" for number in range(count)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_certificates(folder / "pki", "localhost", names)
        (folder / "shared.key").write_bytes(secrets.token_bytes(32))
        recipe = _recipe(names, records_file(_CASE.shape, None, folder))
        _FORKSERVER.set_forkserver_preload(["milkglass.training.join", "milkglass.training.serve"])
        pipe, theirs = _FORKSERVER.Pipe()
        server = _FORKSERVER.Process(target=_be_server, args=(theirs, recipe, folder), daemon=True)
        server.start()
        port = _told(pipe, _START_SECONDS)
        done: Any = _FORKSERVER.Array("q", count)
        stop = _FORKSERVER.Event()
        clients = [
            _FORKSERVER.Process(target=_be_client, args=(recipe, folder, name, port, done, stop), daemon=True)
            for name in names
        ]
        for client in clients:
            client.start()
        try:
            _until(lambda: min(done) > 0, _START_SECONDS, "some clients have not begun")
            assert server.pid is not None
            samples = _watch(server.pid, seconds)
            stop.set()
            _rest(done)
            server.terminate()
            counts, refused = _told(pipe, _STOP_SECONDS)
            taken = _steps_taken(recipe, folder / "server")
        finally:
            for process in (*clients, server):
                process.kill()
                process.join()
    wrong = [
        (name, seen, steps, counts[name, "activations"])
        for name, seen, steps in zip(names, done, taken, strict=True)
        if not seen == steps == counts[name, "activations"]
    ]
    return {
        "clients": count,
        "seconds": seconds,
        "steps": sum(done),
        "steps_of_each": [min(done), max(done)],
        "messages": sum(counts.values()),
        "refused": refused,
        "lost_or_doubled": len(wrong),
        "wrong": wrong,
        **_growth(samples),
    }


def _recipe(names: Sequence[str], records: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {"path": str(records), "record_shape": _CASE.shape, "classes": 10, "test_share": 0.02},
            "network": {"name": _CASE.network, "settings": dict(_CASE.settings)},
            "cut": {"at": _CASE.at},
            "training": {"epochs": 100_000, "batch_size": _BATCH},
            "parties": {"clients": names, "mode": "splitfed1"},
            "attacker": {"auxiliary_share": 0.01, "validation_share": 0.01},
        }
    )


@final
class _Count:
    """What the server took."""

    def __init__(self) -> None:
        self.messages: Counter[tuple[str, str]] = Counter()
        self.turned_away: Counter[str] = Counter()

    def connected(self, parties: int) -> None:
        """Nothing to count."""

    def refused(self, reason: str, times: int = 1) -> None:
        """Somebody was turned away."""
        self.turned_away[reason] += times

    def message(self, party: str, kind: str, wire_bytes: int, seconds: float) -> None:  # noqa: ARG002
        """A message was taken."""
        self.messages[party, kind] += 1


@final
class _Pace:
    """Counts a client's steps where others see it, and holds the client between two batches once it is to stop."""

    def __init__(self, number: int, done: Any, stop: Any) -> None:
        self._number, self._done, self._stop = number, done, stop

    def batch(self, epoch: int, step: int, steps: int, result: StepResult) -> None:  # noqa: ARG002
        """One batch is done."""
        self._done[self._number] += 1
        if self._stop.is_set():
            threading.Event().wait()

    def epoch(self, line: dict[str, Any]) -> None:
        """Nothing to do."""


def _be_server(pipe: Connection, recipe: Recipe, folder: Path) -> None:
    from milkglass.training.serve import serve

    watch = _Count()
    credentials = load_credentials(folder / "pki" / "localhost", "server")
    with contextlib.suppress(MilkglassError):  # it is stopped in the middle
        serve(recipe, "localhost:0", credentials, folder / "server", watch=watch, ready=pipe.send)
    pipe.send((dict(watch.messages), dict(watch.turned_away)))


def _be_client(recipe: Recipe, folder: Path, name: str, port: int, done: Any, stop: Any) -> None:
    from milkglass.training.join import join

    credentials = load_credentials(folder / "pki" / name, "client")
    pace = _Pace(recipe.parties.clients.index(name), done, stop)
    shared = folder / "shared.key"
    join(recipe, name, f"localhost:{port}", credentials, folder / name, shared_key=shared, progress=pace)


def _told(pipe: Connection, seconds: float) -> Any:
    if not pipe.poll(seconds):
        raise TimeoutError(f"the server has said nothing for {seconds:g} seconds")
    return pipe.recv()


def _until(condition: Any, seconds: float, words: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(words)
        time.sleep(0.2)


def _rest(done: Any) -> None:
    """Until no client has done anything for two seconds: each is held, or waits for one that is."""
    before: list[int] = []
    while before != list(done):
        before = list(done)
        time.sleep(2.0)


def _watch(process_id: int, seconds: float) -> list[tuple[float, float]]:
    """(seconds, MiB of memory) of the process, again and again."""
    samples = []
    began = time.monotonic()
    while (elapsed := time.monotonic() - began) < seconds:
        pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
        samples.append((elapsed, pages * 4096 / 2**20))
        time.sleep(_SAMPLE_SECONDS)
    return samples


def _growth(samples: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The line through what follows the first third: its slope, and the slope's error from the halves' disagreement."""
    rest = samples[len(samples) // 3 :]

    def slope(part: Sequence[tuple[float, float]]) -> float:
        return 600 * statistics.linear_regression(*zip(*part, strict=True)).slope

    halves = [slope(rest[: len(rest) // 2]), slope(rest[len(rest) // 2 :])]
    return {
        "memory_mib": statistics.mean(mib for _, mib in rest),
        "memory_mib_lowest": min(mib for _, mib in rest),
        "memory_mib_highest": max(mib for _, mib in rest),
        "growth_mib_in_10_minutes": slope(rest),
        "growth_error": abs(halves[0] - halves[1]) / 2,
    }


def _steps_taken(recipe: Recipe, folder: Path) -> list[int]:
    """How often each client's stage at the server was trained, by the optimizers in the server's checkpoint."""
    from milkglass.runs import RunFolder
    from milkglass.training.serve import NO_RECORDS

    checkpoint = RunFolder.resume(folder, recipe, NO_RECORDS).load_checkpoint()
    if checkpoint is None:
        return [0] * len(recipe.parties.clients)
    state = checkpoint.parties[recipe.parties.server]
    return [int(state[f"server{number}.optimizer.0.step"]) for number in range(len(recipe.parties.clients))]


if __name__ == "__main__":
    main()
