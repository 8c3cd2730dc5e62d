"""A comparison as tables for the docs: what `milkglass compare` left in a folder.

python -m benchmarks.compare_table runs/compare_digits-compare
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.filesize import decimal


def interval(row: dict[str, Any], name: str, scale: float = 1.0, digits: int = 3) -> str:
    """A figure with its interval, or a dash."""
    value, ends = row[name], row[f"{name}_interval"]
    if value is None:
        return "–"
    return f"{scale * value:.{digits}f} ({' to '.join(f'{scale * end:.{digits}f}' for end in ends)})"


def size(value: float | None) -> str:
    """Bytes, or a dash."""
    return "–" if value is None else decimal(round(value))


def trainings(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each training that was measured, in the order in which they were."""
    lines = [
        "| training | protection | clients | accuracy, % | peek | membership | GFLOP | holds | sent / received | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["status"] != "measured" or row["inference"]:
            continue
        peek = interval(row, "peek") + ("" if row["sound"] else " (inconclusive)")
        cells = [
            *(row["training"], row["protection"], row["clients"], interval(row, "accuracy", 100, 1), peek),
            *(interval(row, "membership", digits=2), f"{row['client_flops'] / 1e9:.2f}", size(row["client_memory"])),
            *(f"{size(row['bytes_up'])} / {size(row['bytes_down'])}", f"{row['seconds']:.1f}"),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def answers(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each protection of answers."""
    lines = ["| protection | status | records | accuracy, % | sent / received | s | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if row["inference"]:
            seconds = "–" if row["seconds"] is None else f"{row['seconds']:.2f}"
            lines.append(
                f"| {row['protection']} | {row['status']} | {row['records']} | {interval(row, 'accuracy', 100, 1)} "
                f"| {size(row['bytes_up'])} / {size(row['bytes_down'])} | {seconds} | {' '.join(row['notes'])} |"
            )
    return lines


def main() -> None:
    """Print the tables, what was not run, and the recommendations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    content = json.loads((parser.parse_args().folder / "compare.json").read_bytes())
    rows = content["rows"]
    print(f"{content['machine']}; {content['train_records']} training records, {content['test_records']} test records")
    for line in [*trainings(rows), "", *answers(rows), ""]:
        print(line)
    for row in rows:
        if row["status"] not in ("measured", "modelled"):
            print(f"not run: {row['words']}: {row['status']}")
    for row in content["formulas"]["rows"]:
        print(f"formula: {row['training']}, {row['clients']} clients: counted / expected {row['ratio']:.4f}")
    for advice in content["advice"]:
        print(advice["headline"])


if __name__ == "__main__":
    main()
