"""An event loop that runs only while its owner waits for something, in the owner's thread, and that outlives Ctrl-C."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar, final

_Result = TypeVar("_Result")
_LAST_SECONDS: Final = 1.0


@final
class OwnLoop:
    """`loop` is asyncio's."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._interrupted: asyncio.Task[Any] | None = None
        self._running: asyncio.Task[Any] | None = None
        self._stopped = False

    def finish(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run until this is done. Ctrl-C leaves it half-done in the loop, until `give_up`.

        Raises InterruptedError where another thread has called `interrupt`.
        """
        task = self.loop.create_task(work)
        self._running = task
        if self._stopped:  # read after `_running` is set: `interrupt` does the two in the other order
            task.cancel()
        try:
            return self.loop.run_until_complete(task)
        except (KeyboardInterrupt, SystemExit):
            self._interrupted = task
            raise
        except asyncio.CancelledError:
            raise InterruptedError from None
        finally:
            self._running = None

    def interrupt(self) -> None:
        """From another thread: nothing is waited for any longer, until `give_up`."""
        self._stopped = True
        task = self._running
        if task is not None:
            self.loop.call_soon_threadsafe(task.cancel)

    def give_up(self) -> None:
        """End what an interrupt left half-done: it must not wake up while its owner puts everything away."""
        self._stopped = False
        task, self._interrupted = self._interrupted, None
        if task is None:
            return
        task.cancel()
        self.loop.run_until_complete(asyncio.wait({task}, timeout=_LAST_SECONDS))
        if task.done() and not task.cancelled():
            task.exception()  # asked for, or asyncio complains that nobody did

    def close(self) -> None:
        """Nothing runs in it any more."""
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
