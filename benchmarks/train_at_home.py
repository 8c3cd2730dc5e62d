"""Defending a network that is there already: trained at home, fine-tuned with a defense for some epochs, then attacked.

    python -m benchmarks.train_at_home --data DIR --set fashion-mnist|cifar10 [--seeds 0,1,2] [--attacks NAME,...]

The setting of NoPeek-Infer: all training happens at the client's own site, the server gets its stage and answers
queries. For each seed the undefended network is trained first (the recipe's epochs), then each defense begins with its
weights. Cells are ordinary run folders made by the ordinary commands, one thread each; what is finished is not made
again. `lost` is against the home network fine-tuned for as many epochs without a defense (`none`). Accuracies are of
all 10,000 test records (`milkglass predict`); attacks are scored on 2,000 of them. `named`: how often who knows the
client's weights names the one of 1,000 candidates that was sent, from one release.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from benchmarks.setting import command_line, machine_line
from milkglass.verdict import MATCHING

EXAMPLES: Final = Path(__file__).parents[1] / "examples"
FILES: Final = {
    "fashion-mnist": ("fashion-mnist-train.npz", "fashion-mnist-test.npz"),
    "cifar10": ("cifar10-train.parquet", "cifar10-test.parquet"),
}
HOME: Final = {
    "fashion-mnist": ("training.decay_steps=936",),  # 12 epochs of 78 batches
    "cifar10": (),
}
FINE_TUNED: Final = {
    "fashion-mnist": ("training.epochs=8", "training.decay_steps=624"),
    "cifar10": ("training.epochs=10", "training.decay_steps=1560"),
}
ENDS: Final = "training.client_learns=ends"
DEFENSES: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "fashion-mnist": {
        "channel and entropy": ("defense={channel={width=8,sigma=0.3},entropy={weight=0.02}}", ENDS),
        "NoPeek, weight 10": ("defense={nopeek={weight=10.0}}",),
    },
    "cifar10": {
        "channel, sigma 0.6": ("defense={channel={width=48,sigma=0.6,projection='conv'},entropy={weight=0.003}}",),
        "channel, sigma 0.8": ("defense={channel={width=48,sigma=0.8,projection='conv'},entropy={weight=0.003}}",),
    },
}
FEWER_ATTACKS: Final = {"channel, sigma 0.8": ("--attacks", "nearest neighbor,kernel ridge")}
"""Of a defense that stands beside another one: what did best on that one, or nearly; all take half an hour."""


def main() -> None:
    """Make what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--set", choices=list(FILES), required=True, dest="name")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--cells", type=Path, default=Path("runs/at-home"))
    parser.add_argument("--quick", action="store_true", help="quick audits")
    parser.add_argument("--attacks", help="only these, as of milkglass audit")
    arguments = parser.parse_args()
    audit = ["--quick"] if arguments.quick else []
    audit += [] if arguments.attacks is None else ["--attacks", arguments.attacks]
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in map(int, arguments.seeds.split(",")):
        for defense, row in make(arguments.name, seed, arguments.data, arguments.cells, audit).items():
            rows.setdefault(defense, []).append(row)
    print(f"<!-- {command_line()}; {machine_line()} -->\n")
    print(
        "| defense | seeds | accuracy, % | lost, points | peek, fresh | ten releases | named, fresh | bits "
        "| client's FLOPs, % |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for defense, found in rows.items():
        cells = [
            _words([100 * each["accuracy"] for each in found], 1),
            _words([100 * each["lost"] for each in found], 1),
        ]
        cells += [_words([each[name] for each in found], 3) for name in ("fresh", "repeated", "named")]
        bits = found[0]["bits"]
        cells += ["–" if bits is None else f"{bits:.1f}", f"{100 * found[0]['share']:.0f}"]
        print(f"| {defense} | {len(found)} | " + " | ".join(cells) + " |")


def make(name: str, seed: int, data: Path, cells: Path, audit: list[str]) -> dict[str, dict[str, Any]]:
    """Of one seed: the home network fine-tuned without a defense, and with each. audit: options of the audits."""
    train, test = (data.resolve() / file for file in FILES[name])
    recipe = str(EXAMPLES / f"{name}.toml")
    common = [f"seed={seed}", f"data.path={train}", f"data.test_path={test}", "data.test_records=2000", *HOME[name]]
    home = cells / f"{name}-home-seed{seed}"
    _train(home, recipe, [*common, "defense={}"])
    later = [*common, *FINE_TUNED[name], f"network.start={home.resolve()}", "training.at_home=true"]
    rows = {}
    reference: dict[str, Path] = {}
    for defense, settings in {"none": ("defense={}",), **DEFENSES[name]}.items():
        out = cells / f"{name}-{defense.replace(', ', ' ').replace(' ', '-')}-seed{seed}"
        _train(out, recipe, [*later, *settings])
        which = "ends" if ENDS in settings else "all"
        if defense == "none":
            reference["all"] = out
            rows[defense] = _row(out, out, out, test, None)
            continue
        if which not in reference:
            reference[which] = cells / f"{name}-none-{which}-seed{seed}"
            _train(reference[which], recipe, [*later, "defense={}", ENDS])
        rows[defense] = _row(out, reference["all"], reference[which], test, [*audit, *FEWER_ATTACKS.get(defense, ())])
    return rows


def _row(out: Path, fine_tuned: Path, reference: Path, test: Path, audit: list[str] | None) -> dict[str, Any]:
    """fine_tuned: without a defense. reference: what the audit takes for the undefended run; audit: None for none."""
    summary = json.loads((out / "summary.json").read_text())
    accuracy = _accuracy(out, test)
    row = {
        "accuracy": accuracy,
        "lost": _accuracy(fine_tuned, test) - accuracy,
        "bits": None if summary["certificate"] is None else summary["certificate"]["bits_per_release"],
        "share": summary["client_flops_share"],
        "fresh": float("nan"),
        "repeated": float("nan"),
        "named": float("nan"),
    }
    if audit is not None:
        if not (out / "audit.json").exists():
            _milkglass(out, "audit", str(out), "--reference", str(reference), *audit)
        found = json.loads((out / "audit.json").read_text())
        exposures = found["exposures"]
        games = [each for each in found["inferences"] if each["measure"] == MATCHING and each["exposure"] == "fresh"]
        row["named"] = games[0]["value"] if games else float("nan")  # none in quick audits
        row |= {name: exposure["value"] for name, exposure in exposures.items()}
        row["repeated"] = row["repeated"] if "repeated" in exposures else row["fresh"]  # nothing random: the same again
    return row


def _accuracy(out: Path, test: Path) -> float:
    """Of all test records, with the run's defense on; 0..1."""
    if not (out / "predictions.json").exists():
        _milkglass(out, "predict", str(out), str(test))
    return float(json.loads((out / "predictions.json").read_text())["accuracy"])


def _train(out: Path, recipe: str, overrides: list[str]) -> None:
    if not (out / "summary.json").exists():
        _milkglass(out, "train", recipe, *(f"--set={each}" for each in overrides), "--out", str(out), "--resume")


def _words(values: list[float], digits: int) -> str:
    if any(value != value for value in values):
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _milkglass(out: Path, *arguments: str) -> None:
    """Run a command with one thread; its words go to a log beside the cell."""
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with out.with_name(out.name + ".log").open("a") as log:
        done = subprocess.run(
            [sys.executable, "-m", "milkglass", *arguments], stdout=log, stderr=log, env=environment, check=False
        )
    if done.returncode not in (0, 4):
        raise SystemExit(f"{out.name}: milkglass {arguments[0]} ended with {done.returncode}; see {log.name}")


if __name__ == "__main__":
    main()
