"""Inference across the cut: the same answers as in one process, fresh noise every time, and nobody else's answers."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import Tensor

from milkglass.certificates import certs, load_credentials
from milkglass.cli import main
from milkglass.errors import DataError, LinkError, MessageError, RecipeError, RunError
from milkglass.messages import Message
from milkglass.randomness import Source, write_key
from milkglass.recipe import Recipe
from milkglass.runs import RunFolder
from milkglass.training.answer import Answering, answering
from milkglass.training.inputs import form_in, read_input
from milkglass.training.join import join
from milkglass.training.predict import predict
from milkglass.training.serve import Form, serve
from milkglass.training.setup import Shapes, crossing_shapes
from milkglass.training.shares import deal_records
from milkglass.training.split import set_up, train
from milkglass.transports.local import LocalTransport
from tests.answered import while_answering
from tests.helpers import small_recipe

RUN: Final = 77
U_SHAPED: Final[dict[str, Any]] = {"cut": {"at": "hidden1", "back_at": "hidden2"}}
NOISE: Final[dict[str, Any]] = {"defense": {"noise": {"sigma": 0.5}}}
EIGHT: Final = tuple(f"clinic-{number}" for number in range(8))


def _recipe(**changes: Any) -> Recipe:
    waits: dict[str, Any] = {"client": {"patience_seconds": 20.0, "answer_seconds": 20.0}}
    return small_recipe(**(waits | changes))


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki") / "kit"
    certs(folder, "localhost", ["client", "stranger", *EIGHT])
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process: one client, labels sent, no defense."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(_recipe(), run)
    return run


def _parted(whole: Path, folder: Path, name: str = "client", run: int = RUN) -> tuple[Path, Path]:
    """The folders that the client and the server of this run would have between machines."""
    client, server = folder / name, folder / "server"
    for part, files in ((client, ("bottom", "head")), (server, ("top",))):
        part.mkdir(parents=True, exist_ok=True)
        for file in ("recipe.toml", "records.json", *(f"{stage}.safetensors" for stage in files)):
            if (whole / file).exists():
                shutil.copy(whole / file, part / file)
        (part / "run.json").write_text(json.dumps({"run": run}))
        (part / "summary.json").write_text(json.dumps({"party": part.name}))
    return client, server


def _predict(run: Path, given: Path, out: Path, **more: Any) -> tuple[dict[str, Any], str]:
    """(what predictions.json holds, what the file of all probabilities holds)."""
    summary = predict(run, given, out=out, **more)
    return summary, out.read_text()


def _test_file(folder: Path, recipe: Recipe, *, labels: bool = True) -> Path:
    """The recipe's test records, as a file of pictures (N, H, W, C)."""
    test = deal_records(recipe).test
    path = folder / "test.npz"
    images = test.x.permute(0, 2, 3, 1).numpy()
    if labels:
        np.savez(path, images=images, labels=test.y.numpy())
    else:
        np.savez(path, images=images)
    return path


def _logits(setup_of: Path, x: Tensor) -> Tensor:
    """What one network without any cut says of records."""
    folder = RunFolder.open_finished(setup_of)
    setup = set_up(folder.recipe)
    setup.client.stage.load_state_dict(folder.read_tensors("bottom.safetensors"))
    setup.server.stage.load_state_dict(folder.read_tensors("top.safetensors"))
    parts = [setup.client.stage, setup.server.stage]
    if setup.client.head is not None:
        setup.client.head.load_state_dict(folder.read_tensors("head.safetensors"))
        parts.append(setup.client.head)
    z: Tensor = x
    with torch.no_grad():
        for part in parts:
            z = part.eval()(z)
    return z


# -- In one process


