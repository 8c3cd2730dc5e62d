"""Four volunteers of which one is killed, one leaves and two come late, against one process of the same target batch.

    python -m benchmarks.collaboration_run [--data DIR] [--epochs 20] [--runs 3] [--keys 5] [--out FILE.json]

All are processes of `milkglass collab` on the loopback, one thread each. Two begin; at epoch 2 a third is started and
at epoch 4 a fourth. Once all four have averaged together, at epoch 7 or later, the second is killed (SIGKILL), and at
epoch 12 or later the first, whose address the late ones were given, leaves (Ctrl-C, SIGINT). The late ones go on to the
end. Beside that the same recipe in one process alone, with several private keys, which is how much the order of records
alone does to the loss; and a plain torch loop over the records in the order of the first key, as an oracle. Adam, its
learning rate falling to 0 by half a cosine over the epochs.

Wanted: test loss within 2 % of one process's mean; the same bits at all survivors; every epoch stepped along a full
batch, none missed by a survivor, and none done again but the one in flight at the kill. With --data: Fashion-MNIST, all
60,000 records, and its test set; without: the small digits, where an epoch is short.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from torch.nn import functional as F

from benchmarks.setting import command_line, machine_line, write_result
from benchmarks.volunteers import Crowd, Process, volunteers, wait_for
from milkglass.randomness import read_key, write_key
from milkglass.recipe import Recipe, load_recipe

THIRD_AT, FOURTH_AT, KILL_AT, LEAVE_AT = 2, 4, 7, 12
_LAST: Final = 3  # epochs whose training loss is averaged
_PIECE: Final = 512
_MOST_SECONDS: Final = 1800.0
_LEAVE_SECONDS: Final = 30.0
_RECIPE: Final = """\
[data]
{data}
[network]
name = "cnn"
settings = {{ width = {width} }}
[training]
batch_size = 64
learning_rate = {learning_rate}
decay_steps = {epochs}
[parties]
mode = "collaboration"
[attacker]
auxiliary_share = 0
validation_share = 0
[collaboration]
run = "benchmark"
target_batch = {target}
epochs = {epochs}
matchmaking_seconds = 2
timeout_seconds = 15
"""


def main() -> None:
    """Run all, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with fashion-mnist-train.npz and fashion-mnist-test.npz")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--target", type=int, default=4096, help="target batch, records")
    parser.add_argument("--width", type=int, default=32, help="of the cnn: how long an epoch lasts")
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--runs", type=int, default=3, help="of the collaboration")
    parser.add_argument("--keys", type=int, default=5, help="runs of one process alone, each with a key of its own")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where the run folders stay, for benchmarks.churn")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.epochs <= LEAVE_AT:
        parser.error(f"--epochs {arguments.epochs}; expected more than {LEAVE_AT}, at which one leaves")
    print(f"{command_line()}\n{machine_line()}\n")
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        recipe = _recipe(arguments, folder)
        rows = one_process(recipe, folder / "one", arguments.keys)
        print(f"| run | test loss | accuracy | training loss, last {_LAST} epochs | records a step | from the mean |")
        print("|---|---|---|---|---|---|")
        mean = statistics.fmean(row["test_loss"] for row in rows)
        rows.append(plain_loop(recipe, folder / "one" / "0.key"))
        for row in rows:
            _tell(row, mean)
        together = []
        for number in range(arguments.runs):
            together.append(collaboration(recipe, folder / f"four-{number}", number))
            _tell(together[-1], mean)
    _tell_verdicts(rows[: arguments.keys], together, mean)
    if arguments.out:
        write_result(arguments.out, rows + together)


def one_process(recipe: Path, folder: Path, keys: int) -> list[dict[str, Any]]:
    """`milkglass collab` alone, with so many keys, all at the same time: what each came to."""
    folder.mkdir(parents=True, exist_ok=True)
    with volunteers(folder) as crowd:
        for number in range(keys):
            key = folder / f"{number}.key"
            key.unlink(missing_ok=True)
            write_key(key)
            crowd.collab(f"key{number}", recipe, ["--key", str(key)])
        for each in crowd.all:
            each.wait(_MOST_SECONDS)
        return [_came_to(each, f"one process, key {number}") for number, each in enumerate(crowd.all)]


