"""What runs in the processes that `flower_processes` starts: a SuperLink for the server, a SuperNode for a client.

Both are made by flwr 1.41's own functions, beside which stand three things of ours: at a SuperLink a gate that asks who
calls, and what for; a middleware that ties Flower's node to the caller's certificate; at a SuperNode the certificate.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast, final

from milkglass.training.flower_gate import Gate, Inside, known_peers, nodes_are_certificates
from milkglass.training.flower_processes import TRAFFIC, client_context, server_context, stub_bundle, stub_hash
from milkglass.transports.address import every_address

_LOOPBACK: Final = "127.0.0.1"
_LOOK_SECONDS: Final = 0.5
_LONGEST_TOLD: Final = 1 << 20
_WRITING: Final = threading.Lock()


def main() -> None:
    """Be the process that the first argument names, as the line on the standard input tells."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints, prints into the log
    told = json.loads(sys.stdin.buffer.readline(_LONGEST_TOLD))
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def ready(**said: Any) -> None:
        out.write(json.dumps(said) + "\n")
        out.flush()

    {"superlink": _superlink, "supernode": _supernode}[sys.argv[1]](told, ready)


def _end_with_parent() -> None:
    while sys.stdin.buffer.read(1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


# A SuperLink.


def _superlink(told: Mapping[str, Any], ready: Any) -> None:
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.main import create_app
    from starlette.middleware import Middleware

    app = create_app(_superlink_config(bytes.fromhex(told["secret"])), SuperLinkLifespan)
    app.user_middleware.append(Middleware(nodes_are_certificates()))  # the innermost: requests are parsed by then
    _start_run(app)
    counts: dict[str, list[int]] = {name: [0, 0] for name in told["clients"]}
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn has its own, and raises it again at the end
    gate = Gate(app, told["clients"])
    asyncio.run(_listen(told, gate, Inside(app), counts, ready))
    _write_counts(Path(told["folder"]), counts)


def _superlink_config(secret: bytes) -> Any:
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
    from flwr.superlink.config_loader import SuperLinkLifespanConfig

    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=_LOOPBACK,
        port=0,
        insecure=False,
        certificates=None,
        superexec_auth_secret=secret,
        authn_plugin=NoOpControlAuthnPlugin(),  # the Control API, which it is for, is not to be reached
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=":flwr-in-memory:",
        isolation="process",
        runtime_dependency_install=False,
    )


def _start_run(app: Any) -> None:
    """The one run there is, of the bundle that holds nothing."""
    from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
    from flwr.common.serde import fab_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.auth.typing import AccountInfo
    from flwr.supercore.fab import Fab
    from flwr.superlink.servicer.control.control_handlers import start_run

    account = AccountInfo(flwr_aid=NOOP_FLWR_AID, account_name=NOOP_ACCOUNT_NAME)
    request = StartRunRequest(fab=fab_to_proto(Fab(stub_hash(), stub_bundle(), {})))
    start_run(request, account, app.state.linkstate_factory.state(), None)


async def _listen(told: Mapping[str, Any], gate: Any, inside: Any, counts: dict[str, list[int]], ready: Any) -> None:
    import uvicorn

    outer, inner = [_bound(place) for place in every_address(told["listen"])], _bound(f"{_LOOPBACK}:0")
    context = server_context(Path(told["tls"]))
    plain: dict[str, Any] = {"log_config": None, "access_log": False, "http": "h11", "ws": "none", "loop": "asyncio"}
    public = uvicorn.Server(
        uvicorn.Config(
            gate,
            ssl_context_factory=lambda *_: context,
            **(plain | {"http": known_peers(counts), "timeout_graceful_shutdown": 2}),
        )
    )
    private = uvicorn.Server(uvicorn.Config(inside, lifespan="off", timeout_graceful_shutdown=2, **plain))

    async def say_when_ready() -> None:
        while not (public.started and private.started):
            await asyncio.sleep(0.05)
        ready(port=outer[0].getsockname()[1], private=f"{_LOOPBACK}:{inner.getsockname()[1]}")

    async def end_together() -> None:
        await public.serve(outer)
        private.should_exit = True

    await asyncio.gather(private.serve([inner]), end_together(), say_when_ready())


