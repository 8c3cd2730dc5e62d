"""Whatever happens to the line, the disk or the clock: a training ends in the bits of the undisturbed one."""

from __future__ import annotations

import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from milkglass.certificates import load_credentials, make_certificates
from milkglass.recipe import Recipe
from milkglass.training.join import join
from milkglass.training.serve import serve
from tests.background import in_background
from tests.network import SECONDS, Ended, Network, assert_same, in_one_process
from tests.training.whole import DEFENDED, DROPOUTS, recipe_of, training
from tests.wire_faults import FaultyNetwork
from tests.wire_server import until

STEPS = 30
RECORDS = {"name": "digits", "train_records": 480, "test_records": 40, "test_share": 0.1}
TRAINING: dict[str, Any] = {
    **DROPOUTS,
    "data": RECORDS,
    "training": training(epochs=2, batch_size=32, micro_batches=2),
    "defense": DEFENDED,
    "client": {"checkpoint_seconds": 0.0, "most_releases": 99},
    "server": {"checkpoint_seconds": 0.0, "heartbeat_seconds": 1},
}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder, "localhost", ["client"])
    return folder


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return recipe_of(**TRAINING)


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe) -> Ended:
    return in_one_process(recipe)[0]


@pytest.fixture
def network(recipe: Recipe, certificates: Path, tmp_path: Path) -> Iterator[Network]:
    with Network(tmp_path / "network", recipe, certificates) as network:
        yield network


def _reset_in_a_frame(line: FaultyNetwork) -> None:
    line.reset_after = 9000
    line.cut()


@pytest.mark.parametrize(
    ("disturb", "times"),
    [
        (FaultyNetwork.cut, 3),
        (FaultyNetwork.reset, 3),
        (_reset_in_a_frame, 3),
        pytest.param(FaultyNetwork.fall_silent, 1, marks=pytest.mark.slow),  # a client's heartbeat is 10 seconds
    ],
)
def test_a_bad_line_changes_no_bit(
    disturb: Callable[[FaultyNetwork], None], times: int, network: Network, undisturbed: Ended
) -> None:
    server = network.start("server")
    with FaultyNetwork(network._ports["server"], delay_seconds=0.002) as line:
        network._ports["server"] = line.port
        client = network.start("client")
        for count in range(1, times + 1):
            until(lambda count=count: line.bytes_to_server > count * 25_000)  # type: ignore[misc]
            assert client.alive
            disturb(line)
        client.result()
        server.result()
        assert line.accepted > times
    assert_same(network.ended(), undisturbed)


@pytest.mark.parametrize("who", ["server", "client"])
@pytest.mark.parametrize(
    ("what", "seconds", "most_bytes"),
    [("checkpoint", 0.0, 12_000), pytest.param("journal", 999.0, 40_000, marks=pytest.mark.slow)],
)
def test_a_full_disk_is_one_line_and_with_resume_it_goes_on(
    who: str, what: str, seconds: float, most_bytes: int, network: Network, undisturbed: Ended
) -> None:
    often = {who: {**TRAINING[who], "checkpoint_seconds": seconds}}
    (network.folder / "recipe.toml").write_text(recipe_of(**(TRAINING | often)).to_toml())
    running = {"server": network.start("server")}
    network.hold("client", before=5)
    if who == "client":
        running["client"] = network.start("client")
    until((network.folder / who / "recipe.toml").exists)
    process = running[who]._process.pid
    assert process is not None
    resource.prlimit(process, resource.RLIMIT_FSIZE, (most_bytes, most_bytes))  # as a full disk does, files end there
    network.release("client")
    if who == "server":
        running["client"] = network.start("client")
    line = running[who].failure()
    assert re.fullmatch(rf"cannot write [^\n]*/{what}/[^\n]*: File too large; what was written before is whole", line)
    running[who] = network.start(who, resume=True)
    for party in running.values():
        party.result()
    assert_same(network.ended(), undisturbed)


def test_a_clock_that_jumps_changes_no_bit(
    network: Network, recipe: Recipe, certificates: Path, undisturbed: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ports, over = time.time, list[int](), threading.Event()
    keys = {name: network.folder / f"{name}.key" for name in network.names}

    def serves() -> None:
        credentials = load_credentials(certificates / "localhost", "server")
        folder = network.folder / "server"
        serve(recipe, "localhost:0", credentials, folder, key=keys["server"], ready=ports.append)

    def joins() -> None:
        credentials = load_credentials(certificates / "client", "client")
        folder = network.folder / "client"
        join(recipe, "client", f"localhost:{ports[0]}", credentials, folder, key=keys["client"])

    def jumps() -> None:
        for jump in (1e9, -1e9, 3600.0, -3600.0) * 1000:
            monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
            if over.wait(0.02):
                return

    serving, jumping = in_background(serves), in_background(jumps)
    try:
        until(lambda: ports)
        in_background(joins).result(SECONDS)
        serving.result(SECONDS)
    finally:
        over.set()
        jumping.result(SECONDS)
    assert_same(network.ended(), undisturbed)


# The client's own limits.


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"most_releases": 1}, "1"),
        ({"leakage": {"limit": 0.01, "window": 64}}, "the client's limit is 0.01"),
    ],
)
def test_a_server_cannot_raise_the_clients_limits(limit: dict[str, Any], words: str, network: Network) -> None:
    file = network.folder / "recipe.toml"
    own = {"checkpoint_seconds": 0.0, "patience_seconds": 20.0}
    generous = {"most_releases": 1_000_000, "leakage": {"limit": 1.0, "window": 64}, **own}
    file.write_text(recipe_of(**(TRAINING | {"client": generous})).to_toml())
    server = network.start("server")
    file.write_text(recipe_of(**(TRAINING | {"client": limit | own})).to_toml())
    client = network.start("client")
    line = client.failure()
    assert words in line
    assert "\n" not in line
    assert (network.folder / "client" / "alarm.txt").read_text() == line
    assert server.alive
    sent = [row for row in (network.folder / "client.frames").read_text().splitlines() if row.startswith("to server")]
    assert 0 < len(sent) < 2 * STEPS  # it stopped on the way, and the server waits
    assert "alarm.txt must be removed" in network.start("client", resume=True).failure()
