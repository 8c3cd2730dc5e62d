"""What a volunteer answers to others: hivemind routes calls by their names, over connections that prove who calls.

Nothing here decides: who may join stands in `group.py`, what is averaged in `reduction.py`, what is shown in
`disputes.py`, and what is given to whom in `state.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, AsyncIterator, Final, final  # noqa: UP035 - hivemind knows typing's own alone

from milkglass.collaboration.admission import Admission
from milkglass.collaboration.bandwidth import Probes
from milkglass.collaboration.engine import P2P, P2PContext, PeerID, ServicerBase, averaging_pb2, runtime_pb2
from milkglass.collaboration.identity import short_name
from milkglass.collaboration.node import Node
from milkglass.errors import LinkError, MessageError

_GREETING_SECONDS: Final = 10.0


@final
@dataclass(frozen=True)
class Greeting:
    """What a volunteer says of itself to anybody.

    run: its name. agreed: the recipe as all agreed on it. digest: the recipe's. data: of the data, such as a text's
    hash. epoch: where it stands. peers: names of those it knows. authority: peer id, in hexadecimal, of who admits;
    None where everybody is.
    """

    run: str
    agreed: dict[str, Any]
    digest: str
    data: str
    epoch: int
    peers: list[str]
    authority: str | None

    def to_bytes(self) -> bytes:
        """JSON."""
        return json.dumps(asdict(self)).encode()


def read_greeting(content: bytes) -> Greeting:
    """Another's, of the types that are written above and no others. Raises MessageError."""
    try:
        read = Greeting(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        raise MessageError("a greeting that cannot be read") from None
    texts = (read.run, read.digest, read.data, *([] if read.authority is None else [read.authority]))
    lists = type(read.agreed) is dict and type(read.peers) is list and type(read.epoch) is int
    if not lists or not all(type(text) is str for text in (*texts, *read.peers)):
        raise MessageError("a greeting of wrong types")
    return read


@final
class Greeter(ServicerBase):  # type: ignore[misc]  # hivemind has no types
    """Says to anybody what run this is, by what recipe, and who is there. greeting: makes that."""

    def __init__(self, greeting: Callable[[], Greeting]) -> None:
        self._greeting = greeting

    async def rpc_greeting(self, request: runtime_pb2.ExpertRequest, context: P2PContext) -> runtime_pb2.ExpertResponse:
        """JSON."""
        del request, context
        return runtime_pb2.ExpertResponse(metadata=self._greeting().to_bytes())


async def greet(p2p: P2P, peer_id: bytes) -> Greeting | None:
    """What another says of itself; None where it says nothing, as an authority does.

    Raises LinkError, one line, where what it says is no greeting.
    """
    try:
        stub = Greeter.get_stub(p2p, PeerID(peer_id))
        answer = await asyncio.wait_for(stub.rpc_greeting(runtime_pb2.ExpertRequest()), _GREETING_SECONDS)
    except Exception:  # whatever it is that answers there
        return None
    try:
        return read_greeting(answer.metadata)
    except MessageError as error:
        raise LinkError(
            f"{short_name(peer_id)} answers with {error}; expected a volunteer that runs this version of milkglass"
        ) from None


@final
class Service(ServicerBase):  # type: ignore[misc]  # hivemind has no types
    """Answers for a volunteer. run: the name under which its calls are routed."""

    def __init__(self, node: Node, run: str, admission: Admission) -> None:
        self._node, self._run, self._admission = node, run, admission
        self.probes = Probes()
        self.matcher: Any = None
        self.reductions: Any = None
        self.disputes: Any = None
        self.states: Any = None

    async def open(self) -> None:
        """From now on others are answered; not those of an unreachable volunteer, whom nobody calls."""
        if self._node.reachable:
            await self.add_p2p_handlers(self._node.p2p, namespace=self._run)

    async def close(self) -> None:
        """Nobody is answered any more."""
        if self._node.reachable:
            await self.remove_p2p_handlers(self._node.p2p, namespace=self._run)

    def stub(self, peer_id: bytes) -> Any:
        """Calls another's service."""
        return self.get_stub(self._node.p2p, PeerID(peer_id), namespace=self._run)

    async def rpc_join_group(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.MessageFromLeader]:
        """hivemind's matchmaking."""
        async for answer in self.matcher.join(request, context):
            yield answer

    async def rpc_reduce(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """A member of a round contributes to a part."""
        async for answer in self.reductions.serve(requests, context):
            yield answer

    async def rpc_evidence(
        self, request: runtime_pb2.ExpertRequest, context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """A member of a round looks for himself."""
        async for answer in self.disputes.show(request, context):
            yield answer

    async def rpc_state(
        self, request: runtime_pb2.ExpertRequest, context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """Somebody who is behind, or new, asks for the state of training."""
        async for answer in self.states.give(request, context):
            yield answer

    async def rpc_probe(
        self, requests: AsyncIterator[runtime_pb2.ExpertRequest], context: P2PContext
    ) -> AsyncIterator[runtime_pb2.ExpertResponse]:
        """Somebody measures the bandwidth between us."""
        async for answer in self.probes.answer(requests, context.remote_id.to_bytes(), self._admission):
            yield answer
