"""A party in the middle, between machines: the bits of one process, and whoever is killed."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from milkglass.certificates import make_certificates
from milkglass.recipe import Recipe
from milkglass.training.split import computing_with, play_epoch, set_up
from tests.helpers import small_recipe
from tests.network import SECONDS, Network
from tests.wire_server import until

HOP = "127.0.0.1"


def _recipe(epochs: int) -> Recipe:
    return small_recipe(
        network={"name": "mlp", "settings": {"hidden": [16, 12, 8]}},
        cut={"at": "hidden1", "hops": ["hidden2"]},
        parties={"hops": [HOP]},
        training={"epochs": epochs, "batch_size": 8, "learning_rate": 1e-2},
        defense={"noise": {"sigma": 0.1}},
        client={"checkpoint_seconds": 0.2},
        server={"checkpoint_seconds": 0.2},
    )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder, "localhost", ["client"])
    make_certificates(folder, HOP, ["client"])
    return folder


def _expected(recipe: Recipe) -> dict[str, dict[str, torch.Tensor]]:
    with computing_with(recipe.threads):
        setup = set_up(recipe)
        for epoch in range(1, recipe.training.epochs + 1):
            play_epoch(setup, epoch)
    (hop,) = setup.desks[HOP].servers.values()
    return {
        "client": setup.client.stage.state_dict(),
        HOP: hop.stage.state_dict(),
        "server": setup.server.stage.state_dict(),
    }


def _assert_ended(network: Network, recipe: Recipe) -> None:
    weights = network.ended().weights
    for party, tensors in _expected(recipe).items():
        for name, tensor in tensors.items():
            assert torch.equal(weights[party][name], tensor), f"{party}: {name}"


def test_three_machines_end_in_the_bits_of_one_process(tmp_path: Path, certificates: Path) -> None:
    recipe = _recipe(2)
    with Network(tmp_path / "network", recipe, certificates) as network:
        network.run()
        _assert_ended(network, recipe)


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_whoever_is_killed_the_bits_are_those_of_the_undisturbed_run(
    kills: int, tmp_path: Path, certificates: Path
) -> None:
    recipe, generator, killed, runs = _recipe(40), random.Random(kills), 0, 0
    while killed < kills:
        runs += 1
        with Network(tmp_path / f"run {runs}", recipe, certificates) as network:
            parties = {name: network.start(name) for name in network.names}
            for _ in range(min(10, kills - killed)):
                time.sleep(generator.uniform(0.05, 0.5))
                if not parties["client"].alive:
                    break
                name = generator.choice(network.names)
                parties[name].kill()
                parties[name] = network.start(name, resume=True)
                killed += 1
            for party in parties.values():
                party.result()
            _assert_ended(network, recipe)


def test_a_hop_that_is_told_to_end_does_not_wait_for_who_is_away(tmp_path: Path, certificates: Path) -> None:
    recipe = _recipe(40)
    with Network(tmp_path / "network", recipe, certificates) as network:
        network.hold("client", before=100)
        parties = {name: network.start(name) for name in network.names}
        until(lambda: network.seen("server") >= 20, SECONDS)
        parties["server"].kill()
        network.release("client")
        time.sleep(0.5)  # by now the hop awaits an answer
        began = time.monotonic()
        parties[HOP].stop()
        assert parties[HOP].failure().startswith("stopped; nothing is lost")
        assert time.monotonic() - began < 60
        for name in ("server", HOP):
            parties[name] = network.start(name, resume=True)
        for party in parties.values():
            party.result()
        _assert_ended(network, recipe)
