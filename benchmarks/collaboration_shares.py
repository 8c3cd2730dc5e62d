"""Adaptive against equal shares: four volunteers at 200, 100, 50 and 50 Mbit/s, in network namespaces. Linux, root.

    python -m benchmarks.collaboration_shares [--rates 200 100 50 50] [--megabytes 10] [--epochs 8] [--out FILE.json]

A butterfly all-reduce in which each volunteer reduces a part of the vector for all: of equal size; of the size that
hivemind's linear program makes of the bandwidths that the volunteers measure (what `milkglass collab` does); and of
those that were really given. A batch takes its time without keeping a processor busy, so that what is measured is the
averaging. All volunteers are connected before the first begins to train; the others begin in turn, in their order,
within the first epoch, so that each measures its bandwidth as it comes, and nobody has to download a state.

Averaging: seconds from when the first of the four begins with its group to when the last one has the whole average,
median over epochs (lowest to highest). They begin within a batch or two of each other, which is told beside it.
Predicted: what the linear program minimizes, max_i ((N - 2) w_i + 1) / b_i times the bytes of the vector, for the
shares w that were used and the true rates b: no headers, no latency, no time to add up.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.setting import command_line, machine_line, write_result
from benchmarks.shaped_lan import ShapedLan, shaped_lan, why_not
from benchmarks.volunteers import Crowd, Process, read_lines, volunteers, wait_for

EQUAL, MEASURED, TRUE = "equal", "measured", "true rates"
_WARM_UP_EPOCHS: Final = 1
_BETWEEN_SECONDS: Final = 5.0  # a measurement of bandwidth takes 3
_BATCH_SECONDS: Final = 0.1  # short: volunteers look for their group between two batches
_TARGET: Final = 4 * 240  # records: 24 s for one volunteer, 6 s for four
_MOST_SECONDS: Final = 900.0
_RECIPE: Final = """\
[data]
name = "digits"
[network]
name = "benchmarks.measured_volunteer:waiting_mlp"
settings = {{ hidden = [{width}, {width}], seconds = {seconds} }}
[training]
batch_size = 4
optimizer = "sgd"
learning_rate = 0.01
[parties]
mode = "collaboration"
[attacker]
auxiliary_share = 0
validation_share = 0
[collaboration]
run = "shares"
target_batch = {target}
epochs = 1_000_000
compress = "{compress}"
matchmaking_seconds = 5
timeout_seconds = 120
"""


def main() -> None:
    """Measure each way, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=int, nargs="+", default=[200, 100, 50, 50], help="Mbit/s, one a volunteer")
    parser.add_argument("--megabytes", type=float, default=10.0, help="of the vector, in float32")
    parser.add_argument("--compress", default="none", choices=("none", "fp16", "int8"))
    parser.add_argument("--epochs", type=int, default=8, help="of each way, all of them in it")
    parser.add_argument("--ways", nargs="+", default=[EQUAL, MEASURED, TRUE], choices=(EQUAL, MEASURED, TRUE))
    parser.add_argument("--rounds", type=int, default=1, help="how often each way takes its turn")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where the run folders stay")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print(f"{command_line()}\n{machine_line()}\n")
    reason = why_not()
    if reason is not None:
        print(f"skipped: {reason}")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.toml").write_text(
            _RECIPE.format(
                width=_width(arguments.megabytes), seconds=_BATCH_SECONDS, target=_TARGET, compress=arguments.compress
            )
        )
        _table_head()
        rows = []
        with shaped_lan(len(arguments.rates), [f"{rate}mbit" for rate in arguments.rates]) as lan:
            for number in range(arguments.rounds):
                for way in arguments.ways:
                    place = folder / f"{way.replace(' ', '-')}-{number}"
                    rows.append(measure(lan, arguments.rates, folder / "recipe.toml", place, way, arguments.epochs))
                    _tell(rows[-1])
    _tell_ratios(rows)
    if arguments.out:
        write_result(arguments.out, rows)


def measure(lan: ShapedLan, rates: Sequence[int], recipe: Path, folder: Path, way: str, epochs: int) -> dict[str, Any]:
    """One run of all volunteers; averaging times and what they say of their bandwidths."""
    count = len(rates)
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("go-*"):
        file.unlink()
    with volunteers(folder) as crowd:
        address: list[str] = []
        for number, (host, rate) in enumerate(zip(lan.hosts, rates, strict=True)):
            bandwidth = {EQUAL: "none", MEASURED: "measured", TRUE: str(rate * 1e6 / 8)}[way]
            words = ["-m", "benchmarks.measured_volunteer", str(recipe), "--out", str(folder / f"v{number}")]
            words += ["--listen", f"{host.address}:0", "--go", str(folder / f"go-{number}"), "--bandwidth", bandwidth]
            process = crowd.start(f"v{number}", [*words, *address], host.namespace)
            address = address or ["--peer", process.address()]
        for process in crowd.all:
            process.address()
        for number in range(count):
            (folder / f"go-{number}").touch()
            time.sleep(_BETWEEN_SECONDS)
        wanted = epochs + _WARM_UP_EPOCHS
        wait_for(lambda: _rounds_of_all(crowd) >= wanted, crowd.all, _MOST_SECONDS, f"{wanted} epochs of all")
        return _row(crowd, rates, way)