def plain_loop(path: Path, key: Path) -> dict[str, Any]:
    """The same training by torch alone, with nothing of milkglass but its records, its network and their order."""
    import torch

    from milkglass.collaboration.tasks import task_of

    recipe: Recipe = load_recipe(path)
    torch.set_num_threads(1)
    task, order, target = task_of(recipe), read_key(key).generator("order"), recipe.collaboration.target_batch
    adam = torch.optim.Adam(task.network.parameters(), lr=recipe.training.learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, recipe.collaboration.epochs)
    losses = []
    for _ in range(recipe.collaboration.epochs):
        adam.zero_grad()
        whole, total = task.draw(order, target), 0.0
        for part in whole.split(_PIECE):
            loss = F.cross_entropy(task.network(part.inputs), part.targets, reduction="sum") / target
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        adam.step()
        cosine.step()
        losses.append(total)
    tested = task.test()
    return {
        "run": "plain loop, key 0",
        "test_loss": tested["loss"],
        "accuracy": tested["accuracy"],
        "training_loss": statistics.fmean(losses[-_LAST:]),
        "group_samples": float(target),
    }


def collaboration(recipe: Path, folder: Path, number: int) -> dict[str, Any]:
    """One run of four; what its survivors came to, and what became of each epoch."""
    epochs = load_recipe(recipe).collaboration.epochs
    target = load_recipe(recipe).collaboration.target_batch
    with volunteers(folder) as crowd:
        first = crowd.collab("first", recipe)
        address = ["--peer", first.address()]
        began = time.monotonic()
        killed = crowd.collab("killed", recipe, address)
        late = []
        for name, at in (("third", THIRD_AT), ("fourth", FOURTH_AT)):
            wait_for(lambda at=at: first.epoch >= at, [first, killed], _MOST_SECONDS, f"epoch {at}")  # type: ignore[misc]
            late.append(crowd.collab(name, recipe, address))
        wait_for(lambda: all(_was_in(each, 4) for each in crowd.all), crowd.all, _MOST_SECONDS, "four in a group")
        wait_for(lambda: first.epoch >= KILL_AT, crowd.all, _MOST_SECONDS, f"epoch {KILL_AT}")
        kill_after = first.epoch
        killed.signal(signal.SIGKILL)
        going_on = [first, *late]
        wait_for(lambda: first.epoch >= max(LEAVE_AT, kill_after + 2), going_on, _MOST_SECONDS, f"epoch {LEAVE_AT}")
        leave_after = first.epoch
        if leave_after >= epochs - 1:
            raise RuntimeError(f"{folder}: the first leaves after epoch {leave_after} of {epochs}; make epochs longer")
        first.signal(signal.SIGINT)
        left_with = first.wait(_LEAVE_SECONDS)
        for each in late:
            each.wait(_MOST_SECONDS)
        seconds = time.monotonic() - began
        row = _came_to(late[0], f"four volunteers, run {number}")
        row |= _history(crowd, target, epochs, kill_after, leave_after)
        summaries = [_finished(each) for each in late]
        networks = {(each.folder / "network.safetensors").read_bytes() for each in late}
        return row | {
            "seconds": seconds,
            "left_with": left_with,
            "daemons_left": [pid for each in (first, killed) for pid in each.left_daemons()],
            "survivors_equal": len({each["state"] for each in summaries}) == 1 and len(networks) == 1,
            "failed_averagings": {each.name: _finished(each)["failed_averagings"] for each in late},
            "state_downloads": {each.name: _finished(each)["state_downloads"] for each in late},
            "wasted_samples": sum(each["wasted_samples"] for each in summaries),
            "notes": {each.name: _notes(each) for each in crowd.all},
        }


