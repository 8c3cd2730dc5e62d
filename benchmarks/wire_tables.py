"""The tables of less_on_the_wire.py, from its cells."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, Final

from benchmarks import cost_model, large_batch_accuracy
from benchmarks.cost_model import Model, Steps, fit, overtaken_at
from benchmarks.turns import ratio
from benchmarks.wire_cells import (
    ADAPTIVE,
    DENSE,
    DRAWN,
    LINKS,
    METHODS,
    TEST_EVERY,
    TIMED_ONLY,
    Cells,
    Timed,
    over,
    products,
    timed,
)


def print_all(arguments: argparse.Namespace, cells: Cells) -> list[dict[str, Any]]:
    """Print what is there; the rows. arguments: of less_on_the_wire."""
    rows = []
    for link in LINKS:
        rows += _steps_table(arguments, cells, link)
    rows += _accuracy_table(arguments, cells)
    for link in LINKS:
        rows += _time_table(arguments, cells, link)
    rows += large_batch_accuracy.table(arguments.cells, arguments.seeds)
    return rows + _model_tables(arguments, cells)


def _steps_table(arguments: argparse.Namespace, cells: Cells, link: str) -> list[dict[str, Any]]:
    found = timed(arguments.ranks, cells, link)
    if not found:
        return []
    numbers = cells.get(f"steps/{arguments.ranks}")["parameters"]
    print(f"\nA step over {link}, {arguments.ranks} ranks, {numbers:,} parameters:\n")
    print(
        "| method | steps | seconds a step | of those with no average | dense / this, by block | CPU, ms | MB a step "
        "| interface / payload |\n|---|---|---|---|---|---|---|---|"
    )
    rows = []
    for name, each in found.items():
        faster = ratio(found[DENSE].by_block, each.by_block)
        row: dict[str, Any] = {
            "table": "steps",
            "link": link,
            "way": name,
            "steps": each.steps,
            "seconds": each.seconds,
        }
        row |= {"by_block": each.by_block, "local_seconds": each.local, "meeting_seconds": each.meeting}
        row |= {"faster": vars(faster), "averages": each.averages}
        row |= {what: each.mean(what) for what in ("cpu_seconds", "payload", "on_wire")}
        rows.append(row)
        local = f"{each.local:.3f}" if each.averages else ""
        payload, cpu = each.mean("payload"), 1e3 * each.mean("cpu_seconds")
        told = f"{each.steps} | {each.seconds:.3f} | {local} | {faster.words()} | {cpu:.0f} | {payload / 1e6:.3f}"
        print(f"| {name} | {told} | {each.mean('on_wire') / payload:.3f} |")
    for left, right in (("top-k, .001", "Gaussian-k, .001"), ("top-k, .01", "Gaussian-k, .01"), _TORCHS):
        print(f"\n{left} / {right}: {ratio(found[left].by_block, found[right].by_block).words()}")
    return rows


_TORCHS: Final = ("torch.topk, .001", "Gaussian-k, .001")


def _accuracy_table(arguments: argparse.Namespace, cells: Cells) -> list[dict[str, Any]]:
    rows = []
    for name in METHODS:
        found = cells.below(f"accuracy/{arguments.ranks}/{name}/")
        if found:
            reached = {seed: told["reached"] for seed, told in found.items()}
            rows.append({"table": "accuracy", "way": name, "reached": reached, "target": arguments.target})
            rows[-1]["averages"] = {seed: told["averages"] for seed, told in found.items()}
            rows[-1]["best"] = {seed: max(accuracy for _, accuracy in told["curve"]) for seed, told in found.items()}
    if not rows:
        return []
    print(f"\nSteps to {arguments.target:.0%}, tested every {TEST_EVERY}, at most {arguments.most_steps}, by seed:\n")
    print("| method | steps | averages | best accuracy, % |\n|---|---|---|---|")
    for row in rows:
        steps = ", ".join("not reached" if each is None else str(each) for each in row["reached"].values())
        averages = ", ".join(str(each) for each in row["averages"].values() if each is not None)
        best = ", ".join(f"{100 * each:.1f}" for each in row["best"].values())
        print(f"| {row['way']} | {steps} | {averages} | {best} |")
    return rows


def _time_table(arguments: argparse.Namespace, cells: Cells, link: str) -> list[dict[str, Any]]:
    found = products(arguments.ranks, cells, link)
    if not any(found.values()):
        return []
    print(f"\nSeconds to {arguments.target:.0%} over {link}, by seed: steps times seconds a step:\n")
    print("| method | seconds | dense / this | top-k of the same density / this |\n|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for name, seconds in found.items():
        other = "top-k, .01" if name.endswith(".01") else "top-k, .001"
        ratios = [over(found[base], seconds) for base in (DENSE, other)]
        rows.append({"table": "time", "link": link, "way": name, "seconds": seconds})
        rows[-1] |= {"dense_over": ratios[0], "topk_over": ratios[1]}
        words = ["–" if value is None else f"{value:.2f}" for value in ratios]
        print(f"| {name} | {', '.join(f'{each:.1f}' for each in seconds.values()) or '–'} | {' | '.join(words)} |")
    for name, told in cells.below(f"check/{arguments.ranks}/{link}/").items():
        product = found[name][told["seed"]]
        print(
            f"\nEnd to end, {name}: {told['reached']} steps in {told['seconds']:.1f} s; the product says {product:.1f}"
        )
        rows.append({"table": "check", "link": link, "way": name, "seconds": told["seconds"]})
        rows[-1] |= {"steps": told["reached"], "product": product}
    return rows


def _model_tables(arguments: argparse.Namespace, cells: Cells) -> list[dict[str, Any]]:
    """Print the fitted cost model, what it misses, and where sparse gradients lose."""
    by_link = {link: timed(arguments.ranks, cells, link) for link in LINKS}
    if not all(by_link.values()):
        return []
    steps: dict[str, dict[str, Steps]] = {}
    measured = []
    for link, found in by_link.items():
        steps[link] = {name: _pattern(name, each, arguments.ranks) for name, each in found.items()}
        measured += [(steps[link][name], LINKS[link], each.seconds) for name, each in found.items()]
    one = Steps({}, 2, 8 * (arguments.ranks - 1) / arguments.ranks, arguments.ranks)
    measured += [
        (one, LINKS[link], cells.get(f"steps/{arguments.ranks}")["links"][link]["smallest"]) for link in by_link
    ]
    model = fit(measured)
    computing = {name for each in steps["1gbit"].values() for name in each.computing}
    told = ", ".join(f"{name} {1e3 * model.numbers[name]:.0f}" for name in sorted(computing))
    print(
        f"\nCost model, fitted to {len(measured)} times: a message takes {1e6 * model.latency:.0f} microseconds before"
    )
    print(f"its bytes, bytes get {model.efficiency:.1%} of the rate. Computing, ms: {told}.")
    print("\n| method | link | measured, s | model, s | off, % |\n|---|---|---|---|---|")
    rows: list[dict[str, Any]] = [{"table": "model", "numbers": dict(model.numbers)}]
    for link, found in by_link.items():
        for name, each in found.items():
            fitted = model.seconds(steps[link][name], arguments.ranks, LINKS[link])
            off = 100 * (fitted / each.seconds - 1)
            rows.append({"table": "fit", "link": link, "way": name, "seconds": each.seconds, "model": fitted})
            print(f"| {name} | {link} | {each.seconds:.3f} | {fitted:.3f} | {off:+.0f} |")
    trained = cells.get(f"accuracy/{arguments.ranks}/{ADAPTIVE}/{arguments.seeds[0]}")
    if trained is not None:
        for link, found in by_link.items():
            steps[link][ADAPTIVE] = _averaging_as(trained, found[ADAPTIVE], arguments.ranks)
    return rows + _predictions(arguments, cells, model, steps)


def _predictions(
    arguments: argparse.Namespace, cells: Cells, model: Model, by_link: Mapping[str, Mapping[str, Steps]]
) -> list[dict[str, Any]]:
    """Print what the model says of other numbers of ranks, beside what was measured with some."""
    rows: list[dict[str, Any]] = []
    print("\nPrediction, times as fast as dense, by ranks:\n")
    print(f"| link | method | {' | '.join(map(str, cost_model.RANKS))} | no faster than dense from |")
    print("|---|---|" + "---|" * (len(cost_model.RANKS) + 1))
    for link, rate in LINKS.items():
        methods = by_link[link]
        for name in DRAWN[1:]:
            faster = [
                model.seconds(methods[DENSE], n, rate) / model.seconds(methods[name], n, rate) for n in cost_model.RANKS
            ]
            end = overtaken_at(model, methods[name], methods[DENSE], rate)
            rows.append({"table": "prediction", "link": link, "way": name, "faster": faster, "overtaken_at": end})
            print(f"| {link} | {name} | {' | '.join(f'{each:.2f}' for each in faster)} | {end or 'never'} |")
    for ranks in sorted({int(name) for name in cells.below("steps/")} - {arguments.ranks}):
        print(f"\nPredicted and measured with {ranks} ranks, seconds a step:\n")
        print("| link | method | predicted | measured |\n|---|---|---|---|")
        for link, rate in LINKS.items():
            for name, each in timed(ranks, cells, link).items():
                told = model.seconds(by_link[link][name], ranks, rate)
                rows.append({"table": "prediction", "ranks": ranks, "link": link, "way": name, "seconds": each.seconds})
                rows[-1]["predicted"] = told
                print(f"| {link} | {name} | {told:.3f} | {each.seconds:.3f} |")
    if arguments.figure:
        drawn = {link: {name: by_link[link][name] for name in DRAWN} for link in LINKS}
        words = f"Prediction of a cost model fitted to {arguments.ranks} ranks on one machine. Not measured."
        arguments.figure.write_text(cost_model.picture(model, drawn, LINKS, DENSE, words))
    return rows


def _averaging_as(trained: Mapping[str, Any], each: Timed, ranks: int) -> Steps:
    """Adaptive averaging as often as in a whole training, not as in the few timed steps."""
    share, timed_share = trained["averages"] / trained["steps"], each.averages / each.steps
    sent = each.mean("on_wire") * share / timed_share
    return Steps({"a local step": 1.0, "an average": share}, 4 * share, sent, ranks)


def _pattern(name: str, each: Timed, ranks: int) -> Steps:
    """How a method's steps go: what they compute, how many messages one after the other, how many bytes."""
    section = (METHODS | TIMED_ONLY)[name].section
    sent = each.mean("on_wire")
    if section.exchange in ("periodic", "adaptive"):
        share = each.averages / each.steps
        return Steps({"a local step": 1.0, "an average": share}, 4 * share, sent, ranks)
    rounds = {DENSE: 6.0, "powersgd": 6.0}.get(section.exchange, 2.0)  # dense: three buckets; PowerSGD: three in turn
    return Steps({name: 1.0}, rounds, sent, ranks, gathers=section.exchange in ("topk", "gaussian_k"))
