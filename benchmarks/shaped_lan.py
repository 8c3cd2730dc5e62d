"""A local network on one machine whose links have a rate: namespaces on a bridge, token buckets both ways. Linux, root.

    with shaped_lan(4, "100mbit") as lan:
        ...  # a process calls slow_link.enter(lan.hosts[0].namespace), and its sockets are there
        lan.shape("1gbit")

Each host has one interface, `eth0`, that leads to a bridge in a namespace of its own; nothing leaves these namespaces.
What a host sends is held back at its own end, what it receives at the bridge's. There is no delay beyond that of the
machine: for a long line, see slow_link.py. All is removed at the end, also after an exception and on SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

INTERFACE: Final = "eth0"
_NETWORK: Final = "10.214.77"
_MOST_HOSTS: Final = 200
_QUEUE: Final = "50ms"
_BURSTS: Final = {"10gbit": "2mb", "1gbit": "256kb"}
_BURST: Final = "32kb"  # at lower rates


@dataclass(frozen=True)
class Host:
    """One end of a link."""

    namespace: str
    address: str


@final
class ShapedLan:
    """The hosts, and the means to change what their links carry."""

    def __init__(self, hosts: tuple[Host, ...], switch: str) -> None:
        self.hosts = hosts
        self._switch = switch

    def shape(self, rate: str | Sequence[str | None] | None) -> None:
        """Let every link carry so much each way, as `tc` writes it ("100mbit", "1gbit"); None: as much as it can.

        A sequence: one for each host, in their order.
        """
        rates = [rate] * len(self.hosts) if rate is None or isinstance(rate, str) else list(rate)
        for number, (host, each) in enumerate(zip(self.hosts, rates, strict=True)):
            for namespace, device in ((host.namespace, INTERFACE), (self._switch, _port(number))):
                place = ["ip", "netns", "exec", namespace, "tc", "qdisc"]
                if each is None:
                    subprocess.run([*place, "del", "dev", device, "root"], capture_output=True, check=False)
                    continue
                bucket = ["tbf", "rate", each, "burst", _BURSTS.get(each, _BURST), "latency", _QUEUE]
                subprocess.run([*place, "replace", "dev", device, "root", *bucket], check=True)


@contextlib.contextmanager
def shaped_lan(count: int, rate: str | Sequence[str | None] | None, congestion: str = "cubic") -> Iterator[ShapedLan]:
    """So many hosts, and a link each. congestion: TCP's way to find its rate, told and not left to the machine."""
    if not 1 <= count <= _MOST_HOSTS:
        raise ValueError(f"{count} hosts; expected 1 to {_MOST_HOSTS}")
    prefix = f"mg{os.getpid()}"
    switch = f"{prefix}-switch"
    hosts = tuple(Host(f"{prefix}-{number}", f"{_NETWORK}.{number + 1}") for number in range(count))
    with _ending_on_sigterm():
        try:
            _add(switch)
            _ip(switch, "link add bridge type bridge")
            _ip(switch, "link set bridge up")
            for number, host in enumerate(hosts):
                _add(host.namespace)
                _ip(switch, f"link add {_port(number)} type veth peer name {INTERFACE} netns {host.namespace}")
                _ip(switch, f"link set {_port(number)} master bridge up")
                _ip(host.namespace, f"addr add {host.address}/24 dev {INTERFACE}")
                _ip(host.namespace, f"link set {INTERFACE} up")
                route = f"route replace {_NETWORK}.0/24 dev {INTERFACE} src {host.address} congctl {congestion}"
                _ip(host.namespace, route)
            lan = ShapedLan(hosts, switch)
            lan.shape(rate)
            yield lan
        finally:
            for namespace in (switch, *(host.namespace for host in hosts)):
                subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def why_not() -> str | None:
    """Why there can be no shaped network on this machine; None where there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid():
        return "network namespaces need root"
    try:
        with shaped_lan(1, "100mbit"):
            return None
    except FileNotFoundError as error:
        return f"there is no `{error.filename}` (iproute2)"
    except subprocess.CalledProcessError as error:
        return f"`{' '.join(error.cmd)}` is not permitted here, or its kernel module is missing"


def sent_bytes(interface: str) -> int:
    """What an interface of this process's namespace has sent so far, headers of packets included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == interface:
            return int(counts.split()[8])
    raise LookupError(f"there is no interface {interface}")


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit, so that what is in `finally` is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _port(number: int) -> str:
    return f"port{number}"


def _add(namespace: str) -> None:
    subprocess.run(["ip", "netns", "add", namespace], check=True, stderr=subprocess.DEVNULL)
    _ip(namespace, "link set lo up")


def _ip(namespace: str, words: str) -> None:
    subprocess.run(["ip", "-n", namespace, *words.split()], check=True, stderr=subprocess.DEVNULL)
