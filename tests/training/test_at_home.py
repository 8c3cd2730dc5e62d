"""Trained at home, asked from afar: the two halves of a run meet again between machines, and nothing else is needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from milkglass.errors import RecipeError
from milkglass.replay import find_reference, replay
from milkglass.runs import RunFolder
from milkglass.training.join import join
from milkglass.training.predict import predict
from milkglass.training.serve import serve
from milkglass.training.split import train
from tests.answered import while_answering
from tests.training.whole import CLIENTS, MLP, parties, recipe_of, training

CHANNEL: dict[str, Any] = {"channel": {"width": 4, "sigma": 0.1}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An undefended run, and one that was fine-tuned from it, at home, with a channel."""
    folder = tmp_path_factory.mktemp("home")
    train(recipe_of(training=training(epochs=6)), folder / "undefended")
    network = {**MLP["network"], "start": str(folder / "undefended")}
    table = training(at_home=True, client_learns="ends", optimizer="adam", epochs=4)
    client = {"keep_releases": True, "most_queries": 1}
    recipe = recipe_of(network=network, training=table, defense=CHANNEL, client=client)
    train(recipe, folder / "defended")
    return folder / "undefended", folder / "defended"


def _records(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    np.savez(folder / "records.npz", images=rng.integers(0, 17, (30, 8, 8)).astype(np.uint8))
    return folder / "records.npz"


def test_its_halves_answer_each_other_between_machines(runs: tuple[Path, Path], tmp_path: Path) -> None:
    _, defended = runs
    given = _records(tmp_path)
    predict(defended, given, out=tmp_path / "here.csv")
    client, server = tmp_path / "client", tmp_path / "server"
    shutil.copytree(defended, client)
    (client / "top.safetensors").unlink()
    server.mkdir()
    for name in ("recipe.toml", "summary.json", "run.json", "top.safetensors"):  # all that docs/defenses.md hands over
        shutil.copy(defended / name, server / name)
    told: list[tuple[str, dict[str, Any]]] = []
    with while_answering(server, None, told) as address:
        summary = predict(client, given, address=address, out=tmp_path / "there.csv")
    assert summary["records"] == 30
    # kept releases: the same noise, so the same answers, and the ledger lets them pass once more
    assert (tmp_path / "there.csv").read_text() == (tmp_path / "here.csv").read_text()
    assert json.loads((server / "answered.json").read_text())["records"] == 30


def test_its_audit_has_no_training_to_attack_and_says_so(runs: tuple[Path, Path]) -> None:
    undefended, defended = runs
    folder = RunFolder.open_finished(defended)
    found = replay(folder, find_reference(folder), trained_on=True)
    assert [trial.view.exposure for trial in found.trials] == ["fresh", "repeated"]
    assert any(note.startswith("trained-on: none, for all was trained at home") for note in found.notes)
    assert found.certificate is not None
    assert found.check is not None
    assert found.check.agrees  # kept releases are the same ten times over; the check asks for fresh ones
    repeated = found.trials[1].view.target.repeats
    assert repeated is not None
    assert all(bool((each == repeated[0]).all()) for each in repeated)
    assert undefended.exists()
    summary = json.loads((defended / "summary.json").read_text())
    assert summary["certificate"]["training"]["releases"] == 0


def test_nobody_trains_it_between_machines(tmp_path: Path) -> None:
    recipe, words = recipe_of(training=training(at_home=True)), r"training\.at_home: `milkglass train` trains it"
    with pytest.raises(RecipeError, match=words):
        serve(recipe, "localhost:0", None, tmp_path / "out")
    with pytest.raises(RecipeError, match=words):
        join(recipe, "client", "localhost:1", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_clients_have_no_home_in_common() -> None:
    with pytest.raises(RecipeError, match=r"training\.at_home is for one client without hops"):
        recipe_of(training=training(at_home=True), parties=parties("relay", CLIENTS[:2]))