def _lines(process: Process) -> list[dict[str, Any]]:
    return read_lines(process.folder.with_name(f"{process.name}.jsonl"))


def _rounds_of_all(crowd: Crowd) -> int:
    return min(len([line for line in _lines(each) if line["peers"] == len(crowd.all)]) for each in crowd.all)


def _row(crowd: Crowd, rates: Sequence[int], way: str) -> dict[str, Any]:
    """Of the epochs that all averaged together, but the first."""
    count = len(rates)
    by_epoch: dict[int, list[dict[str, Any]]] = {}
    for each in crowd.all:
        for line in _lines(each):
            if line["peers"] == count:
                by_epoch.setdefault(line["epoch"], []).append(line)
    whole = [lines for _, lines in sorted(by_epoch.items()) if len(lines) == count][_WARM_UP_EPOCHS:]
    begins = [[line["averaging_began"] for line in lines] for lines in whole]
    longest = [
        max(line["averaging_ended"] for line in lines) - min(each) for lines, each in zip(whole, begins, strict=True)
    ]
    said = [line["bandwidth"] for line in whole[-1]]
    sent = [statistics.median(lines[number]["bytes_sent"] for lines in whole) for number in range(count)]
    numbers, shares = _shares(crowd.all[0], said)
    failed = [line for each in crowd.all for line in each.said("failed")]
    return {
        "way": way,
        "rates_mbit": list(rates),
        "vector_bytes": 4 * numbers,
        "said_mbit": [None if each is None else each * 8e-6 for each in said],
        "shares": shares,
        "averaging_seconds": longest,
        "began_within_seconds": [max(each) - min(each) for each in begins],
        "median_seconds": statistics.median(longest),
        "predicted_seconds": _predicted(shares, rates, 4 * numbers),
        "megabytes_sent": [each / 1e6 for each in sent],
        "failed": failed,
    }


def _shares(process: Process, said: Sequence[float | None]) -> tuple[int, list[float]]:
    """(numbers in the vector, the share of it that each volunteer reduces), as the volunteers' own plan has it."""
    from milkglass.collaboration.shares import shares
    from milkglass.collaboration.tasks import task_of
    from milkglass.recipe import load_recipe

    network = task_of(load_recipe(process.folder / "recipe.toml")).network
    numbers = sum(each.numel() for each in network.parameters())
    return numbers, shares([each or 1.0 for each in said])


def _predicted(shares: Sequence[float], rates: Sequence[int], vector_bytes: int) -> float:
    """Seconds that the linear program foresees for these shares, at rates in Mbit/s."""
    others = len(rates) - 2
    slowest = max((others * share + 1) / (rate * 1e6 / 8) for share, rate in zip(shares, rates, strict=True))
    return slowest * vector_bytes


def _width(megabytes: float) -> int:
    """Of two equal hidden layers, for 64 inputs and 10 classes: w^2 + 76 w + 10 numbers."""
    return round(-38 + math.sqrt(38**2 + megabytes * 1e6 / 4))


def _table_head() -> None:
    print(
        "| shares | bandwidths said, Mbit/s | shares, % | averaging, s | predicted, s | measured over predicted "
        "| began within, s | MB sent by each |"
    )
    print("|---|---|---|---|---|---|---|---|")


def _tell(row: dict[str, Any]) -> None:
    said = ", ".join("none" if each is None else f"{each:.0f}" for each in row["said_mbit"])
    shares = ", ".join(f"{100 * each:.0f}" for each in row["shares"])
    longest = row["averaging_seconds"]
    print(
        f"| {row['way']} | {said} | {shares} | {row['median_seconds']:.2f} ({min(longest):.2f} to {max(longest):.2f}) "
        f"| {row['predicted_seconds']:.2f} | {row['median_seconds'] / row['predicted_seconds']:.2f} "
        f"| {statistics.median(row['began_within_seconds']):.2f} "
        f"| {', '.join(f'{each:.1f}' for each in row['megabytes_sent'])} |",
        flush=True,
    )
    for line in row["failed"]:
        print(f"  {line}", flush=True)


def _tell_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Equal over adaptive, measured and predicted, of all rounds together."""
    ways = {way: [row for row in rows if row["way"] == way] for way in (EQUAL, MEASURED, TRUE)}
    if not ways[EQUAL]:
        return
    print()
    for way in (MEASURED, TRUE):
        if not ways[way]:
            continue
        pooled = [[each for row in ways[name] for each in row["averaging_seconds"]] for name in (EQUAL, way)]
        ratio = statistics.median(pooled[0]) / statistics.median(pooled[1])
        foreseen = ways[EQUAL][0]["predicted_seconds"] / statistics.fmean(r["predicted_seconds"] for r in ways[way])
        print(f"equal shares take {ratio:.2f} times as long as by {way}; foreseen: {foreseen:.2f} times")


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(str(error))
