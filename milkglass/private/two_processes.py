"""Two parties as two processes of this machine, whose link is counted byte by byte.

A protocol of others (SPU, emp-wasm) runs in a process for each party; this file starts both, lets them begin at the
same moment, and ends them, each by its own process id, whatever happens. They do not reach each other directly: each
connects to a relay in this process, which passes bytes on and counts them. That is exact (all of TCP's payload, also
acknowledgements of the library's own) and needs nothing of the library or the system. Only the part between set-up and
the rest may be off by an acknowledgement that was on its way.

A party is a command that says `ready` (a line on its output), waits for `go` (a line on its input), and says `done`.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from milkglass.errors import LinkError, foreign_line

PARTIES: Final = ("client", "server")
_HOST: Final = "127.0.0.1"
_PIECE_BYTES: Final = 1 << 16
_GRACE_SECONDS: Final = 5.0
_TRIES: Final = 500  # to reach a party that does not listen yet
_PAUSE_SECONDS: Final = 0.02


@final
@dataclass(frozen=True)
class PairRun:
    """What two parties took. Seconds from the start until both were ready, and from then until the client was done.

    Bytes up go from the client to the server: `bytes_up`, `bytes_down` after set-up, `setup_bytes` both ways before.
    """

    setup_seconds: float
    seconds: float
    setup_bytes: int
    bytes_up: int
    bytes_down: int


@contextlib.contextmanager
def party_folders() -> Iterator[tuple[Path, Path]]:
    """A folder for the client and one for the server, readable by their owner alone; gone afterwards."""
    with contextlib.ExitStack() as stack:
        client, server = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"milkglass-{party}-"))) for party in PARTIES
        )
        yield client, server


def run_pair(
    command: Callable[[int, str, str], Sequence[str]], folders: tuple[Path, Path], *, timeout_seconds: float
) -> PairRun:
    """Run both parties to their end.

    `command(rank, own, other)` is the command line of party `rank` (0 client, 1 server), which listens at the address
    `own` ("host:port") and reaches the other at `other`. What it says on its error output goes to `log.txt` in its
    folder. Raises LinkError, with the party's last line, where one ends early, fails, or is not done in time.
    """
    started, deadline = time.monotonic(), time.monotonic() + timeout_seconds
    with Relay() as to_server, Relay() as to_client:
        own = (f"{_HOST}:{to_client.target}", f"{_HOST}:{to_server.target}")
        other = (f"{_HOST}:{to_server.port}", f"{_HOST}:{to_client.port}")
        commands = [command(rank, own[rank], other[rank]) for rank in range(2)]
        with _both(commands, folders) as pair:
            pair.wait_for("ready", deadline, timeout_seconds)
            begun = time.monotonic()
            before_up, before_down = _counts(to_server, to_client)
            pair.tell("go")
            done = pair.wait_for("done", deadline, timeout_seconds)
            pair.wait_for_end(deadline, timeout_seconds)
            for relay in (to_server, to_client):
                relay.settle()
            up, down = _counts(to_server, to_client)
    return PairRun(begun - started, done - begun, before_up + before_down, up - before_up, down - before_down)


def _counts(to_server: Relay, to_client: Relay) -> tuple[int, int]:
    """Bytes from the client and bytes from the server, over the connections that either has opened."""
    return to_server.forth + to_client.back, to_server.back + to_client.forth


@final
class Relay:
    """Passes every connection to `port` on to `target`, a port that was free, and counts both directions."""

    def __init__(self) -> None:
        self.forth = 0
        self.back = 0
        self._listener = socket.create_server((_HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        with socket.create_server((_HOST, 0)) as probe:
            self.target: int = probe.getsockname()[1]
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._pumps: list[threading.Thread] = []
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            ends = [self._listener, *self._open]
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def settle(self) -> None:
        """Both ends have gone: count what they sent last."""
        for pump in list(self._pumps):
            pump.join(_GRACE_SECONDS)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        """The other half of a connection: its party may not listen yet."""
        with self._lock:
            self._open.append(near)
        for _ in range(_TRIES):
            try:
                far = socket.create_connection((_HOST, self.target))
                break
            except OSError:
                if self._closed:
                    return
                time.sleep(_PAUSE_SECONDS)
        else:
            near.close()
            return
        with self._lock:
            self._open.append(far)
            if self._closed:
                far.close()
                return
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for ends in ((near, far, True), (far, near, False)):
            pump = threading.Thread(target=self._pump, args=ends, daemon=True)
            pump.start()
            self._pumps.append(pump)

    def _pump(self, source: socket.socket, sink: socket.socket, forth: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE_BYTES):
                with self._lock:
                    if forth:
                        self.forth += len(piece)
                    else:
                        self.back += len(piece)
                sink.sendall(piece)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@final
class _Pair:
    """The two processes. What they say arrives in one queue, so that the first to fail is the one that is named."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._logs: list[Path] = []
        self._heard: queue.Queue[tuple[int, str | None]] = queue.Queue()  # None: it says nothing more

    def start(self, command: Sequence[str], log: Path) -> None:
        """The next party: the client, then the server."""
        rank = len(self._processes)
        with log.open("wb") as errors:
            try:
                process = subprocess.Popen(
                    list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                )
            except OSError as error:
                what = f"{command[0]}: {error.strerror or error}"
                raise LinkError(f"two parties: the {PARTIES[rank]}'s process cannot be started: {what}") from None
        self._processes.append(process)
        self._logs.append(log)
        threading.Thread(target=self._listen, args=(rank,), daemon=True).start()

    def wait_for(self, word: str, deadline: float, timeout_seconds: float) -> float:
        """Until both have said so; when the client did. Other lines are passed over."""
        said: dict[int, float] = {}
        while len(said) < len(self._processes):
            try:
                rank, line = self._heard.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                silent = [rank for rank in range(len(self._processes)) if rank not in said]
                raise self._late(silent, word, timeout_seconds) from None
            if line == word:
                said[rank] = time.monotonic()
            elif line is None and rank not in said:
                raise self._ended(rank, word)
        return said[0]

    def wait_for_end(self, deadline: float, timeout_seconds: float) -> None:
        """Until both have ended well."""
        for rank, process in enumerate(self._processes):
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise self._late([rank], "at its end", timeout_seconds) from None
            if code:
                raise self._ended(rank, "at its end")

    def tell(self, word: str) -> None:
        """A line to both. Who is gone is found out when it is waited for."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.write(word + "\n")
                process.stdin.flush()

    def end(self) -> None:
        """Nothing of them is left."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _listen(self, rank: int) -> None:
        pipe = self._processes[rank].stdout
        assert pipe is not None
        with contextlib.suppress(ValueError):  # closed meanwhile
            for line in pipe:
                self._heard.put((rank, line.strip()))
        self._heard.put((rank, None))

    def _late(self, ranks: Sequence[int], word: str, timeout_seconds: float) -> LinkError:
        """Who waits for the other is as silent as the other: all are named."""
        silent = "; ".join(f"the {PARTIES[rank]}: {self._last_words(rank)}" for rank in ranks)
        return LinkError(f"two parties: not {word} within {timeout_seconds:g} s: {silent}")

    def _ended(self, rank: int, word: str) -> LinkError:
        try:
            code: int | None = self._processes[rank].wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:  # it has closed its output, no more
            code = None
        words = self._last_words(rank)
        return LinkError(f"two parties: the {PARTIES[rank]} ended before it was {word} (exit code {code}); {words}")

    def _last_words(self, rank: int) -> str:
        """What its log says last, but for what the link says about its own end."""
        lines = [line for line in self._logs[rank].read_text(errors="replace").splitlines() if line.strip()]
        told = [line for line in lines if "Channel destructor" not in line] or lines
        return f"its last words: {foreign_line(told[-1])}" if told else "it left no word"


@contextlib.contextmanager
def _both(commands: Sequence[Sequence[str]], folders: tuple[Path, Path]) -> Iterator[_Pair]:
    pair = _Pair()
    try:
        for command, folder in zip(commands, folders, strict=True):
            pair.start(command, folder / "log.txt")
        yield pair
    finally:
        pair.end()
