"""SIMULATION: what coming and going costs a collaboration of 2 to 1,000 volunteers, by target batch.

    python -m benchmarks.churn [--out FILE.json] [--figure FILE.svg]
    python -m benchmarks.churn --check DIR [DIR ...]     beside real runs; DIR: the run folders of one run's peers

churn_model.py says what is simulated. What it stands on is assumed, not measured: sessions as in sahajBERT
(exponential, 4 hours in the mean; 15 minutes beside it), a network like sahajBERT's (ALBERT-large, 17.7 million
parameters: gradients in fp16, a state of weights and two moments in float32), links as those shaped for the averaging
benchmark (50, 50, 100, 200 Mbit/s), 0.1 s for a message, 5 ms for a connection; speeds lognormal, 5 records/s in the
mean, a tenth of the volunteers below 1.9 and a tenth above 9.0; half of the sessions end with a kill. Waiting times are
milkglass's defaults. DeDLOC's target batch is 4,096.

- efficiency: records that went into a step, of those that all online could have computed, did they nothing else.
- wasted: of the records that went into a step or were lost, those lost.
- batch: records in a step. It is over the target because volunteers compute on while their group meets; these records
  count as used.

The check fits nothing. For each set of peers that stepped together it takes their speeds (records over the seconds in
which they did not average) and how long they met and averaged, simulates that, and compares seconds per epoch and
efficiency. What is checked is how an epoch is put together; nobody comes or goes in it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from benchmarks.churn_model import Costs, Outcome, Population, Sessions, draw_sessions, epoch_seconds, simulate
from benchmarks.setting import command_line, machine_line, write_result
from milkglass.charts import svg
from milkglass.collaboration_section import Collaboration
from milkglass.errors import MilkglassError, RunError
from milkglass.figures import Points, chart, number

ONLINE: Final = (2, 4, 16, 64, 256, 1000)
TARGETS: Final = tuple(2**power for power in range(10, 21))
SESSION_SECONDS: Final = (4 * 3600.0, 900.0)
EFFICIENT, WASTEFUL = 0.8, 0.05
_PARAMETERS: Final = 17_700_000
_RATES: Final = (50e6, 50e6, 100e6, 200e6)  # bit/s
_WARM_UP_SESSIONS: Final = 2
_NEEDED: Final = ("epoch", "samples", "group_samples", "seconds", "averaging_seconds", "matchmaking_seconds")
_CHECKED_EPOCHS: Final = 1000

Cell = tuple[int, int]  # mean number online, target batch


def main() -> None:
    """Simulate, or check against real runs, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--online", type=int, nargs="+", default=list(ONLINE), help="volunteers online, in the mean")
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), help="target batches, records")
    parser.add_argument("--sessions", type=float, nargs="+", default=list(SESSION_SECONDS), help="means, seconds")
    parser.add_argument("--killed", type=float, default=0.5, help="share of sessions that end without a goodbye")
    parser.add_argument("--matchmaking", type=float, default=Collaboration().matchmaking_seconds, help="seconds")
    parser.add_argument("--timeout", type=float, default=Collaboration().timeout_seconds, help="seconds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--check", type=Path, nargs="+", metavar="DIR", help="folders with real peers' run folders")
    arguments = parser.parse_args()
    print(f"{command_line()}\n{machine_line()}\n")
    try:
        rows = _check_all(arguments.check) if arguments.check else _simulate_all(arguments)
    except MilkglassError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if arguments.out:
        write_result(arguments.out, rows)


