"""Federated rounds between processes on Flower: who is let in, whose code runs, what is answered, who may be gone."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from milkglass.certificates import make_certificates
from milkglass.client import StepResult
from milkglass.errors import EgressError, LinkError, RecipeError, RunError
from milkglass.recipe import Recipe, parse_recipe
from milkglass.runs import RunFolder
from milkglass.training import federated_join as joining
from milkglass.training import federated_serve as serving
from milkglass.training import federated_tasks as tasks
from milkglass.training import flower_parts as flower
from milkglass.training import flower_processes as processes
from milkglass.training.federated import NETWORK, Member, first_network, train
from milkglass.training.federated_ledger import Ledger
from milkglass.training.flower_gate import PEER, Gate, Peer
from milkglass.training.split import Silence
from tests.network import Party, _tell

ROOT = Path(__file__).parents[2]
CLIENTS = ("client-a", "client-b", "client-c")
RESULT = StepResult(1.0, 0.0, 0.5)


def recipe_of(clients: int = 2, **changes: Any) -> Recipe:
    """Digits, a tiny network, a round or more; `changes` replace whole tables."""
    tables: dict[str, Any] = {
        "data": {"name": "digits", "train_records": 96, "test_records": 40, "test_share": 0.1},
        "network": {"name": "mlp", "settings": {"hidden": [8]}},
        "training": {"epochs": 1, "batch_size": 16, "learning_rate": 0.1},
        "parties": {"mode": "federated", "clients": list(CLIENTS[:clients])},
        "client": {"patience_seconds": 60},
        "attacker": {"auxiliary_share": 0, "validation_share": 0},
    }
    return parse_recipe(tables | changes)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder, "localhost", [*CLIENTS, "client-x"])
    return folder


@pytest.fixture(scope="module")
def other_certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    make_certificates(folder, "localhost", list(CLIENTS))
    return folder


@pytest.fixture(scope="module")
def link(certificates: Path) -> Iterator[tuple[str, str, processes.FlowerProcess]]:
    """A SuperLink for two clients: where it listens, where it does on loopback, its process."""
    with processes.superlink("localhost:0", certificates / "localhost", list(CLIENTS[:2])) as process:
        said = process.start()
        yield f"localhost:{said['port']}", said["private"], process


# Who is let in.


def _as(folder: Path) -> Any:
    return flower.httpx.Client(verify=processes.client_context(folder), trust_env=False)


def test_nobody_is_let_in_without_a_certificate_of_the_same_authority(
    link: tuple[str, str, Any], certificates: Path, other_certificates: Path, tmp_path: Path
) -> None:
    address, mine = link[0], certificates / "client-a"
    without = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    without.load_verify_locations(mine / "rootCA.pem")
    with flower.httpx.Client(verify=without, trust_env=False) as client, pytest.raises(flower.httpx.HTTPError):
        client.get(f"https://{address}{processes.GREETING_PATH}")
    with _as(mine) as client:
        assert client.get(f"https://{address}{processes.GREETING_PATH}").text == "client-a"
    recipe = recipe_of(client={"patience_seconds": 20})
    with pytest.raises(LinkError, match=r"is not who this client trusts .*; expected a certificate .*rootCA\.pem"):
        joining.join_rounds(recipe, "client-a", address, other_certificates / "client-a", _never)
    mixed = tmp_path / "client-a"
    shutil.copytree(other_certificates / "client-a", mixed)
    shutil.copy(mine / "rootCA.pem", mixed)
    with pytest.raises(
        LinkError, match=r"hung up 3 times .*; expected one of its CA in .*|refuses this client's certificate"
    ):
        joining.join_rounds(recipe, "client-a", address, mixed, _never)
    with pytest.raises(LinkError, match=r"'client-x' is not among the recipe's clients; did you mean 'client-[ab]'\?"):
        joining.join_rounds(recipe, "client-x", address, certificates / "client-x", _never)


def test_a_client_reaches_the_fleet_api_alone_and_loopback_nothing_without_the_secret(
    link: tuple[str, str, Any], certificates: Path
) -> None:
    address, private, process = link
    paths = ["control/start-run", "control/register-node", "runtime/acquire-task", "responses", "../docs", "../health"]
    with _as(certificates / "client-a") as client:
        for path in paths:
            assert client.post(f"https://{address}/v1/{path}", content=b"").status_code == 404, path
    with flower.httpx.Client(trust_env=False) as client:
        assert client.post(f"http://{private}/v1/control/start-run", content=b"").status_code == 404
    for secret in (bytes(32), None):
        stranger = tasks.runtime_client(private, secret=secret)
        with pytest.raises(LinkError, match="401"):
            tasks.await_task(stranger, tasks.SERVER_TASK, process)
        stranger.close()


def test_a_node_is_the_client_of_its_certificate_and_speaks_in_no_other_name(
    link: tuple[str, str, Any], certificates: Path
) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest, RegisterNodeFleetRequest
    from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    own: Any = load_pem_private_key((certificates / "client-a" / "client.key").read_bytes(), None)
    for key in (ec.generate_private_key(ec.SECP256R1()), own):
        public, context = key.public_key(), processes.client_context(certificates / "client-a")
        named = public_key_to_bytes(public)
        signing = [NodeAuthHttpInterceptor(key, public)]
        with FleetHttpClient(f"https://{link[0]}", interceptors=signing, verify=context) as client:
            with pytest.raises(flower.httpx.HTTPStatusError, match="409"):
                client.RegisterNode(RegisterNodeFleetRequest(public_key=named))
            activate = ActivateNodeRequest(public_key=named, heartbeat_interval=30)
            if key is not own:
                with pytest.raises(flower.httpx.HTTPStatusError, match="409"):
                    client.ActivateNode(activate)
                continue
            node = client.ActivateNode(activate).node_id
            others = Message(metadata=Metadata(src_node_id=node + 1, dst_node_id=1, message_id="0" * 64))
            with pytest.raises(flower.httpx.HTTPStatusError, match="409"):
                client.PushMessages(
                    PushMessagesRequest(
                        node=Node(node_id=node), messages_list=[others], message_object_trees=[ObjectTree()]
                    )
                )


@pytest.mark.parametrize(
    ("peer", "length", "status"),
    [
        (None, b"0", 404),
        (Peer("client-x", b""), b"0", 404),
        (Peer("", b""), b"0", 404),
        (Peer("client-a", b""), None, 413),
        (Peer("client-a", b""), b"-1", 413),
        (Peer("client-a", b""), str(processes.MOST_REQUEST_BYTES + 1).encode(), 413),
        (Peer("client-a", b""), str(processes.MOST_REQUEST_BYTES).encode(), 200),
    ],
    ids=["no certificate", "a stranger", "no name", "no length", "no number", "too long", "long"],
)
def test_flower_sees_only_bounded_requests_of_clients(peer: Peer | None, length: bytes | None, status: int) -> None:
    said: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    async def inside(*_: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    scope = {
        "type": "http",
        "path": "/v1/fleet/pull-messages",
        "method": "POST",
        "headers": [] if length is None else [(b"content-length", length)],
        "state": {} if peer is None else {PEER: peer},
    }
    asyncio.run(Gate(inside, CLIENTS)(scope, None, send))
    assert said[0]["status"] == status


def test_a_server_that_is_not_there_is_one_line_after_the_patience(certificates: Path, tmp_path: Path) -> None:
    recipe = recipe_of(client={"patience_seconds": 0.5})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(LinkError, match=rf"^the server at {address} could not be reached for 0\.5 seconds: .+$"):
            joining.federated_join(recipe, "client-a", address, certificates / "client-a", tmp_path / "run")


def test_a_party_is_refused_before_anything_is_dialed_for_a_wrong_name_or_recipe(
    certificates: Path, tmp_path: Path
) -> None:
    def join(recipe: Recipe, name: str, holder: str = "client-a") -> None:
        joining.federated_join(recipe, name, "localhost:1", certificates / holder, tmp_path / "run")

    with pytest.raises(
        RecipeError, match=r"'client-q' is not among the recipe's clients; did you mean 'client-[ab]'\?"
    ):
        join(recipe_of(), "client-q")
    with pytest.raises(RecipeError, match="--name client-b: the certificate is client-a's"):
        join(recipe_of(), "client-b")
    split = parse_recipe({"data": {"name": "digits"}, "network": {"name": "mlp"}, "cut": {"at": "hidden1"}})
    for refused in (
        lambda: join(split, "client-a"),
        lambda: serving.federated_serve(split, "localhost:0", certificates / "localhost", tmp_path / "run"),
    ):
        with pytest.raises(RecipeError, match=r"parties\.mode is 'relay'; expected 'federated'"):
            refused()
    assert not (tmp_path / "run").exists()


# The processes beside a party's own.


def _gone(pid: int) -> bool:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_a_superlink_is_kept_at_home_and_does_not_outlive_the_one_who_started_it(
    certificates: Path, number: signal.Signals
) -> None:
    start = (
        "import sys, time; from pathlib import Path; from milkglass.training.flower_processes import superlink\n"
        "with superlink('localhost:0', Path(sys.argv[1]), ['client-a']) as link:\n"
        "    link.start(); print(link.pid, flush=True); time.sleep(600)"
    )
    words = [sys.executable, "-c", start, str(certificates / "localhost")]
    careless = os.environ | {"FLWR_TELEMETRY_ENABLED": "1", "FLWR_INTERNAL_GRPC_CONTROL_API": "1"}
    started = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=careless)
    assert started.stdout is not None
    with started, started.stdout:
        child = int(started.stdout.readline())
        surroundings = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        assert {each for each in surroundings if each.startswith(b"FLWR_") and not each.startswith(b"FLWR_HOME=")} == {
            b"FLWR_TELEMETRY_ENABLED=0",
            b"FLWR_DISABLE_UPDATE_CHECK=1",
            b"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
        }
        started.send_signal(number)
        assert started.wait(30) != 0
    assert _gone(child)


def test_a_process_that_cannot_start_says_why_in_one_line(certificates: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            processes.superlink(address, certificates / "localhost", list(CLIENTS)) as link,
            pytest.raises(LinkError, match=rf"^the superlink ended: .*cannot listen at {address}[^\n]*$"),
        ):
            link.start()


# Whose code runs.


def _hostile_bundle(marker: Path) -> bytes:
    """An app that leaves a marker as soon as it is imported, and as soon as it is called."""
    config = processes._FAB_CONFIG.replace("milkglass.training.federated_serve:none", "evil.app:server").replace(
        "milkglass.training.federated_join:none", "evil.app:client"
    )
    code = f"open({str(marker)!r}, 'w').close()\nfrom flwr.clientapp import ClientApp\nclient = ClientApp()\n"
    files = {"pyproject.toml": config, "evil/__init__.py": code, "evil/app.py": code}
    listing = "".join(
        f"{name},{hashlib.sha256(text.encode()).hexdigest()},{8 * len(text)}\n" for name, text in files.items()
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in {**files, ".info/CONTENT": listing}.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def test_the_bundle_that_flower_must_have_is_the_same_everywhere_and_holds_no_code() -> None:
    with zipfile.ZipFile(io.BytesIO(processes.stub_bundle())) as archive:
        assert archive.namelist() == ["pyproject.toml"]
    assert processes.stub_hash() == hashlib.sha256(processes.stub_bundle()).hexdigest()
    tasks.check_bundle(processes.stub_bundle())
    with pytest.raises(LinkError, match=r"the server sent code .* nothing of it was run"):
        tasks.check_bundle(processes.stub_bundle() + b" ")


def _anything(content: bytes) -> None:
    """In place of `check_bundle`."""
    del content


def _never(*_: Any) -> Any:
    raise AssertionError("the app was asked")


def _record(marker: Path) -> str:
    """Runs in another process: what Flower's own client does with the bundle; whether the marker came."""
    return (
        "import sys, pathlib; from flwr.cli.install import install_from_fab;"
        "from flwr.clientapp.utils import get_load_client_app_fn; import hashlib;"
        "bundle = pathlib.Path(sys.argv[1]).read_bytes(); install_from_fab(bundle, skip_prompt=True);"
        "get_load_client_app_fn('', None, True)('milkglass/rounds', '1.0.0', hashlib.sha256(bundle).hexdigest());"
        f"assert pathlib.Path({str(marker)!r}).exists()"
    )


