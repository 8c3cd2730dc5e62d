"""Who may ask a SuperLink for what: a gate before Flower's own server, and a middleware behind Flower's own checks.

The gate (ASGI) knows a caller by the certificate of its connection. RFC 8446, 4.4.2: TLS has seen by then that the
caller holds its key, and that our CA signed it.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from milkglass.errors import foreign_line, nearest
from milkglass.training.flower_processes import GREETING_PATH, MOST_REQUEST_BYTES

PEER: Final = "peer"
"""Where in a request's state its `Peer` is."""
_FLEET: Final = "/v1/fleet/"
_RUNTIME: Final = "/v1/runtime/"


@dataclass(frozen=True)
class Peer:
    """Who calls, from its certificate: its name, and its public key as Flower writes one."""

    name: str
    key: bytes


@final
class Gate:
    """What a client may ask a SuperLink for: the Fleet API, and whether it may come. Its certificate says who it is."""

    def __init__(self, app: Any, clients: Sequence[str]) -> None:
        self._app, self._clients = app, clients

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI has it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        peer: Peer | None = scope.get("state", {}).get(PEER)
        path, asked = scope.get("path", ""), dict(scope.get("headers", ()))
        if scope["type"] != "http" or peer is None:
            await _say(send, 404, "")
        elif peer.name not in self._clients:
            # 403 and 401 mean other things to a SuperNode, which never comes so far
            known = nearest(peer.name, self._clients)
            await _say(send, 404, f"{peer.name!r} is not among the recipe's clients; {known}")
        elif path == GREETING_PATH:
            await _say(send, 200, peer.name)
        elif not path.startswith(_FLEET) or scope["method"] != "POST":
            await _say(send, 404, "")
        elif not asked.get(b"content-length", b"").isdigit() or int(asked[b"content-length"]) > MOST_REQUEST_BYTES:
            await _say(send, 413, "")
        else:
            await self._app(scope, receive, send)


@final
class Inside:
    """What a SuperLink's own server may ask it for on loopback: the Runtime API, with its secret or a task's token."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI has it."""
        if scope["type"] == "http" and scope["path"].startswith(_RUNTIME):
            await self._app(scope, receive, send)
        else:
            await _say(send, 404, "")


async def _say(send: Any, status: int, words: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words.encode()})


def known_peers(counts: dict[str, list[int]]) -> Any:
    """Uvicorn's HTTP, which also tells whose certificate a connection has, and counts bytes by that name."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Peers(H11Protocol):  # type: ignore[misc, unused-ignore]
        """A connection."""

        def connection_made(self, transport: Any) -> None:
            peer = _peer(transport.get_extra_info("ssl_object").getpeercert(binary_form=True))
            self.app_state = {**self.app_state, PEER: peer}
            self._count = counts.get(peer.name, [0, 0])
            super().connection_made(_Counted(transport, self._count))  # type: ignore[arg-type, unused-ignore]

        def data_received(self, data: bytes) -> None:
            self._count[0] += len(data)
            super().data_received(data)

    return Peers


@final
class _Counted:
    """A transport that counts what is written."""

    def __init__(self, transport: Any, count: list[int]) -> None:
        self._transport, self._written = transport, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write, and count."""
        self._written[1] += len(data)
        self._transport.write(data)


def _peer(certificate: bytes) -> Peer:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    shown = x509.load_der_x509_certificate(certificate)
    names = shown.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    key = shown.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return Peer(foreign_line(str(names[0].value)) if len(names) == 1 else "", key)


def nodes_are_certificates() -> Any:
    """A middleware: whoever calls is the node of its certificate, which is made at its first call, and no other."""
    from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest, RegisterNodeFleetRequest
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.responses import JSONResponse

    keys: dict[str, bytes] = {}

    def refusal(request: Any, peer: Peer) -> str | None:
        message = getattr(request.state, "protobuf_request", None)
        if message is None or isinstance(message, RegisterNodeFleetRequest):
            return "not to be asked for"
        # Flower has checked by now that the signature is this key's, and that the node is
        if b64decode(request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER]) != peer.key:
            return "signed by another key than the certificate's"
        if keys.setdefault(peer.name, peer.key) != peer.key:
            return "another certificate of that name was here before"
        sent = message.messages_list if isinstance(message, PushMessagesRequest) else ()
        if any(each.metadata.src_node_id != message.node.node_id for each in sent):
            return "in another's name"
        state = request.app.state.linkstate_factory.state()
        if isinstance(message, ActivateNodeRequest) and state.get_node_id_by_public_key(peer.key) is None:
            state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, peer.key, 0, name=peer.name)
        return None

    class Nodes(BaseHTTPMiddleware):  # type: ignore[misc, unused-ignore]
        """As Starlette has it."""

        async def dispatch(self, request: Any, call_next: Any) -> Any:
            if request.url.path.startswith(_FLEET):
                reason = refusal(request, getattr(request.state, PEER))
                if reason is not None:
                    return JSONResponse({"detail": reason}, 409)  # Flower lets no other kind of refusal out
            return await call_next(request)

    return Nodes
