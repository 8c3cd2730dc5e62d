"""A bad network, to put between two parties: it delays, throttles, cuts, resets, and falls silent."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, final

_CHUNK_BYTES = 16 << 10


@dataclass(eq=False)
class _Link:
    """One connection through the proxy: both ends, and whether it has fallen silent."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    silent: bool = False


@final
class FaultyNetwork:
    """A TCP proxy at 127.0.0.1:`port` before the server at 127.0.0.1:`target`, in a thread of its own.

    delay_seconds: every byte is so late. bytes_per_second: no more get through, each way. reset_after: the next
    connection is reset (SO_LINGER 0, so with RST) once so many bytes of the client got through.
    """

    def __init__(self, target: int, *, delay_seconds: float = 0.0, bytes_per_second: float = 0.0) -> None:
        self.target = target
        self.delay_seconds, self.bytes_per_second = delay_seconds, bytes_per_second
        self.reset_after: int | None = None
        self.accepted = self.resets = self.bytes_to_server = 0
        self._links: list[_Link] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty network")

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """End every connection in order, at once."""
        self._run(self._end_all(reset=False))

    def reset(self) -> None:
        """End every connection with RST."""
        self._run(self._end_all(reset=True))

    def fall_silent(self) -> None:
        """Half-open: what is connected stays so, and not a byte passes any more. New connections are good ones."""
        for link in self._links:
            link.silent = True

    # In the loop.

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            _end(writer, reset=True)
            return
        link = _Link(writer, back)
        self._links.append(link)
        limit, self.reset_after = self.reset_after, None
        pumps = [self._pump(link, reader, back, limit), self._pump(link, there, writer, None)]
        for work in pumps:
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self, link: _Link, source: asyncio.StreamReader, sink: asyncio.StreamWriter, limit: int | None
    ) -> None:
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        writing = asyncio.create_task(self._write(link, waiting, sink))
        to_server = sink is link.server
        passed = 0
        try:
            while data := await source.read(_CHUNK_BYTES):
                if limit is not None and passed + len(data) > limit:
                    self.resets += 1
                    self._end(link, reset=True)
                    return
                passed += len(data)
                self.bytes_to_server += len(data) if to_server else 0
                waiting.put_nowait((self._loop.time() + self.delay_seconds, data))
                if self.bytes_per_second:
                    await asyncio.sleep(len(data) / self.bytes_per_second)
        except OSError:
            pass
        finally:
            waiting.put_nowait((self._loop.time() + self.delay_seconds, b""))
            await writing
            if not link.silent:
                self._end(link, reset=False)

    async def _write(
        self, link: _Link, waiting: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter
    ) -> None:
        while True:
            due, data = await waiting.get()
            if not data:
                return
            await asyncio.sleep(max(due - self._loop.time(), 0.0))
            if not link.silent:
                with contextlib.suppress(OSError):
                    sink.write(data)
                    await sink.drain()

    async def _end_all(self, *, reset: bool) -> None:
        for link in list(self._links):
            self._end(link, reset=reset)

    def _end(self, link: _Link, *, reset: bool) -> None:
        if link in self._links:
            self._links.remove(link)
            _end(link.client, reset=reset)
            _end(link.server, reset=reset)

    async def _close(self) -> None:
        self._server.close()
        await self._end_all(reset=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0.01)  # for the sockets to be closed


def _end(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    with contextlib.suppress(OSError):
        if reset:
            there: socket.socket = writer.get_extra_info("socket")
            there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            writer.close()
