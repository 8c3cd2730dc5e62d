"""The state of training, from a volunteer to one who is new, was away, or took another way than most.

What most volunteers of the epoch say that the state hashes to is what a download must hash to. Where their machines
differ in kind, so that no two states have the same bits, there is no such word; then the state is taken as it comes,
and `Download.checked` is False.

Neither side lets itself be held up: who gives has two takers at a time, who share one copy, and who takes goes on to
the next donor where a state is longer than any of this network, or comes too slowly.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, final

from milkglass.collaboration.admission import Admission
from milkglass.collaboration.engine import P2PContext, runtime_pb2
from milkglass.collaboration.identity import short_name
from milkglass.collaboration.progress import Report
from milkglass.collaboration.replica import Replica, Version, epoch_of
from milkglass.errors import MessageError

_PIECE: Final = 1 << 18
_LEAST_SPEED: Final = 1 << 16
"""In bytes/s: whoever gives or takes a state more slowly is left."""
_UPLOADS: Final = 2
_UPLOAD_SECONDS: Final = 60.0
"""How much longer than at the least speed an upload may take."""
_BUSY_SECONDS: Final = 3.0
_LOOKS: Final = 4
_LOOK_SECONDS: Final = 0.5


@final
@dataclass(frozen=True)
class Download:
    """A state that was taken over. donor: whose it was. checked: it is what most say that it is."""

    epoch: int
    donor: bytes
    bytes_received: int
    checked: bool


@final
class States:
    """Gives our state to others, to two at a time. Those who take the same state share one copy of it."""

    def __init__(self, replica: Replica, admission: Admission) -> None:
        self._replica, self._admission = replica, admission
        self._free, self._uploads = asyncio.Semaphore(_UPLOADS), 0
        self._copying = asyncio.Lock()
        self._copy: tuple[Version, bytes] | None = None
        self.bytes_sent = 0

    async def give(
        self, request: runtime_pb2.ExpertRequest, context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """Our state in pieces, to whoever may take part. Raises MessageError for others, and while two take it already.

        A taker that does not read is left: the task that waits for it is cancelled.
        """
        objection = self._admission.objection(context.remote_id.to_bytes(), request.metadata)
        if objection is not None:
            raise MessageError(objection)
        async with self._upload() as content:
            task = asyncio.current_task()
            assert task is not None
            most_seconds = len(content) / _LEAST_SPEED + _UPLOAD_SECONDS
            end = asyncio.get_running_loop().call_later(most_seconds, task.cancel)
            try:
                for start in range(0, len(content), _PIECE):
                    piece = content[start : start + _PIECE]
                    self.bytes_sent += len(piece)
                    yield runtime_pb2.ExpertResponse(metadata=piece)
            finally:
                end.cancel()

    @asynccontextmanager
    async def _upload(self) -> AsyncIterator[bytes]:
        """Inside, one of the uploads is ours; the state now. The copy is forgotten with the last of them."""
        try:
            async with asyncio.timeout(_BUSY_SECONDS):
                await self._free.acquire()
        except TimeoutError:
            raise MessageError("busy: gives its state to others just now") from None
        self._uploads += 1
        try:
            yield await self._newest()
        finally:
            self._uploads -= 1
            if self._uploads == 0:
                self._copy = None
            self._free.release()

    async def _newest(self) -> bytes:
        loop = asyncio.get_running_loop()
        async with self._copying:
            version = await loop.run_in_executor(None, lambda: self._replica.version)
            if self._copy is None or self._copy[0] != version:
                self._copy = await loop.run_in_executor(None, self._replica.save)
            return self._copy[1]


def donors(reports: Mapping[bytes, Report], epoch: int) -> list[bytes]:
    """Whom to ask for the state of that epoch, or a later one: those who are there first, then those who are ahead."""
    able = {peer: report for peer, report in reports.items() if report.reachable and report.epoch >= epoch}
    return sorted(able, key=lambda peer: able[peer].epoch)


async def download(
    service: Any,
    replica: Replica,
    token: bytes,
    peers: Sequence[bytes],
    agreed: Callable[[int], Awaitable[bytes | None]],
    timeout_seconds: float,
) -> Download:
    """The state of the first of `peers` who gives one that holds.

    agreed: what the state of an epoch hashes to, where most agree: asked when it has arrived, as training goes on
    meanwhile; it raises MessageError where too few know of that epoch. Raises MessageError, which says of each why not.
    """
    why, most_bytes = [], replica.most_bytes
    for peer in peers:
        try:
            content = await _fetch(service, peer, token, timeout_seconds, most_bytes)
            expected = await _asked(agreed, epoch_of(content))
            if expected is not None and hashlib.sha256(content).digest() != expected:
                raise MessageError("its state is not the one that most have")
            version = await asyncio.get_running_loop().run_in_executor(None, replica.load, content)
            return Download(version.epoch, peer, len(content), expected is not None)
        except asyncio.CancelledError:
            raise
        except MessageError as error:
            why.append(f"{short_name(peer)}: {error}")
        except Exception:
            why.append(f"{short_name(peer)}: does not answer")
    raise MessageError("; ".join(why) or "nobody is there who can be asked")


async def _asked(agreed: Callable[[int], Awaitable[bytes | None]], epoch: int) -> bytes | None:
    """What most say of an epoch; the others' word of one that was reached just now is waited for."""
    for _ in range(_LOOKS - 1):
        try:
            return await agreed(epoch)
        except MessageError:
            await asyncio.sleep(_LOOK_SECONDS)
    return await agreed(epoch)


async def _fetch(service: Any, peer: bytes, token: bytes, timeout_seconds: float, most_bytes: int) -> bytes:
    """The state of one donor. Raises MessageError where it is too long or slow, TimeoutError where nothing comes."""
    call = service.stub(peer).rpc_state(runtime_pb2.ExpertRequest(metadata=token))
    found, begun = bytearray(), None
    async with aclosing(await asyncio.wait_for(call, timeout_seconds)) as answers:
        while True:
            try:
                answer = await asyncio.wait_for(anext(answers), timeout_seconds)
            except StopAsyncIteration:
                break
            found += answer.metadata
            if len(found) > most_bytes:
                raise MessageError(f"gives more than {most_bytes} bytes, the most that a state here has")
            begun = begun or time.monotonic()
            if time.monotonic() - begun > timeout_seconds + len(found) / _LEAST_SPEED:
                raise MessageError(f"gives its state at less than {_LEAST_SPEED} bytes/s")
    if not found:
        raise MessageError("gives no state")
    return bytes(found)
