"""Our attacks beside published code: UnSplit, and a public decoder against NoPeek, on the same clients and records.

    python -m benchmarks.published_attacks --peer-path DIR --runs DIR [--data DIR] [--cpu-seconds 600] [--table FILE.md]

`--peer-path` holds checkouts of ege-erdogan/unsplit, as `unsplit`, and of TTitcombe/NoPeekNN, as `NoPeekNN`: their code
is not ours to ship, so it is read from there. `--runs` holds finished runs `undefended-seed0`, `biased-1-seed0` and
`biased-10-seed0`, as benchmarks.accuracy_peek makes them. Nobody gets entitled values, and all get the same pairs:
none for UnSplit, 5,000 for decoders (theirs by default), of which ours keep 1,000 back to choose settings by. Settings
are the peers' own; where those take longer than `--cpu-seconds` of processor time a client, they are stopped there and
the table says how far they came.

Before that, with `--data` (the folder of fashion-mnist-{train,test}.npz), each peer meets its own client in its own
setting. Their figures are for MNIST, which is not at hand: on Fashion-MNIST what can be compared is the error as a
share of the mean picture's.
- UnSplit: the repository shows pictures, and no number. Its `MnistNet` cut after the first pooling.
- The decoder: mean squared error .332 on normalized MNIST (notebook 1_data_volume of TTitcombe/Model-Inversion-SplitNN,
  5,000 pairs of EMNIST), about half of the mean picture's .71 [derived from MNIST's usual statistics].
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.setting import machine_line
from milkglass.attacks.base import Attack
from milkglass.attacks.decoder import Decoder
from milkglass.attacks.ridge import Ridge
from milkglass.attacks.unsplit import UnSplit
from milkglass.leakage.reconstruction import squared_errors
from milkglass.randomness import drawing_from, public_source
from milkglass.replay import replay
from milkglass.runs import RunFolder
from milkglass.transcript import Knowledge, Pairs, Release, View

CLIENTS: Final = ("undefended-seed0", "biased-1-seed0", "biased-10-seed0")
PAIRS: Final = 5000
KEPT_BACK: Final = 1000
RECORDS: Final = 10
"""UnSplit rebuilds so many: its demonstration takes one of each class."""
MEAN, SPREAD = 0.1307, 0.3081  # both decoder repositories normalize by MNIST's
MAIN_ITERATIONS: Final = 1000
EPOCHS: Final = 10


@dataclass(frozen=True)
class Row:
    """One attack on one client: mean squared error on [0, 1] pixels, beside the mean picture's on the same records."""

    client: str
    attack: str
    error: float
    mean_picture: float
    wall_seconds: float
    cpu_seconds: float
    reached: str


def main() -> None:
    """Meet the peers at home, then run both sides on each client, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-path", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument(
        "--data", type=Path, help="folder of fashion-mnist-{train,test}.npz: the peers' own setting too"
    )
    parser.add_argument("--cpu-seconds", type=float, default=600.0, help="of a peer's attack on one client")
    parser.add_argument("--client-batches", type=int, default=9380, help="of 64, to train a peer's own client")
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    unsplit, decoder = load_unsplit(arguments.peer_path / "unsplit"), load_decoder(arguments.peer_path / "NoPeekNN")
    makers: dict[str, Callable[[], tuple[View, Tensor]]] = {}
    if arguments.data:
        own = partial(own_setting, arguments.data, batches=arguments.client_batches)
        makers["its own: MnistNet, split 2"] = partial(own, halves_of_unsplit(unsplit))
        makers["its own: conv, conv, linear 500"] = partial(own, halves_of_nopeek())
    for name in CLIENTS:
        makers[name] = partial(run_view, arguments.runs, name)
    rows: list[Row] = []
    table = ""
    for name, make in makers.items():
        view, truth = make()
        for row in compare(name, view, truth, unsplit, decoder, arguments.cpu_seconds):
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
            table = render(rows, arguments.cpu_seconds, arguments.client_batches if arguments.data else 0)
            if arguments.table:  # after each row: what was measured is kept if the rest is stopped
                arguments.table.write_text(table)
    print(table)


def compare(
    name: str, view: View, truth: Tensor, unsplit: ModuleType, decoder: ModuleType, budget: float
) -> Iterator[Row]:
    """Both sides, on the same records; a client that is one peer's own meets that peer alone."""

    def row(attack: str, run: Callable[[], tuple[Tensor, str]]) -> Row:
        wall, cpu = time.perf_counter(), time.process_time()
        made, reached = run()
        return scored(attack, made, time.perf_counter() - wall, time.process_time() - cpu, reached)

    def scored(attack: str, made: Tensor, wall: float, cpu: float, reached: str) -> Row:
        records = truth[: len(made)]
        error, mean = (
            squared_errors(guess, records).mean().item()
            for guess in (made, view.known.records.mean(0).expand_as(records))
        )
        return Row(name, attack, error, mean, wall, cpu, reached)

    def ours(attack: Attack) -> Row:
        return row(f"milkglass {attack.name}", lambda: (attack.attack(view).target, repr(attack)))

    if "linear" not in name:
        wall, cpu = time.perf_counter(), time.process_time()
        made, reached = their_unsplit(unsplit, view, budget)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        yield scored("UnSplit's code", made, wall, cpu, reached)
        shown = torch.stack([unsplit.normalize(picture) for picture in made])
        yield scored("the same, as it shows pictures", shown, wall, cpu, "each put into 0 to 1 by their `normalize`")
        yield ours(UnSplit(records=RECORDS))
    if "MnistNet" not in name:
        yield row("NoPeekNN's decoder", lambda: their_decoder(decoder, view, budget))
        yield ours(Ridge())
        yield ours(Decoder())


