"""Where a party listens: HOST:PORT, checked before anything dials.

gRPC takes much more than that, other schemes and named ports among it, and turns port 65537 into port 1: a slip of the
pen would be dialed for minutes.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Final

from milkglass.errors import LinkError

_HOST: Final = r"[A-Za-z0-9._-]+"  # a name, or an IPv4 address
_PORT: Final = r"[0-9]{1,5}"
_HIGHEST_PORT: Final = 65_535
_TRIES: Final = 100  # for a port that is free at every address


def checked_address(text: str, what: str, *, free_port: bool = False) -> str:
    """The same text, where it is HOST:PORT or [IPV6]:PORT. Raises LinkError, which begins with `what`, if it is not.

    free_port: port 0 is allowed, for one who listens: any port that is free.
    """
    lowest = 0 if free_port else 1
    host, colon, port = text.rpartition(":")
    if not colon or not _is_host(host):
        raise LinkError(f"{what} {text!r}: expected HOST:PORT, such as example.org:7499, 10.0.0.1:7499 or [::1]:7499")
    if not re.fullmatch(_PORT, port) or not lowest <= int(port) <= _HIGHEST_PORT:
        raise LinkError(f"{what} {text!r}: the port is {port!r}; expected a number from {lowest} to {_HIGHEST_PORT}")
    return text


def every_address(address: str) -> list[str]:
    """IP:PORT for each address of this machine that HOST:PORT is, at one port; port 0: one that is free at them all.

    gRPC listens where it can and calls that success: where `localhost` is two addresses and another program has the
    port at one of them, half of the clients would come to that program. Raises LinkError where one is in use, or none
    is this machine's.
    """
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:  # no such name
        found = []
    for _ in range(1 if int(port) else _TRIES):
        with ExitStack() as sockets:
            try:
                places = _bound(dict.fromkeys((family, place) for family, _, _, _, place in found), sockets)
            except OSError:
                continue
        if places:
            return places
    raise cannot_listen(address)


def cannot_listen(address: str) -> LinkError:
    """What is said where nobody can listen there."""
    return LinkError(f"cannot listen at {address}: it is in use, or no address of this machine")


def _bound(wanted: Iterable[tuple[int, Any]], sockets: ExitStack) -> list[str]:
    """Where sockets could be bound, all at the port of the first. Raises OSError where one is in use."""
    port, places = 0, []
    for family, (host, given, *rest) in wanted:
        probe = sockets.enter_context(socket.socket(family, socket.SOCK_STREAM))
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does: what has just closed is no matter
        try:
            probe.bind((host, given or port, *rest))
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # such as ::1 where there is no IPv6
                raise
            continue
        port = probe.getsockname()[1]
        places.append(f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}")
    return places


def _is_host(text: str) -> bool:
    if not (text.startswith("[") and text.endswith("]")):
        return re.fullmatch(_HOST, text) is not None
    try:
        ipaddress.IPv6Address(text[1:-1])
    except ValueError:
        return False
    return True