def _bound(place: str) -> socket.socket:
    host, _, port = place.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, int(port)))
    return bound


# A SuperNode.


def _supernode(told: Mapping[str, Any], ready: Any) -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode import fleet_http_connection
    from flwr.supernode import start_client_internal as looping
    from flwr.supernode.nodestate import NodeStateFactory

    tls, counts = Path(told["tls"]), {told["name"]: [0, 0]}
    # Flower has no setting for a client's certificate; a server that asks for one turns away whoever lacks this line
    connecting, looking = cast(Any, fleet_http_connection), cast(Any, looping)
    connecting.FleetHttpClient = _certified_client(tls, Path(told["folder"]), counts)
    looking.time = _Impatient
    states = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    private = _serve_runtime(states, bytes.fromhex(told["secret"]))
    ready(private=private)
    key: Any = load_pem_private_key((tls / "client.key").read_bytes(), None)
    looping.start_client_internal(
        state_factory=states,
        server_address=told["address"],
        node_config={},
        root_certificates=(tls / "rootCA.pem").read_bytes(),
        insecure=False,
        authentication_keys=(key, key.public_key()),
        max_wait_time=told["patience_seconds"],
        isolation="process",
        runtime_api_address=private,
        superexec_auth_secret=bytes.fromhex(told["secret"]),
        runtime_dependency_install=False,
    )


@final
class _Impatient:
    """The clock of a SuperNode's loop, which looks for messages every 3 seconds: a round is five of them."""

    @staticmethod
    def sleep(seconds: float) -> None:
        """Not so long."""
        time.sleep(min(seconds, _LOOK_SECONDS))


def _certified_client(tls: Path, folder: Path, counts: dict[str, list[int]]) -> Any:
    """Flower's HTTP client with the client's certificate, TLS 1.3 alone, to that server alone; and it counts bytes."""
    from flwr.supernode.fleet_http_client import FleetHttpClient

    class Certified(FleetHttpClient):  # type: ignore[misc, unused-ignore]
        """As Flower has it."""

        @classmethod
        def from_server_address(
            cls,
            server_address: str,
            insecure: bool,
            root_certificates: bytes | str | None,
            interceptors: Any,
            *,
            retry_invoker: Any = None,
        ) -> Any:
            del insecure, root_certificates  # what is trusted, and that it is TLS, stands in the context
            context = client_context(tls)
            address = f"https://{server_address}"
            client = cls(address, interceptors=interceptors, verify=context, retry_invoker=retry_invoker)
            client._client.follow_redirects = False  # a server shall not have us call others
            return client

        def _send(self, context: Any, *, stream: bool = False) -> Any:
            response = super()._send(context, stream=stream)
            [count] = counts.values()
            count[0] += len(context.request.content) + _head_bytes(context.request)
            count[1] += len(response.content) + _head_bytes(response)
            _write_counts(folder, counts)
            return response

    return Certified


def _head_bytes(either: Any) -> int:
    return sum(len(name) + len(value) + 4 for name, value in either.headers.raw) + 2


def _serve_runtime(states: Any, secret: bytes) -> str:
    """The SuperNode's Runtime API, on loopback; where."""
    import uvicorn
    from flwr.supernode.main import create_app

    bound = _bound(f"{_LOOPBACK}:0")
    app = create_app(state_factory=states, superexec_auth_secret=secret)
    config = uvicorn.Config(Inside(app), lifespan="off", log_config=None, access_log=False, ws="none")
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, args=([bound],), daemon=True).start()
    while not server.started:
        time.sleep(0.02)
    return f"{_LOOPBACK}:{bound.getsockname()[1]}"


def _write_counts(folder: Path, counts: Mapping[str, list[int]]) -> None:
    with _WRITING:
        beside = folder / f"{TRAFFIC}.new"
        beside.write_text(json.dumps(counts))
        beside.replace(folder / TRAFFIC)


if __name__ == "__main__":
    main()
