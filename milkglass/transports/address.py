"""Where a party listens: HOST:PORT, checked before anything dials.

gRPC takes much more than that, other schemes and named ports among it, and turns port 65537 into port 1: a slip of the
pen would be dialed for minutes.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from milkglass.errors import LinkError

_HOST: Final = r"[A-Za-z0-9._-]+"  # a name, or an IPv4 address
_PORT: Final = r"[0-9]{1,5}"
_HIGHEST_PORT: Final = 65_535


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


def _is_host(text: str) -> bool:
    if not (text.startswith("[") and text.endswith("]")):
        return re.fullmatch(_HOST, text) is not None
    try:
        ipaddress.IPv6Address(text[1:-1])
    except ValueError:
        return False
    return True
