"""Whoever is killed, and whenever: started again with `resume`, all end in the bits of the undisturbed run."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from milkglass.certificates import make_certificates
from milkglass.recipe import Recipe
from tests.network import SECONDS, Ended, Frames, Network, assert_same, goodbyes, in_one_process
from tests.training.whole import CLIENTS, DEFENDED, DROPOUTS, U_SHAPED, parties, recipe_of, training
from tests.wire_server import until

OFTEN = {
    "client": {"checkpoint_seconds": 0.15, "most_releases": 99},
    "server": {"checkpoint_seconds": 0.15, "heartbeat_seconds": 1},
}
RECORDS = {"name": "digits", "train_records": 960, "test_records": 40, "test_share": 0.1}
LONG: dict[str, Any] = {"data": RECORDS, "training": training(epochs=10, batch_size=16), "defense": DEFENDED} | OFTEN
"""600 steps of one client."""
SHORTER = training(epochs=6, batch_size=16)
SEVERAL: dict[str, dict[str, Any]] = {
    "relay": LONG | DROPOUTS | {"parties": parties("relay"), "training": SHORTER},
    "splitfed1, in pieces": LONG
    | {"parties": parties("splitfed1"), "training": training(epochs=6, batch_size=16, micro_batches=2)},
    "splitfed2, U-shaped": LONG | U_SHAPED | {"parties": parties("splitfed2"), "training": SHORTER},
    "vertical": LONG
    | {
        "parties": parties("vertical", ["ann", "ben"], owner_settings={"hidden": [8]}),
        "training": training(epochs=4, batch_size=16),
    },
}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder, "localhost", ["client", *CLIENTS])
    return folder


Undisturbed = tuple[Recipe, Ended, Frames]


@pytest.fixture(scope="module")
def one_client() -> Undisturbed:
    recipe = recipe_of(**LONG)
    return recipe, *in_one_process(recipe)


def _check(network: Network, undisturbed: Undisturbed) -> None:
    """The same end; and each message's bytes are the same in all lives: nothing was drawn, or released, twice."""
    _, expected, crossed = undisturbed
    assert_same(network.ended(), expected)
    frames = crossed | goodbyes(crossed)
    assert network.frames() == frames
    server = json.loads((network.folder / "server" / "summary.json").read_text())
    assert server["messages"] == sum(way == "to server" for way, _, _ in frames)


def _killed(network: Network, generator: random.Random, kills: int) -> Counter[str]:
    """Let all train to their end; on the way kill one of them, again and again; how often which.

    Less often where they come to their end before. A killed one is started again at once, and may die as it starts.
    """
    running = {name: network.start(name) for name in network.names}
    killed: Counter[str] = Counter()
    for _ in range(kills):
        time.sleep(generator.uniform(0.01, 0.6))
        if all((network.folder / name / "summary.json").exists() for name in network.recipe.parties.clients):
            break
        name = generator.choice(network.names)
        running[name].kill()
        killed[name] += 1
        running[name] = network.start(name, resume=True)
    for party in running.values():
        party.result()
    return killed


def _kill_often(
    folder: Path, certificates: Path, undisturbed: Undisturbed, kills: int, generator: random.Random
) -> Counter[str]:
    """Run after run, each with up to 10 kills, until there were so many; each run is checked."""
    killed: Counter[str] = Counter()
    runs = 0
    while (done := killed.total()) < kills:
        with Network(folder / f"run {runs}", undisturbed[0], certificates) as network:
            killed += _killed(network, generator, min(10, kills - done))
            _check(network, undisturbed)
        runs += 1
    return killed


def test_either_party_killed_at_five_moments(tmp_path: Path, certificates: Path, one_client: Undisturbed) -> None:
    assert _kill_often(tmp_path, certificates, one_client, 5, random.Random(0)).total() == 5


@pytest.mark.slow
def test_either_party_killed_at_fifty_moments(tmp_path: Path, certificates: Path, one_client: Undisturbed) -> None:
    killed = _kill_often(tmp_path, certificates, one_client, 50, random.Random(1))
    assert min(killed["server"], killed["client"]) > 10


