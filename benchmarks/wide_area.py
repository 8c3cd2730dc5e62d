"""Over a long, slow line: 50 ms of added round trip, 100 Mbit/s, between network namespaces of this machine.

    python -m benchmarks.wide_area [--data DIR] [--blocks 4] [--out FILE.json]

Linux and root; elsewhere it says why it is skipped. slow_link.py is the line; it makes the namespaces and removes them.
Wanted: micro-batches at batch 256 at least 1.5 x as fast as the plain schedule; a message of 64 KiB there and back in
one round trip of the line once warm, not two: 50 ms, and 5.5 ms each way for the bits themselves.

TCP's congestion control is told: cubic is most systems' own. bbr never sees more of the line than a small message asks
for, and then paces the next one as if that were all: 64 KiB take 1.5 round trips, over bare gRPC as well.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks import echo
from benchmarks.setting import command_line, machine_line, write_result
from benchmarks.slow_link import slow_link
from benchmarks.turns import Worker, alternate, ratio
from benchmarks.two_parties import CASES, Case, Place, place, recipe_of, records_file, two_parties

_BLOCK_SECONDS: Final = 8.0
_BATCH: Final = 256
_MESSAGES: Final = 20


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with the data sets; without it random records")
    parser.add_argument("--blocks", type=int, default=4, help="of about eight seconds, of each contender")
    parser.add_argument("--pieces", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    parser.add_argument("--rate", type=float, default=100e6, help="bit/s")
    parser.add_argument("--delay", type=float, default=0.025, help="one way, seconds")
    parser.add_argument("--congestion", default="cubic", help="TCP's congestion control")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    records = "data sets" if arguments.data else "random records"
    print(f"{command_line()}\n{machine_line()}; {records}, {arguments.congestion}\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces are removed
    reason = _why_not()
    if reason is not None:
        print(f"skipped: {reason}")
        return
    rows: list[dict[str, Any]] = []
    link = slow_link(arguments.rate, arguments.delay, arguments.congestion)
    with link as (there, here), tempfile.TemporaryDirectory() as name:
        where = place(Path(name), there[1], server_namespace=there[0], client_namespace=here[0])
        print("| message there and back | milliseconds | in round trips, without its bits |\n|---|---|---|")
        for size_kib in (1, 64, 1024):
            rows.append(message_time(where, size_kib, arguments.rate, arguments.delay))
            told = rows[-1]
            print(f"| {size_kib} KiB | {told['milliseconds']:.1f} | {told['round_trips']:.2f} |", flush=True)
        heads = " | ".join(f"{pieces} pieces" for pieces in arguments.pieces)
        print(f"\n| network | cut | plain, ms | {heads} |\n|{'---|' * (len(arguments.pieces) + 3)}")
        for case in (CASES[number] for number in arguments.cases):
            rows.append(measure(case, where, arguments.pieces, arguments.data, arguments.blocks))
            told = rows[-1]
            cells = ["{median:.2f} ({low:.2f}-{high:.2f})".format(**each) for each in told["speedup"].values()]
            print(f"| {case.name} | {case.at} | {told['plain_milliseconds']:.0f} | {' | '.join(cells)} |", flush=True)
    if arguments.out:
        write_result(arguments.out, rows)


def _why_not() -> str | None:
    """Why this machine cannot do it; None where it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid():
        return "network namespaces need root"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    probe = f"mg-probe-{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "there is no `ip` (iproute2)"
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    return f"no network namespace can be made: {made.stderr.strip()}" if made.returncode else None


def message_time(where: Place, size_kib: int, rate: float, delay_seconds: float) -> dict[str, Any]:
    """How long one message takes there and back, one after the other, once warm."""
    server = Worker(echo.serve_ours, where, size_kib)
    client = None
    try:
        client = Worker(echo.ask_ours, where, size_kib, server.told(), echo.WARM_UP)
        client.told()
        seconds = statistics.median(client.work(1) for _ in range(_MESSAGES))
    finally:
        for worker in (client, server):
            if worker is not None:
                worker.end()
    bits_seconds = 2 * 8 * 1024 * size_kib / rate
    return {
        "message_kib": size_kib,
        "milliseconds": 1000 * seconds,
        "round_trips": (seconds - bits_seconds) / (2 * delay_seconds),
    }


def measure(case: Case, where: Place, pieces: list[int], data: Path | None, blocks: int) -> dict[str, Any]:
    """Throughput with micro-batches as a multiple of the plain schedule's."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as ends:
        folder = Path(name)
        records = records_file(case.shape, data, folder)
        contenders: dict[str, list[Worker]] = {}
        for count in (1, *pieces):
            recipe = recipe_of(case, records, batch_size=_BATCH, micro_batches=count)
            contenders[str(count)] = list(ends.enter_context(two_parties(recipe, where, folder / str(count))))
        steps = max(2, math.ceil(_BLOCK_SECONDS * 2 / contenders["1"][0].work(2)))
        found = {
            n: [block.seconds for block in each] for n, each in alternate(contenders, blocks, steps, untimed=1).items()
        }
    return {
        "network": case.name,
        "at": case.at,
        "batch": _BATCH,
        "steps_in_a_block": steps,
        "plain_milliseconds": 1000 * statistics.median(found["1"]),
        "speedup": {str(count): asdict(ratio(found["1"], found[str(count)])) for count in pieces},
    }


if __name__ == "__main__":
    main()
