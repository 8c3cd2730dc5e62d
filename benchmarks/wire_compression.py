"""What compressing activations and gradients on the wire costs in accuracy, and saves in bytes.

    python -m benchmarks.wire_compression [--data DIR] [--seeds 0 1 2] [--epochs 3] [--out FILE.json]

`cnn` cut after its second block. Digits for 12 epochs, and with --data Fashion-MNIST, all its records, for --epochs.
All parties in one process: what crosses is the same as between machines. Bytes are of training and tests, both ways.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks.setting import command_line, machine_line, write_result
from milkglass.recipe import Recipe
from milkglass.training.split import train

_WAYS: Final[tuple[dict[str, object], ...]] = (
    {"compress": "none"},
    {"compress": "fp16"},
    {"compress": "bf16"},
    {"compress": "int8"},
    {"compress": "topk", "topk_share": 0.25},
    {"compress": "topk", "topk_share": 0.1},
    {"compress": "topk", "topk_share": 0.03},
)
_DIGITS_EPOCHS: Final = 12


def main() -> None:
    """Measure every way and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with fashion-mnist-{train,test}.npz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3, help="of Fashion-MNIST")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print(f"{command_line()}\n{machine_line()}\n")
    print(
        "| data | wire | accuracy, % | against none, points | bytes, MB | share of none's |\n|---|---|---|---|---|---|"
    )
    sets: dict[str, tuple[dict[str, object], int, int]] = {"digits": ({"name": "digits"}, _DIGITS_EPOCHS, 64)}
    if arguments.data:
        train_path, test_path = (str(arguments.data / f"fashion-mnist-{part}.npz") for part in ("train", "test"))
        fashion: dict[str, object] = {"path": train_path, "test_path": test_path}
        sets["Fashion-MNIST"] = fashion, arguments.epochs, 128
    rows: list[dict[str, Any]] = []
    for name, (data, epochs, batch_size) in sets.items():
        first: dict[str, Any] | None = None
        for wire in _WAYS:
            row = {"data": name, "wire": wire, "epochs": epochs, "seeds": arguments.seeds}
            row |= measure(data, epochs, batch_size, wire, arguments.seeds)
            rows.append(row)
            first = first or row
            print(_line(row, first), flush=True)
    if arguments.out:
        write_result(arguments.out, rows)


def measure(
    data: dict[str, object], epochs: int, batch_size: int, wire: dict[str, object], seeds: list[int]
) -> dict[str, Any]:
    """Test accuracy (0..1) and bytes, a number for each seed."""
    accuracies, wire_bytes = [], []
    for seed in seeds:
        recipe = Recipe.model_validate(
            {
                "seed": seed,
                "data": data,
                "network": {"name": "cnn"},
                "cut": {"at": "block2"},
                "training": {"epochs": epochs, "batch_size": batch_size},
                "wire": wire,
                "attacker": {"auxiliary_share": 0.01, "validation_share": 0.01},
            }
        )
        with tempfile.TemporaryDirectory() as folder:
            summary = train(recipe, Path(folder) / "run")
        accuracies.append(summary["accuracy"])
        wire_bytes.append(summary["bytes_sent"] + summary["bytes_received"])
    return {"accuracy": accuracies, "bytes": wire_bytes}


def _line(row: dict[str, Any], first: dict[str, Any]) -> str:
    wire = row["wire"]
    way = wire["compress"] + (f" {wire['topk_share']:g}" if "topk_share" in wire else "")
    percents = [100 * accuracy for accuracy in row["accuracy"]]
    lost = [100 * (a - b) for a, b in zip(row["accuracy"], first["accuracy"], strict=True)]  # same seed, same weights
    cells = [
        f"{statistics.mean(percents):.2f} ({min(percents):.2f}-{max(percents):.2f})",
        f"{statistics.mean(lost):+.2f} ({min(lost):+.2f} to {max(lost):+.2f})",
        f"{statistics.mean(row['bytes']) / 1e6:.1f}",
        f"{sum(row['bytes']) / sum(first['bytes']):.3f}",
    ]
    return f"| {row['data']} | {way} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