@pytest.mark.parametrize("way", SEVERAL)
def test_any_of_several_parties_killed(tmp_path: Path, way: str, certificates: Path) -> None:
    _kill_several(tmp_path, way, certificates, 3)


@pytest.mark.slow
@pytest.mark.parametrize("way", SEVERAL)
def test_any_of_several_parties_killed_at_thirty_moments(tmp_path: Path, way: str, certificates: Path) -> None:
    killed = _kill_several(tmp_path, way, certificates, 30)
    assert len(killed) == 1 + len(recipe_of(**SEVERAL[way]).parties.clients), "each of them was"


def _kill_several(folder: Path, way: str, certificates: Path, kills: int) -> Counter[str]:
    recipe = recipe_of(**SEVERAL[way])
    undisturbed = recipe, *in_one_process(recipe)
    return _kill_often(folder, certificates, undisturbed, kills, random.Random(f"{way}, {kills}"))


def test_a_server_that_is_told_to_end_keeps_its_state(
    tmp_path: Path, certificates: Path, one_client: Undisturbed
) -> None:
    with Network(tmp_path / "network", one_client[0], certificates) as network:
        network.hold("client", before=300)
        server, client = network.start("server"), network.start("client")
        for frames in (20, 80):
            until(lambda frames=frames: network.seen("server") >= frames, SECONDS)  # type: ignore[misc]
            server.stop()
            words = "stopped; nothing is lost: run it again with --resume, and its clients go on"
            assert server.failure() == words
            (progress,) = (network.folder / "server" / "checkpoint").glob("*/progress.json")
            taken = json.loads(progress.read_text())["lines"]["client"]["answered"]
            journal = network.folder / "server" / "journal" / f"{progress.parent.name.zfill(12)}.received"
            assert taken >= frames - 1, "the last one may have been seen, and not taken"
            assert journal.stat().st_size == 0, "the checkpoint holds all"
            assert client.alive
            server = network.start("server", resume=True)
            server.port()  # until then the signal would end it at once
        network.release("client")
        server.result()
        client.result()
        _check(network, one_client)


def test_a_client_that_says_again_what_it_said_keeps_no_state_meanwhile(
    tmp_path: Path, certificates: Path, one_client: Undisturbed
) -> None:
    """Its journals hold answers that the server has forgotten: they must stay until it is where it was."""
    recipe = one_client[0]
    with Network(tmp_path / "network", _kept_by_client(recipe, 1000.0), certificates) as network:
        network.hold("client", before=300)
        server, client = network.start("server"), network.start("client")
        until(lambda: network.seen("server") >= 200, SECONDS)
        client.kill()
        said = network.seen("client") // 2
        network.write_recipe(_kept_by_client(recipe, 0.0))
        client = network.start("client", resume=True)
        checkpoints = network.folder / "client" / "checkpoint"
        until(lambda: any(checkpoints.glob("*/progress.json")), SECONDS)
        assert min(int(file.parent.name) for file in checkpoints.glob("*/progress.json")) >= said
        client.kill()
        network.release("client")
        network.write_recipe(recipe)
        client = network.start("client", resume=True)
        client.result()
        server.result()
        _check(network, one_client)


def _kept_by_client(recipe: Recipe, seconds: float) -> Recipe:
    section = recipe.client.model_copy(update={"checkpoint_seconds": seconds})
    return recipe.model_copy(update={"client": section})


def test_a_client_that_was_done_says_goodbye_when_it_is_started_again(tmp_path: Path, certificates: Path) -> None:
    """The server dies before the goodbye; the client's training is over all the same, and both come to their end."""
    recipe = recipe_of(**OFTEN)
    undisturbed = recipe, *in_one_process(recipe)
    with Network(tmp_path / "network", recipe, certificates) as network:
        network.hold("client", before=sum(way == "to server" for way, _, _ in undisturbed[2]))
        server, client = network.start("server"), network.start("client")
        until((network.folder / "client" / "bottom.safetensors").exists, SECONDS)
        server.kill()
        client.kill()
        network.release("client")
        server, client = network.start("server", resume=True), network.start("client", resume=True)
        client.result()
        server.result()
        summary = (network.folder / "client" / "summary.json").read_bytes()
        assert network.start("client", resume=True).result() == json.loads(summary)
        _check(network, undisturbed)
