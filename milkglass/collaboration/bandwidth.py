"""How many bytes a second a volunteer can send and receive: measured with others as it joins, and as the run grows.

hivemind takes a number that its user types, or else takes all for equal. A link to one other measures the slower of the
two ends; so as many as four are asked at the same time, and their rates added up: as long as together they have more
than this one, what is measured is this one's own. Two measurements at one volunteer would share its link, so each takes
part in one at a time; whoever is turned away tries again later.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, final

from milkglass.collaboration.admission import Admission
from milkglass.collaboration.engine import runtime_pb2
from milkglass.errors import MessageError

PARTNERS: Final = 4
_PIECE: Final = bytes(1 << 18)
_SECONDS: Final = 1.0
_MOST_PIECES: Final = 256  # 64 MiB, each way
_PATIENCE: Final = 20.0


@final
class Probes:
    """One volunteer's measurements, its own and those of others with it."""

    def __init__(self) -> None:
        self._busy = False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._busy:
            raise MessageError("another measurement goes on here")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    async def measure(self, service: Any, peers: Sequence[bytes], token: bytes) -> float | None:
        """Bytes per second, the smaller of both directions, with all of `peers` at once; None where one is busy.

        service: whose `stub(peer)` calls another's. token: what shows that we may take part.
        """
        with contextlib.suppress(MessageError), self._alone():
            found = await asyncio.gather(*[_with(service, peer, token) for peer in peers])
            if all(up > 0 for up, _ in found):
                return min(sum(up for up, _ in found), sum(down for _, down in found)) or None
        return None

    async def answer(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], sender: bytes, admission: Admission
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """The other side: take in all, then send as long. Raises MessageError for a stranger, or while busy."""
        head = await asyncio.wait_for(anext(requests), _PATIENCE)
        objection = admission.objection(sender, head.metadata)
        if objection is not None:
            raise MessageError(objection)
        with self._alone():
            async with asyncio.timeout(_PATIENCE * _SECONDS):
                pieces = 0
                async for request in requests:
                    pieces += 1
                    if request.uid == "end" or pieces > _MOST_PIECES:
                        break
                yield runtime_pb2.ExpertResponse()
                begun = time.perf_counter()
                for _ in range(_MOST_PIECES):
                    if time.perf_counter() - begun > _SECONDS:
                        break
                    yield runtime_pb2.ExpertResponse(metadata=_PIECE)


async def _with(service: Any, peer: bytes, token: bytes) -> tuple[float, float]:
    """(bytes per second up, down) with one peer; zeros where it does not answer."""
    sent, begun = 0, time.perf_counter()

    async def messages() -> AsyncIterator[runtime_pb2.ExpertRequest]:
        nonlocal sent
        yield runtime_pb2.ExpertRequest(metadata=token)
        for _ in range(_MOST_PIECES - 1):
            if time.perf_counter() - begun > _SECONDS:
                break
            yield runtime_pb2.ExpertRequest(metadata=_PIECE)
            sent += len(_PIECE)
        yield runtime_pb2.ExpertRequest(uid="end")

    try:
        async with asyncio.timeout(_PATIENCE * _SECONDS):
            answers = await service.stub(peer).rpc_probe(messages())
            await anext(answers)  # all has arrived
            turned = time.perf_counter()
            up = sent / (turned - begun)
            received = 0
            async for answer in answers:
                received += len(answer.metadata)
            return up, received / max(time.perf_counter() - turned, 1e-9)
    except asyncio.CancelledError:
        raise
    except Exception:  # it is gone, or busy, or does not want to
        return 0.0, 0.0
