"""A place in the network is left without a trace: no connection stays open, however its calls ended."""

from __future__ import annotations

import asyncio
import gc
import socket
import warnings

import pytest

from milkglass.collaboration.admission import OpenDoor
from milkglass.collaboration.identity import new_identity
from milkglass.collaboration.node import Node
from milkglass.collaboration.signed_records import SignedRecords

pytestmark = pytest.mark.slow


def test_what_is_open_is_closed_as_it_ends() -> None:
    """hivemind leaves the connections of calls that were broken off to the garbage collector."""
    own = new_identity()
    with socket.create_server(("127.0.0.1", 0)) as server:
        with Node(own, SignedRecords(own, OpenDoor())) as node:
            opened = [node.run(asyncio.open_connection(*server.getsockname())) for _ in range(2)]
            assert not any(writer.transport.is_closing() for _, writer in opened)
        assert all(writer.transport.is_closing() for _, writer in opened)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            opened.clear()
            gc.collect()
        for _ in range(2):
            with server.accept()[0] as there:
                assert there.recv(1) == b""