def test_a_whole_run_predicts_its_test_records_as_it_did_in_training(whole: Path, tmp_path: Path) -> None:
    recipe = RunFolder.open_finished(whole).recipe
    given = _test_file(tmp_path, recipe)
    summary, text = _predict(whole, given, tmp_path / "p.csv")
    trained = json.loads((whole / "summary.json").read_text())
    assert summary["accuracy"] == trained["accuracy"]
    assert summary["records"] == sum(summary["classes"]) == 40
    assert json.loads((whole / "predictions.json").read_text()) == summary
    test = deal_records(recipe).test
    expected = _logits(whole, test.x)
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["record", "class", *(f"p{k}" for k in range(10))]
    assert [int(row[0]) for row in rows[1:]] == list(range(40))
    assert [int(row[1]) for row in rows[1:]] == expected.argmax(dim=1).tolist()
    found = torch.tensor([[float(p) for p in row[2:]] for row in rows[1:]], dtype=torch.float64)
    torch.testing.assert_close(found, expected.double().softmax(dim=1), rtol=1e-8, atol=1e-12)
    assert [row["class"] for row in summary["first"]] == expected.argmax(dim=1)[:10].tolist()
    assert [row["label"] for row in summary["first"]] == test.y[:10].tolist()


def test_json_lines_hold_what_the_table_holds(whole: Path, tmp_path: Path) -> None:
    given = _test_file(tmp_path, RunFolder.open_finished(whole).recipe, labels=False)
    summary, text = _predict(whole, given, tmp_path / "p.jsonl")
    _, table = _predict(whole, given, tmp_path / "p.csv")
    lines = [json.loads(line) for line in text.splitlines()]
    for line, row in zip(lines, list(csv.reader(io.StringIO(table)))[1:], strict=True):
        assert [line["record"], line["class"], *line["probabilities"]] == [*map(int, row[:2]), *map(float, row[2:])]
    assert summary["accuracy"] is None
    assert all("label" not in row for row in summary["first"])


def test_every_form_of_a_picture_array_gives_the_same(whole: Path, tmp_path: Path) -> None:
    x = deal_records(RunFolder.open_finished(whole).recipe).test.x  # (N, 1, 8, 8)
    forms = {
        "channels first": x.numpy(),
        "channels last": x.permute(0, 2, 3, 1).numpy(),
        "no channels": x[:, 0].numpy(),
        "float64": x[:, 0].double().numpy(),
    }
    texts = []
    for name, array in forms.items():
        np.save(tmp_path / f"{name}.npy", array)
        texts.append(_predict(whole, tmp_path / f"{name}.npy", tmp_path / "p.csv")[1])
    assert len(set(texts)) == 1
    pixels = (x[:, 0] * 255).round().to(torch.uint8)
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    np.save(tmp_path / "shares.npy", (pixels.float() / 255).numpy())
    pair = [_predict(whole, tmp_path / f"{name}.npy", tmp_path / "p.csv")[1] for name in ("pixels", "shares")]
    assert pair[0] == pair[1] != texts[0]


def test_batches_change_no_answer(whole: Path, tmp_path: Path) -> None:
    given = _test_file(tmp_path, RunFolder.open_finished(whole).recipe)
    found = [_predict(whole, given, tmp_path / "p.jsonl", batch=size) for size in (256, 40, 7, 1)]
    assert [each[0]["messages"] for each in found] == [2, 2, 12, 80]
    probabilities = [
        torch.tensor([json.loads(line)["probabilities"] for line in text.splitlines()]) for _, text in found
    ]
    for each in probabilities[1:]:
        torch.testing.assert_close(each, probabilities[0], rtol=1e-4, atol=1e-6)


# -- A table's scale


