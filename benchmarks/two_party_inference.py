"""Two-party inference of the server's stage (Cheetah on SPU) beside the same stage in the clear; digits, an mlp.

    python -m benchmarks.two_party_inference [--python PATH] [--records 1 100] [--hidden 64 32] [--out FILE.json]

The client keeps the first hidden layer, the server the rest. `--python` is the interpreter of an environment with SPU
0.9.5 (default: the one of `python -m milkglass.private.two_party_environment`). Both parties are processes of this
machine, one thread each; bytes are TCP's payload between them. Seconds are medians over `--runs`, and the ratio is to
the plain stage on the same batch. Then the class alone by a garbled circuit over shares of the logits: measured with
emp-wasm where it is installed (`--module` names its index.js), and modelled for half gates.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.setting import command_line, machine_line, write_result
from milkglass.cuts import Stages, cut
from milkglass.errors import MissingExtraError
from milkglass.networks import build
from milkglass.private.garbled_circuits import garbled_argmax_cost, garbled_argmax_run
from milkglass.private.two_party import TRANSFERS, TwoPartyRun, two_party_run
from milkglass.randomness import public_source, rehearsal_source

_SEED: Final = 0
_TEST_RECORDS: Final = 360
_STEPS: Final = 600
_BATCH: Final = 128
_PLAIN_REPEATS: Final = 200
_GARBLED_RECORDS: Final = 10
_COLUMNS: Final = (
    *("transfers", "records", "top-1 equal", "largest logit error", "kB up a record", "kB down a record"),
    *("s online", "s set-up", "MB set-up", "ratio to plain"),
)


def main() -> None:
    """Train, run every case, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="interpreter with SPU 0.9.5")
    parser.add_argument("--module", type=Path, help="emp-wasm's index.js")
    parser.add_argument("--records", type=int, nargs="+", default=[1, 100])
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{command_line()}\n{machine_line()}")
    stages, z_ND, accuracy = trained(arguments.hidden)
    print(f"mlp {arguments.hidden} on digits, cut after hidden1; accuracy {accuracy:.3f} on {len(z_ND)} test records\n")
    print(f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}")
    rows = []
    for transfers in TRANSFERS:
        for records in arguments.records:
            row = measure(stages.top, z_ND[:records], transfers, arguments.python, arguments.runs)
            rows.append(row)
            print(
                f"| {transfers} | {row['records']} | {row['top1_equal']:.4f} | {row['largest_logit_error']:.1e} | "
                f"{row['bytes_up_per_record'] / 1e3:.1f} | {row['bytes_down_per_record'] / 1e3:.1f} | "
                f"{row['seconds']:.2f} | {row['setup_seconds']:.2f} | {row['setup_bytes'] / 1e6:.1f} | "
                f"{row['ratio']:.0f} |",
                flush=True,
            )
    rows.append(garbled(stages.top, z_ND, arguments.module))
    if arguments.out:
        write_result(arguments.out, rows)


def trained(hidden: list[int]) -> tuple[Stages, Tensor, float]:
    """Both stages, the activations of the test records (N, D), and the accuracy there (0..1)."""
    pictures, labels = load_digits(return_X_y=True)
    x_NF, y_N = torch.from_numpy((pictures / 16).astype(np.float32)), torch.from_numpy(labels)
    source = public_source(_SEED)
    order = torch.randperm(len(x_NF), generator=source.generator("order"))
    train, test = order[_TEST_RECORDS:], order[:_TEST_RECORDS]
    model = build("mlp", (64,), 10, {"hidden": hidden}, source.generator("weights"))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batches = source.generator("batches")
    for _ in range(_STEPS):
        chosen = train[torch.randint(len(train), (_BATCH,), generator=batches)]
        optimizer.zero_grad()
        F.cross_entropy(model(x_NF[chosen]), y_N[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()
    stages = cut(model, "hidden1")
    with torch.no_grad():
        accuracy = float((model(x_NF[test]).argmax(1) == y_N[test]).double().mean())
        return stages, stages.bottom(x_NF[test]), accuracy


def measure(stage: nn.Module, z_BD: Tensor, transfers: str, python: Path | None, runs: int) -> dict[str, Any]:
    """One row: `runs` runs of one batch; medians of seconds and bytes, the worst of what concerns the answers."""
    found: list[TwoPartyRun] = [two_party_run(stage, z_BD, python=python, transfers=transfers) for _ in range(runs)]
    seconds = statistics.median(run.seconds for run in found)
    plain_seconds = plain(stage, z_BD)
    return {
        "transfers": transfers,
        "records": len(z_BD),
        "top1_equal": min(run.top1_equal for run in found),
        "largest_logit_error": max(run.largest_logit_error for run in found),
        "bytes_up_per_record": statistics.median(run.bytes_up for run in found) / len(z_BD),
        "bytes_down_per_record": statistics.median(run.bytes_down for run in found) / len(z_BD),
        "seconds": seconds,
        "setup_seconds": statistics.median(run.setup_seconds for run in found),
        "setup_bytes": statistics.median(run.setup_bytes for run in found),
        "plain_seconds": plain_seconds,
        "ratio": seconds / plain_seconds,
        "runs": runs,
    }


def plain(stage: nn.Module, z_BD: Tensor) -> float:
    """Seconds of the stage in the clear, the median of many."""
    taken = []
    with torch.no_grad():
        for _ in range(_PLAIN_REPEATS):
            before = time.perf_counter()
            stage(z_BD)
            taken.append(time.perf_counter() - before)
    return statistics.median(taken)


def garbled(stage: nn.Module, z_ND: Tensor, module: Path | None) -> dict[str, Any]:
    """The class alone, measured and modelled; prints both."""
    with torch.no_grad():
        logits_BK = stage(z_ND[:_GARBLED_RECORDS])
    cost = garbled_argmax_cost(logits_BK.shape[1])
    print(
        f"\ngarbled argmax, MODELLED (half gates): {cost.and_gates} AND gates a record, "
        f"{cost.bytes_up / 1e3:.1f} kB up, {cost.bytes_down / 1e3:.1f} kB down"
    )
    row: dict[str, Any] = {"garbled_modelled": vars(cost)}
    try:
        run = garbled_argmax_run(logits_BK, rehearsal_source(_SEED, "garbled"), module=module)
    except MissingExtraError as error:
        print(f"garbled argmax, not measured: {error}")
        return row
    measured = {
        "records": run.records,
        "equal": run.equal,
        "bytes_up_per_record": run.bytes_up / run.records,
        "bytes_down_per_record": run.bytes_down / run.records,
        "seconds": run.seconds,
    }
    print(
        f"garbled argmax, MEASURED (authenticated garbling, emp-wasm): {run.records} records, equal {run.equal:.4f}, "
        f"{measured['bytes_up_per_record'] / 1e3:.1f} kB up, {measured['bytes_down_per_record'] / 1e3:.1f} kB down a "
        f"record, {run.seconds:.2f} s for all"
    )
    return {**row, "garbled_measured": measured}


if __name__ == "__main__":
    main()
