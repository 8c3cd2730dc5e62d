"""Data-parallel training from a recipe: two ranks learn what one learns with a batch twice as large.

Most trainings run in a group of two real processes that lives on; torchrun itself is tried at the end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from milkglass.errors import RecipeError, RunError
from milkglass.parallel_section import Exchange
from milkglass.recipe import parse_recipe
from milkglass.report import render
from milkglass.results import read_results
from milkglass.runs import RunFolder
from milkglass.training.large_batch import train
from milkglass.training.split import train as train_split
from milkglass.training.tcp_traffic import tcp_traffic
from tests.training.gloo_ranks import Ranks
from tests.training.together import elsewhere, recipe, whole

ROOT = Path(__file__).parents[2]
STEPS = 8  # in an epoch: 256 records, 2 ranks, 16 of each
NUMBERS = 64 * 32 + 32 + 32 * 16 + 16 + 16 * 10 + 10
WAYS: dict[str, dict[str, Any]] = {
    "dense": {},
    "topk": {"density": 0.05},
    "gaussian_k": {"density": 0.05, "warmup": [0.2]},
    "powersgd": {"matrix_rank": 2},
    "periodic": {"period": 3},
    "adaptive": {"period": 2, "compress_weights": True, "density": 0.1},
}


def weights(out: Path) -> Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(out / "network.safetensors").items())])


def told(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def lines(out: Path, name: str = "exchange.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def of(way: str, **changes: Any) -> Any:
    return recipe(parallel={"exchange": way, **WAYS[way]}, **changes)


def fine(results: list[str | None]) -> None:
    assert results == [None, None]


@pytest.fixture(scope="module")
def trained(two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run folder for each way."""
    folder = tmp_path_factory.mktemp("ways")
    for way in WAYS:
        fine(two_ranks.run(whole, of(way), str(folder / way)))
    return {way: folder / way for way in WAYS}


def test_two_ranks_learn_what_one_learns_with_twice_the_batch(trained: dict[str, Path], tmp_path: Path) -> None:
    train(of("dense", batch_size=32), tmp_path / "one")
    torch.testing.assert_close(weights(trained["dense"]), weights(tmp_path / "one"), rtol=1e-4, atol=1e-5)
    for key in ("loss", "train_accuracy", "accuracy"):
        found, expected = ([line[key] for line in lines(out, "metrics.jsonl")] for out in
                           (trained["dense"], tmp_path / "one"))  # fmt: skip
        assert found == pytest.approx(expected, abs=1e-4)


