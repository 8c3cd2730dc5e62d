"""One peer of hivemind's own `hivemind.Optimizer`, to be measured beside `milkglass collab`: same network, same batch.

    python -m benchmarks.hivemind_peer RECIPE --out RUN --go FILE --peers N [--peer ADDRESS]

A line for each of its epochs goes to <RUN>.jsonl: seconds, seconds of forward and backward passes in them, this peer's
records, and how many peers its tracker knows of. Settings as those that suit the loopback: matchmaking 2 s, a request's
timeout 1 s in both of its averagers (with the 3 s that its gradients' one has by itself, groups wait for each other and
none comes about in 30 s), 30 s for the daemon to start; nothing is delayed or compressed, and shares are equal. Once
--go is there it waits until all N are known, for those that step alone at first come to different epochs. It trains
until it is ended, and has to be ended together with its children, which it starts in its own process group.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from milkglass.collaboration.tasks import Task, task_of
from milkglass.memory import keep_freed_memory
from milkglass.randomness import Source
from milkglass.recipe import Recipe, load_recipe

_MATCHMAKING_SECONDS: Final = 2.0
_REQUEST_SECONDS: Final = 1.0
_DAEMON_SECONDS: Final = 30.0
_LOOK_SECONDS: Final = 0.02
_TELL_SECONDS: Final = 0.5


def main() -> None:
    """Train, and write lines, until ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--go", type=Path, required=True)
    parser.add_argument("--peers", type=int, required=True)
    parser.add_argument("--peer", action="append", default=[])
    arguments = parser.parse_args()
    os.environ["HIVEMIND_MEMORY_SHARING_STRATEGY"] = "file_descriptor"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hivemind
        from hivemind.optim.grad_averager import GradientAverager
    keep_freed_memory()
    torch.set_num_threads(1)
    recipe = load_recipe(arguments.recipe)
    task = task_of(recipe)
    dht = hivemind.DHT(
        initial_peers=arguments.peer,
        host_maddrs=["/ip4/127.0.0.1/tcp/0"],
        startup_timeout=_DAEMON_SECONDS,
        start=True,
    )
    optimizer = hivemind.Optimizer(
        dht=dht,
        run_id=recipe.collaboration.run,
        batch_size_per_step=recipe.training.batch_size,
        target_batch_size=recipe.collaboration.target_batch,
        optimizer=torch.optim.Adam(task.network.parameters(), lr=recipe.training.learning_rate),
        use_local_updates=False,
        matchmaking_time=_MATCHMAKING_SECONDS,
        averaging_timeout=recipe.collaboration.timeout_seconds,
        averager_opts={"request_timeout": _REQUEST_SECONDS},
        grad_averager_factory=partial(GradientAverager, request_timeout=_REQUEST_SECONDS),
    )
    print(f"others join with: --peer {dht.get_visible_maddrs()[0]}", flush=True)
    while not arguments.go.exists():
        time.sleep(_LOOK_SECONDS)
    while optimizer.tracker.global_progress.num_peers < arguments.peers:
        optimizer.tracker.report_local_progress(0, 1)  # who has nothing yet is not told of
        time.sleep(_TELL_SECONDS)
    _train(recipe, task, optimizer, arguments.out.with_name(f"{arguments.out.name}.jsonl"))


def _train(recipe: Recipe, task: Task, optimizer: Any, path: Path) -> None:
    """For ever."""
    order, size = Source(os.urandom(32)).generator("order"), recipe.training.batch_size
    epoch, samples, compute_seconds, began = optimizer.local_epoch, 0, 0.0, time.monotonic()
    with path.open("w") as file:
        while True:
            begun = time.perf_counter()
            batch = task.draw(order, size)
            task.loss(batch).backward()  # type: ignore[no-untyped-call]
            samples, compute_seconds = samples + size, compute_seconds + time.perf_counter() - begun
            peers = optimizer.tracker.global_progress.num_peers
            optimizer.step()
            optimizer.zero_grad()
            if optimizer.local_epoch == epoch:
                continue
            now = time.monotonic()
            line = {"epoch": optimizer.local_epoch, "peers": peers, "seconds": now - began, "samples": samples}
            file.write(json.dumps(line | {"compute_seconds": compute_seconds}) + "\n")
            file.flush()
            epoch, samples, compute_seconds, began = optimizer.local_epoch, 0, 0.0, now


if __name__ == "__main__":
    main()