def _simulate_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Simulate, print and draw; the rows of the result."""
    costs = Costs(
        matchmaking_seconds=arguments.matchmaking,
        timeout_seconds=arguments.timeout,
        gradient_bytes=2 * _PARAMETERS,
        state_bytes=12 * _PARAMETERS,
        latency_seconds=0.1,
        seconds_per_connection=0.005,
    )
    began = time.perf_counter()
    print(f"SIMULATION, {arguments.seeds} seeds; brackets hold the range over seeds. {costs}")
    rows, lines = [], {}
    for session in arguments.sessions:
        found: dict[Cell, list[Outcome]] = {}
        for online in arguments.online:
            people = Population(online, session, arguments.killed, speed=5.0, speed_spread=0.6, rates=_RATES)
            for target in arguments.targets:
                found[online, target] = outcomes = play(people, costs, target, arguments.seeds)
                row = {"simulation": True, "session_seconds": session, "online": online, "target_batch": target}
                rows.append(row | told(outcomes))
        print(f"\nSimulation, sessions of {_length(session)} in the mean, {arguments.killed:.0%} of them killed.\n")
        print("\n".join(tables(found)))
        lines[session] = found
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    if arguments.figure:
        arguments.figure.write_text(picture(lines))
    return rows


def play(people: Population, costs: Costs, target: int, seeds: int) -> list[Outcome]:
    """A cell, an outcome for each seed: at least 10 mean sessions long, and 1,000 sessions, and about 200 epochs."""
    session = people.session_seconds
    warm_up = _WARM_UP_SESSIONS * session
    epoch = min(epoch_seconds(people, costs, target), session)
    seconds = max(10 * session, 1000 * session / people.online, 200 * epoch)
    outcomes = []
    for seed in range(seeds):
        generator = np.random.default_rng([seed, round(people.online), target, round(session)])
        sessions = draw_sessions(people, costs, warm_up + seconds, generator)
        outcomes.append(simulate(sessions, costs, target, seconds, warm_up))
    return outcomes


def told(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What a cell says, of all seeds together; null where no step came about."""
    pooled = Outcome.pooled(outcomes)
    return {
        "efficiency": pooled.efficiency,
        "efficiency_by_seed": [each.efficiency for each in outcomes],
        "wasted_share": pooled.wasted_share,
        "wasted_share_by_seed": [each.wasted_share for each in outcomes],
        "seconds_per_epoch": pooled.seconds_per_epoch if pooled.epochs else None,
        "batch": pooled.batch if pooled.epochs else None,
        "group": pooled.group if pooled.epochs else None,
        "failed_share": pooled.failed_share,
        "counted": asdict(pooled),
    }


