"""The same recipe with the same keys ends in the same bits in one process and between machines, in every way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from milkglass.certificates import make_certificates
from milkglass.recipe import Recipe
from tests.network import Ended, Network, assert_same, goodbyes, in_one_process
from tests.training.whole import CLIENTS, DEFENDED, DROPOUTS, EVERY_DEFENSE, U_SHAPED, parties, recipe_of, training

BACK: dict[str, Any] = {"cut": {"at": "drop1", "back_at": "drop2"}}
OWNERS = parties("vertical", CLIENTS[:2], owner_settings={"hidden": [8]})
ADAM = training(optimizer="adam", batch_size=16)
PIECES = training(micro_batches=4)
ALWAYS = {"client": {"checkpoint_seconds": 0, "most_releases": 5}, "server": {"checkpoint_seconds": 0}}
"""Every party keeps its state as often as it can."""
WAYS: dict[str, dict[str, Any]] = {
    "vanilla": {"training": ADAM, "client": {"most_releases": 2, "leakage": {"limit": 1.0, "window": 64}}},
    "vanilla, dropout, defended": DROPOUTS | {"defense": DEFENDED} | ALWAYS,
    "vanilla, in pieces, compressed": {"training": PIECES, "wire": {"compress": "int8"}},
    "U-shaped": DROPOUTS | BACK | {"training": ADAM},
    "U-shaped, in pieces, defended": U_SHAPED | {"training": PIECES, "defense": DEFENDED, "wire": {"compress": "fp16"}},
    "relay of 2": DROPOUTS | {"parties": parties("relay", CLIENTS[:2]), "training": ADAM},
    "relay of 2, U-shaped, always kept": U_SHAPED | {"parties": parties("relay", CLIENTS[:2])} | ALWAYS,
    "splitfed1 of 3": DROPOUTS | {"parties": parties("splitfed1"), "training": ADAM},
    "splitfed1 of 3, in pieces, always kept": {"parties": parties("splitfed1"), "training": PIECES} | ALWAYS,
    "splitfed1 of 3, U-shaped, always kept": DROPOUTS | BACK | {"parties": parties("splitfed1")} | ALWAYS,
    "splitfed2 of 3": DROPOUTS | {"parties": parties("splitfed2"), "defense": DEFENDED, "training": ADAM},
    "splitfed2 of 3, U-shaped, in pieces": U_SHAPED | {"parties": parties("splitfed2"), "training": PIECES} | ALWAYS,
    "vertical of 2": {"parties": OWNERS, "defense": DEFENDED, "training": ADAM},
    "vanilla, every defense": DROPOUTS | {"defense": EVERY_DEFENSE, "training": ADAM} | ALWAYS,
    "relay of 2, channel": {"parties": parties("relay", CLIENTS[:2]), "defense": EVERY_DEFENSE} | ALWAYS,
    "splitfed1 of 3, channel": {"parties": parties("splitfed1"), "defense": {"channel": {"width": 4}}},
    "U-shaped, labels protected": U_SHAPED | {"defense": {"labels": {}, "channel": {"width": 4}}, "training": PIECES},
    "vertical of 2, labels protected": {"parties": OWNERS, "defense": {"labels": {}}, "training": ADAM} | ALWAYS,
    "vertical of 2, in pieces, compressed": {"parties": OWNERS, "training": PIECES, "wire": {"compress": "topk"}}
    | ALWAYS,
}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder, "localhost", ["client", *CLIENTS])
    return folder


def _learns(recipe: Recipe, ended: Ended) -> bool:
    first = in_one_process(recipe.model_copy(update={"training": recipe.training.model_copy(update={"epochs": 1})}))[0]
    return all(
        any(not torch.equal(t, first.weights[party][name]) for name, t in weights.items())
        for party, weights in ended.weights.items()
    )


@pytest.mark.parametrize("way", WAYS)
def test_between_machines_a_training_ends_in_the_bits_of_one_process(
    tmp_path: Path, way: str, certificates: Path
) -> None:
    recipe = recipe_of(**WAYS[way])
    expected, crossed = in_one_process(recipe)
    assert _learns(recipe, expected)
    with Network(tmp_path / "network", recipe, certificates) as network:
        ended = network.run()
        assert_same(ended, expected)
        assert network.frames() == crossed | goodbyes(crossed)
    sent = [party for way, party, _ in crossed if way == "to server"]
    assert ended.summaries["server"]["messages"] == len(sent) + len(set(sent))