def _join_believing(told: Connection, folder: Path, name: str, tls: Path, address: str) -> None:
    """A client that takes any bundle; its answer shows whose code made it."""
    from milkglass.recipe import load_recipe

    recipe = load_recipe(folder / f"{name}.toml")
    vars(joining)["check_bundle"] = _anything

    def own(message: Any, context: Any) -> Any:
        del context
        return flower.Message(tasks.saying(made_by="the client's own code"), reply_to=message)

    def work() -> dict[str, Any]:
        joining.join_rounds(recipe, name, address, tls, own)
        return {}

    _tell(told, work)


def _join(told: Connection, folder: Path, name: str, tls: Path, address: str, key: Path | None = None) -> None:
    from milkglass.recipe import load_recipe

    recipe = load_recipe(folder / f"{name}.toml")
    _tell(told, lambda: joining.federated_join(recipe, name, address, tls, folder / name, key=key))


def _serve(told: Connection, folder: Path, name: str, tls: Path) -> None:
    from milkglass.recipe import load_recipe

    recipe = load_recipe(folder / f"{name}.toml")
    _tell(
        told,
        lambda: serving.federated_serve(
            recipe, "localhost:0", tls, folder / name, ready=lambda port: told.send(("port", port))
        ),
    )


@pytest.mark.slow
def test_a_client_runs_no_code_that_its_server_sends_and_answers_no_other_recipe(
    certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, bundle = tmp_path / "evil ran", tmp_path / "bundle"
    bundle.write_bytes(_hostile_bundle(marker))
    control = [sys.executable, "-c", _record(marker), str(bundle)]
    subprocess.run(control, check=True, env=os.environ | {"FLWR_HOME": str(tmp_path / "home")}, cwd=tmp_path)
    marker.unlink()
    (tmp_path / "hostile_superlink.py").write_text(
        "from pathlib import Path\nfrom hashlib import sha256\nfrom milkglass.training import flower_children\n"
        f"bundle = Path({str(bundle)!r}).read_bytes()\nflower_children.stub_bundle = lambda: bundle\n"
        "flower_children.stub_hash = lambda: sha256(bundle).hexdigest()\nflower_children.main()\n"
    )
    monkeypatch.setattr(serving, "check_bundle", _anything)
    monkeypatch.setattr(processes, "_CHILDREN", "hostile_superlink")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    recipe = recipe_of(3)
    for name in CLIENTS[:2]:
        (tmp_path / f"{name}.toml").write_text(recipe.to_toml())
    (tmp_path / "client-c.toml").write_text(recipe_of(3, training={"epochs": 1, "batch_size": 8}).to_toml())
    with processes.superlink("localhost:0", certificates / "localhost", list(CLIENTS)) as link:
        said = link.start()
        works = {"client-a": _join, "client-b": _join_believing, "client-c": _join_believing}
        parties = [
            Party(work, tmp_path, name, certificates / name, f"localhost:{said['port']}")
            for name, work in works.items()
        ]
        wary, believing, other = parties
        try:
            with serving._grid(said["private"], link, recipe, lambda *_, **__: None) as (grid, _):
                shown: list[Any] = []
                while not shown or wary.alive or other.alive:
                    shown = list(grid.get_nodes())
                    assert {node.name for node in shown} <= {"client-b"}
                    time.sleep(0.2)
                assert "the server sent code" in wary.failure()
                difference = "recipe: training.batch_size is 8 here and 16 there"
                assert other.failure() == f"the server has another recipe: {difference}"
                asked = flower.Message(tasks.saying(), shown[0].node_id, "train")
                [answer] = grid.send_and_receive([asked], timeout=60)
                assert tasks.words(answer, "made_by") == "the client's own code"
                grid.say_goodbye("a reason")
                assert believing.failure() == "the server ended the run: a reason"
        finally:
            for party in parties:
                party.end()
    assert not marker.exists()
    assert not (tmp_path / "client-a" / "journal").exists()


# What a client answers.


def _ledger(recipe: Recipe, path: Path, network: torch.nn.Module) -> Ledger:
    folder = RunFolder.resume(path, recipe, "records")
    return Ledger(recipe, folder, network, Silence(), 3)


def test_an_epoch_is_answered_for_one_set_of_weights_alone_also_after_a_restart(tmp_path: Path) -> None:
    recipe = recipe_of(training={"epochs": 4, "batch_size": 16}, federated={"local_epochs": 2})
    network = first_network(recipe, (64,), 10)
    first = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    ledger = _ledger(recipe, tmp_path / "run", network)
    for epoch in (1, 2):  # a round of two epochs is one line
        ledger.on_batch(epoch, RESULT)
    assert ledger.rounds == 1
    ledger.asked()
    ledger.on_batch(1, RESULT)  # asked again, as by a server that goes on from its checkpoint
    with torch.no_grad():
        next(network.parameters()).add_(1e-6)
    again = _ledger(recipe, tmp_path / "run", network)
    with pytest.raises(EgressError, match="the round from epoch 1 again, and from other weights"):
        again.on_batch(1, RESULT)
    again.asked()
    again.on_batch(3, RESULT)
    network.load_state_dict(first)
    again.asked()
    again.on_batch(1, RESULT)
    again.asked()
    with pytest.raises(EgressError, match="from epoch 3 again"):
        again.on_batch(3, RESULT)


def test_an_app_that_makes_an_answer_of_a_refusal_is_not_heard(tmp_path: Path) -> None:
    recipe = recipe_of(training={"epochs": 2, "batch_size": 16})
    ledger = _ledger(recipe, tmp_path / "run", first_network(recipe, (64,), 10))

    def swallowing(message: Any, context: Any) -> str:
        del message, context
        with contextlib.suppress(EgressError):
            ledger.on_batch(3, RESULT)
        return "an answer"

    train_message = SimpleNamespace(metadata=SimpleNamespace(message_type="train"))
    with pytest.raises(EgressError, match="a round from epoch 3"):
        joining._guarded(swallowing, ledger)(train_message, None)


@pytest.mark.parametrize("epoch", [0, 2, 5, 7])
def test_an_epoch_that_begins_no_round_of_the_recipe_is_not_answered(tmp_path: Path, epoch: int) -> None:
    recipe = recipe_of(training={"epochs": 4, "batch_size": 16}, federated={"local_epochs": 2})
    ledger = _ledger(recipe, tmp_path / "run", first_network(recipe, (64,), 10))
    with pytest.raises(EgressError, match=rf"a round from epoch {epoch}; the recipe has 4 epochs, 2 in a round"):
        ledger.on_batch(epoch, RESULT)
    assert ledger.rounds == 0


def test_tests_are_counted_also_over_a_restart(tmp_path: Path) -> None:
    recipe = recipe_of(training={"epochs": 2, "batch_size": 16})
    network = first_network(recipe, (64,), 10)
    for _ in range(3):
        _ledger(recipe, tmp_path / "run", network).test()
    with pytest.raises(EgressError, match="test 4; a run of this recipe has no more than 3"):
        _ledger(recipe, tmp_path / "run", network).test()
    (tmp_path / "run" / "journal" / "answered.json").write_text('{"tests": "many"}')
    with pytest.raises(RunError, match="damaged"):
        _ledger(recipe, tmp_path / "run", network)


def test_a_message_that_breaks_off_is_no_answer_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = flower.httpx.Request("POST", "http://127.0.0.1/v1/runtime/pull-object")
    logged: list[str] = []

    def gives_up(client: Any) -> None:
        del client
        raise flower.httpx.HTTPStatusError("401", request=asked, response=flower.httpx.Response(401, request=asked))

    class Alive:
        alive, secret = True, bytes(32)

    monkeypatch.setattr(flower, "pull_task_input", gives_up)
    monkeypatch.setattr(joining, "kept_alive", contextlib.nullcontext)
    node: Any = Alive()
    answering = joining._Answering(
        recipe_of(), "client-a", node, "127.0.0.1:1", _never, lambda event, **_: logged.append(event)
    )
    answering._answer("token")
    answering.close()
    assert logged == ["a message did not come whole"]
    assert answering.answered == 0


# Whole runs.


@pytest.mark.slow
def test_between_machines_the_rounds_end_in_the_weights_of_one_process(certificates: Path, tmp_path: Path) -> None:
    recipe = recipe_of()
    train(recipe, tmp_path / "one")
    expected = load_file(tmp_path / "one" / NETWORK)
    for name in ("server", *CLIENTS[:2]):
        (tmp_path / f"{name}.toml").write_text(recipe.to_toml())
    parties = [Party(_serve, tmp_path, "server", certificates / "localhost")]
    try:
        address = f"localhost:{parties[0].port()}"
        for name in CLIENTS[:2]:
            key = tmp_path / f"{name}.key"  # the one that the rehearsal in one process derives from the seed
            key.write_bytes(hashlib.sha256(f"milkglass rehearsal {recipe.seed} {name}".encode()).digest())
            parties.append(Party(_join, tmp_path, name, certificates / name, address, key))
        summary, *joined = [party.result() for party in parties]
    finally:
        for party in parties:
            party.end()
    for name in ("server", *CLIENTS[:2]):
        found = load_file(tmp_path / name / NETWORK)
        assert found.keys() == expected.keys()
        for layer, tensor in found.items():
            torch.testing.assert_close(tensor, expected[layer], rtol=1e-6, atol=1e-7, msg=f"{name}: {layer}")
    one = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert (summary["accuracy"], summary["rounds"]) == (one["accuracy"], 1)
    counted = summary["http_bytes"]["by_client"]
    for each in joined:
        sent, received = counted[each["party"]]
        assert sent > summary["bytes_by_client"][each["party"]][0]
        # the two ends count the same but for request lines, and for what crosses as the client hangs up
        assert each["bytes_sent"] == pytest.approx(sent, rel=0.2)
        assert each["bytes_received"] == pytest.approx(received, rel=0.2)


def _join_and_stall(told: Connection, folder: Path, name: str, tls: Path, address: str, round_: int) -> None:
    """A client that says so and stalls, when it is to train in that round."""
    own_round = Member.round

    def stalling(member: Member, weights: Any, epoch: int, on_batch: Any = None) -> Any:
        if epoch == round_:
            (folder / f"{name} stalls").touch()
            time.sleep(600)
        return own_round(member, weights, epoch, on_batch)

    Member.round = stalling  # type: ignore[assignment, method-assign]
    _join(told, folder, name, tls, address)


def _kill_when_stalled(party: Party, folder: Path) -> None:
    end = time.monotonic() + 120
    while not (folder / f"{party.name} stalls").exists() and time.monotonic() < end:
        time.sleep(0.1)
    party.kill()


@pytest.mark.slow
def test_a_round_goes_on_without_the_killed_while_enough_are_left_and_then_ends_in_one_line(
    certificates: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(training={"epochs": 2, "batch_size": 16}, federated={"least_clients": 1})
    for name in ("server", *CLIENTS[:2]):
        (tmp_path / f"{name}.toml").write_text(recipe.to_toml())
    parties = [Party(_serve, tmp_path, "server", certificates / "localhost")]
    try:
        address = f"localhost:{parties[0].port()}"
        for name, round_ in (("client-a", 2), ("client-b", 1)):
            parties.append(Party(_join_and_stall, tmp_path, name, certificates / name, address, round_))
        server, second, first = parties
        _kill_when_stalled(first, tmp_path)
        _kill_when_stalled(second, tmp_path)
        assert "round 2: without client-a (" in (failure := server.failure())
        assert "0 of 2 clients are left, and federated.least_clients is 1" in failure
    finally:
        for party in parties:
            party.end()
    [line] = [json.loads(text) for text in (tmp_path / "server" / "metrics.jsonl").read_text().splitlines()]
    assert (line["clients"], list(line["missing"])) == (1, ["client-b"])
    assert not (tmp_path / "server" / "summary.json").exists()
