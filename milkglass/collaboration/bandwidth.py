"""How many bytes a second a volunteer can send and receive: measured with others, at once, before it takes part.

hivemind takes a number that its user types, or else takes all for equal. A link to one other measures the slower of the
two ends; so as many as four are asked at the same time, and their rates added up: as long as together they have more
than this one, what is measured is this one's own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from milkglass.collaboration.admission import Admission
from milkglass.collaboration.engine import runtime_pb2
from milkglass.errors import MessageError

PARTNERS: Final = 4
_PIECE: Final = bytes(1 << 18)
_SECONDS: Final = 1.5
_MOST_PIECES: Final = 256  # 64 MiB, each way


async def measure(service: Any, peers: Sequence[bytes], token: bytes, seconds: float = _SECONDS) -> float | None:
    """Bytes per second, the smaller of both directions, with all of `peers` at once; None where none answers.

    service: whose `stub(peer)` calls another's. token: what shows that we may take part.
    """
    found = await asyncio.gather(*[_with(service, peer, token, seconds) for peer in peers[:PARTNERS]])
    up = sum(rate for rate, _ in found)
    down = sum(rate for _, rate in found)
    return min(up, down) or None


async def _with(service: Any, peer: bytes, token: bytes, seconds: float) -> tuple[float, float]:
    """(bytes per second up, down) with one peer; zeros where it does not answer."""
    sent, begun = 0, time.perf_counter()
    up = 0.0

    async def messages() -> AsyncIterator[runtime_pb2.ExpertRequest]:
        nonlocal sent
        yield runtime_pb2.ExpertRequest(uid=str(seconds), metadata=token)
        for _ in range(_MOST_PIECES):
            if time.perf_counter() - begun > seconds:
                break
            yield runtime_pb2.ExpertRequest(metadata=_PIECE)
            sent += len(_PIECE)
        yield runtime_pb2.ExpertRequest(uid="end")

    try:
        async with asyncio.timeout(20 * seconds):
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
    except Exception:  # it is gone, or does not want to
        return 0.0, 0.0


async def answer_probe(
    requests: AsyncIterator[runtime_pb2.ExpertRequest], sender: bytes, admission: Admission
) -> AsyncIterator[runtime_pb2.ExpertResponse]:
    """The other side: take in all, then send as long. Raises MessageError for a stranger."""
    head = await asyncio.wait_for(anext(requests), _SECONDS)
    objection = admission.objection(sender, head.metadata)
    if objection is not None:
        raise MessageError(objection)
    seconds = min(float(head.uid), _SECONDS)
    pieces = 0
    async for request in requests:
        pieces += 1
        if request.uid == "end" or pieces > _MOST_PIECES:
            break
    yield runtime_pb2.ExpertResponse()
    begun = time.perf_counter()
    for _ in range(_MOST_PIECES):
        if time.perf_counter() - begun > seconds:
            break
        yield runtime_pb2.ExpertResponse(metadata=_PIECE)