def run_view(runs: Path, name: str) -> tuple[View, Tensor]:
    """A finished run's view, with the pairs that both sides get, and the records behind its target."""
    reference = RunFolder.open_finished(runs / CLIENTS[0])
    trial = replay(RunFolder.open_finished(runs / name), reference).trials[0]
    return without_entitled(trial.view), trial.truth


def without_entitled(view: View) -> View:
    """The first 5,000 pairs, 1,000 of them for validation, and no entitled values: published attacks have none."""
    known, target = view.known, view.target.activations

    def pairs(rows: slice) -> Pairs:
        records = known.records[rows]
        return Pairs(known.activations[rows], records, records.new_zeros(len(records), 0))

    return replace(
        view,
        known=pairs(slice(PAIRS - KEPT_BACK)),
        validation=pairs(slice(PAIRS - KEPT_BACK, PAIRS)),
        target=Release(target, target.new_zeros(len(target), 0)),
    )


def own_setting(data: Path, halves: Halves, batches: int) -> tuple[View, Tensor]:
    """A peer's own client, trained on Fashion-MNIST by its own settings for so many batches, and what it sends."""
    train, test = (read(data / f"fashion-mnist-{part}.npz") for part in ("train", "test"))
    source = public_source(0).derive("published attacks")
    bottom, top = halves(source.generator("client"))
    weights = [*bottom.parameters(), *top.parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-3, amsgrad=True)  # UnSplit's
    draws = source.generator("batches")
    kept = len(train[0]) - PAIRS
    for _ in range(batches):
        rows_B = torch.randint(kept, (64,), generator=draws)
        optimizer.zero_grad()
        F.cross_entropy(top(bottom(train[0][rows_B])), train[1][rows_B]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def pairs(x_N: Tensor) -> Pairs:
        with torch.no_grad():
            sent = torch.cat([bottom(part) for part in torch.split(x_N, 500)])
        return Pairs(sent, x_N, x_N.new_zeros(len(x_N), 0))

    target = pairs(test[0][:2000])
    knowledge = Knowledge(architecture=halves)
    release = Release(target.activations, target.entitled)
    known, validation = pairs(train[0][kept:-KEPT_BACK]), pairs(train[0][-KEPT_BACK:])
    return View(known, validation, release, knowledge=knowledge), target.records


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Pictures (N, 1, 28, 28) in [0, 1], labels (N,)."""
    with np.load(path, allow_pickle=False) as file:
        x_NHWC, y_N = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    return x_NHWC.reshape(-1, 1, 28, 28).float() / 255, y_N.long()


Halves = Callable[[torch.Generator], tuple[nn.Module, nn.Module]]


def halves_of_unsplit(unsplit: ModuleType) -> Halves:
    """Their `MnistNet`, cut after layer 2, its first pooling."""

    def halves(generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
        with drawing_from(generator):
            features, classifier = (getattr(unsplit.MnistNet(), part) for part in ("features", "classifier"))
        return nn.Sequential(*features[:3]), nn.Sequential(*features[3:], nn.Flatten(), *classifier)

    return halves


def halves_of_nopeek() -> Halves:
    """The layers that TTitcombe's repositories train, written down here: theirs ask for PySyft or Lightning."""

    def halves(generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
        with drawing_from(generator):
            features = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
            bottom = nn.Sequential(*features, nn.Linear(9216, 500), nn.Tanh())
            return bottom, nn.Sequential(nn.Linear(500, 128), nn.ReLU(), nn.Linear(128, 10))

    return halves


class Ending(nn.Module):
    """A client's stage as their attack calls it: `model(x, end=layer)`."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x_B: Tensor, end: int) -> Tensor:  # noqa: ARG002
        z_B: Tensor = self.stage(x_B)
        return z_B


def their_unsplit(peer: ModuleType, view: View, budget: float) -> tuple[Tensor, str]:
    """Their function with its defaults, on all records at once: within a budget it comes further so than one by one."""
    assert view.knowledge.architecture is not None
    shape = (RECORDS, *view.known.records.shape[1:])

    def attack(iterations: int) -> Tensor:
        assert view.knowledge.architecture is not None
        clone, _ = view.knowledge.architecture(public_source(0).generator("unsplit's clone"))
        made: Tensor = peer.model_inversion_stealing(
            Ending(clone), 0, view.target.activations[:RECORDS], shape, main_iters=iterations
        )
        return made

    start = time.process_time()
    attack(1)
    iterations = max(1, min(MAIN_ITERATIONS, math.floor(budget / (time.process_time() - start))))
    return attack(iterations), f"{iterations} of {MAIN_ITERATIONS} main iterations"


def their_decoder(peer: ModuleType, view: View, budget: float) -> tuple[Tensor, str]:
    """Their decoder, Adam 1e-4, batches of 128, 10 epochs, on normalized pictures.

    Its first layer takes 500 values; where the client sends more, that layer is made as wide as needed.
    """
    pairs = view.known, view.validation
    known_ND = torch.cat([part.activations.flatten(1) for part in pairs])
    target_TD = view.target.activations.flatten(1)
    source = public_source(0).derive("their decoder")
    with drawing_from(source.generator("weights")):
        model: nn.Module = peer.AttackModel()
        if known_ND.shape[1] != 500:
            model.linear1 = nn.Linear(known_ND.shape[1], 9216)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    x_N = (torch.cat([part.records for part in pairs]) - MEAN) / SPREAD
    done, total = 0, EPOCHS * math.ceil(len(x_N) / 128)
    start = time.process_time()
    for _ in range(EPOCHS):
        for rows_B in torch.split(torch.arange(len(x_N)), 128):
            if time.process_time() - start > budget:
                break
            optimizer.zero_grad()
            F.mse_loss(model(known_ND[rows_B]), x_N[rows_B]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
    with torch.no_grad():
        made = torch.cat([model(part) for part in torch.split(target_TD, 500)])
    return (made * SPREAD + MEAN).clamp(0, 1), f"{done} of {total} batches"


def load_unsplit(path: Path) -> ModuleType:
    """Their attack and their `MnistNet`; what it imports and does not use here is stood in for by empty modules."""
    with standing_in("torchvision", "transforms", "datasets"), standing_in("matplotlib", "pyplot"), finding(path):
        attacks = importlib.import_module("unsplit.attacks")
        models: Any = importlib.import_module("unsplit.models")
    peer = ModuleType("peer_unsplit")
    taken = {"model_inversion_stealing": attacks, "MnistNet": models, "normalize": attacks}
    peer.__dict__.update({word: getattr(module, word) for word, module in taken.items()})
    return peer


def load_decoder(path: Path) -> ModuleType:
    """Their `AttackModel`, from its file alone: the package around it asks for more."""
    spec = importlib.util.spec_from_file_location("peer_decoder", path / "src" / "attacker.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def standing_in(package: str, *parts: str) -> Iterator[None]:
    """Inside, `package` is an empty module with empty `parts`."""
    top = ModuleType(package)
    made = {package: top}
    for part in parts:
        made[f"{package}.{part}"] = ModuleType(f"{package}.{part}")
        setattr(top, part, made[f"{package}.{part}"])
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@contextmanager
def finding(path: Path) -> Iterator[None]:
    """Inside, modules are looked for in `path` first."""
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))


def render(rows: list[Row], budget: float, batches: int) -> str:
    """The table, in markdown."""
    lines = [
        machine_line(),
        "",
        f"One thread; peers stopped after {budget:g} s of processor time a client"
        + (f"; their own clients trained for {batches} batches of 64." if batches else "."),
        "",
        "| client | attack | error | of the mean picture's | seconds | computing | settings, or how far it came |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.client} | {row.attack} | {row.error:.4f} | {row.error / row.mean_picture:.2f} | "
        f"{row.wall_seconds:.0f} | {row.cpu_seconds:.0f} | {row.reached} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
