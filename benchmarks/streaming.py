"""Streaming distance correlation of a whole data set: peak memory, time, and agreement with the direct form.

    python -m benchmarks.streaming [--records 20000] [--threads 1] [--out streaming.json]

Each measurement runs in a fresh process, so that its peak memory is its own (libraries and the data are in it).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.setting import machine_line, write_result
from milkglass.leakage.distance_correlation import distance_correlation, u_distance_correlation_sqr
from milkglass.leakage.streaming import streaming_distance_correlation


def main() -> None:
    parser = argparse.ArgumentParser(description="peak memory, time and agreement of streaming distance correlation")
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--record-values", type=int, default=784)
    parser.add_argument("--activation-values", type=int, default=512)
    parser.add_argument("--block-rows", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--compare-at", type=int, default=4_000, help="records at which the direct form is run as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    if settings.child is not None:
        print(json.dumps(_stream(settings.child, settings)))
        return

    print(f"{machine_line()}, {settings.threads} thread(s)\n")
    print("| records | block rows | seconds | peak memory, MiB | of it before the call |\n|---|---|---|---|---|")
    runs = []
    for block_rows in settings.block_rows:
        command = [sys.executable, "-m", "benchmarks.streaming", *sys.argv[1:], "--child", str(block_rows)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        runs.append({"block_rows": block_rows, **result})
        print(
            f"| {settings.records} x {settings.record_values} | {block_rows} | {result['seconds']:.1f} "
            f"| {result['peak_mib']:.0f} | {result['before_mib']:.0f} |"
        )
    agreement = _compare(settings)  # last: a child's peak starts at its parent's
    print(f"\nat n = {settings.compare_at}: differs from the direct form by {agreement}")
    if settings.out:
        write_result(
            settings.out, [*runs, {"threads": settings.threads, "compare_at": settings.compare_at, **agreement}]
        )


def _data(records: int, settings: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Records, and activations that depend on them."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.rand(records, settings.record_values, generator=generator)
    weight_DE = torch.randn(settings.record_values, settings.activation_values, generator=generator)
    return x_ND, torch.relu((x_ND - 0.5) @ weight_DE)


def _stream(block_rows: int, settings: argparse.Namespace) -> dict[str, float]:
    x_ND, z_NE = _data(settings.records, settings)
    before_mib = _peak_mib()
    start = time.perf_counter()
    value = streaming_distance_correlation(x_ND, z_NE, block_rows=block_rows)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": _peak_mib(), "before_mib": before_mib, "biased": value.biased}


def _compare(settings: argparse.Namespace) -> dict[str, float]:
    x_ND, z_NE = _data(settings.compare_at, settings)
    value = streaming_distance_correlation(x_ND, z_NE, block_rows=settings.block_rows[0])
    return {
        "biased": abs(value.biased - distance_correlation(x_ND, z_NE).item()),
        "squared_unbiased": abs(value.squared_unbiased - u_distance_correlation_sqr(x_ND, z_NE).item()),
    }


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


if __name__ == "__main__":
    main()
