"""Bytes that this process has sent and received over TCP, as the kernel has counted them.

Collective operations of gloo travel over sockets that it makes by itself, so its bytes are counted where they leave:
the kernel keeps count for every connection (`TCP_INFO`, Linux 4.19 and later). Retransmissions are counted, headers
below TCP's payload are not. Bytes of connections that were closed between two looks are lost.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_RECEIVED_AT: Final = 128  # struct tcp_info, linux/tcp.h: tcpi_bytes_received
_SENT_AT: Final = 200  # tcpi_bytes_sent
_LENGTH: Final = _SENT_AT + 8


@dataclass(frozen=True)
class TcpTraffic:
    """sent, received: bytes of payload since the connections began."""

    sent: int
    received: int

    def __add__(self, other: TcpTraffic) -> TcpTraffic:
        return TcpTraffic(self.sent + other.sent, self.received + other.received)

    def __sub__(self, other: TcpTraffic) -> TcpTraffic:
        return TcpTraffic(self.sent - other.sent, self.received - other.received)


def tcp_traffic() -> TcpTraffic | None:
    """All that this process's TCP connections have carried so far; None where the system does not count."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        return None
    sent = received = 0
    for descriptor in descriptors.iterdir():
        try:
            if not str(descriptor.readlink()).startswith("socket:"):
                continue
            told = _told(int(descriptor.name))
        except OSError:  # closed meanwhile, or no connection
            continue
        if told is None:
            continue
        if len(told) < _LENGTH:
            return None
        received += struct.unpack_from("=Q", told, _RECEIVED_AT)[0]
        sent += struct.unpack_from("=Q", told, _SENT_AT)[0]
    return TcpTraffic(sent, received)


def _told(descriptor: int) -> bytes | None:
    """The kernel's count of a connection; None where the socket is not TCP's."""
    with socket.socket(fileno=os.dup(descriptor)) as own:
        if own.family not in (socket.AF_INET, socket.AF_INET6) or own.type != socket.SOCK_STREAM:
            return None
        return own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