def tables(found: Mapping[Cell, Sequence[Outcome]]) -> list[str]:
    """Markdown lines of one length of sessions: an overview, the targets to use, and all that was found."""
    sizes = sorted({online for online, _ in found})
    targets = sorted({target for _, target in found})
    pooled = {cell: Outcome.pooled(outcomes) for cell, outcomes in found.items()}
    lines = ["Efficiency / wasted, %:", "", f"| online | {' | '.join(f'{t:,}' for t in targets)} |"]
    lines.append("|" + "---|" * (len(targets) + 1))
    for online in sizes:
        each = (pooled[online, target] for target in targets)
        cells = (f"{100 * one.efficiency:.0f} / {100 * one.wasted_share:.1f}" for one in each)
        lines.append(f"| {online:,} | {' | '.join(cells)} |")
    lines += ["", f"| online | efficiency at least {EFFICIENT:.0%} | wasted at most {WASTEFUL:.0%} | both |"]
    lines.append("|---|---|---|---|")
    for online in sizes:
        good = [t for t in targets if pooled[online, t].efficiency >= EFFICIENT]
        spare = [t for t in targets if pooled[online, t].wasted_share <= WASTEFUL]
        both = [t for t in good if t in spare]
        lines.append(f"| {online:,} | {_span(good, targets)} | {_span(spare, targets)} | {_span(both, targets)} |")
    lines += ["", "| online | target | efficiency, % | wasted, % | seconds per epoch | batch | group | failed, % |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for (online, target), outcomes in found.items():
        one = pooled[online, target]
        used = _ranged([each.efficiency for each in outcomes], one.efficiency)
        lost = _ranged([each.wasted_share for each in outcomes], one.wasted_share)
        epoch = f"{number(one.seconds_per_epoch, 0)} | {number(one.batch, 0)} | {number(one.group, 1)}"
        shown = epoch if one.epochs else "never | – | –"
        lines.append(f"| {online:,} | {target:,} | {used} | {lost} | {shown} | {100 * one.failed_share:.1f} |")
    return lines


def _length(seconds: float) -> str:
    return f"{seconds / 3600:g} h" if seconds >= 3600 else f"{seconds / 60:g} min"


def _span(chosen: Sequence[int], targets: Sequence[int]) -> str:
    """From the first to the last of the chosen ones; all of them where one between is not chosen."""
    if not chosen:
        return "none"
    between = [target for target in targets if chosen[0] <= target <= chosen[-1]]
    if len(chosen) > 1 and between == chosen:
        return f"{chosen[0]:,} to {chosen[-1]:,}"
    return ", ".join(f"{target:,}" for target in chosen)


def _ranged(by_seed: Sequence[float], value: float) -> str:
    return f"{100 * value:.1f} ({100 * min(by_seed):.1f} to {100 * max(by_seed):.1f})"


def picture(found: Mapping[float, Mapping[Cell, Sequence[Outcome]]]) -> str:
    """An SVG: efficiency for each length of sessions, and what is wasted for the first, by target batch."""
    charts = []
    for index, (session, cells) in enumerate(found.items()):
        sizes = sorted({online for online, _ in cells if online > 2})
        efficiency: dict[str, Points] = {}
        wasted: dict[str, Points] = {}
        for online in sizes:
            pooled = {target: Outcome.pooled(each) for (n, target), each in cells.items() if n == online}
            efficiency[f"{online:,} online"] = [(target, one.efficiency) for target, one in pooled.items()]
            wasted[f"{online:,} online"] = [(target, one.wasted_share) for target, one in pooled.items()]
        shown = [("efficiency", "records used, of those possible", efficiency, (EFFICIENT, f"{EFFICIENT:.0%}"))]
        if index == 0:
            shown.append(("wasted work", "records lost, of those computed", wasted, (WASTEFUL, f"{WASTEFUL:.0%}")))
        for what, unit, series, level in shown:
            title = f"Simulation: {what}, sessions of {_length(session)}"
            charts.append(chart(title, unit, series, across="target batch", log=True, level=level, foot=0.0))
    words = "Simulation, not measured: assumed speeds, links and costs; exponential sessions; see benchmarks/churn.py."
    return svg([each for each in charts if each is not None], words)


@final
@dataclass(frozen=True)
class Checked:
    """A set of peers that stepped together, measured and simulated. Efficiencies: records stepped with, of possible."""

    peers: tuple[str, ...]
    epochs: int
    measured_seconds: float
    simulated_seconds: float
    measured_efficiency: float
    simulated_efficiency: float

    @property
    def seconds_ratio(self) -> float:
        """Simulated over measured seconds per epoch."""
        return self.simulated_seconds / self.measured_seconds

    @property
    def efficiency_ratio(self) -> float:
        """Simulated over measured efficiency."""
        return self.simulated_efficiency / self.measured_efficiency


def compare(peers: Mapping[str, Sequence[Mapping[str, Any]]], target_batch: int) -> list[Checked]:
    """A row for each set of peers, from the lines of their metrics, one an epoch: those of one real run.

    Left out are lines that lack a number, each peer's first, and epochs in which the peers' samples do not make up 95 %
    of their group's. Raises RunError where a peer's lines all lack something, or where no epoch is left.
    """
    lines = {name: _usable(name, each) for name, each in peers.items()}
    together: dict[tuple[str, ...], list[int]] = {}
    for epoch in sorted({epoch for each in lines.values() for epoch in each}):
        names = tuple(name for name, each in lines.items() if epoch in each)
        added = sum(lines[name][epoch]["samples"] for name in names)
        if added >= 0.95 * lines[names[0]][epoch]["group_samples"]:
            together.setdefault(names, []).append(epoch)
    if not together:
        raise RunError(
            f"peers {', '.join(peers)}: there is no epoch in which they added up what their group stepped with; "
            "expected the run folders of all peers of one run, with 2 epochs or more"
        )
    return [
        _checked(names, [[lines[name][epoch] for epoch in epochs] for name in names], target_batch)
        for names, epochs in together.items()
    ]


def _usable(name: str, lines: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """By epoch, what is needed of a peer's lines but the first."""
    usable: dict[int, dict[str, float]] = {}
    missing: list[str] = []
    for line in lines[1:]:
        values = {key: float(line[key]) for key in _NEEDED if _is_number(line.get(key))}
        if len(values) < len(_NEEDED):
            missing = missing or [key for key in _NEEDED if key not in values]
        elif values["seconds"] > values["averaging_seconds"] and values["group_samples"] > 0:
            usable[int(values["epoch"])] = values
    if missing and not usable:
        raise RunError(
            f"peer {name}: its metrics have no numbers for {', '.join(missing)}; expected {', '.join(_NEEDED)} for "
            "each epoch"
        )
    return usable


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _checked(names: tuple[str, ...], lines: Sequence[Sequence[Mapping[str, float]]], target_batch: int) -> Checked:
    """lines: each peer's, of the same epochs."""
    epochs, count = list(zip(*lines, strict=True)), len(names)
    each = [line for peer in lines for line in peer]
    speeds = [
        sum(line["samples"] for line in peer) / sum(line["seconds"] - line["averaging_seconds"] for line in peer)
        for peer in lines
    ]
    measured = statistics.fmean(line["seconds"] for line in each)
    stepped = statistics.fmean(epoch[0]["group_samples"] for epoch in epochs)
    costs = Costs(
        matchmaking_seconds=statistics.fmean(line["matchmaking_seconds"] for line in each),
        timeout_seconds=math.inf,
        latency_seconds=statistics.fmean(line["averaging_seconds"] for line in each),
        rounds=1,
    )
    always, never = np.zeros(count), np.full(count, math.inf)
    sessions = Sessions(always, always, never, np.zeros(count, dtype=bool), np.array(speeds), np.ones(count))
    outcome = simulate(sessions, costs, target_batch, _CHECKED_EPOCHS * measured)
    return Checked(
        peers=names,
        epochs=len(epochs),
        measured_seconds=measured,
        simulated_seconds=outcome.seconds_per_epoch,
        measured_efficiency=stepped / (sum(speeds) * measured),
        simulated_efficiency=outcome.efficiency,
    )


def _check_all(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Print the check of each real run; the rows of the result."""
    heads = ("run", "peers", "epochs", "measured seconds per epoch", "simulated", "ratio")
    print(f"| {' | '.join((*heads, 'measured efficiency', 'simulated', 'ratio'))} |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for folder in folders:
        for one in compare(*read_run(folder)):
            rows.append({"run": folder.name, **asdict(one)})
            rows[-1] |= {"seconds_ratio": one.seconds_ratio, "efficiency_ratio": one.efficiency_ratio}
            seconds = f"{one.measured_seconds:.2f} | {one.simulated_seconds:.2f} | {one.seconds_ratio:.2f}"
            shares = f"{one.measured_efficiency:.2f} | {one.simulated_efficiency:.2f} | {one.efficiency_ratio:.2f}"
            print(f"| {folder.name} | {', '.join(one.peers)} | {one.epochs} | {seconds} | {shares} |")
    return rows


def read_run(folder: Path) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """(lines of metrics by peer, target batch) of a folder that holds the run folders of one run's peers.

    Raises RunError where there are fewer than two, or where a file cannot be read.
    """
    found = sorted(folder.glob("*/metrics.jsonl"))
    if len(found) < 2:
        raise RunError(f"{folder}: {len(found)} folders with a metrics.jsonl; expected the run folders of 2 to 4 peers")
    peers, targets = {}, set()
    for path in found:
        try:
            peers[path.parent.name] = [dict(json.loads(line)) for line in path.read_text().splitlines()]
            recipe = tomllib.loads((path.parent / "recipe.toml").read_text())
            targets.add(int(recipe["collaboration"]["target_batch"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path.parent}: not a run folder of a collaboration ({type(error).__name__}: {error}); expected "
                "metrics.jsonl, and recipe.toml with collaboration.target_batch"
            ) from None
    if len(targets) > 1:
        raise RunError(f"{folder}: target batches {sorted(targets)}; expected the peers of one run, with one")
    return peers, targets.pop()


if __name__ == "__main__":
    main()
