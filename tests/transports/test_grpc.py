"""The network's transport passes the suite that every transport passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from milkglass.certificates import load_credentials, make_certificates
from milkglass.codec import Allowed, Limits
from milkglass.messages import Addressed, Message, Responder
from milkglass.transports.base import Transport
from tests.suites.transport import TransportSuite
from tests.wire_server import ServerThread, dial

_ANY_ROWS = Allowed((None, 3), frozenset({torch.float32}))
_TO_SERVER = Limits(4 << 20, {"activations": {"activations": _ANY_ROWS}}, 1000)


class _Sole:
    """A responder as the service of one client, known to it by the suite's name."""

    def __init__(self, responder: Responder) -> None:
        self._responder = responder

    def receive(self, message: Message) -> list[Addressed]:
        return [(message.party, self._responder.reply(message))]


@pytest.mark.parametrize("secure", [True, False])
class TestGrpc(TransportSuite):
    @pytest.fixture(autouse=True)
    def _places(self, tmp_path: Path, secure: bool) -> Iterator[None]:
        make_certificates(tmp_path / "pki", "localhost", ["client"])
        self._folder, self._secure = tmp_path, secure
        with contextlib.ExitStack() as self._open:
            yield

    def make(self, responder: Responder) -> Transport:
        own, theirs = self._folder / "pki" / "client", self._folder / "pki" / "localhost"
        server = ServerThread(
            load_credentials(theirs, "server") if self._secure else None,
            self._folder / "server",
            _Sole(responder),
            limits=_TO_SERVER,
            clients=("client",),
        )
        self._open.enter_context(server)
        credentials = load_credentials(own, "client") if self._secure else None
        transport = dial(
            server.port,
            credentials,
            self._folder / "client",
            party="client",
            limits=Limits(4 << 20, {"gradients": {"gradient": _ANY_ROWS}}, 1000),
        )
        self._open.callback(transport.close)
        return transport