def test_one_rank_alone_is_an_ordinary_loop(tmp_path: Path) -> None:
    """Every way comes to the same there: nothing is sent, so nothing is lost."""
    train(of("dense"), tmp_path / "dense")
    for way in ("topk", "gaussian_k", "powersgd", "periodic", "adaptive"):
        if way != "powersgd":  # torch's takes factors of low rank even so
            train(of(way), tmp_path / way)
            torch.testing.assert_close(weights(tmp_path / way), weights(tmp_path / "dense"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_folder_says_what_it_came_to(trained: dict[str, Path], way: str) -> None:
    out, summary = trained[way], told(trained[way])
    assert summary["accuracy"] > 0.4  # of ten classes, after 24 steps
    assert (summary["exchange"], summary["ranks"], summary["steps"]) == (way, 2, 3 * STEPS)
    assert summary["accuracy"] == lines(out, "metrics.jsonl")[-1]["accuracy"]
    assert summary["records"] == {"train": 256, "auxiliary": 180, "validation": 180, "test": 100}
    assert len(weights(out)) == NUMBERS
    assert not list(out.rglob("*.partial"))
    page = render(read_results(out))
    assert "Nothing crossed a cut: 2 processes of one owner" in page
    assert ("Left over by compression" in page) == (way in ("topk", "gaussian_k"))
    assert ("Steps between two averages" in page) == (way in ("periodic", "adaptive"))


def test_bytes_are_those_at_the_sockets(trained: dict[str, Path]) -> None:
    sent = {way: told(out)["bytes_sent"] for way, out in trained.items()}
    dense = 2 * 3 * STEPS * 4 * NUMBERS  # two ranks: an all-reduce in a ring sends a vector's bytes once
    assert dense < sent["dense"] < 1.2 * dense
    assert told(trained["dense"])["bytes_received"] == pytest.approx(sent["dense"], rel=0.01)
    share = sum(line["sent"] for line in lines(trained["topk"])) / NUMBERS  # 4 bytes, and as many for the index
    assert 2 * share * dense / 3 / STEPS < sent["topk"] < 2 * share * dense / 3 / STEPS + 0.2 * dense
    assert sent["topk"] < 0.35 * sent["dense"]
    assert sent["powersgd"] < 0.6 * sent["dense"]
    assert sent["periodic"] < 0.7 * sent["dense"]  # an epoch of three with every step, then every third
    assert sent["adaptive"] < sent["dense"]


def test_every_step_says_what_was_left_over_beside_its_bounds(trained: dict[str, Path]) -> None:
    for way in ("topk", "gaussian_k"):
        found = lines(trained[way])
        assert [line["step"] for line in found] == list(range(3 * STEPS))
        for line in found:
            share = line["sent"] / line["numbers"]
            assert line["bound"] == pytest.approx((1 - share) ** 2)
            assert line["old_bound"] == pytest.approx(1 - share)
            assert 0 < line["left_share"] <= line["old_bound"]
    sent = [line["sent"] for line in lines(trained["gaussian_k"])]
    assert min(sent[:STEPS]) > max(sent[STEPS:])  # the warm-up
    epoch = lines(trained["topk"], "metrics.jsonl")[0]
    assert epoch["left_share"] == pytest.approx(sum(line["left_share"] for line in lines(trained["topk"])[:STEPS]) / 8)


def test_every_average_says_its_period_and_what_it_follows(trained: dict[str, Path]) -> None:
    constant, adaptive = lines(trained["periodic"]), lines(trained["adaptive"])
    assert [line["step"] for line in constant][:STEPS] == list(range(STEPS))  # the first epoch
    assert {line["next_period"] for line in constant[STEPS:]} == {3}
    assert {line["phase"] for line in adaptive} == {"every step", "sampling", "adapting"}
    for line in adaptive:
        assert {"period", "variance", "bound", "learning_rate", "next_period"} <= line.keys()


@pytest.mark.parametrize("stop_after", [1, 2])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "powersgd"])
def test_a_run_that_was_stopped_ends_in_the_same_bits(
    two_ranks: Ranks, trained: dict[str, Path], way: str, stop_after: int, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    results = two_ranks.run(whole, of(way), out, False, False, stop_after)
    assert results[0] == "stopped"
    fine(two_ranks.run(whole, of(way), out, True))
    assert torch.equal(weights(tmp_path / "out"), weights(trained[way]))
    assert lines(tmp_path / "out") == lines(trained[way])
    assert told(tmp_path / "out")["bytes_sent"] == pytest.approx(told(trained[way])["bytes_sent"], rel=0.2)


def test_a_run_with_power_sgd_goes_on_though_not_to_the_same_bits(two_ranks: Ranks, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert two_ranks.run(whole, of("powersgd"), out, False, False, 2) == ["stopped"] * 2
    fine(two_ranks.run(whole, of("powersgd"), out, True))
    assert told(tmp_path / "out")["accuracy"] > 0.4


def test_dropout_and_batch_norm_follow_the_key_and_a_resumed_run_too(two_ranks: Ranks, tmp_path: Path) -> None:
    changes = {"network": {"name": "tests.training.together:normed"}}
    for way in ("dense", "adaptive"):
        outs = [str(tmp_path / f"{way}{number}") for number in range(4)]
        fine(two_ranks.run(whole, of(way, **changes), outs[0]))
        fine(two_ranks.run(whole, of(way, **changes), outs[1], False, True))
        assert two_ranks.run(whole, of(way, **changes), outs[2], False, True, 1) == ["stopped"] * 2
        fine(two_ranks.run(whole, of(way, **changes), outs[2], True, True))
        one, other, again = (weights(Path(out)) for out in outs[:3])
        assert not torch.equal(one, other)
        assert torch.equal(other, again)


def test_with_momentum_correction_the_optimizer_has_none_of_its_own(two_ranks: Ranks, tmp_path: Path) -> None:
    """All is sent, so velocities stay, and what is sent is momentum SGD's step: not twice the momentum."""
    section = {"exchange": "topk", "density": 1.0, "momentum_correction": True}
    fine(two_ranks.run(whole, recipe(parallel=section), str(tmp_path / "corrected")))
    fine(two_ranks.run(whole, recipe(), str(tmp_path / "plain")))
    torch.testing.assert_close(weights(tmp_path / "corrected"), weights(tmp_path / "plain"), rtol=1e-4, atol=1e-5)


def test_who_is_not_to_be_attacked_need_not_set_records_aside(tmp_path: Path) -> None:
    summary = train(recipe(attacker={"auxiliary_share": 0, "validation_share": 0}), tmp_path / "out")
    assert summary is not None
    assert summary["records"] == {"train": 256, "auxiliary": 0, "validation": 0, "test": 100}


def test_a_folder_that_is_taken_is_told_to_all(two_ranks: Ranks, trained: dict[str, Path]) -> None:
    out = str(trained["dense"])
    first, second = two_ranks.run(whole, of("dense"), out)
    assert first == f"run folder {out}: holds a finished run; choose another --out, or remove it"
    assert second == f"rank 1: rank 0 cannot use the run folder {out}"
    fine(two_ranks.run(whole, of("dense"), out, True))  # nothing is left to do
    first, _ = two_ranks.run(whole, of("topk"), out, True)
    assert first is not None
    assert "belongs to another recipe: parallel." in first


def test_a_run_of_two_ranks_cannot_go_on_as_one_or_under_another_key(two_ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert two_ranks.run(whole, of("topk"), str(out), False, False, 1) == ["stopped"] * 2
    with pytest.raises(RunError, match="its 2 ranks cannot go on as 1"):
        train(of("topk"), out, resume=True)
    for words in two_ranks.run(whole, of("topk"), str(out), True, True):
        assert words is not None
        assert "made under another private key" in words


@pytest.mark.parametrize("way", WAYS)
def test_a_training_that_diverges_ends_in_one_line_at_all_ranks(two_ranks: Ranks, way: str, tmp_path: Path) -> None:
    results = two_ranks.run(whole, of(way, training={"learning_rate": 1e20}), str(tmp_path / "out"))
    for words in results:
        assert words is not None
        assert "finite" in words
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize("way", ["periodic", "adaptive"])
def test_a_training_that_diverges_between_averages_does_not_end_as_finished(
    two_ranks: Ranks, way: str, tmp_path: Path
) -> None:
    section = {"exchange": way, "period": 64, "dense_epochs": 0}
    told_recipe = recipe(parallel=section, training={"learning_rate": 1e12, "epochs": 1})
    for words in two_ranks.run(whole, told_recipe, str(tmp_path / "out")):
        assert words is not None
        assert "not finite; training has diverged" in words
    assert not (tmp_path / "out" / "summary.json").exists()


def test_ranks_that_do_not_share_a_folder_are_told_so(two_ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert two_ranks.run(whole, of("topk"), str(out), False, False, 1) == ["stopped"] * 2
    for words in two_ranks.run(elsewhere, of("topk"), str(out)):
        assert words is not None
        assert words.endswith("checkpoints of epochs 1, 0; expected one folder that all of them share")


def test_too_few_records_are_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    for words in two_ranks.run(whole, recipe(batch_size=129), str(tmp_path / "out")):
        assert words == (
            "256 training records make no batch of 129 for each of 2 ranks; lower training.batch_size"
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_with_it_is_refused() -> None:
    tables: dict[str, Any] = recipe().model_dump(mode="json", exclude_none=True)
    for section, values, words in (
        ("defense", {"nopeek": {"weight": 1.0}}, "defense does not go with parties.mode data_parallel"),
        ("guard", {"hijack": {}}, "guard.hijack does not go with"),
        ("wire", {"compress": "fp16"}, "wire.compress does not go with"),
        ("network", {"name": "mlp", "start": "runs/x"}, "network.start does not go with"),
        ("training", {"micro_batches": 4, "batch_size": 64}, "training.micro_batches does not go with"),
        ("training", {"drop_last_batch": False}, "training.drop_last_batch = false does not go with"),
        ("cut", {"back_at": "hidden1"}, "cut.back_at does not go with"),
        ("parallel", {"density": 0}, "parallel.density"),
        ("parallel", {"density": 1.5}, "parallel.density"),
        ("parallel", {"exchange": "periodic", "period": 0}, "parallel.period"),
        ("parallel", {"period": 4}, "period goes with exchange periodic or adaptive; exchange is dense"),
        ("parallel", {"warmup": [0.1]}, "warmup goes with exchange topk or gaussian_k; exchange is dense"),
        ("parallel", {"exchange": "gaussiank"}, "parallel.exchange"),
        ("parallel", {"exchange": "topk", "momentum_correction": True}, None),
    ):
        changed = tables | {section: values}
        if words is None:
            parse_recipe(changed | {"training": {"optimizer": "sgd"}})
            words = "momentum_correction is training.momentum"
        if section != "training":
            changed |= {"training": {"optimizer": "adam"}}
        with pytest.raises(RecipeError, match=words):
            parse_recipe(changed)


def test_without_a_cut_only_this_mode_is_a_recipe() -> None:
    tables = recipe().model_dump(mode="json", exclude_none=True)
    with pytest.raises(RecipeError, match=r"'cut\.at' is missing"):
        parse_recipe(tables | {"parties": {}})


def test_other_commands_say_that_nothing_was_split(trained: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"parties.mode is data_parallel, where nothing is split"):
        train_split(recipe(), tmp_path / "out")
    with pytest.raises(RunError, match=r"its parties.mode is data_parallel: nothing was split there"):
        RunFolder.open_finished(trained["dense"])


def test_a_recipe_of_split_training_keeps_its_digest_whatever_a_servers_ranks_do() -> None:
    tables = recipe().model_dump(mode="json", exclude_none=True) | {"cut": {"at": "hidden1"}, "parties": {}}
    assert parse_recipe(tables).digest() == parse_recipe(tables | {"parallel": {"exchange": "topk"}}).digest()


def test_the_ways_are_all_tried() -> None:
    assert set(WAYS) == set(Exchange.__args__)  # type: ignore[attr-defined]


def test_traffic_is_counted_by_the_kernel() -> None:
    import socket

    before = tcp_traffic()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        other, _ = server.accept()
        with other:
            one.sendall(b"x" * 1000)
            other.recv(1000, socket.MSG_WAITALL)
            other.sendall(b"y" * 50)
            one.recv(50, socket.MSG_WAITALL)
            now = tcp_traffic()
    assert before is not None
    assert now is not None
    assert (now - before).sent == (now - before).received == 1050  # both ends are this process's


def _torchrun(out: Path, *more: str) -> subprocess.Popen[str]:
    file = out.with_suffix(".toml")
    file.write_text(of("gaussian_k", training={"epochs": 150}).to_toml())
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "milkglass", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *words, str(file), "--out", str(out), *more],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_under_torchrun_a_rank_that_dies_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    started = _torchrun(out)
    try:
        _wait_for(out / "checkpoint" / "0003" / "progress.json", started)
        listed = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        os.kill(int(listed[1]), signal.SIGKILL)
        said, _ = started.communicate(timeout=90)
        assert started.returncode != 0
        assert "milkglass: rank 0: rank 1 of 2 is gone or hangs" in said, said
        assert not (out / "summary.json").exists()
        again = _torchrun(out, "--resume")
        said, _ = again.communicate(timeout=120)
        assert again.returncode == 0, said
        assert f"{out}: 2 ranks, exchange gaussian_k; accuracy " in said
        assert len(lines(out, "metrics.jsonl")) == 150
    finally:
        started.kill()
