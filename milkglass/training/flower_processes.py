"""Flower's SuperLink and SuperNode (flwr 1.41), each in a process of its own: started, awaited, ended by its own pid.

Flower: Beutel et al. 2020, arXiv 2007.14390. Where we differ from its commands:
- A SuperLink's port carries its Control API (submit code, register nodes) beside the Fleet API, and wants no account.
  Ours shows clients the Fleet API alone; the Runtime API is on loopback, the Control API nowhere.
- Flower's TLS names the server only. Ours asks for the client's certificate too: it must be of our CA and bear the name
  of a client of the recipe; Flower's own signature in each request must be made with that certificate's key.
- Flower ships code to clients (a FAB). Ours is a fixed stub that is looked at and never unpacked or run.
- No telemetry, no update checks, no installing at run time.

A process is told what to do in a line of JSON on its standard input, which stays open: when it closes, the one who
started it is gone, and it ends. It says a line of JSON on its standard output once it is ready.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import select
import ssl
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, final

from milkglass.errors import LinkError, foreign_line
from milkglass.flower import SILENT

GREETING_PATH: Final = "/milkglass"
"""Where the server says to whoever has a certificate whether it may come."""
MOST_REQUEST_BYTES: Final = 64 << 20
"""Flower sends tensors in pieces of 5 MiB."""
_CHILDREN: Final = "milkglass.training.flower_children"
_READY_SECONDS: Final = 120.0
_END_SECONDS: Final = 10.0
TRAFFIC: Final = "traffic.json"
_FAB_DATE: Final = (2024, 10, 1, 0, 0, 0)
_FAB_CONFIG: Final = """\
[project]
name = "rounds"
version = "1.0.0"
description = "A stub: milkglass runs its own code, whatever a bundle holds."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "milkglass"

[tool.flwr.app.components]
serverapp = "milkglass.training.federated_serve:none"
clientapp = "milkglass.training.federated_join:none"
"""


def stub_bundle() -> bytes:
    """The app bundle (FAB) that a Flower run must name: no code, and the same bytes everywhere."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("pyproject.toml", _FAB_DATE), _FAB_CONFIG)
    return buffer.getvalue()


def stub_hash() -> str:
    """SHA-256 of the stub, in hexadecimal."""
    return hashlib.sha256(stub_bundle()).hexdigest()


@dataclass(frozen=True)
class Traffic:
    """Bytes of a client's HTTP, heads and polls among them; TLS's own and TCP's come on top."""

    sent: int = 0
    received: int = 0


@final
class FlowerProcess:
    """A SuperLink or a SuperNode. A context: it does not outlive it.

    told: what its process is told; keys go this way, and not into a list of arguments that others can read.
    """

    def __init__(self, kind: str, told: Mapping[str, Any]) -> None:
        self.kind = kind
        self._told = dict(told)
        self._scratch = tempfile.TemporaryDirectory(prefix="milkglass-flower-")  # closed to others
        self._folder = Path(self._scratch.name)
        self._process: subprocess.Popen[bytes] | None = None
        self.secret = secrets.token_bytes(32)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        self._scratch.cleanup()

    @property
    def pid(self) -> int:
        """Of the process, once it is started."""
        return 0 if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> dict[str, Any]:
        """Start it and wait until it is ready; what it then says. Raises LinkError, one line, where it ends instead."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
        environment |= {**SILENT, "FLWR_HOME": str(self._folder), "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
        command = [sys.executable, "-P", "-m", _CHILDREN, self.kind]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the one who started it, who then ends it
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps(self._told | {"secret": self.secret.hex(), "folder": str(self._folder)})
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise LinkError(self.last_words()) from None
        there, _, _ = select.select([self._process.stdout], [], [], _READY_SECONDS)
        said = self._process.stdout.readline() if there else b""
        if not said:
            raise LinkError(self.last_words())
        return dict(json.loads(said))

    def last_words(self) -> str:
        """What it said last, in one line."""
        try:
            lines = (self._folder / "log").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        said = [line.strip() for line in lines if line.strip() and "https://flower.ai" not in line]
        return f"the {self.kind} ended: {foreign_line(said[-1] if said else 'it said nothing')}"

    def end(self) -> None:
        """End it, by its own pid; returns when it is gone."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()

    def traffic(self) -> dict[str, Traffic]:
        """By client, from the client's side; complete once it has ended."""
        try:
            counts = json.loads((self._folder / TRAFFIC).read_text())
        except (OSError, ValueError):
            return {}
        return {name: Traffic(*pair) for name, pair in counts.items()}


def superlink(listen: str, tls: Path, clients: list[str]) -> FlowerProcess:
    """A SuperLink that listens at HOST:PORT (port 0: a free one) for those clients. Once ready it says port, private.

    tls: the server's folder of certificates, checked before. private: where on loopback its Runtime API is.
    """
    return FlowerProcess("superlink", {"listen": listen, "tls": str(tls.resolve()), "clients": clients})


def supernode(address: str, tls: Path, name: str, patience_seconds: float) -> FlowerProcess:
    """A SuperNode that dials the server at HOST:PORT. Once ready it says private: where on loopback its Runtime API is.

    tls: the client's folder of certificates, checked before. It ends where the server is away for patience_seconds.
    """
    told = {"address": address, "tls": str(tls.resolve()), "name": name, "patience_seconds": patience_seconds}
    return FlowerProcess("supernode", told)


def client_context(tls: Path) -> ssl.SSLContext:
    """What a client trusts, and shows. tls: its folder of certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(tls / "rootCA.pem")
    context.load_cert_chain(tls / "client.crt", tls / "client.key")
    return context


def server_context(tls: Path) -> ssl.SSLContext:
    """What a server shows, and whom it lets in: whoever has a certificate of its CA. tls: its folder."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(tls / "server.crt", tls / "server.key")
    context.load_verify_locations(tls / "rootCA.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context
