"""`train` with every way of training: what it writes, and that a run stopped and resumed ends in the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from milkglass.randomness import Source
from milkglass.training.split import set_up, train
from tests.helpers import KEY, Stop
from tests.training.whole import CLIENTS, DEFENDED, DROPOUTS, MLP, U_SHAPED, parties, recipe_of, training

OWNERS = ["ann", "ben", "cas", "dan"]
WAYS: dict[str, dict[str, Any]] = {
    "U-shaped": U_SHAPED,
    "relay": DROPOUTS | {"parties": parties("relay")},
    "splitfed1": DROPOUTS | {"cut": {"at": "drop1", "back_at": "drop2"}, "parties": parties("splitfed1")},
    "splitfed2": DROPOUTS | {"parties": parties("splitfed2")},
    "vertical": {"parties": parties("vertical", OWNERS, owner_settings={"hidden": [4]})},
}
STAGES = {
    "U-shaped": {"bottom", "head", "top"},
    "relay": {"bottom", "top"},
    "splitfed1": {"bottom", "head", "top"},
    "splitfed2": {"bottom", "top"},
    "vertical": {"bottom", "bottom-ben", "bottom-cas", "bottom-dan", "top"},
}


def _tensors(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in run.glob("*.safetensors")}


def _without_seconds(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith("seconds")}


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [_without_seconds(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("pieces", "optimizer"), [(1, "adam"), (2, "sgd")])
@pytest.mark.parametrize("way", WAYS)
def test_resumed_runs_end_in_the_same_bits(tmp_path: Path, way: str, pieces: int, optimizer: str) -> None:
    settings = training(epochs=4, batch_size=16, micro_batches=pieces, optimizer=optimizer)
    recipe = recipe_of(
        **WAYS[way], defense=DEFENDED, training=settings, client={"most_releases": 9, "leakage": {"limit": 1.0}}
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    summary = train(recipe, whole, Source(KEY))
    for epoch, step in ((1, 2), (3, 1), (4, 4)):
        with pytest.raises(KeyboardInterrupt):
            train(recipe, stopped, Source(KEY), resume=True, progress=Stop(epoch, step))
        assert len(_metrics(stopped) if epoch > 1 else []) == epoch - 1
    resumed = train(recipe, stopped, Source(KEY), resume=True)
    assert _tensors(stopped) == _tensors(whole)
    assert _metrics(stopped) == _metrics(whole)
    assert _without_seconds(resumed) == _without_seconds(summary)
    assert {name.removesuffix(".safetensors") for name in _tensors(whole)} == STAGES[way]


@pytest.mark.parametrize("way", WAYS)
def test_the_summary_of_every_way_adds_up(tmp_path: Path, way: str) -> None:
    recipe = recipe_of(**WAYS[way], client={"most_releases": 2})
    summary = train(recipe, tmp_path / "run")
    flows = {(flow["direction"], flow["kind"]): flow for flow in summary["wire"]}
    assert summary["bytes_sent"] == sum(flow["bytes"] for (way_, _), flow in flows.items() if way_ == "to server")
    assert summary["bytes_received"] == sum(flow["bytes"] for (way_, _), flow in flows.items() if way_ == "to client")
    assert summary["messages"] == sum(flow["messages"] for flow in flows.values())
    clients = recipe.parties.clients
    vertical, several = way == "vertical", way in ("relay", "splitfed1", "splitfed2")
    batches = 2 * 3 * (len(clients) if vertical else 1)
    assert flows["to server", "activations"]["messages"] == flows["to client", "gradients"]["messages"] == batches
    assert (("to server", "returns") in flows) == (way in ("U-shaped", "splitfed1"))
    assert flows["to server", "queries"]["messages"] == 2 * len(clients)
    if several:
        assert flows["to server", "weights"]["messages"] == 2 * 3
        taken = 2 * (3 + 2) if way == "relay" else 2 * 3
        assert flows["to server", "collect"]["messages"] == flows["to client", "handed"]["messages"] == taken
    else:
        assert ("to server", "weights") not in flows
    assert ("to server", "hashes") in flows if vertical else ("to server", "hashes") not in flows
    assert 0 < summary["accuracy"] <= 1
    assert sum(summary["records"]["train"].values()) == 96 * (len(clients) if vertical else 1)
    each = {"largest": 2, "mean": 2.0, "total": 2 * 96 if not several else 2 * 32}
    assert summary["releases"] == dict.fromkeys(clients, each)
    assert summary["client_flops_per_sample"] > 0
    assert {"squared_unbiased", "biased", "n", "permutation_floor"} == set(summary["distance_correlation"])
    lines = _metrics(tmp_path / "run")
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[-1]["accuracy"] == summary["accuracy"]


def test_the_written_stages_are_those_of_their_parties(tmp_path: Path) -> None:
    for way, tables in WAYS.items():
        recipe, run = recipe_of(**tables), tmp_path / way
        train(recipe, run)
        setup = set_up(recipe)
        parts = {"bottom": setup.client.stage, "top": setup.server.stage, "head": setup.client.head}
        parts |= {f"bottom-{seat.client.name}": seat.client.stage for seat in setup.seats[1:]}
        for name in STAGES[way]:
            part = parts[name]
            assert part is not None
            written = load_file(run / f"{name}.safetensors")
            assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in part.state_dict().items()}
            first = part.state_dict()
            assert any(not torch.equal(tensor, first[n]) for n, tensor in written.items()), "it has learned"


def test_several_clients_test_each_record_once() -> None:
    setup = set_up(recipe_of(**MLP, parties=parties("relay")))
    assert [seat.client.name for seat in setup.seats] == CLIENTS
    tests = [seat.share.test for seat in setup.seats]
    assert torch.equal(torch.cat([part.x for part in tests]), setup.records.test.x)
    assert torch.equal(torch.cat([part.y for part in tests]), setup.records.test.y)
