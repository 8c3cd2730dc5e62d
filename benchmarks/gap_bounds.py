"""What the generalization gap proves about membership, over training-set sizes, beside the published figures.

    python -m benchmarks.gap_bounds --data DIR [--sets fashion,cifar10] [--sizes 10,200,1000,10000] [--out DIR]

By the ordinary commands: `milkglass train` for the largest size, `milkglass bounds RUN --sizes ...` for all of them,
one thread. The largest is trained on some 3,000 batches (CIFAR-10: 1,500) of 64, every other size on as many or more,
so the small ones to their end. What is finished is not made again; what was stopped goes on.

Del Grosso et al. 2021 (arXiv 2105.03875): the published rows are of networks of their own, which are not at hand; ours
is the `cnn` for both sets. So the trend is to be compared: gap and bound fall as records grow, attacks stay above the
bound. Their attack is "largest probability above .8". One seed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.setting import command_line, machine_line

PUBLISHED: Final = {
    "cifar10": {
        10: (0.775, 0.597, 0.677),
        200: (0.661, 0.583, 0.716),
        1000: (0.532, 0.567, 0.641),
        10000: (0.423, 0.553, 0.592),
    },
    "fashion": {
        10: (0.684, 0.586, 0.628),
        200: (0.251, 0.531, 0.610),
        1000: (0.117, 0.515, 0.524),
        10000: (0.061, 0.508, 0.513),
    },
}
"""By set and training records: gap, bound, success of their attack."""
FILES: Final = {
    "cifar10": ("cifar10-train.parquet", "cifar10-test.parquet"),
    "fashion": ("fashion-mnist-train.npz", "fashion-mnist-test.npz"),
}
SIZES: Final = "10,200,1000,10000"
BATCH: Final = 64
BATCHES: Final = {"cifar10": 1500, "fashion": 3000}
RECIPE: Final = """\
[data]
path = {train}
test_path = {test}
train_records = {records}
test_records = 100 # they tell the accuracy of every epoch, and at 10 records there are thousands

[network]
name = "cnn"
settings = {{ width = 32 }}

[cut]
at = "block2"

[training]
epochs = {epochs}
batch_size = {batch}

[attacker]
auxiliary_share = 0.1
validation_share = 0.02
"""


def main() -> None:
    """Make what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sets", default="fashion,cifar10")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--out", type=Path, default=Path("runs/gap-bounds"))
    arguments = parser.parse_args()
    names = arguments.sets.split(",")
    if not set(names) <= set(FILES):
        parser.error(f"--sets {arguments.sets}: known: {', '.join(FILES)}")
    sizes = sorted({int(size) for size in arguments.sizes.split(",")})
    for name in names:
        make(name, sizes, arguments.data, arguments.out / name)
    print(f"<!-- {command_line()}; {machine_line()} -->\n")
    print(render({name: json.loads((arguments.out / name / "bounds.json").read_text()) for name in names}))


def make(name: str, sizes: Sequence[int], data: Path, out: Path) -> None:
    """Train the largest size, then measure it and the others."""
    largest = sizes[-1]
    batch = min(BATCH, largest)
    out.mkdir(parents=True, exist_ok=True)
    train, test = (json.dumps(str((data / file).resolve())) for file in FILES[name])
    epochs = max(1, -(-BATCHES[name] // (largest // batch)))
    text = RECIPE.format(train=train, test=test, records=largest, epochs=epochs, batch=batch)
    (out / "recipe.toml").write_text(text)
    run = out / f"size-{largest}"
    _milkglass(out, "train", str(out / "recipe.toml"), "--out", str(run), "--resume")
    _milkglass(out, "bounds", str(run), "--sizes", ",".join(map(str, sizes)), "--out", str(out))
    print(f"{name}: done", file=sys.stderr, flush=True)


def render(found: dict[str, dict[str, Any]]) -> str:
    """The table, in markdown; figures after a slash are the published ones."""
    lines = [
        "| set | records | accuracy: members, others | gap, ours / theirs | bound as published, ours / theirs "
        "| bound, 0 <= loss <= 2 | clipped bound (95 % sure) | probability > .8, ours / theirs | best loss (95 %) "
        "| AUC |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, content in found.items():
        for each in content["sizes"]:
            gap, bound, attack = (
                f" / {value:.3f}" if value else "" for value in PUBLISHED[name].get(each["records"], (0, 0, 0))
            )
            published, sound, clipped = each["bounds"]
            sure, best, _, area = each["attacks"]
            lines.append(
                f"| {name} | {each['records']:,} | {each['accuracy_on_members']:.3f}, {each['accuracy_on_others']:.3f} "
                f"| {each['gaps'][0]['value']:.3f}{gap} | {published['value']:.3f}{bound} | {sound['value']:.3f} "
                f"| {clipped['value']:.3f} ({clipped['low']:.3f}) | {sure['value']:.3f}{attack} "
                f"| {best['value']:.3f} ({best['low']:.3f} to {best['high']:.3f}) | {area['value']:.3f} |"
            )
        under = [each["records"] for each in content["sizes"] if _under(each)]
        gaps = [each["gaps"][0]["value"] for each in content["sizes"]]
        falls = "falls" if gaps == sorted(gaps, reverse=True) else "does not fall throughout"
        told = (
            f"under a bound beyond their interval at {under} records" if under else "above every bound, or within noise"
        )
        lines.append(f"<!-- {name}: the gap {falls}; the two attacks by balanced accuracy are {told} -->")
    return "\n".join(lines)


def _under(size: dict[str, Any]) -> bool:
    """Whether both attacks by balanced accuracy stay under what some attack surely reaches: they are weak ones then."""
    reached = max(attack["high"] for attack in size["attacks"] if attack["measure"] == "balanced accuracy")
    return bool(reached < max(bound["low"] for bound in size["bounds"]))


def _milkglass(out: Path, *arguments: str) -> None:
    """Run a command with one thread; its words go to a log."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (out / "log.txt").open("a") as log:
        done = subprocess.run(
            [sys.executable, "-m", "milkglass", *arguments], stdout=log, stderr=log, env=environment, check=False
        )
    if done.returncode:
        raise SystemExit(f"{out}: milkglass {arguments[0]} ended with {done.returncode}; see {log.name}")


if __name__ == "__main__":
    main()
