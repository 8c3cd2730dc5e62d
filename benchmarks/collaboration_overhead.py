"""What a step of a collaboration takes over computing alone, by target batch: 2 and 4 volunteers on this machine.

    python -m benchmarks.collaboration_overhead [--peers 2 4] [--targets 256 ... 262144] [--epochs 10]
        [--by milkglass hivemind] [--keep DIR] [--out FILE.json]

Volunteers are processes of one thread on the loopback (benchmarks.measured_volunteer: `milkglass collab` with a clock
around forward and backward). Computing alone: the target batch over the sum of the volunteers' own speeds, which are
taken in the same epochs, records over seconds in forward and backward, while all of them compute at once. Overhead:
median seconds of an epoch over that, less 1. What is computed beyond the target while a group meets counts as overhead,
though these records are used; so the same over the records that were used stands beside it.

After each cell hivemind's own `hivemind.Optimizer` does the same (benchmarks.hivemind_peer): same network, same records
and batches, same target, as many processes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.setting import command_line, machine_line, write_result
from benchmarks.volunteers import Crowd, Process, read_lines, volunteers, wait_for

OURS, THEIRS = "milkglass", "hivemind"
TARGETS: Final = tuple(4**power for power in range(4, 10))
WANTED: Final = 0.2
_MODULES: Final = {OURS: "benchmarks.measured_volunteer", THEIRS: "benchmarks.hivemind_peer"}
_WARM_UP_EPOCHS: Final = 3
_MOST_SECONDS: Final = 600.0
_RECIPE: Final = """\
[data]
name = "digits"
[network]
name = "mlp"
settings = {{ hidden = [1024, 512] }}
[training]
batch_size = 64
learning_rate = 0.001
[parties]
mode = "collaboration"
[attacker]
auxiliary_share = 0
validation_share = 0
[collaboration]
run = "overhead"
target_batch = {target}
epochs = 1_000_000
matchmaking_seconds = 2
timeout_seconds = 30
"""


def main() -> None:
    """Measure each cell, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), help="target batches, records")
    parser.add_argument("--epochs", type=int, default=10, help="of each cell, after three to warm up")
    parser.add_argument("--by", nargs="+", default=[OURS, THEIRS], choices=(OURS, THEIRS))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where the run folders stay, for benchmarks.churn")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print(f"{command_line()}\n{machine_line()}\n")
    print(
        "| volunteers | target batch | by | seconds per epoch | computing alone, s | overhead, % | of records used, % "
        "| met, s | averaged, s | records a step |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for peers in arguments.peers:
            for target in arguments.targets:
                for by in arguments.by:
                    folder = (arguments.keep or Path(name)) / f"{by}-{peers}-{target}"
                    try:
                        rows.append(measure(by, peers, target, arguments.epochs, folder))
                    except RuntimeError as error:
                        print(f"{by}, {peers} volunteers, {target}: {error}", file=sys.stderr)
                        continue
                    _tell(rows[-1])
    for peers in arguments.peers:
        for by in (OURS, THEIRS):
            _tell_bound([row for row in rows if row["peers"] == peers and row["by"] == by])
    if arguments.out:
        write_result(arguments.out, rows)


def measure(by: str, peers: int, target: int, epochs: int, folder: Path) -> dict[str, Any]:
    """One cell: so many epochs that all are in, after those to warm up."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe, go = folder / "recipe.toml", folder / "go"
    recipe.write_text(_RECIPE.format(target=target))
    go.unlink(missing_ok=True)
    with volunteers(folder) as crowd, _groups_ended(crowd, by):
        address: list[str] = []
        for number in range(peers):
            words = ["-m", _MODULES[by], str(recipe), "--out", str(folder / f"v{number}"), "--go", str(go), *address]
            words += ["--peers", str(peers)] if by == THEIRS else []
            process = crowd.start(f"v{number}", words)
            address = address or ["--peer", process.address()]
        for process in crowd.all:
            process.address()
        go.touch()
        wanted = epochs + _WARM_UP_EPOCHS
        wait_for(lambda: _rounds_of_all(crowd) >= wanted, crowd.all, _MOST_SECONDS, f"{wanted} epochs of all")
        return _row(crowd, by, target, epochs)


@contextlib.contextmanager
def _groups_ended(crowd: Crowd, by: str) -> Any:
    """hivemind's peers start processes of their own, all in the group of the one that we started: end that group."""
    try:
        yield
    finally:
        for process in crowd.all if by == THEIRS else ():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _lines(process: Process, peers: int) -> list[dict[str, Any]]:
    """Of epochs that so many averaged together."""
    lines = read_lines(process.folder.with_name(f"{process.name}.jsonl"))
    return [line for line in lines if line["peers"] == peers]


def _rounds_of_all(crowd: Crowd) -> int:
    return min(len(_lines(each, len(crowd.all))) for each in crowd.all)


def _row(crowd: Crowd, by: str, target: int, epochs: int) -> dict[str, Any]:
    count = len(crowd.all)
    each = [_lines(process, count)[_WARM_UP_EPOCHS : _WARM_UP_EPOCHS + epochs] for process in crowd.all]
    speeds = [sum(line["samples"] for line in own) / sum(line["compute_seconds"] for line in own) for own in each]
    every = [line for own in each for line in own]
    seconds = [line["seconds"] for line in every]
    used = sum(line["samples"] for line in every) / epochs
    alone, epoch = target / sum(speeds), statistics.median(seconds)
    row = {
        **{"by": by, "peers": count, "target_batch": target, "epochs": epochs, "speeds": speeds},
        **{"epoch_seconds": seconds, "median_seconds": epoch, "mean_seconds": statistics.fmean(seconds)},
        **{"computing_alone_seconds": alone, "overhead": epoch / alone - 1, "records_used": used},
        "overhead_of_used": statistics.fmean(seconds) / (used / sum(speeds)) - 1,
        "notes": [line for process in crowd.all for line in process.said("milkglass: ")],
    }
    for name in ("matchmaking_seconds", "averaging_seconds"):
        row[name] = statistics.median(line[name] for line in every) if by == OURS else None
    return row


def _tell(row: dict[str, Any]) -> None:
    parts = [row[name] for name in ("matchmaking_seconds", "averaging_seconds")]
    met, averaged = ("" if each is None else f"{each:.2f}" for each in parts)
    print(
        f"| {row['peers']} | {row['target_batch']:,} | {row['by']} | {row['median_seconds']:.2f} "
        f"({min(row['epoch_seconds']):.2f} to {max(row['epoch_seconds']):.2f}) | {row['computing_alone_seconds']:.3f} "
        f"| {100 * row['overhead']:,.0f} | {100 * row['overhead_of_used']:,.0f} | {met} | {averaged} "
        f"| {row['records_used']:,.0f} |",
        flush=True,
    )


def _tell_bound(rows: Sequence[dict[str, Any]]) -> None:
    """From which batch on the overhead is as wanted, at this and every larger one."""
    if not rows:
        return
    good = []
    for row in sorted(rows, key=lambda row: -row["target_batch"]):
        if row["overhead"] >= WANTED:
            break
        good.append(row)
    words = f"\n{rows[0]['by']}, {rows[0]['peers']} volunteers: overhead under {WANTED:.0%} "
    if good:
        words += f"from a target batch of {good[-1]['target_batch']:,} on, which is "
        words += f"{good[-1]['computing_alone_seconds']:.1f} s of computing alone"
    else:
        words += "at none of these"
    print(words)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(str(error))
