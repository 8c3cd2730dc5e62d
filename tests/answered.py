"""A finished server that answers queries, in a thread of its own: for tests of inference between machines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milkglass.certificates import Credentials
from milkglass.runs import RunFolder
from milkglass.training.answer import answering


@contextmanager
def while_answering(
    server: Path, credentials: Credentials | None, told: list[tuple[str, dict[str, Any]]]
) -> Iterator[str]:
    """The address at which the server of that folder answers, in a thread of its own."""
    loop, over, there = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
    ports: list[int] = []

    def ready(port: int) -> None:
        ports.append(port)
        there.set()

    def log(event: str, **values: Any) -> None:
        told.append((event, values))

    recipe = RunFolder.open_finished(server, ("top.safetensors",)).recipe
    work = answering(recipe, "localhost:0", credentials, server, over, log=log, ready=ready)
    thread = threading.Thread(target=loop.run_until_complete, args=(work,))
    thread.start()
    try:
        assert there.wait(60)
        yield f"localhost:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(60)
        assert not thread.is_alive()
        loop.close()
