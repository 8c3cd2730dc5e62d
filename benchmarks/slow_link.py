"""Two network namespaces with a slow, long wire between them, for kernels without netem. Linux, root.

Each host has a TUN device; this process is the wire: a packet waits for its turn at the rate, then for the delay, and
comes out at the other end. Segments that the kernel has not cut yet (a virtio-net header says so) pass whole, and pay
for the headers of all packets that they stand for.

    python -m benchmarks.slow_link FIRST:ADDRESS SECOND:ADDRESS --rate 100e6 --delay 0.025
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_NEW_NETWORK: Final = 0x40000000  # CLONE_NEWNET
_SET_INTERFACE, _SET_OFFLOAD = 0x400454CA, 0x400454D0  # TUNSETIFF, TUNSETOFFLOAD
_TUN_PLAIN_WITH_HEADER: Final = 0x0001 | 0x1000 | 0x4000  # IFF_TUN, IFF_NO_PI, IFF_VNET_HDR
_CHECKSUM_AND_TCP: Final = 0x01 | 0x02 | 0x04  # TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6
_HEADER_BYTES: Final = 10  # struct virtio_net_hdr
_FRAMING_BYTES: Final = 14  # Ethernet
_IP_AND_TCP_BYTES: Final = 52
_QUEUE_SECONDS: Final = 0.2  # a queue at the sender holds so much


def enter(namespace: str) -> None:
    """Move this thread, and all that it starts from now on, into a network namespace."""
    with Path("/var/run/netns", namespace).open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {namespace}")


@contextlib.contextmanager
def slow_link(
    rate: float, delay_seconds: float, congestion: str = "cubic"
) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """((namespace, address), (namespace, address)) of two hosts; removed at the end.

    rate: bit/s. delay_seconds: one way. congestion: TCP's way to find its rate.
    """
    ends = [(f"mg{os.getpid()}-{side}", f"10.213.77.{number}") for number, side in enumerate("ab", start=1)]
    switch = None
    try:
        for namespace, _ in ends:
            subprocess.run(["ip", "netns", "add", namespace], check=True)
            subprocess.run(["ip", "-n", namespace, "link", "set", "lo", "up"], check=True)
        told = [f"{namespace}:{address}" for namespace, address in ends]
        command = [sys.executable, "-m", "benchmarks.slow_link", *told, f"--rate={rate}", f"--delay={delay_seconds}"]
        switch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert switch.stdout is not None
        if switch.stdout.readline() != "ready\n":
            raise OSError("the wire between the namespaces could not be laid")
        for namespace, address in ends:
            route = f"route replace 10.213.77.0/24 dev wire src {address} congctl {congestion}"
            subprocess.run(["ip", "-n", namespace, *route.split()], check=True)
        yield ends[0], ends[1]
    finally:
        if switch is not None:
            switch.terminate()
            switch.wait()
        for namespace, _ in ends:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def _device(namespace: str, address: str) -> int:
    """A TUN device in a namespace, up, with its address; the file to read and write packets."""
    with Path("/proc/thread-self/ns/net").open() as home:
        enter(namespace)
        file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(file, _SET_INTERFACE, struct.pack("16sH22x", b"wire", _TUN_PLAIN_WITH_HEADER))
        fcntl.ioctl(file, _SET_OFFLOAD, _CHECKSUM_AND_TCP)
        ctypes.CDLL(None, use_errno=True).setns(home.fileno(), _NEW_NETWORK)
    for words in (f"address add {address}/24 dev wire", "link set wire mtu 1500 up"):
        subprocess.run(["ip", "-n", namespace, *words.split()], check=True)
    return file


def _wire_bytes(packet: bytes) -> int:
    """What it has on the wire, with the headers of each packet that it will be cut into."""
    length, size = len(packet) - _HEADER_BYTES, int.from_bytes(packet[4:6], "little")
    count = -(-length // size) if packet[1] and size else 1
    return length + count * _FRAMING_BYTES + (count - 1) * _IP_AND_TCP_BYTES


def _run(files: list[int], rate: float, delay_seconds: float) -> None:
    under_way: list[deque[tuple[float, bytes]]] = [deque(), deque()]
    free_at = [0.0, 0.0]
    while True:
        due = [queue[0][0] for queue in under_way if queue]
        wait = max(0.0, min(due) - time.monotonic()) if due else None
        for file in select.select(files, [], [], wait)[0]:
            side = files.index(file)
            with contextlib.suppress(BlockingIOError):
                packet = os.read(file, 1 << 17)
                now = time.monotonic()
                if free_at[side] - now < _QUEUE_SECONDS:  # else the queue is full, and it is lost
                    free_at[side] = max(free_at[side], now) + 8 * _wire_bytes(packet) / rate
                    under_way[side].append((free_at[side] + delay_seconds, packet))
        for side, queue in enumerate(under_way):
            while queue and queue[0][0] <= time.monotonic():
                with contextlib.suppress(OSError):  # the host is gone
                    os.write(files[1 - side], queue.popleft()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ends", nargs=2)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--delay", type=float, required=True)
    arguments = parser.parse_args()
    devices = [_device(*end.split(":")) for end in arguments.ends]
    print("ready", flush=True)
    _run(devices, arguments.rate, arguments.delay)