def _table(folder: Path, records: int = 240) -> tuple[Path, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A table whose columns differ a thousandfold in scale; (file, numbers (N, 3), codes (N, 2))."""
    generator = np.random.default_rng(0)
    numeric = generator.normal([1000.0, 0.0, -5.0], [300.0, 1.0, 0.01], (records, 3))
    categorical = generator.integers(0, [3, 4], (records, 2))
    labels = (numeric[:, 0] > 1000) ^ (categorical[:, 1] > 1)
    np.savez(folder / "table.npz", numeric=numeric, categorical=categorical, labels=labels.astype(np.int64))
    return folder / "table.npz", numeric, categorical


def test_a_table_is_scaled_as_in_training(tmp_path: Path) -> None:
    path, numeric, categorical = _table(tmp_path)
    recipe = _recipe(
        data={"path": str(path), "test_share": 0.2}, training={"epochs": 30, "batch_size": 16, "learning_rate": 1e-2}
    )
    trained = train(recipe, tmp_path / "run")
    deal = deal_records(recipe)
    rows = deal.test_indices.numpy()
    labels = deal.test.y.numpy()
    np.savez(tmp_path / "test.npz", numeric=numeric[rows], categorical=categorical[rows], labels=labels)
    summary, text = _predict(tmp_path / "run", tmp_path / "test.npz", tmp_path / "p.csv")
    assert summary["accuracy"] == trained["accuracy"] > 0.8
    expected = _logits(tmp_path / "run", deal.test.x).double().softmax(dim=1)
    found = torch.tensor([[float(p) for p in row[2:]] for row in list(csv.reader(io.StringIO(text)))[1:]])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)

    np.save(tmp_path / "test.npy", np.hstack([numeric[rows], categorical[rows]]))
    assert _predict(tmp_path / "run", tmp_path / "test.npy", tmp_path / "p.csv")[1] == text
    # another scale, of these very rows, would give another answer
    one = np.hstack([numeric[rows[:1]], categorical[rows[:1]]])
    np.save(tmp_path / "one.npy", one)
    first = _predict(tmp_path / "run", tmp_path / "one.npy", tmp_path / "p.csv")[1]
    torch.testing.assert_close(float(first.splitlines()[1].split(",")[2]), float(expected[0, 0]), rtol=1e-4, atol=1e-6)


def test_a_table_that_does_not_fit_the_runs_is_refused(tmp_path: Path) -> None:
    path, numeric, categorical = _table(tmp_path)
    train(_recipe(data={"path": str(path), "test_share": 0.2}, training={"epochs": 1}), tmp_path / "run")
    form = form_in(RunFolder.open_finished(tmp_path / "run"))
    for arrays, words in (
        ({"numeric": numeric, "categorical": categorical + 1}, "category code [34] in categorical column"),
        ({"numeric": numeric}, "3 numeric and 0 categorical columns; expected 3 and 2"),
        ({"images": np.zeros((5, 8, 8))}, "pictures; the run's records are a table"),
        ({"numeric": numeric, "categorical": categorical, "labels": np.full(240, 2)}, "label 2 is out of range"),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(DataError, match=words):
            read_input(tmp_path / "bad.npz", form)
    for array, words in (
        (numeric, r"expected \(records, 5\): 3 numeric columns"),
        (np.hstack([numeric, categorical + 0.5]), "no whole numbers"),
        (np.hstack([numeric * np.nan, categorical]), "NaN or infinity"),
        (np.hstack([numeric, categorical + np.inf]), "no whole numbers"),
    ):
        np.save(tmp_path / "bad.npy", array)
        with pytest.raises(DataError, match=words):
            read_input(tmp_path / "bad.npy", form)


# -- Noise


def test_two_predictions_of_the_same_records_send_different_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(**NOISE)
    write_key(tmp_path / "key")
    key = Source((tmp_path / "key").read_bytes())
    sent: list[Tensor] = []
    training = True
    plain_send = LocalTransport.send

    def send(self: LocalTransport, message: Message) -> None:
        assert training or message.kind == "queries"
        if message.kind == "queries":
            sent.append(message.tensors["activations"].clone())
        plain_send(self, message)

    monkeypatch.setattr(LocalTransport, "send", send)
    train(recipe, tmp_path / "run", key)
    last_in_training = sent[-1]
    sent.clear()
    training = False
    given = _test_file(tmp_path, recipe)
    for _ in range(2):
        assert predict(tmp_path / "run", given)["defense"] == "Gaussian noise, sigma 0.5"
    shutil.copytree(tmp_path / "run", tmp_path / "copied back")  # no counter in the folder is what tells them apart
    predict(tmp_path / "copied back", given)
    folder = RunFolder.open_finished(tmp_path / "run")
    stage = set_up(recipe).client.stage
    stage.load_state_dict(folder.read_tensors("bottom.safetensors"))
    with torch.no_grad():
        clean = stage.eval()(deal_records(recipe).test.x)
    noises = [(each - clean) / 0.5 for each in (*sent, last_in_training)]
    assert len(noises) == 4
    for number, noise in enumerate(noises):
        n = noise.numel()
        assert abs(float(noise.mean())) < 5 / n**0.5
        assert abs(float(noise.std()) - 1) < 5 / (2 * n) ** 0.5
        for other in noises[:number]:
            correlation = float(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1])
            assert abs(correlation) < 5 / n**0.5, "no noise is used twice"


# -- Between machines


@pytest.mark.parametrize(
    "changes",
    [{}, U_SHAPED, {"wire": {"compress": "int8"}}, {**U_SHAPED, "wire": {"compress": "fp16"}}],
    ids=["labels sent", "U-shaped", "int8", "U-shaped fp16"],
)
def test_the_network_gives_the_same_answers_as_one_process(changes: dict[str, Any], kit: Path, tmp_path: Path) -> None:
    recipe = _recipe(**changes)
    train(recipe, tmp_path / "run")
    given = _test_file(tmp_path, recipe)
    client, server = _parted(tmp_path / "run", tmp_path)
    own = load_credentials(kit / "client", "client")
    here = _predict(tmp_path / "run", given, tmp_path / "p.csv", batch=16)
    told: list[tuple[str, dict[str, Any]]] = []
    with while_answering(server, load_credentials(kit / "localhost", "server"), told) as address:
        there = [
            _predict(client, given, tmp_path / "q.csv", batch=16, address=address, credentials=own) for _ in range(2)
        ]
    for found in there:
        assert found[1] == here[1]
        same = ("accuracy", "classes", "messages", "first", "bytes_sent")
        assert {key: found[0][key] for key in same} == {key: here[0][key] for key in same}
    if not changes:
        expected = _logits(tmp_path / "run", deal_records(recipe).test.x).argmax(dim=1)
        assert [int(line.split(",")[1]) for line in here[1].splitlines()[1:]] == expected.tolist()
    assert not list(client.glob("predicting-*")), "nothing that was on its way stays"
    answered = json.loads((server / "answered.json").read_text())
    assert answered["clients"] == {"client": {"messages": 6, "records": 80}}
    assert (answered["messages"], answered["records"]) == (6, 80)
    assert [event for event, _ in told].count("connected") == 2


def test_what_serve_and_join_leave_can_predict(kit: Path, tmp_path: Path) -> None:
    recipe = _recipe(**U_SHAPED, training={"epochs": 12, "batch_size": 32, "learning_rate": 1e-2})
    theirs, own = load_credentials(kit / "localhost", "server"), load_credentials(kit / "client", "client")
    ports: list[int] = []
    there = threading.Event()

    def ready(port: int) -> None:
        ports.append(port)
        there.set()

    listen = (recipe, "localhost:0", theirs, tmp_path / "server")
    # a daemon: where joining fails it would serve, and be waited for, for ever
    serving = threading.Thread(target=serve, args=listen, kwargs={"ready": ready}, daemon=True)
    serving.start()
    assert there.wait(60)
    trained = join(recipe, "client", f"localhost:{ports[0]}", own, tmp_path / "client")
    serving.join(60)
    assert not serving.is_alive()
    given = _test_file(tmp_path, recipe)
    with while_answering(tmp_path / "server", theirs, []) as address:
        summary, _ = _predict(tmp_path / "client", given, tmp_path / "p.csv", address=address, credentials=own)
    assert summary["accuracy"] == trained["accuracy"] > 0.2
    with pytest.raises(RunError, match=r"top\.safetensors is missing: the server has it; --server"):
        predict(tmp_path / "client", given)


def test_eight_clients_at_once_get_their_own_answers(kit: Path, tmp_path: Path) -> None:
    recipe = _recipe(parties={"clients": list(EIGHT)}, training={"epochs": 1, "batch_size": 8})
    train(recipe, tmp_path / "run")
    x = deal_records(recipe).test.x
    for number, name in enumerate(EIGHT):
        np.save(tmp_path / f"{name}.npy", x[number * 5 : number * 5 + 5].repeat(8, 1, 1, 1).numpy())
        _parted(tmp_path / "run", tmp_path, name)
    here = [_predict(tmp_path / "run", tmp_path / f"{name}.npy", tmp_path / "p.csv", batch=4)[1] for name in EIGHT]
    assert len(set(here)) == 8

    def ask(name: str) -> str:
        own = load_credentials(kit / name, "client")
        start.wait(60)
        more = {"batch": 4, "address": address, "credentials": own}
        return _predict(tmp_path / name, tmp_path / f"{name}.npy", tmp_path / f"{name}.csv", **more)[1]

    start = threading.Barrier(8)
    told: list[tuple[str, dict[str, Any]]] = []
    with (
        while_answering(tmp_path / "server", load_credentials(kit / "localhost", "server"), told) as address,
        ThreadPoolExecutor(8) as pool,
    ):
        found = list(pool.map(ask, EIGHT))
    assert found == here
    answered = json.loads((tmp_path / "server" / "answered.json").read_text())
    assert answered["clients"] == {name: {"messages": 10, "records": 40} for name in EIGHT}


def test_strangers_are_refused(whole: Path, kit: Path, tmp_path: Path) -> None:
    given = _test_file(tmp_path, RunFolder.open_finished(whole).recipe)
    client, server = _parted(whole, tmp_path)
    stranger, _ = _parted(whole, tmp_path / "elsewhere", "stranger")
    text = (stranger / "recipe.toml").read_text().replace('"client"', '"stranger"')
    (stranger / "recipe.toml").write_text(text)
    certs(tmp_path / "other", "localhost", ["client"])
    own = load_credentials(kit / "client", "client")
    told: list[tuple[str, dict[str, Any]]] = []
    with while_answering(server, load_credentials(kit / "localhost", "server"), told) as address:
        with pytest.raises(LinkError, match="'stranger' is not among the clients of this run"):
            predict(stranger, given, address=address, credentials=load_credentials(kit / "stranger", "client"))
        other = load_credentials(tmp_path / "other" / "client", "client")
        with pytest.raises(LinkError, match="not one that this client trusts"):
            predict(client, given, address=address, credentials=other)
        with pytest.raises(LinkError, match="it is client's; the certificate is stranger's"):
            predict(client, given, address=address, credentials=load_credentials(kit / "stranger", "client"))
        assert predict(client, given, address=address, credentials=own)["records"] == 40
    # more than once where the refusal crosses the greeting, which gRPC calls an internal error: it dials again
    assert {values["why"] for event, values in told if event == "refused"} == {"unknown name"}


def test_another_runs_client_is_refused_by_the_handshake(whole: Path, kit: Path, tmp_path: Path) -> None:
    given = _test_file(tmp_path, RunFolder.open_finished(whole).recipe)
    _, server = _parted(whole, tmp_path)
    later, _ = _parted(whole, tmp_path / "later", run=RUN + 1)
    train(_recipe(seed=1), tmp_path / "another")
    other, _ = _parted(tmp_path / "another", tmp_path / "other")
    own = load_credentials(kit / "client", "client")
    with while_answering(server, load_credentials(kit / "localhost", "server"), []) as address:
        with pytest.raises(LinkError, match="it began another run than the one that is served here"):
            predict(later, given, address=address, credentials=own)
        with pytest.raises(LinkError, match="recipe: seed is 0 here and 1 there"):
            predict(other, given, address=address, credentials=own)
        with pytest.raises(RunError, match="trained in one process, so no server knows it"):
            predict(whole, given, address=address, credentials=own)


def test_a_finished_server_takes_nothing_but_questions(whole: Path) -> None:
    folder = RunFolder.open_finished(whole)
    shapes: Shapes = crossing_shapes(folder.recipe, (1, 8, 8), 10)
    service = Answering(folder.recipe, Form((1, 8, 8), 10, shapes), folder)
    z = torch.rand(4, 16)
    before = [tensor.clone() for tensor in service._server.stage.state_dict().values()]
    service.receive(Message("queries", "client", 0, {"activations": z}))
    for message in (
        Message("activations", "client", 0, {"activations": z, "labels": torch.zeros(4, dtype=torch.int64)}),
        Message("queries", "nobody", 0, {"activations": z}),
        Message("goodbye", "client", 0),
    ):
        with pytest.raises(MessageError, match="only clients' questions are answered"):
            service.receive(message)
    after = list(service._server.stage.state_dict().values())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert service.counts == {"client": {"messages": 1, "records": 4}}


def test_a_server_of_another_recipe_or_without_a_run_does_not_begin(whole: Path, tmp_path: Path) -> None:
    _, server = _parted(whole, tmp_path)

    def begin(recipe: Recipe, out: Path) -> None:
        asyncio.run(answering(recipe, "localhost:0", None, out, asyncio.Event()))

    with pytest.raises(RunError, match="belongs to another recipe: seed is 1 here and 0 there"):
        begin(_recipe(seed=1), server)
    with pytest.raises(RunError, match=r"run\.json is missing"):
        begin(_recipe(), whole)
    for parties, cut, words in (
        ({"clients": ["a", "b"], "mode": "vertical"}, {"at": "hidden1"}, "mode vertical"),
        ({"hops": ["middle"]}, {"at": "hidden1", "hops": ["hidden2"]}, "across several hops"),
    ):
        with pytest.raises(RecipeError, match=words):
            begin(_recipe(parties=parties, cut=cut), server)


# -- As a person types it


def _typed(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """(exit code, standard output, error stream) of a command."""
    code: object = 0
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code or 0
    printed = capsys.readouterr()
    assert isinstance(code, int)
    return code, printed.out, printed.err


def test_the_command_prints_what_its_file_holds(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = _test_file(tmp_path, RunFolder.open_finished(whole).recipe)
    code, out, err = _typed(capsys, "predict", whole, given, "--out", tmp_path / "p.csv", "--batch", "8")
    assert (code, err) == (0, "")
    summary = json.loads((whole / "predictions.json").read_text())
    for row in summary["first"]:
        assert [str(row["record"]), str(row["class"]), f"{row['probability']:.3f}", str(row["label"])] in [
            line.replace("│", " ").split() for line in out.splitlines()
        ]
    last = out.splitlines()[-1] if out.splitlines()[-1].startswith(str(whole)) else out[out.index(str(whole)) :]
    assert f"40 records: {summary['classes'][0]:,} of class 0" in last
    assert f"accuracy {summary['accuracy']:.3f}; defense none; {summary['bytes_sent']:,} bytes sent" in last
    assert f"{summary['bytes_received']:,} received in 10 messages" in last
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 41


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{whole}", "{folder}/none.npy"], "none.npy: no such file"),
        (["{whole}", "{folder}/text.npy"], "cannot be read, or no .npy file of plain numbers"),
        (["{whole}", "{folder}/objects.npy"], "cannot be read, or no .npy file of plain numbers"),
        (["{whole}", "{folder}/flat.npy"], "images of shape (4, 64); expected (records, height, width)"),
        (["{whole}", "{folder}/larger.npy"], "records of shape (1, 9, 9); expected (1, 8, 8), as the run's"),
        (["{whole}", "{folder}/bright.npy"], "expected [0, 1], or uint8"),
        (["{whole}", "{folder}/empty.npy"], "expected an array of records"),
        (["{whole}", "{folder}/labels.npz"], "no array `images`, `features` or `numeric`"),
        (["{whole}", "{folder}/good.txt"], "no such file"),
        (["{whole}", "{folder}/good.npy", "--batch", "0"], "--batch 0: expected 1 to 256"),
        (["{whole}", "{folder}/good.npy", "--batch", "257"], "--batch 257: expected 1 to 256"),
        (["{whole}", "{folder}/good.npy", "--out", "p.txt"], "expected a file named *.csv or *.jsonl"),
        (["{whole}", "{folder}/good.npy", "--plaintext"], "go with --server"),
        (["{whole}", "{folder}/good.npy", "--server", "localhost:1"], "--tls DIR: expected a folder"),
        (["{whole}", "{folder}/good.npy", "--server", "example.org:1", "--plaintext"], "only on loopback"),
        (["{whole}", "{folder}/good.npy", "--server", "localhost:1", "--plaintext"], "trained in one process"),
        (["{folder}", "{folder}/good.npy"], "not a run, or half-written"),
        (["{folder}/old", "{folder}/good.npy"], "records.json is missing: an older milkglass"),
        (["{folder}/other", "{folder}/good.npy"], "bottom.safetensors: does not fit the recipe's network"),
    ],
)
def test_bad_input_is_one_line(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    x = deal_records(RunFolder.open_finished(whole).recipe).test.x[:4].numpy()
    (tmp_path / "text.npy").write_text("not an array")
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "flat.npy", x.reshape(4, 64))
    np.save(tmp_path / "larger.npy", np.zeros((4, 9, 9), np.float32))
    np.save(tmp_path / "bright.npy", x * 255)
    np.save(tmp_path / "empty.npy", x[:0])
    np.save(tmp_path / "good.npy", x)
    np.savez(tmp_path / "labels.npz", labels=np.zeros(4, np.int64))
    for copy in ("old", "other"):
        shutil.copytree(whole, tmp_path / copy)
    (tmp_path / "old" / "records.json").unlink()
    shutil.copy(whole / "top.safetensors", tmp_path / "other" / "bottom.safetensors")
    code, out, err = _typed(capsys, "predict", *(word.format(whole=whole, folder=tmp_path) for word in words))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("milkglass: ")
    assert expected in err


def test_serve_predict_answers_until_it_is_stopped(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, server = _parted(whole, tmp_path)
    given = _test_file(tmp_path, RunFolder.open_finished(whole).recipe)
    words = ["serve", str(server / "recipe.toml"), "--listen", "localhost:0", "--plaintext", "--metrics", "0"]
    command = [sys.executable, "-m", "milkglass", *words, "--predict", "--out", str(server)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stderr is not None
            metrics, ready = json.loads(serving.stderr.readline()), json.loads(serving.stderr.readline())
            address = f"localhost:{ready['port']}"
            code, out, _ = _typed(capsys, "predict", client, given, "--server", address, "--plaintext")
            assert code == 0
            assert f"{json.loads((client / 'predictions.json').read_text())['accuracy']:.3f}" in out
            with grpc.insecure_channel(address) as channel:
                asked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
            assert asked.status == health_pb2.HealthCheckResponse.SERVING
            with urllib.request.urlopen(metrics["address"], timeout=60) as page:
                assert 'milkglass_messages_total{kind="queries",party="client"} 1.0' in page.read().decode()
        finally:
            serving.send_signal(signal.SIGTERM)
        out, err = serving.communicate(timeout=60)
    assert serving.returncode == 0, err
    assert out == "server: answered 1 messages; records by client: client 40\n"
    events = [json.loads(line)["event"] for line in err.splitlines()]
    assert events == ["connected", "disconnected"]
    assert json.loads((server / "answered.json").read_text())["records"] == 40
    code, _, err = _typed(capsys, *words, "--predict", "--resume", "--out", server)
    assert code == 2
    assert "--predict: goes without --key, --resume and --onward" in err
