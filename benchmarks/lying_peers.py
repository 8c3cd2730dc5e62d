"""Lying volunteers: 16 simulated peers of which 3 lie train one network; final loss beside that of honest training.

    python -m benchmarks.lying_peers [--optimizer sgd|adam] [--seeds 0,1,2] [--data DIR] [--out FILE]

A perceptron (32 hidden units) on scikit-learn's digits, or with --data on 6,000 records of Fashion-MNIST; 200 epochs
(steps) with a target batch of 512, a learning rate that falls to 0 by half a cosine. Loss: of all training records at
the end, over that of 16 honest peers without a defense and the same records in every epoch. What is random about
an honest training is no part of that ratio, but Adam amplifies the least difference: an average off by 1e-4 ends up to
4 % away, with SGD 0.1 %.

Three ways: none (the mean; each part reduced by one peer, as in hivemind); clipping at honest reducers alone (with its
memory, and claims of records capped at two medians); all, as `collaboration.robust` does (also: each part reduced by
two and compared, the implausible recomputed, and who is not heard for long is out).

The liars agree, know all contributions, and hide nothing from each other. `simulated_peers.py` says how peers work.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.setting import command_line, machine_line, write_result
from benchmarks.simulated_peers import LIARS, PEERS, Contribute, Defense, Known, Lie, Outcome, Setting, train
from milkglass.collaboration.centered_clipping import MEMORY
from milkglass.collaboration.weights import ROBUST_CAP
from milkglass.data import Deal, deal, load
from milkglass.networks import build
from milkglass.randomness import public_source

_RATES: Final = {"sgd": 0.1, "adam": 0.01}
_DEFENSES: Final = {
    "none": Defense(),
    "clipping": Defense(clip=True, memory=MEMORY, cap=ROBUST_CAP),
    "all": Defense(clip=True, memory=MEMORY, cap=ROBUST_CAP, twice=True, outs=True),
}
_UNEQUAL: Final = tuple(float(2 ** (peer % 4)) for peer in range(PEERS))
_FACTOR: Final = 4.0
_ENOUGH: Final = 100.0
"""A loss of so many times the honest one needs no digits."""


def main() -> None:
    """Train all, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=list(_RATES), default="sgd")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--data", type=Path, help="a folder with Fashion-MNIST; by default scikit-learn's digits")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds, begun = [int(seed) for seed in arguments.seeds.split(",")], time.perf_counter()
    rows = make(arguments.data, arguments.optimizer, seeds)
    print(f"<!-- {command_line()}; {machine_line()}; {time.perf_counter() - begun:.0f} s -->\n")
    print(
        "| what 3 of 16 do | loss, no defense | clipping alone | all | accuracy, %, none / all | liars out, by epoch |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(_cells(row)) + " |")
    _print_sums(rows)
    if arguments.out is not None:
        write_result(arguments.out, rows)


def make(data: Path | None, optimizer: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each lie: outcomes by defense and seed, losses also over the honest one's. data: None for digits."""
    tasks = {seed: _task(data, seed) for seed in seeds}
    honest = {seed: train(*tasks[seed], _setting(seed, optimizer), Lie(), Defense()) for seed in seeds}
    rows = []
    for name, (lie, unequal) in CASES.items():
        row: dict[str, Any] = {"lie": name, "optimizer": optimizer, "seeds": list(seeds), "ways": {}}
        for way, defense in _DEFENSES.items():
            if lie.two_faced and not defense.twice:
                continue  # there is no second reducer to tell something else
            found = [train(*tasks[seed], _setting(seed, optimizer, unequal=unequal), lie, defense) for seed in seeds]
            row["ways"][way] = _told(found, [honest[seed] for seed in seeds])
        rows.append(row)
    return rows


def _setting(seed: int, optimizer: str, *, unequal: bool = False) -> Setting:
    chosen = Setting(seed, optimizer, _RATES[optimizer])
    return replace(chosen, speeds=_UNEQUAL, uneven=0.5) if unequal else chosen


def _task(data: Path | None, seed: int) -> tuple[Deal, nn.Module]:
    if data is None:
        pool, test, share, limit = load(name="digits"), None, 0.25, None
    else:
        files = [load(path=data / f"fashion-mnist-{which}.npz") for which in ("train", "test")]
        pool, test, share, limit = files[0], files[1], 0.0, 6000
    source = public_source(seed)
    records = deal(
        pool,
        test,
        clients=("all",),
        train_records=limit,
        test_records=None,
        auxiliary_share=0,
        validation_share=0,
        test_share=share,
        source=source,
    )
    settings = {"hidden": (32,)}
    return records, build("mlp", records.record_shape, records.classes, settings, source.generator("weights"))


# What liars contribute.


def _times(factor: float) -> Contribute:
    return lambda known: factor * known.own_LD


def _noise(known: Known) -> Tensor:
    """Ten times as large as the true ones."""
    noise_LD = torch.randn(known.own_LD.shape, generator=known.generator)
    times_L1: Tensor = (10 * known.own_LD.norm(dim=1) / noise_LD.norm(dim=1)).unsqueeze(1)
    return noise_LD * times_L1


def _a_little(deviations: float) -> Contribute:
    """Baruch, Baruch and Goldberg, NeurIPS 2019, arXiv 1902.06156: all the same, a little below the mean everywhere."""

    def contribute(known: Known) -> Tensor:
        below_D: Tensor = known.honest_HD.mean(0) - deviations * known.honest_HD.std(0)
        return below_D.expand_as(known.own_LD)

    return contribute


def _hidden(reach: float) -> Contribute:
    """Against where training goes, from the mean so many typical distances away: what is heard whole, and no more."""

    def contribute(known: Known) -> Tensor:
        mean_D = known.honest_HD.mean(0)
        along_D = known.center_D if bool(known.center_D.any()) else mean_D
        typical = (known.honest_HD - mean_D).norm(dim=1).median()
        hidden_D: Tensor = mean_D - reach * typical * along_D / along_D.norm()
        return hidden_D.expand_as(known.own_LD)

    return contribute


# What lying reducers return.


def _zeros(known: Known, true_D: Tensor) -> Tensor:  # noqa: ARG001
    return torch.zeros_like(true_D)


def _turned(known: Known, true_D: Tensor) -> Tensor:  # noqa: ARG001
    return -5 * true_D


def _random(known: Known, true_D: Tensor) -> Tensor:
    noise_D = torch.randn(true_D.shape, generator=known.generator)
    times: Tensor = 10 * true_D.norm() / noise_D.norm()
    return noise_D * times


def _just_plausible(known: Known, true_D: Tensor) -> Tensor:
    """Against the true part, as far from the center as all honest peers let pass."""
    nearest: Tensor = (known.gradients_HD - known.center_D).norm(dim=1).min()
    times: Tensor = 0.999 * _FACTOR * nearest / true_D.norm().clamp_min(1e-12)
    return known.center_D - times * true_D


_BARUCH: Final = statistics.NormalDist().inv_cdf((PEERS - PEERS // 2 - 1) / (PEERS - len(LIARS)))
"""So many standard deviations that with enough honest peers beyond them the liars are in the majority."""
CASES: Final[dict[str, tuple[Lie, bool]]] = {
    "nothing, all are honest": (Lie(), False),
    "nothing, but peers are unequal": (Lie(), True),
    "contribute gradients times -5": (Lie(_times(-5)), False),
    "gradients times -5, claiming 1,000 times the records": (Lie(_times(-5), claim=1000), False),
    "contribute gradients times 1,000": (Lie(_times(1000)), False),
    "contribute noise": (Lie(_noise), False),
    "a little is enough, 0.1 deviations": (Lie(_a_little(_BARUCH)), False),
    "a little is enough, 1 deviation": (Lie(_a_little(1.0)), False),
    "hide in the noise, at the typical distance": (Lie(_hidden(1.0)), False),
    "hide in the noise, at the radius": (Lie(_hidden(2.0)), False),
    "hide at the radius, claiming 1,000 times the records": (Lie(_hidden(2.0), claim=1000), False),
    "tell two reducers different contributions": (Lie(_times(-5), two_faced=True), False),
    "reduce to zeros": (Lie(reduce=_zeros), False),
    "reduce to the true part times -5": (Lie(reduce=_turned), False),
    "reduce to noise": (Lie(reduce=_random), False),
    "reduce to -5 times where both reducers lie": (Lie(reduce=_turned, in_pairs=True), False),
    "reduce to the just plausible where both lie": (Lie(reduce=_just_plausible, in_pairs=True), False),
}
"""Who lies how, and whether peers are 1, 2, 4 or 8 times as fast as others, give or take a half in each epoch."""


def _told(found: Sequence[Outcome], honest: Sequence[Outcome]) -> dict[str, Any]:
    """For JSON, which knows no infinity: None is for what diverged."""
    return {
        "loss": [each.loss if math.isfinite(each.loss) else None for each in found],
        "ratio": [
            each.loss / base.loss if math.isfinite(each.loss) else None
            for each, base in zip(found, honest, strict=True)
        ],
        "accuracy": [100 * each.accuracy if math.isfinite(each.loss) else None for each in found],
        "liars_out": [[epoch for epoch, peer in each.banned if peer in LIARS] for each in found],
        "honest_out": [len([peer for _, peer in each.banned if peer not in LIARS]) for each in found],
        "counts": [each.counts for each in found],
    }


def _cells(row: dict[str, Any]) -> list[str]:
    ways, full = row["ways"], row["ways"]["all"]
    accuracy = [_accuracy(ways[way]["accuracy"]) if way in ways else "–" for way in ("none", "all")]
    out = ", ".join(f"{len(epochs)} by {max(epochs)}" if epochs else "none" for epochs in full["liars_out"])
    ratios = [_words(ways[way]["ratio"]) if way in ways else "–" for way in _DEFENSES]
    return [row["lie"], *ratios, " / ".join(accuracy), out]


def _accuracy(values: Sequence[float | None]) -> str:
    finite = [value for value in values if value is not None]
    return f"{statistics.mean(finite):.1f}" if len(finite) == len(values) else "diverged"


def _words(ratios: Sequence[float | None]) -> str:
    finite = [ratio for ratio in ratios if ratio is not None and ratio < _ENOUGH]
    if len(finite) < len(ratios):
        return f"over {_ENOUGH:g}"
    return f"{statistics.mean(finite):.3f} ({min(finite):.3f} to {max(finite):.3f})"


def _print_sums(rows: Sequence[dict[str, Any]]) -> None:
    """What the whole defense took from the honest."""
    for row in rows:
        full = row["ways"]["all"]
        alarms, parts = (sum(counts.get(name, 0) for counts in full["counts"]) for name in ("false alarm", "parts"))
        if row["lie"].startswith("nothing"):
            print(f"\n{row['lie']}: {alarms} of {parts} true parts seemed implausible to one of the peers.")
    print(f"\nHonest peers banned, in all rows: {sum(sum(row['ways']['all']['honest_out']) for row in rows)}.")


if __name__ == "__main__":
    main()
