"""A volunteer's place in the network: one event loop in a thread, hivemind's daemon as the one child, and the DHT.

Training runs in the main thread and asks this one (`Node.run`). The child has a session of its own, so that Ctrl-C
reaches the training alone, which then leaves in order: say goodbye, stop the handlers, end the daemon, wait for it. If
this process is killed, the daemon ends by itself as its pipe breaks.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeVar, final

from milkglass.collaboration.engine import (
    P2P,
    DHTNode,
    DHTRecord,
    MSGPackSerializer,
    Multiaddr,
    P2PDaemonError,
    PeerID,
    RecordValidatorBase,
    ValidationError,
)
from milkglass.collaboration.identity import Identity
from milkglass.errors import LinkError, first_line

START_SECONDS: Final = 30.0
_LEAVE_SECONDS: Final = 10.0
_DAEMON_SECONDS: Final = 2.0
_CANCELLATIONS: Final = 3
_CANCEL_SECONDS: Final = 0.5
_FIND_AGAIN_SECONDS: Final = 0.05
T = TypeVar("T")
BROKEN: Final = (OSError, P2PDaemonError, asyncio.IncompleteReadError)
"""What is raised where the daemon has ended, or a call of it fails."""


@final
class Node:
    """A running place in the network: `with Node(...) as node`.

    identity: who this is. peers: addresses of any that are in it already; none for the first. listen: (host, port), 0
    for a free port. reachable: False for one behind a firewall, who only calls and is never called. validator: what
    the DHT believes, of others and of ours. look_around: asked with the connected daemon before the DHT is joined: it
    may refuse.
    """

    def __init__(
        self,
        identity: Identity,
        validator: RecordValidatorBase,
        *,
        peers: Sequence[str] = (),
        listen: tuple[str, int] = ("127.0.0.1", 0),
        reachable: bool = True,
        look_around: Callable[[P2P], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self.identity, self.reachable, self._look_around = identity, reachable, look_around
        self._peers, self._listen, self._validator = tuple(check_address(peer) for peer in peers), listen, validator
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_keep_quiet)
        self._daemons: list[asyncio.SubprocessTransport] = []
        self._start_process = self._loop.subprocess_exec
        self._loop.subprocess_exec = self._start_daemon  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._serve, name="collaboration", daemon=True)
        self.p2p: Any = None
        self.dht: Any = None

    def __enter__(self) -> Node:
        self._thread.start()
        try:
            self.run(self._start())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def addresses(self) -> list[str]:
        """Where others reach this one, loopback last; none where nobody does."""
        if not self.reachable:
            return []
        found = [str(address) for address in self.run(self.p2p.get_visible_maddrs())]
        return sorted(found, key=lambda address: "/127.0.0.1/" in address)

    @property
    def alive(self) -> bool:
        """Whether the daemon runs."""
        return self.p2p is not None and self.p2p._child.returncode is None

    def run(self, work: Coroutine[Any, Any, T], timeout_seconds: float | None = None) -> T:
        """Do it in the event loop, and wait. Raises TimeoutError; LinkError where the daemon has ended."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_seconds)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TimeoutError from None
        except BROKEN as error:
            if self.p2p is not None and self._has_ended():
                raise LinkError(
                    f"the peer-to-peer daemon has ended ({first_line(error)}); start the volunteer again"
                ) from None
            raise

    def begin(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Do it in the event loop, and do not wait."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _has_ended(self) -> bool:
        """Whether the daemon has ended. Its calls fail a moment before that is known."""
        end = time.monotonic() + _DAEMON_SECONDS
        while self.alive and time.monotonic() < end:
            time.sleep(_FIND_AGAIN_SECONDS)
        return not self.alive

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _start_daemon(self, *arguments: Any, **options: Any) -> Any:
        """As the loop's own, for hivemind, which does not ask: no Ctrl-C of this terminal reaches the daemon."""
        found = await self._start_process(*arguments, start_new_session=True, **options)
        self._daemons.append(found[0])
        return found

    async def _start(self) -> None:
        host, port = self._listen
        if self.reachable:
            _check_free(host, port)
        kind = "ip6" if ":" in host else "ip4"
        with TemporaryDirectory(prefix="milkglass-") as folder:
            key = Path(folder) / "identity"
            self.identity.write(key)
            try:
                self.p2p = await P2P.create(
                    initial_peers=list(self._peers),
                    identity_path=str(key),
                    check_if_identity_free=False,
                    host_maddrs=[f"/{kind}/{host}/tcp/{port}"] if self.reachable else None,
                    no_listen=not self.reachable,
                    dht_mode="server" if self.reachable else "client",
                    startup_timeout=START_SECONDS,
                    auto_nat=False,
                    nat_port_map=False,
                    use_relay=False,
                )
            except P2PDaemonError as error:
                text = first_line(error)
                raise self._no_answer() if "bootstrap" in text else LinkError(f"the daemon: {text}") from None
        if self._look_around is not None:
            await self._look_around(self.p2p)
        try:
            self.dht = await DHTNode.create(
                p2p=self.p2p,
                initial_peers=list(self._peers) or None,
                client_mode=not self.reachable,
                record_validator=self._validator,
                num_replicas=5,
                cache_locally=False,
                cache_nearest=0,
            )
        except ValidationError as error:  # its two reasons: the other's clock, or the other cannot call back
            hint = (
                "are the clocks right?"
                if "local time" in str(error)
                else "expected --listen with an address that it reaches, or --client-mode"
            )
            raise LinkError(f"{first_line(error)}; {hint}") from None
        except Exception:  # whatever hivemind raises where the first ping is not answered
            raise self._no_answer() from None
        self.dht.protocol._validate_dictionary = partial(_keep_valid, self._validator)

    def _no_answer(self) -> LinkError:
        return LinkError(
            f"nobody answers at {', '.join(self._peers)}; expected an address that a running `milkglass collab` prints"
        )

    def _stop(self) -> None:
        for work in (self._end, self._hang_up):
            with contextlib.suppress(Exception):
                self.run(work(), _LEAVE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_LEAVE_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()

    async def _end(self) -> None:
        if self.dht is not None:
            with contextlib.suppress(Exception):  # a daemon that was killed does not answer
                await asyncio.wait_for(self.dht.shutdown(), _DAEMON_SECONDS)
        if self.p2p is not None:
            await self.p2p.shutdown()
        for daemon in self._daemons:  # hivemind forgets one that did not come to work
            daemon.close()
        end = self._loop.time() + _DAEMON_SECONDS
        while any(daemon.get_returncode() is None for daemon in self._daemons) and self._loop.time() < end:
            await asyncio.sleep(_FIND_AGAIN_SECONDS)
        for _ in range(_CANCELLATIONS):  # hivemind's matchmaking waits for others even as it is cancelled
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            if others:
                await asyncio.wait(others, timeout=_CANCEL_SECONDS)

    async def _hang_up(self) -> None:
        """Close the connections to the daemon of calls that were cancelled: hivemind leaves them open."""
        for connection in list(getattr(self._loop, "_transports", {}).values()):  # asyncio tells them nowhere else
            connection.abort()
        await asyncio.sleep(0)  # they are closed in the loop's next turn


@final
class Notices:
    """The DHT as hivemind's matchmaking wants it: coroutines in our own loop, in place of another process.

    Matchmaking asks anew as soon as it is answered, thousands of times a second where the answer is near; here it
    waits a moment before each.
    """

    def __init__(self, node: Node) -> None:
        self.peer_id = node.p2p.peer_id
        self._dht = node.dht

    async def store(
        self, key: str, value: object, expiration_time: float, subkey: object = None, return_future: bool = True
    ) -> bool:
        """As hivemind's."""
        del return_future
        return bool(await self._dht.store(key, value, expiration_time, subkey=subkey))

    async def get(self, key: str, latest: bool = False, return_future: bool = True) -> Any:
        """As hivemind's."""
        del return_future
        await asyncio.sleep(_FIND_AGAIN_SECONDS)
        return await self._dht.get(key, latest=latest)


def _keep_valid(validator: RecordValidatorBase, key: bytes, dictionary: Any) -> bool:
    """Take out of a dictionary what is not valid. hivemind's own throws all of it away for one entry.

    An entry was valid when it was stored, and its owner's token has been revoked or has expired since.
    """
    with dictionary.freeze():
        entries = [(subkey, entry.value, entry.expiration_time) for subkey, entry in dictionary.items()]
    for subkey, value, expiration_time in entries:
        if not validator.validate(DHTRecord(key, MSGPackSerializer.dumps(subkey), value, expiration_time)):
            del dictionary[subkey]
    return True


def check_address(address: str) -> str:
    """A peer's address, such as /ip4/192.0.2.7/tcp/7000/p2p/12D3KooW...; raises LinkError, one line."""
    try:
        read = Multiaddr(address)
        PeerID.from_base58(read["p2p"])
    except Exception:
        raise LinkError(
            f"address {address!r}: expected one that `milkglass collab` prints, such as "
            "/ip4/192.0.2.7/tcp/7000/p2p/12D3KooW..."
        ) from None
    return address


def read_listen(text: str) -> tuple[str, int]:
    """HOST:PORT, port 0 for a free one; raises LinkError, one line."""
    host, colon, port = text.rpartition(":")
    host = host.strip("[]")
    try:
        if not colon or not 0 <= int(port) <= 65535:
            raise ValueError
        ipaddress.ip_address(host)
    except ValueError:
        raise LinkError(
            f"--listen {text!r}: expected an IP address of this machine and a port, such as 0.0.0.0:7000"
        ) from None
    return host, int(port)


def peer_of(address: str) -> bytes:
    """The peer id in an address."""
    return bytes(PeerID.from_base58(Multiaddr(check_address(address))["p2p"]).to_bytes())


def on_loopback(address: str) -> bool:
    """Whether a peer's address is one of this machine alone."""
    return address.startswith(("/ip4/127.", "/ip6/::1/", "/dns/localhost/", "/dns4/localhost/", "/dns6/localhost/"))


def check_reachable(listen: tuple[str, int], peers: Sequence[str]) -> None:
    """Raise LinkError where those at the addresses are on other machines, and listen is for this one alone."""
    host, port = listen
    if ipaddress.ip_address(host).is_loopback and not all(map(on_loopback, peers)):
        raise LinkError(
            f"--listen {host}:{port}: others cannot reach a loopback address; expected --listen 0.0.0.0:PORT, or "
            "--client-mode"
        )


def _check_free(host: str, port: int) -> None:
    """Raise LinkError if nobody can listen there. libp2p would share a port that is taken, without a word."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise LinkError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; expected an address of this machine and a "
                "free port"
            ) from None


def _keep_quiet(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """hivemind leaves tasks that are still waiting; what went wrong is told by whoever asked for it."""
    del loop, context
