"""A server's stage over several processes, under torchrun: it ends where one process does, and nothing gets lost.

Float32 sums in another order differ in their last bits, so the results are compared within a tolerance. What the ranks
hold of each other is compared bit by bit.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, final

import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from milkglass.client import StepResult
from milkglass.errors import CutError, LinkError, MilkglassError, RecipeError
from milkglass.randomness import Source
from milkglass.rank_links import Links
from milkglass.recipe import parse_recipe
from milkglass.sharding import Crew
from milkglass.training import sharded
from milkglass.training.join import join
from milkglass.training.serve import serve
from milkglass.training.split import Silence, train
from tests.helpers import KEY, small_recipe
from tests.network import SECONDS
from tests.training.ranks import PLAYS, batches, make, mlp, play
from tests.training.whole import MLP, U_SHAPED, parties

ROOT = Path(__file__).parents[2]
RANKS = 3
TOLERANCE = 1e-5


@contextmanager
def _torchrun(ranks: int, *arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("wb") as file:
        started = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            yield started
        finally:
            for process in (*_children(started), started.pid):
                _kill(process)
            started.wait()


def _children(started: subprocess.Popen[bytes]) -> list[int]:
    """torchrun's processes, rank 0 first."""
    listed = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    return [int(number) for number in listed.read_text().split()] if listed.exists() else []


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _wait_for_port(port: int, started: subprocess.Popen[bytes], log: Path) -> None:
    """Until somebody listens: a client that dials before would wait longer and longer between its attempts."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            socket.create_connection(("localhost", port)).close()
            return
        except OSError:
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)


def _differ(found: Tensor, expected: Tensor) -> float:
    """Relative to the tensor's largest number."""
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every rank wrote of every play."""
    folder = tmp_path_factory.mktemp("played")
    with _torchrun(RANKS, "tests.training.ranks", str(folder), log=folder / "log") as started:
        assert started.wait(timeout=SECONDS) == 0, (folder / "log").read_text()
    return folder


LOSSY = ("little sent", "averaged now and then", "averaged in pieces")


@pytest.mark.parametrize("name", [name for name in PLAYS if "dropout" not in name and name not in LOSSY])
def test_several_processes_answer_and_learn_what_one_does(played: Path, name: str) -> None:
    server, answers = play(name)
    found = load_file(played / f"{name}.0.safetensors")
    expected = {f"state.{key}": t for key, t in server.weights(with_optimizer=True).items()} | answers
    assert found.keys() == {*expected, "there"}
    assert len(answers) > 5
    for key, tensor in expected.items():
        if name == "averaged always" and key.startswith("state.optimizer"):
            continue  # each rank's is its own there; what comes of all of them is the same
        assert found[key].dtype == tensor.dtype
        assert _differ(found[key].double(), tensor.double()) < TOLERANCE, key
    moved = [key for key in expected if key.startswith("state.stage")]
    first = PLAYS[name][0]().weights()
    assert len(moved) == len(first)
    for key in moved:
        changed = not torch.equal(expected[key], first[key.removeprefix("state.")])
        assert changed == ("unused" not in key)  # what had no part in the loss is not even decayed


@pytest.mark.parametrize("name", PLAYS)
def test_every_process_ends_with_the_same_bits(played: Path, name: str) -> None:
    first, *others = (load_file(played / f"{name}.{rank}.safetensors") for rank in range(RANKS))
    same = "state.stage" if "averaged" in name else "state."  # with averages, each has a momentum of its own
    kept = {key for key in first if key.startswith(same)}
    for other in others:
        assert {key for key in other if key.startswith(same)} == kept
        for key in kept:
            assert torch.equal(first[key], other[key]), key
    assert any(key.startswith("state.optimizer") for key in kept) or name == "nothing to learn" or "averaged" in name


@pytest.mark.parametrize("name", LOSSY)
def test_with_less_on_the_wire_all_learn_together_though_not_quite_the_same(played: Path, name: str) -> None:
    server, answers = play(name)
    found = load_file(played / f"{name}.0.safetensors")
    assert found.keys() == {f"state.{key}" for key in server.weights(with_optimizer=True)} | answers.keys() | {"there"}
    first, last = PLAYS[name][0]().weights(), server.weights()
    moved = torch.cat([(found[f"state.{key}"] - first[key]).flatten() for key in last])
    expected = torch.cat([(last[key] - first[key]).flatten() for key in last])
    assert not torch.equal(moved, expected)  # so something was left over, or each went its own way
    assert float(torch.cosine_similarity(moved, expected, dim=0)) > 0.5


def test_dropout_differs_between_rows_ranks_and_steps_and_comes_again_under_the_same_key(played: Path) -> None:
    found, again = (load_file(played / f"{name}.0.safetensors") for name in ("dropout", "dropout again"))
    made = [tensor for key, tensor in found.items() if key.endswith("features.features")]
    gradients = [tensor for key, tensor in found.items() if key.endswith("gradients.gradient")]
    assert len(made) == len(gradients) == 2
    for features, gradient in zip(made, gradients, strict=True):
        assert len({tuple(row.tolist()) for row in features}) > 4  # two ranks with one stream would share their rows
        dropped = (gradient == 0).float().mean()
        assert 0.2 < dropped < 0.8
    assert not torch.equal(made[0], made[1])
    assert found.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in found.items())


def test_who_falls_out_is_told_in_one_line_and_nothing_more_is_computed(played: Path) -> None:
    for rank in range(1, RANKS):
        assert (played / f"said.{rank}").read_text() == f"rank {rank} was started with another recipe than rank 0"
    lines = (played / "said.0").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"the {RANKS} processes that share the server's stage no longer work together (")
        assert line.endswith("nothing is lost: start torchrun again with --resume, and the clients go on")


def norm(record_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A factory of a user's own."""
    wide = torch.Size(record_shape).numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(wide, 8), nn.BatchNorm1d(8), nn.Linear(8, classes))


