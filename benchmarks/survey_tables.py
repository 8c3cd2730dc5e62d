"""The survey's tables of client compute and bandwidth (arXiv 1812.03288) beside the formulas.

    python -m benchmarks.survey_tables [--stem cifar] [--at conv1] [--out FILE.json]

Nothing is trained: FLOPs and sizes of VGG-16 and ResNet-50 are counted, in a few seconds. The published figures are
second-hand, from study notes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.setting import command_line, machine_line, write_result
from milkglass.survey import CutFit, Row, bandwidth_rows, compute_rows, cut_fits, verdicts

_SHOWN = 6


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stem", choices=("cifar", "imagenet"), default="cifar", help="of ResNet-50")
    parser.add_argument("--at", default="conv1", help="its cut: conv1, pool1, stage1 ... stage4")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print(f"<!-- {command_line()}; {machine_line()} -->\n")
    fits = cut_fits()
    print_fits(fits)
    rows = [*compute_rows(fits[0]), *bandwidth_rows(arguments.stem, arguments.at)]
    print_rows(rows)
    told = verdicts(rows)
    print("\n" + "\n".join(f"- {verdict.words}" for verdict in told))
    if arguments.out:
        write_result(arguments.out, [*map(asdict, fits), *map(asdict, rows), *map(asdict, told)])


def print_fits(fits: Sequence[CutFit]) -> None:
    """The cuts that come nearest to the split column."""
    print(f"Which cut of VGG-16 gives the published share, {fits[0].published_share:.3%}:\n")
    print(f"| fully connected | cut after | training FLOPs | share | off |\n|{'---|' * 5}")
    for fit in fits[:_SHOWN]:
        print(f"| {fit.head} | {fit.cut} | {fit.counting} | {fit.share:.3%} | {fit.off:+.1%} |")


def print_rows(rows: Sequence[Row]) -> None:
    """Published, ours, implied."""
    print("\n| table | way | clients | published | ours | implied (rounding) | ratio | beside | assumption |")
    print(f"|{'---|' * 9}")
    for row in rows:
        print(
            f"| {row.table} | {row.way} | {row.clients} | {row.published:g} {row.unit} | {row.ours:.4g} a {row.per} "
            f"| {row.implied:.1f} {row.per}s ({row.low:.1f} to {row.high:.1f}) | {row.ratio:.3f} | {row.beside} "
            f"| {row.assumption} |"
        )


if __name__ == "__main__":
    main()
