"""One tensor there and back over loopback with mutual TLS: CPU of both processes against bare gRPC, and bytes.

    python -m benchmarks.round_trip [--blocks 12] [--sizes 64 1024] [--out FILE.json]

See echo.py for what is compared. The contenders take turns, in blocks of less than a second. Wanted: CPU at most 1.5 x
that of the bare stream with asyncio at both ends; gRPC's payload at most 1.01 x the tensors' bytes from 64 KiB on.
Socket is what TCP carried both ways, with TLS and HTTP/2, for each byte of a tensor.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks import echo
from benchmarks.setting import command_line, machine_line, write_result
from benchmarks.turns import Worker, alternate, ratio
from benchmarks.two_parties import place

_BLOCK_SECONDS: Final = 0.5
_WAYS: Final = {
    "ours": (echo.serve_ours, echo.ask_ours),
    "asyncio": (echo.serve_asyncio, echo.ask_asyncio),
    "blocking": (echo.serve_blocking, echo.ask_blocking),
}


def main() -> None:
    """Measure every size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 256, 1024], help="of the tensor, KiB")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print(f"{command_line()}\n{machine_line()}\n")
    print("| tensor | CPU, ms: ours | bare asyncio | bare blocking | ours / asyncio | / blocking | payload | socket |")
    print(f"|{'---|' * 8}")
    rows = []
    for size_kib in arguments.sizes:
        row = measure(size_kib, arguments.blocks)
        rows.append(row)
        cells = [f"{row['cpu_milliseconds'][way]:.2f}" for way in _WAYS]
        cells += ["{median:.2f} ({low:.2f}-{high:.2f})".format(**row[f"to_{way}"]) for way in ("asyncio", "blocking")]
        print(f"| {size_kib} KiB | {' | '.join(cells)} | {row['payload']:.4f} | {row['socket']:.4f} |", flush=True)
    if arguments.out:
        write_result(arguments.out, rows)


def measure(size_kib: int, blocks: int) -> dict[str, Any]:
    """CPU of a round trip each way, and what crosses in ours for a byte of a tensor."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as ends:
        where = place(Path(name))
        contenders: dict[str, list[Worker]] = {}
        for way, (serve, ask) in _WAYS.items():
            server = Worker(serve, where, size_kib)
            ends.callback(server.end)
            client = Worker(ask, where, size_kib, server.told())
            ends.callback(client.end)
            client.told()
            contenders[way] = [client, server]
        ours = contenders["ours"][0]
        count = max(20, math.ceil(_BLOCK_SECONDS * 20 / ours.work(20)))
        before = ours.reported
        found = alternate(contenders, blocks, count)
        crossed = [(b - a) / (blocks * count * 2 * 1024 * size_kib) for a, b in zip(before, ours.reported, strict=True)]
    cpu = {way: [block.cpu_seconds for block in each] for way, each in found.items()}
    clock = {way: [block.seconds for block in each] for way, each in found.items()}
    ones = [1.0] * blocks
    return {
        "tensor_kib": size_kib,
        "round_trips_in_a_block": count,
        "cpu_milliseconds": {way: 1000 * ratio(each, ones).median for way, each in cpu.items()},
        "clock_milliseconds": {way: 1000 * ratio(each, ones).median for way, each in clock.items()},
        **{f"to_{way}": asdict(ratio(cpu["ours"], cpu[way])) for way in ("asyncio", "blocking")},
        "payload": crossed[0],
        "socket": crossed[1],
    }


if __name__ == "__main__":
    main()
