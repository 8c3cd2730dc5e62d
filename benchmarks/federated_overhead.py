"""What our federated training costs over Flower's own run of the same strategy.

    python -m benchmarks.federated_overhead [--data DIR] [--repeats 5] [--ray] [--out FILE.json]

Wanted: at most 1.1 x. The same training is written as a user of Flower would, with a small ClientApp, a small ServerApp
and `flwr.serverapp.strategy.FedAvg` as it comes (it tests each round's mean at the clients): the same network, records,
batches and rounds. It runs on the engine that ours runs on, where it ends in the same weights, which is checked; and
with --ray on Flower's own Ray backend as well (two actors of one core each), which adds up answers in the order in
which they come: there the last bits differ, and after some rounds the weights.

Timed are the rounds after the first, which loads what torch loads late, in each of Ray's actors anew; then the whole
call, which for ours has the run folder with a checkpoint after each round and the counting of bytes; and the
processor's time of this process in the whole call, for machines that do other things too (Ray's actors are others).
Repeats are in turn (ours, Flower's, Ray's, ours, ...); ratios are those of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.setting import machine_line, write_result
from milkglass.flower import flower
from milkglass.networks import build
from milkglass.randomness import public_source, rehearsal_source
from milkglass.recipe import Recipe, parse_recipe
from milkglass.training.federated import train
from milkglass.training.shares import deal_records, share_of

flower()

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402

from milkglass.training.flower_simulation import simulate  # noqa: E402

CLIENTS: Final = ("north", "east", "south", "west")
TEST_BATCH: Final = 256
TIMED: Final = ("rounds", "whole", "processor")


def recipes(data: Path | None) -> dict[str, Recipe]:
    """By name: a tiny one, where every millisecond counts, and one whose clients compute for seconds a round."""
    tables: dict[str, Any] = {
        "data": {"name": "digits"},
        "network": {"name": "mlp"},
        "training": {"epochs": 10, "batch_size": 32, "optimizer": "sgd", "learning_rate": 0.1},
        "parties": {"clients": list(CLIENTS), "mode": "federated"},
        "federated": {"local_epochs": 2},
    }
    found = {"digits, mlp": parse_recipe(tables)}
    if data is not None:
        path = {"path": str(data / "fashion-mnist-train.npz"), "test_path": str(data / "fashion-mnist-test.npz")}
        more = {
            "data": {**path, "train_records": 4000, "test_records": 1000},
            "network": {"name": "cnn", "settings": {"width": 16}},
            "training": tables["training"] | {"epochs": 4},
            "federated": {"local_epochs": 1},
            "attacker": {"auxiliary_share": 0.1, "validation_share": 0.1},
        }
        found["fashion-mnist, cnn"] = parse_recipe(tables | more)
    return found


def ours(recipe: Recipe) -> tuple[float, dict[str, Tensor]]:
    """Seconds of the rounds after the first, and the weights."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train(recipe, out)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return sum(line["seconds"] for line in lines[1:]), load_file(out / "network.safetensors")


def plain(
    recipe: Recipe, run: Callable[[ServerApp, ClientApp, int], None] = simulate
) -> tuple[float, dict[str, Tensor]]:
    """The same of a training that a user of Flower has written. run: on which engine."""
    records = deal_records(recipe)
    shares = [share_of(recipe, records, name) for name in CLIENTS]
    form = records.record_shape, records.classes
    found: dict[str, Any] = {}
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        start = ArrayRecord(network_of(recipe, *form).state_dict())
        ends: list[float] = []
        rounds = recipe.training.epochs // recipe.federated.local_epochs
        every = len(CLIENTS)  # it takes two for enough otherwise, if the others are not there yet
        strategy = FedAvg(min_train_nodes=every, min_evaluate_nodes=every, min_available_nodes=every)
        result = strategy.start(
            grid, start, num_rounds=rounds, evaluate_fn=lambda _, __: ends.append(time.perf_counter())
        )
        found["seconds"], found["weights"] = ends[-1] - ends[1], result.arrays.to_torch_state_dict()

    run(app, client_app(recipe, form, shares), len(CLIENTS))
    return found["seconds"], found["weights"]