def test_what_cannot_be_shared_out_is_refused_with_the_way_out_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded, "shared_out", lambda: True)
    norms = small_recipe(network={"name": "tests.training.test_sharded:norm"}, cut={"at": "1"})
    with pytest.raises(CutError, match=r"BatchNorm \(2\) in the server's stage .*: use nn.GroupNorm, or serve it"):
        serve(norms, "localhost:0", None, tmp_path / "out")
    several = small_recipe(**MLP, parties=parties("splitfed1"))
    with pytest.raises(RecipeError, match=r"splitfed1 keeps a stage for each client.*splitfed2"):
        serve(several, "localhost:0", None, tmp_path / "out")
    epochs = small_recipe(**MLP, parallel={"exchange": "topk", "warmup": [0.1]})
    with pytest.raises(RecipeError, match=r"parallel\.warmup .* know of no epochs"):
        serve(epochs, "localhost:0", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _At(Silence):
    """Does something when certain batches of a client's are done."""

    def __init__(self, acts: dict[tuple[int, int], Callable[[], None]]) -> None:
        self._acts = acts

    def batch(self, epoch: int, step: int, steps: int, result: StepResult) -> None:
        self._acts.pop((epoch, step), lambda: None)()


def _free_port() -> int:
    """Below those that the system gives out by itself, so that nobody takes it until torchrun listens."""
    for port in random.sample(range(20_000, 32_000), 100):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("localhost", port))
            return port
    raise AssertionError("no port is free")


def _recipe(folder: Path, **tables: Any) -> tuple[Path, Path, dict[str, Any]]:
    """A recipe's file and a client's key."""
    given: dict[str, Any] = {
        "data": {"name": "digits", "train_records": 96, "test_records": 40, "test_share": 0.1},
        "network": MLP["network"],
        "cut": {"at": "hidden1"},
        "attacker": {"auxiliary_share": 0.1, "validation_share": 0.1},
        "parties": {"clients": ["ann"]},
        "server": {"checkpoint_seconds": 0.05},
        **tables,
    }
    (folder / "recipe.toml").write_bytes(tomli_w.dumps(given).encode())
    (folder / "key").write_bytes(KEY)
    return folder / "recipe.toml", folder / "key", given


def _serve(recipe: Path, port: int, out: Path, *more: str) -> list[str]:
    return ["milkglass", "serve", str(recipe), "--listen", f"localhost:{port}", "--plaintext", "--out", str(out), *more]


def _compare(found: Path, expected: Path, names: list[str]) -> None:
    for name in names:
        ours, theirs = load_file(found / f"{name}.safetensors"), load_file(expected / f"{name}.safetensors")
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert _differ(ours[key], tensor) < TOLERANCE, f"{name}.{key}"


def test_a_server_under_torchrun_trains_as_one_process_does(tmp_path: Path) -> None:
    recipe, key, given = _recipe(tmp_path, training={"epochs": 2, "batch_size": 32, "learning_rate": 1e-2})
    train(parse_recipe(given), tmp_path / "whole", Source(KEY))
    port, log = _free_port(), tmp_path / "log"
    with _torchrun(2, *_serve(recipe, port, tmp_path / "server"), log=log) as started:
        _wait_for_port(port, started, log)
        join(parse_recipe(given), "ann", f"localhost:{port}", None, tmp_path / "ann", key=key)
        assert started.wait(timeout=SECONDS) == 0, log.read_text()
    _compare(tmp_path / "server", tmp_path / "whole", ["top"])
    _compare(tmp_path / "ann", tmp_path / "whole", ["bottom"])
    told = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    shared = [line for line in told if line["event"] == "stage shared out"]
    assert [(line["processes"], line["device"]) for line in shared] == [(2, "cpu")]
    assert log.read_text().count("trained with ann") == 1


