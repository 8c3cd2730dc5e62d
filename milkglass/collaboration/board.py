"""The notice board of a run: every volunteer keeps its report in the DHT, and reads those of the others.

A newcomer reads alone until it has the state of the others: several that begin at 0 would else outvote who is further.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final, final

from milkglass.collaboration.engine import get_dht_time
from milkglass.collaboration.node import BROKEN, Node
from milkglass.collaboration.progress import STALE_SECONDS, Report, read_report

_LOOK_SECONDS: Final = 0.25
_HURRY_SECONDS: Final = 0.1
_ANSWER_SECONDS: Final = 10.0
_REPEAT_SECONDS: Final = STALE_SECONDS / 4


@final
class Board:
    """What is known of a run's volunteers. run: its name. own: this volunteer's report now; None: only reads."""

    def __init__(self, node: Node, run: str, own: Callable[[], Report] | None) -> None:
        self._node, self._key, self._own = node, f"{run}_progress", own
        self._told: tuple[int, int] | None = None
        self._told_at = 0.0
        self.is_newcomer = True
        self.hurry = False
        """Set while a batch is about to be full: then it counts how soon all know."""
        self.reports: dict[bytes, Report] = {}
        """By peer id, those of others that are not stale."""

    async def keep(self) -> None:
        """Tell and look, again and again."""
        while True:
            begun = time.monotonic()
            with contextlib.suppress(*BROKEN, TimeoutError):  # a daemon that has ended is noticed elsewhere
                await self.tell()
                await self.look()
            pause = _HURRY_SECONDS if self.hurry else _LOOK_SECONDS
            await asyncio.sleep(max(pause - (time.monotonic() - begun), _HURRY_SECONDS / 2))

    async def tell(self) -> None:
        """Put up our report, if something has changed or it grows old."""
        if self._own is None or self.is_newcomer:
            return
        report, now = self._own(), time.monotonic()
        word = report.epoch, report.samples
        if word != self._told or now - self._told_at > _REPEAT_SECONDS:
            self._told, self._told_at = word, now
            await self._store(report.to_dict(), get_dht_time() + STALE_SECONDS)

    async def look(self) -> None:
        """Read what others say."""
        found = await asyncio.wait_for(self._node.dht.get(self._key, latest=True), _ANSWER_SECONDS)
        entries = found.value if found is not None and isinstance(found.value, dict) else {}
        now, own_id = get_dht_time(), self._node.identity.peer_id
        read = {peer: read_report(entry.value, now) for peer, entry in entries.items() if peer != own_id}
        self.reports = {peer: report for peer, report in read.items() if report is not None}

    async def leave(self) -> None:
        """Take our report down."""
        if self._own is not None and not self.is_newcomer:
            await self._store(None, get_dht_time() + STALE_SECONDS + 1)

    async def _store(self, content: object, expires: float) -> None:
        await self._node.dht.store(self._key, content, expires, subkey=self._node.identity.peer_id)