def _history(crowd: Crowd, target: int, epochs: int, kill_after: int, leave_after: int) -> dict[str, Any]:
    """What became of each epoch, by the lines of all."""
    by_epoch: dict[int, list[dict[str, Any]]] = {}
    for each in crowd.all:
        for line in each.lines:
            by_epoch.setdefault(int(line["epoch"]), []).append(line)
    missed = {}
    for each in crowd.all:
        had = [int(line["epoch"]) for line in each.lines]
        last = epochs if each.returncode == 0 else max(had)
        missed[each.name] = sorted(set(range(min(had), last + 1)) - set(had))
    samples = {epoch: {line["group_samples"] for line in lines} for epoch, lines in by_epoch.items()}
    first_seconds = {epoch: max(line["seconds"] for line in lines) for epoch, lines in sorted(by_epoch.items())}
    return {
        "killed_after_epoch": kill_after,
        "left_after_epoch": leave_after,
        "epochs_without_a_step": sorted(set(range(1, epochs + 1)) - set(by_epoch)),
        "epochs_under_target": {epoch: min(each) for epoch, each in sorted(samples.items()) if min(each) < target},
        "epochs_parted": sorted(epoch for epoch, each in samples.items() if len(each) > 1),
        "missed": missed,
        "peers": {epoch: max(line["peers"] for line in lines) for epoch, lines in sorted(by_epoch.items())},
        "epoch_seconds": {epoch: round(each, 2) for epoch, each in first_seconds.items()},
        "group_samples": statistics.fmean(max(each) for each in samples.values()),
    }


def _came_to(process: Process, words: str) -> dict[str, Any]:
    summary, lines = _finished(process), process.lines
    return {
        "run": words,
        "test_loss": summary["test"]["loss"],
        "accuracy": summary["accuracy"],
        "training_loss": statistics.fmean(line["loss"] for line in lines[-_LAST:]),
        "group_samples": statistics.fmean(line["group_samples"] for line in lines),
    }


def _finished(process: Process) -> dict[str, Any]:
    summary = process.summary()
    if summary is None:
        raise RuntimeError(f"{process.name} has ended with {process.returncode} and no summary; see {process.log}")
    return summary


def _was_in(process: Process, peers: int) -> bool:
    return any(line["peers"] >= peers for line in process.lines)


def _notes(process: Process) -> list[str]:
    """What it said beside its epochs."""
    return [line for line in process.said("milkglass: epoch") if ": loss " not in line]


def _tell(row: dict[str, Any], mean: float) -> None:
    print(
        f"| {row['run']} | {row['test_loss']:.4f} | {row['accuracy']:.4f} | {row['training_loss']:.4f} "
        f"| {row['group_samples']:,.0f} | {row['test_loss'] / mean - 1:+.2%} |",
        flush=True,
    )


def _tell_verdicts(alone: Sequence[dict[str, Any]], together: Sequence[dict[str, Any]], mean: float) -> None:
    losses = [row["test_loss"] for row in alone]
    spread = f", {min(losses) / mean - 1:+.2%} to {max(losses) / mean - 1:+.2%}" if len(losses) > 1 else ""
    deviation = f", standard deviation {statistics.stdev(losses) / mean:.2%}" if len(losses) > 1 else ""
    print(f"\nOne process: mean test loss {mean:.4f}{spread}{deviation}.")
    if together:
        found = statistics.fmean(row["test_loss"] for row in together)
        print(f"Four volunteers: mean test loss {found:.4f}, {found / mean - 1:+.2%}.")
    for row in together:
        print(f"\n{row['run']}, {row['seconds']:.0f} s:")
        for name in (
            *("killed_after_epoch", "left_after_epoch", "left_with", "daemons_left", "survivors_equal"),
            *("epochs_without_a_step", "epochs_under_target", "epochs_parted", "missed", "failed_averagings"),
            *("state_downloads", "wasted_samples", "peers", "epoch_seconds", "notes"),
        ):
            print(f"- {name}: {row[name]}")


def _recipe(arguments: argparse.Namespace, folder: Path) -> Path:
    data = 'name = "digits"'
    if arguments.data:
        files = [arguments.data.resolve() / f"fashion-mnist-{which}.npz" for which in ("train", "test")]
        data = f'path = "{files[0]}"\ntest_path = "{files[1]}"\ntest_records = 10_000'
    path = folder / "recipe.toml"
    path.write_text(
        _RECIPE.format(
            data=data,
            width=arguments.width,
            learning_rate=arguments.learning_rate,
            target=arguments.target,
            epochs=arguments.epochs,
        )
    )
    return path


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(str(error))