@pytest.mark.parametrize("section", [{"exchange": "gaussian_k", "density": 0.2}, {"exchange": "adaptive", "period": 2}])
def test_a_server_under_torchrun_may_send_less_between_its_processes(tmp_path: Path, section: dict[str, Any]) -> None:
    recipe, key, given = _recipe(tmp_path, training={"epochs": 2, "batch_size": 32}, parallel=section)
    train(parse_recipe(given), tmp_path / "whole", Source(KEY))
    port, log, out = _free_port(), tmp_path / "log", tmp_path / "server"
    with _torchrun(2, *_serve(recipe, port, out), log=log) as started:
        _wait_for_port(port, started, log)
        join(parse_recipe(given), "ann", f"localhost:{port}", None, tmp_path / "ann", key=key)
        assert started.wait(timeout=SECONDS) == 0, log.read_text()
    ours, theirs = (load_file(folder / "top.safetensors") for folder in (out, tmp_path / "whole"))
    differ = max(_differ(ours[key], tensor) for key, tensor in theirs.items())
    assert TOLERANCE < differ < 0.5


def test_whichever_rank_is_killed_nothing_is_lost(tmp_path: Path) -> None:
    settings = {"epochs": 2, "batch_size": 30, "micro_batches": 3, "learning_rate": 1e-2, "optimizer": "sgd"}
    recipe, key, given = _recipe(tmp_path, **U_SHAPED, training={**settings, "momentum": 0.9})
    train(parse_recipe(given), tmp_path / "whole", Source(KEY))
    port, out = _free_port(), tmp_path / "server"
    with ExitStack() as stack:
        started: list[tuple[subprocess.Popen[bytes], Path]] = []

        def begin(*more: str) -> None:
            log = tmp_path / f"log{len(started)}"
            process = stack.enter_context(_torchrun(2, *_serve(recipe, port, out, *more), log=log))
            started.append((process, log))
            _wait_for_port(port, process, log)

        def fall(rank: int) -> None:
            process, log = started[-1]
            _kill(_children(process)[rank])
            assert process.wait(timeout=SECONDS) != 0
            assert not (out / "summary.json").exists()
            if rank == 1:
                said = [line for line in log.read_text().splitlines() if line.startswith("milkglass: ")]
                assert len(said) == 1, said  # whether rank 0 was idle or at work when the other fell
                assert "nothing is lost" in said[0]
            begin("--resume")

        begin()
        progress = _At({(1, 2): lambda: fall(1), (2, 1): lambda: fall(0)})
        join(parse_recipe(given), "ann", f"localhost:{port}", None, tmp_path / "ann", key=key, progress=progress)
        assert len(started) == 3
        process, log = started[-1]
        assert process.wait(timeout=SECONDS) == 0, log.read_text()
    _compare(out, tmp_path / "whole", ["top"])
    _compare(tmp_path / "ann", tmp_path / "whole", ["bottom", "head"])


@final
class _Broken:
    """A crew of which somebody dies before the step."""

    def __init__(self, stage: nn.Module) -> None:
        self._stage = stage

    def forward(self, z: Tensor, piece: tuple[int, int] | None) -> Tensor:
        return self._stage(z)  # type: ignore[no-any-return]

    def step(self) -> None:
        raise MilkglassError("gone")

    def stepped(self) -> None:
        raise AssertionError("no step was taken")

    def agree(self) -> None: ...

    def load(self) -> None:
        raise MilkglassError("gone")


@pytest.mark.parametrize(
    "error", [LinkError("rank 1 of 2 is gone"), MilkglassError("not finite"), RuntimeError("gloo")]
)
def test_whatever_breaks_the_ranks_is_told_with_the_way_on_and_they_stay_broken(error: Exception) -> None:
    crew = Crew(Links(0, 2, torch.device("cpu"), None, None))
    words = r"no longer work together \(.*\); nothing is lost: start torchrun again"
    with pytest.raises(MilkglassError, match=words), crew._together():
        raise error
    with pytest.raises(MilkglassError, match="nothing is lost: start torchrun again"):
        crew.step()


def test_a_step_that_not_all_take_stays_half_done_so_that_no_checkpoint_holds_it() -> None:
    server = make(mlp)
    server.sharing = _Broken(server.stage)
    before = {name: tensor.clone() for name, tensor in server.weights().items()}
    first, second = batches("activations", [4], pieces=2)
    server.reply(first)
    with pytest.raises(MilkglassError, match="gone"):
        server.reply(second)
    assert not server.resting
    assert all(torch.equal(tensor, before[name]) for name, tensor in server.weights().items())
