"""Who of several ranks is gone: each counts up in the ranks' common store, and one whose count stands still is named.

A collective operation that breaks says which address has hung up, often that of a rank that was only the first to
notice; one that hangs says nothing until its timeout. So each process has a thread that beats once a second in the
store by which the ranks have found each other, and whoever meets an error looks on for a while. The beat also says how
many exchanges its rank has begun: one that is alive, but stuck in work of its own, is behind the others.
"""

from __future__ import annotations

import atexit
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any, ClassVar, Final, final

import torch.distributed as dist

from milkglass.errors import LinkError, first_line

BEAT_SECONDS: Final = 1.0
_SAID_CHARACTERS: Final = 160  # gloo's own words are much longer
_STORE_SECONDS: Final = 5.0  # a beat on its way takes no longer
_LET_GO_SECONDS: Final = 0.05
_WATCHED_SECONDS: Final = 3.5 * BEAT_SECONDS  # a busy machine may skip a beat or two
_KEPT: Final[list[object]] = []


@final
class Pulse:
    """This rank's own beat, and a look at all others'. It ends with the process; or with `stop`.

    store: the ranks' common one; every rank makes its pulse. Any process may look, at any time, without the others.
    """

    _own: ClassVar[tuple[Any, Pulse] | None] = None  # a process has one heart for each process group

    def __init__(self, store: Any, rank: int, ranks: int) -> None:
        self._store = dist.distributed_c10d.PrefixStore("milkglass.pulse", store)
        self._rank, self._ranks = rank, ranks
        self._over = threading.Event()
        self._begun = 0
        self._beat(0)
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    @classmethod
    def of_default_group(cls) -> Pulse:
        """In the store of the process group that `init_process_group` has made; one for all who ask."""
        store = dist.distributed_c10d._get_default_store()
        if cls._own is None or cls._own[0] is not store:
            if cls._own is not None:
                cls._own[1].stop()
            cls._own = store, cls(store, dist.get_rank(), dist.get_world_size())
            keep(dist.group.WORLD)
        return cls._own[1]

    def stop(self) -> None:
        """Beat no more."""
        self._over.set()
        self._thread.join(_STORE_SECONDS)

    def _end(self) -> None:
        """As the process ends: a thread that waits for Python's lock when Python is gone would abort it.

        That is this one's, in the store, or one of gloo's, which lets go of the last operation's tensors.
        """
        self.stop()
        time.sleep(_LET_GO_SECONDS)

    def missing(self) -> list[int] | None:
        """The ranks whose hearts do not beat, in order; None where not even the store answers. Takes some seconds."""
        before = self._beats()
        if before is None:
            return None
        time.sleep(_WATCHED_SECONDS)
        after = self._beats()
        if after is None:
            return None
        others = (rank for rank in range(self._ranks) if rank != self._rank)
        return [rank for rank in others if before.get(rank) == after.get(rank)]

    def mark(self) -> None:
        """Begin with another exchange: all ranks do so equally often, so that who is behind can be told."""
        self._begun += 1

    @contextmanager
    def naming_the_missing(self) -> Iterator[None]:
        """Inside, an error of a collective operation becomes a LinkError that names the ranks that are gone.

        So does an interruption, if a rank is gone: torchrun ends all others when one has ended.
        """
        self.mark()
        try:
            yield
        except (RuntimeError, ConnectionError) as error:
            if not _of_the_network(error):
                raise
            with _not_terminated():
                words = self._words()
            said = shorten(first_line(error), _SAID_CHARACTERS, placeholder=" ...")
            raise LinkError(f"rank {self._rank}: {words} ({said})") from None
        except KeyboardInterrupt:
            with _not_terminated():
                gone = self.missing() if self._ranks > 1 else []
            if not gone:
                raise
            raise LinkError(f"rank {self._rank}: {_words(gone, self._ranks)}") from None

    def _words(self) -> str:
        """Who is gone; if nobody is, who is behind."""
        gone = self.missing()
        if gone == []:
            begun = {rank: int(beat.split(b" ")[1]) for rank, beat in (self._beats() or {}).items()}
            behind = [rank for rank, count in sorted(begun.items()) if count < max(begun.values())]
            if behind:
                return f"{_ranks(behind, self._ranks)} there, but behind: stuck in work of its own"
        return _words(gone, self._ranks)

    def _beats(self) -> dict[int, bytes] | None:
        found = {}
        try:
            for rank in range(self._ranks):
                if self._store.check([str(rank)]):
                    found[rank] = self._store.get(str(rank))
        except (RuntimeError, ConnectionError):
            return None
        return found

    def _beat(self, count: int) -> None:
        self._store.set(str(self._rank), f"{count} {self._begun}")

    def _run(self) -> None:
        count = 0
        while not self._over.wait(BEAT_SECONDS):
            count += 1
            if not dist.is_initialized():  # the store ends soon, and complains at length of who still asks
                return
            try:
                self._beat(count)
            except (RuntimeError, ConnectionError):  # whoever keeps the store has ended: so will this process
                return


@contextmanager
def _not_terminated() -> Iterator[None]:
    """Inside, SIGTERM is not heard: torchrun sends it as soon as one rank is gone, before the others can tell which."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def keep(group: object) -> None:
    """Keep a process group to the end of the process.

    Where DistributedDataParallel is the last that holds one, it ends gloo's threads while it holds Python's lock, for
    which such a thread may wait to let go of a tensor: then neither goes on.
    """
    _KEPT.append(group)


def _words(gone: list[int] | None, ranks: int) -> str:
    if gone is None:
        return "the others' meeting place (the store of rank 0, or of torchrun) is gone"
    if not gone:
        return "the ranks no longer work together, though all are there"
    return f"{_ranks(gone, ranks)} gone or {'hangs' if len(gone) == 1 else 'hang'}"


def _ranks(some: list[int], ranks: int) -> str:
    names = ", ".join(map(str, some))
    return f"rank {names} of {ranks} is" if len(some) == 1 else f"ranks {names} of {ranks} are"


def _of_the_network(error: BaseException) -> bool:
    """Whether an error is one of a collective operation, not of the computation between two of them."""
    if isinstance(error, ConnectionError | dist.DistError):
        return True
    words = str(error).lower()
    return any(part in words for part in ("gloo", "nccl", "connection", "timed out", "timeout", "peer"))