def network_of(recipe: Recipe, shape: tuple[int, ...], classes: int) -> nn.Module:
    """With the first weights."""
    return build(recipe.network.name, shape, classes, recipe.network.settings, public_source(recipe.seed).generator("weights"))  # fmt: skip # noqa: E501


def client_app(recipe: Recipe, form: tuple[tuple[int, ...], int], shares: list[Any]) -> ClientApp:
    """A ClientApp as in Flower's tutorials, whose batches come in the order of ours."""
    app, training = ClientApp(), recipe.training

    def begun(message: Message, context: Context) -> tuple[nn.Module, Any, int]:
        network, client = network_of(recipe, *form), int(context.node_config["partition-id"])
        network.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        return network, shares[client], client

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        network, share, client = begun(message, context)
        records, source = share.train, rehearsal_source(recipe.seed, CLIENTS[client])
        last = int(message.content.config_records["config"]["server-round"]) * recipe.federated.local_epochs  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(network.parameters(), training.learning_rate, training.momentum)
        network.train()
        for epoch in range(last - recipe.federated.local_epochs + 1, last + 1):
            order = torch.randperm(len(records), generator=source.generator("order", epoch))
            size = training.batch_size
            for rows in order[: len(order) // size * size].view(-1, size):
                optimizer.zero_grad()
                F.cross_entropy(network(records.x[rows]), records.y[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        arrays, metrics = ArrayRecord(network.state_dict()), MetricRecord({"num-examples": len(records)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def test(message: Message, context: Context) -> Message:
        network, share, _ = begun(message, context)
        network.eval()
        with torch.no_grad():
            parts = zip(share.test.x.split(TEST_BATCH), share.test.y.split(TEST_BATCH), strict=True)
            right = sum(int((network(x).argmax(dim=1) == y).sum()) for x, y in parts)
        metrics = MetricRecord({"num-examples": len(share.test), "accuracy": right / len(share.test)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def on_ray(server: ServerApp, client: ClientApp, clients: int) -> None:
    """Flower's own simulation."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from flwr.simulation import run_simulation

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    run_simulation(server, client, clients, backend_config=resources)  # type: ignore[arg-type]


def measure(recipe: Recipe, repeats: int, *, ray: bool) -> dict[str, Any]:
    """Median seconds of each way, and the ratios of ours to the others."""
    ways: dict[str, Callable[[], tuple[float, Mapping[str, Tensor]]]] = {
        "ours": lambda: ours(recipe),
        "flower": lambda: plain(recipe),
    }
    if ray:
        ways["ray"] = lambda: plain(recipe, on_ray)
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        ends = {}
        for name, way in ways.items():
            began, worked = time.perf_counter(), time.process_time()
            rounds, ends[name] = way()
            spent = rounds, time.perf_counter() - began, time.process_time() - worked
            if repeat:  # the first one loads what torch loads late
                taken[name].append(spent)
        for key, tensor in ends["ours"].items():
            torch.testing.assert_close(ends["flower"][key], tensor, rtol=1e-3, atol=1e-4)
    row: dict[str, Any] = {}
    for place, what in enumerate(TIMED):
        medians = {name: statistics.median(each[place] for each in all_) for name, all_ in taken.items()}
        row |= {f"{what}_seconds_{name}": seconds for name, seconds in medians.items()}
        row |= {f"{what}_over_{name}": medians["ours"] / seconds for name, seconds in medians.items() if name != "ours"}
    return row


def main() -> None:
    """Measure every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the folder of the shared data sets, for the larger case")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine_line())
    print("| training | timed | ours | Flower, same engine | ratio | Flower on Ray | ratio |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for name, recipe in recipes(arguments.data).items():
        row = measure(recipe, arguments.repeats, ray=arguments.ray)
        rows.append({"training": name} | row)
        for what in TIMED:
            seconds = [row.get(f"{what}_seconds_{way}") for way in ("ours", "flower", "ray")]
            ratios = [row.get(f"{what}_over_{way}") for way in ("flower", "ray")]
            cells = [seconds[0], seconds[1], ratios[0], seconds[2], ratios[1]]
            print(f"| {name} | {what} | {' | '.join('' if c is None else f'{c:.3f}' for c in cells)} |", flush=True)
    if arguments.out:
        write_result(arguments.out, rows)


if __name__ == "__main__":
    main()
